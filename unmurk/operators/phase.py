"""Phase retrieval: of the Fourier transform of the image only the magnitude is seen.

    y = |F P x|

P puts black around the image, p = int(oversample n / 8) rows or columns on each side of n, and F
is the orthonormal two-dimensional Fourier transform of every channel, with the frequency 0 in the
middle. These are the conventions of Chung et al. (2023), arXiv 2209.14687 (DPS), which later work
shares: for n = 256 and oversample = 2, sides of 384, so that 2.25 numbers are seen for each pixel;
oversample = 4 doubles the sides.

Images that are turned by 180 degrees, or moved within black borders, have the same y. So which one
comes out is luck: take several samples and keep that of the smallest residual.

Where a magnitude is 0 its gradient is taken to be 0.
"""

from bisect import bisect_left
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .base import NonlinearOperator, size_text

__all__ = ["FourierMagnitude"]


class FourierMagnitude(NonlinearOperator):
    """The magnitude of the Fourier transform. Text form: "phase:fourier,oversample=2".

    Args:
        oversample: How far black surrounds the image: oversample / 8 of its side on every side,
            >= 0.
    """

    form = "phase:fourier"
    pictorial = False
    options = {"oversample": float}

    def __init__(self, oversample: float = 2.0) -> None:
        if not 0 <= oversample < float("inf"):
            raise InputError(f"phase:fourier: oversample must be >= 0, got {oversample}")
        self.oversample = float(oversample)

    def _pad(self, side: int) -> int:
        return int(self.oversample * side / 8)

    def _long(self, side: int) -> int:
        return side + 2 * self._pad(side)

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H + 2 p, W + 2 q)."""
        channels, height, width = x_shape[-3:]
        return channels, self._long(height), self._long(width)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W). Raises InputError if no image has a measurement of this size."""
        found = [bisect_left(range(side), side, key=self._long) for side in y_shape[-2:]]
        if [self._long(side) for side in found] != list(y_shape[-2:]):
            raise InputError(
                f"phase:fourier: with oversample={self.oversample:g} no image has a measurement "
                f"of size {size_text(y_shape[-2:])}"
            )
        return y_shape[-3], *found

    def _A(self, x: Tensor) -> Tensor:
        down, across = (self._pad(side) for side in x.shape[-2:])
        wide = F.pad(x, (across, across, down, down))
        return torch.fft.fftshift(torch.fft.fft2(wide, norm="ortho"), dim=(-2, -1)).abs()
