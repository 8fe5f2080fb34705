"""Super-resolution: A averages blocks of f x f pixels.

The rows of A have disjoint support, so A A^T = I / f^2 and everything is in closed form:

    A^T y = up(y) / f^2,    A^+ y = up(y)           (up repeats every pixel f x f times)
    prox_l2(z, y, gamma) = z + gamma / (1 + gamma / f^2) A^T (y - A z)
"""

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .base import Operator, size_text

__all__ = ["AverageDown"]


class AverageDown(Operator):
    """Block average to a smaller image. Text form: "sr:average,factor=4".

    Args:
        factor: Side f of the blocks in pixels, >= 1; it must divide height and width.
    """

    form = "sr:average"
    options = {"factor": int}

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise InputError(f"sr:average: factor must be >= 1, got {factor}")
        self.factor = int(factor)

    def at(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Self, after a look at whether the factor divides the image."""
        self._check(tuple(shape))
        return self

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H / f, W / f)."""
        self._check(tuple(x_shape))
        channels, height, width = x_shape[-3:]
        return channels, height // self.factor, width // self.factor

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, f H, f W)."""
        channels, height, width = y_shape[-3:]
        return channels, height * self.factor, width * self.factor

    def _check(self, shape: tuple[int, ...]) -> None:
        if any(n % self.factor for n in shape[-2:]):
            raise InputError(
                f"sr:average: the factor {self.factor} does not divide the image of "
                f"{size_text(shape[-2:])}; crop the image or choose another factor"
            )

    def _up(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)

    def _A(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self._up(y) / self.factor**2

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self._up(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        weight = gamma / self.factor**2
        return z + weight / (1 + weight) * self._up(y - self._A(z))
