"""The floor: corrupted images taken as if they were clean.

Training on A_dagger(y) with the losses of `clean`: what everybody gets who does nothing about the
corruption. For A = I the prior learns the noisy images' distribution exactly, noise included.
"""

import torch
from torch import Tensor

from .baselines import Clean

__all__ = ["Noisy"]


class Noisy(Clean):
    """The method on corrupted images (N, ...), brought to image shape by the pseudo-inverse."""

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a step, on the pseudo-inverse of the measurements."""
        x = self.bind(rows, y).A_dagger(y)
        return super().losses(x, rows, progress, generator)
