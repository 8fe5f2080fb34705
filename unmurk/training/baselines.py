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
    """Learn from clean images (N, C, H, W), given in place of measurements.

    >>> from unmurk.problem import Problem
    >>> shape, x = (1, 8, 8), torch.zeros(4, 1, 8, 8)
    >>> learner = Clean().build(x, Problem("identity", 0.1), shape)
    >>> losses = learner.losses(x, torch.arange(4), 0.0, torch.Generator().manual_seed(0))
    >>> sorted(losses)
    ['flow', 'mean', 'prior']
    """

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
    """Learn from the pseudo-inverse of corrupted images, as if they were clean.

    >>> from unmurk.problem import Problem
    >>> y, problem = torch.ones(4, 1, 4, 4), Problem("sr:average,factor=2", 0.1)
    >>> clean, noisy = (cls().build(y, problem, (1, 8, 8)) for cls in (Clean, Noisy))
    >>> index, x = torch.arange(4), torch.ones(4, 1, 8, 8)  # x is the pseudo-inverse of y
    >>> one = clean.losses(x, index, 0.0, torch.Generator().manual_seed(0))
    >>> other = noisy.losses(y, index, 0.0, torch.Generator().manual_seed(0))
    >>> one["prior"].item() == other["prior"].item()
    True
    """

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step on the pseudo-inverse of the measurements."""
        x = self.bind(index, y.device).A_dagger(y)
        return super().losses(x, index, progress, generator)
