r"""Two baselines: learning from clean images, and from corrupted images taken as clean.

`Clean` shows the best that the same networks and budget can reach. Its prior follows denoising
score matching on clean images. The flow of its posterior is fitted by maximum likelihood to pairs
of an image and a fresh corruption of it,

.. math:: \min_q\; -E_{x,\, y' \sim p(y \mid x)} \log q(x \mid y') .

`Noisy` does the same with :math:`A^+ y` in place of clean images: the result of ignoring the
corruption. For :math:`A = I` its prior learns the distribution of the noisy images exactly, noise
included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .learner import Learner
from .losses import denoising, forward_kl, levels

__all__ = ["Clean", "Noisy"]


@dataclass(eq=False, kw_only=True)
class Clean(Learner):
    """Learn from clean images (N, C, H, W), given in place of measurements."""

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step; y holds clean images."""
        problem = self.bind(index, y.device)
        flow, mean = forward_kl(self.posterior, y, problem, generator)
        prior = denoising(self.prior, y, levels(len(y), generator), generator)
        return {"prior": prior, "flow": flow, "mean": mean}


@dataclass(eq=False, kw_only=True)
class Noisy(Clean):
    """Learn from the pseudo-inverse of corrupted images, as if they were clean."""

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step on the pseudo-inverse of the measurements."""
        x = self.bind(index, y.device).A_dagger(y)
        return super().losses(x, index, progress, generator)
