"""The identity A = I: images that are noisy and nothing else (denoising)."""

import torch
from torch import Tensor

from .base import Operator
from .linalg import Factors, Spectrum, diagonal

__all__ = ["Identity"]


class Identity(Operator):
    """A x = x. Text form: "identity"."""

    form = "identity"
    gram = 1.0

    def _A(self, x: Tensor) -> Tensor:
        return x

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return y

    def _A_dagger(self, y: Tensor) -> Tensor:
        return y

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return (z + gamma * y) / (1 + gamma)

    def _structured(self, x: Tensor) -> Spectrum:
        found = super()._structured(x)  # None for images too large for factors
        return found or diagonal(x.new_ones(1, 1, *x.shape[-2:]), lambda y: y)

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        channels, height, width = (torch.eye(n, dtype=torch.float64) for n in shape)
        return channels, height, width
