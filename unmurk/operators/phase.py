"""Phase retrieval: of the Fourier transform of the image only the magnitude is seen.

    y = |F P x|

P puts black around the image, p = int(oversample n / 8) rows or columns on each side of n, and F
is the orthonormal two-dimensional Fourier transform of every channel, with the frequency 0 in the
middle. These are the conventions of Chung et al. (2023), arXiv 2209.14687 (DPS), which later work
shares: for n = 256 and oversample = 2, sides of 384, so that 2.25 numbers are seen for each pixel;
oversample = 4 doubles the sides.

Images that are turned by 180 degrees, or moved within black borders, have the same y:
`symmetries`. Of them the prior has to choose, and does where a solver is run with restarts
(`solve.symmetries`).

Where a magnitude is 0 its gradient is taken to be 0.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Option, Real, check_tables
from ..errors import InputError
from .base import NonlinearOperator, Operator, size_text

__all__ = ["FourierMagnitude"]

LEAVING = 1e-3  # of an image's power that may be lost by moving it


class FourierMagnitude(NonlinearOperator):
    """The magnitude of the Fourier transform. Text form: "phase:fourier,oversample=2".

    Args:
        oversample: How far black surrounds the image: oversample / 8 of its side on every side,
            a number from 0 to 32.

    Raises:
        InputError: an option out of its bounds; from `bind` and A, spectra above the limit of
            `bounds.TABLES`.
    """

    ambiguous = True
    form = "phase:fourier"
    pictorial = False
    options: ClassVar[dict[str, Option]] = {"oversample": Real(0, 32)}
    oversample: float

    def __init__(self, oversample: float = 2.0) -> None:
        self._take_options(oversample=oversample)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Self, after a look at the memory that the padded image takes."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        channels, height, width = self.y_shape(shape)
        check_tables(
            self.spec,
            f"the spectrum of an image of {size_text(shape[-2:])}",
            16.0 * channels * height * width,
            "lower oversample, or give smaller images",
        )

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

    def symmetries(self, x: Tensor, like: Tensor) -> Callable[[Tensor], Tensor]:
        """x and x turned, both moved to where `like` is; see `Operator.symmetries`.

        Moved is the centre of brightness, by whole pixels, of images that have black borders for
        it: those of which more than `LEAVING` would leave the frame stay. What little leaves comes
        in at the other side, and so does noise.
        """
        moves = [_move(image, like) for image in (x, x.flip(-2, -1))]

        def turned_and_moved(images: Tensor) -> Tensor:
            return torch.stack(list(map(_moved, (images, images.flip(-2, -1)), moves)))

        return turned_and_moved


def _move(x: Tensor, like: Tensor) -> Tensor:
    """By how many rows and columns every image is to be moved, (B, 2)."""
    by = (_centre(like) - _centre(x)).round().long()
    down, across = (
        torch.arange(n, device=x.device) + by[:, k : k + 1] for k, n in enumerate(x.shape[-2:])
    )
    height, width = x.shape[-2:]
    kept = ((down >= 0) & (down < height))[:, :, None] & ((across >= 0) & (across < width))[
        :, None
    ]
    power = x.square().sum(1)
    leaving = (power * ~kept).sum((1, 2)) > LEAVING * power.sum((1, 2))
    return torch.where(leaving[:, None], 0, by)


def _centre(x: Tensor) -> Tensor:
    """Row and column of the centre of brightness, (B, 2)."""
    light = x.clamp_min(0).sum(1)
    full = light.sum((1, 2)).clamp_min(torch.finfo(x.dtype).tiny)
    down, across = (torch.arange(n, dtype=x.dtype, device=x.device) for n in x.shape[-2:])
    return torch.stack([light.sum(2) @ down, light.sum(1) @ across], 1) / full[:, None]


def _moved(x: Tensor, by: Tensor) -> Tensor:
    """Every image moved by its own rows and columns (B, 2), around the frame."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device) - by[:, :1]) % height
    columns = (torch.arange(width, device=x.device) - by[:, 1:]) % width
    number = torch.arange(len(x), device=x.device)[:, None, None]
    return x.movedim(1, -1)[number, rows[:, :, None], columns[:, None]].movedim(-1, 1)
