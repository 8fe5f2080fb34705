"""The ceiling: prior and posterior learnt from clean images, as if there were any.

The prior follows denoising score matching on the images; the posterior's flow is fitted by maximum
likelihood to pairs of an image and a fresh corruption of it (forward KL). Every comparison shows
it as the best that the same networks and budget can reach.
"""

import torch
from torch import Tensor

from .learner import Pair
from .losses import denoising, forward_kl, levels

__all__ = ["Clean"]


class Clean(Pair):
    """The method on clean images (N, C, H, W), given in place of measurements."""

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a step; the measurements given are the images themselves."""
        flow, mean = forward_kl(self.posterior, y, self.bind(rows, y), generator)
        prior = denoising(self.prior, y, levels(len(y), generator), generator)
        return {"prior": prior, "flow": flow, "mean": mean}
