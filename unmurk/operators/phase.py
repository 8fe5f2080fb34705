r"""Phase retrieval: only the magnitude of the Fourier transform is measured.

.. math:: y = |F P x|

P surrounds the image with black, p = int(oversample n / 8) rows or columns on each side of n. F is
the orthonormal two-dimensional Fourier transform of every channel, with frequency 0 in the middle.
These are the conventions of Chung et al. (2023), arXiv 2209.14687 (DPS), which later work shares.
For n = 256 and oversample = 2 the sides are 384, so there are 2.25 measurements for each pixel;
oversample = 4 doubles the sides.

Images that are rotated by 180 degrees, or shifted within black borders, have the same y; see
`symmetries`. The prior has to choose among them, which it does where a solver runs with restarts
(`solvers.restoration.most_likely`).

Where a magnitude is 0, its gradient is defined as 0.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Option, Real, check_tables
from ..errors import InputError, size_text
from .base import NonlinearOperator, Operator

__all__ = ["FourierMagnitude"]

LEAVING = 1e-3  # of an image's power that may leave the frame when it is shifted


class FourierMagnitude(NonlinearOperator):
    """Measure the magnitude of the Fourier transform. Text form: "phase:fourier,oversample=2".

    Args:
        oversample: Width of the black border: oversample / 8 of the image's side on every side,
            a number from 0 to 32.

    Raises:
        InputError: The option is out of its bounds; from `bind` and A, the spectrum is above the
            limit of `bounds.TABLES`.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("phase:fourier,oversample=2")
    >>> A.A(torch.ones(1, 1, 8, 8)).shape, A.linear
    (torch.Size([1, 1, 12, 12]), False)
    """

    ambiguous = True
    form = "phase:fourier"
    extent = "a frequency is a sum over all pixels of the image"
    pictorial = False
    options: ClassVar[dict[str, Option]] = {"oversample": Real(0, 32)}
    oversample: float

    def __init__(self, oversample: float = 2.0) -> None:
        self._take_options(oversample=oversample)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Check the memory that the padded image takes, and return self."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        channels, height, width = self.y_shape(shape)
        check_tables(
            self.spec,
            f"the spectrum of an image of {size_text(shape[-2:])}",
            16.0 * channels * height * width,
            "lower oversample, or use smaller images",
        )

    def _pad(self, side: int) -> int:
        return int(self.oversample * side / 8)

    def _long(self, side: int) -> int:
        return side + 2 * self._pad(side)

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (C, H + 2 p, W + 2 q)."""
        channels, height, width = x_shape[-3:]
        return channels, self._long(height), self._long(width)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (C, H, W). Raises InputError if no image has a measurement of this size."""
        found = [bisect_left(range(side), side, key=self._long) for side in y_shape[-2:]]
        if [self._long(side) for side in found] != list(y_shape[-2:]):
            raise InputError(
                f"phase:fourier: with oversample={self.oversample:g} no image has a measurement"
                f" of size {size_text(y_shape[-2:])}: give the oversample it was made with"
            )
        return y_shape[-3], *found

    def _A(self, x: Tensor) -> Tensor:
        down, across = (self._pad(side) for side in x.shape[-2:])
        wide = F.pad(x, (across, across, down, down))
        return torch.fft.fftshift(torch.fft.fft2(wide, norm="ortho"), dim=(-2, -1)).abs()

    def symmetries(self, x: Tensor, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the map to the image and its rotation by 180 degrees, both aligned with `like`.

        See `Operator.symmetries`. The map shifts each image by whole pixels, so that its center of
        brightness is that of `like`. An image whose black borders are too narrow stays: one that
        would lose more than `LEAVING` of its power. What leaves the frame, noise included, enters
        at the opposite side.
        """
        shifts = [_alignment(image, like) for image in (x, x.flip(-2, -1))]

        def rotate_and_shift(images: Tensor) -> Tensor:
            return torch.stack(list(map(_shift, (images, images.flip(-2, -1)), shifts)))

        return rotate_and_shift


def _alignment(x: Tensor, like: Tensor) -> Tensor:
    """The shift of every image in rows and columns, (B, 2)."""
    by = (_center(like) - _center(x)).round().long()
    down, across = (
        torch.arange(n, device=x.device) + by[:, k : k + 1] for k, n in enumerate(x.shape[-2:])
    )
    height, width = x.shape[-2:]
    inside = ((down >= 0) & (down < height))[:, :, None] & ((across >= 0) & (across < width))[
        :, None
    ]
    power = x.square().sum(1)
    leaving = (power * ~inside).sum((1, 2)) > LEAVING * power.sum((1, 2))
    return torch.where(leaving[:, None], 0, by)


def _center(x: Tensor) -> Tensor:
    """Row and column of the center of brightness, (B, 2)."""
    light = x.clamp_min(0).sum(1)
    full = light.sum((1, 2)).clamp_min(torch.finfo(x.dtype).tiny)
    down, across = (torch.arange(n, dtype=x.dtype, device=x.device) for n in x.shape[-2:])
    return torch.stack([light.sum(2) @ down, light.sum(1) @ across], 1) / full[:, None]


def _shift(x: Tensor, by: Tensor) -> Tensor:
    """Shift every image cyclically by its own number of rows and columns (B, 2)."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device) - by[:, :1]) % height
    columns = (torch.arange(width, device=x.device) - by[:, 1:]) % width
    number = torch.arange(len(x), device=x.device)[:, None, None]
    return x.movedim(1, -1)[number, rows[:, :, None], columns[:, None]].movedim(-1, 1)
