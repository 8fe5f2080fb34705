"""Inpainting: A x = m x with a mask m of zeros and ones, the same for all channels.

A is a projection, so A = A^T = A^+ and the prox is a weighted mean on the seen pixels:

    prox_l2(z, y, gamma) = (z + gamma m y) / (1 + gamma m)

Measurements keep the shape of the image; pixels that are not seen hold zero, carry no noise and
do not count as measurements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import SEED, File, Option, Real, Sides, Whole
from ..errors import InputError
from ..rng import PerImageGenerator, StreamId
from .base import Operator, size_text
from .linalg import Spectrum, diagonal
from .reading import pick_rows, read_masks

__all__ = ["BoxInpaint", "FileInpaint", "Inpaint", "RandomInpaint"]

SIDE = 65536  # pixels, above any image that fits memory


class Inpaint(Operator):
    """What all masks share. Members draw or read `held`, the masks (B or 1, 1, H, W)."""

    tensors = ("held",)
    held: Tensor | None = None
    gram = 1.0

    @property
    def mask(self) -> Tensor | None:
        """The masks (B or 1, 1, H, W), 1 = seen; None before `bind`."""
        return self.held

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        """Masks (B or 1, 1, H, W) on the CPU."""
        raise NotImplementedError

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """The operator with the masks of these images; see `Operator.bind`."""
        numbers = [int(i) for i in index]
        if any(i < 0 for i in numbers):
            raise InputError(f"{self.form}: image numbers must be >= 0, got {min(numbers)}")
        height, width = shape[-2:]
        return self._with(held=self._draw(numbers, height, width).to(self.device))

    def apply_mask(self, y: Tensor) -> Tensor:
        """y with the pixels that are not seen set to zero."""
        op = self._bound(y, y.shape)
        assert isinstance(op, Inpaint) and op.held is not None
        return torch.where(op.held > 0, y, torch.zeros((), dtype=y.dtype, device=y.device))

    def hiding(self, more: Tensor) -> "Inpaint":
        """The operator that hides further pixels: those where `more` (B, 1, H, W) is not 0."""
        assert self.held is not None
        other = self._with(held=torch.where(more != 0, 0.0, self.held))
        assert isinstance(other, Inpaint)
        return other

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.held is not None
        if self.held.shape[-2:] != tuple(shape[-2:]):
            raise InputError(
                f"{self.form}: the mask is {size_text(self.held.shape[-2:])} but the image is "
                f"{size_text(shape[-2:])}; bind it again with at(index, shape)"
            )

    def _A(self, x: Tensor) -> Tensor:
        assert self.held is not None
        return self.held * x

    # hidden pixels of y may hold anything, NaN too: they are dropped, not multiplied by zero
    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self.apply_mask(y)

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self.apply_mask(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        assert self.held is not None
        return (z + gamma * self.apply_mask(y)) / (1 + gamma * self.held)

    def _structured(self, x: Tensor) -> Spectrum:
        assert self.held is not None
        return diagonal(self.held.to(x), self.apply_mask)


class RandomInpaint(Inpaint):
    """Every pixel is seen with probability `keep`, independently; each image has its own mask.

    Text form: "inpaint:random,keep=0.4,seed=0".

    Args:
        keep: Expected fraction of the pixels that are seen, a number from 1e-06 to 1.
        seed: Seed of the masks, a whole number from 0 to 9223372036854775807; the mask of an
            image depends on it and on the image's number.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "inpaint:random"
    options: ClassVar[dict[str, Option]] = {"keep": Real(1e-6, 1), "seed": SEED}
    keep: float
    seed: int

    def __init__(self, keep: float, seed: int = 0) -> None:
        self._take_options(keep=keep, seed=seed)

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        draws = PerImageGenerator(self.seed, index, StreamId.MASK).rand(1, height, width)
        return (draws < self.keep).float()


class BoxInpaint(Inpaint):
    """A rectangle is hidden: centred, at a given place, or anywhere (a place for every image).

    Text form: "inpaint:box,size=12", "inpaint:box,size=12x8,top=3,left=5" or
    "inpaint:box,size=12,seed=0".

    Args:
        size: Height and width of the hole in pixels, a whole number from 1 to 65536, or two of
            them as in 12x8; at least one pixel of the image stays visible.
        top: First hidden row, a whole number from 0 to 65536; with `left`.
        left: First hidden column, a whole number from 0 to 65536; with `top`.
        seed: Draw the place of each image's hole from (seed, image number), a whole number from 0
            to 9223372036854775807.

    Raises:
        InputError: an option out of its bounds, or options that exclude each other.
    """

    form = "inpaint:box"
    options: ClassVar[dict[str, Option]] = {
        "size": Sides(1, SIDE),
        "top": Whole(0, SIDE, optional=True),
        "left": Whole(0, SIDE, optional=True),
        "seed": replace(SEED, optional=True),
    }
    size: tuple[int, int]
    top: int | None
    left: int | None
    seed: int | None

    def __init__(
        self,
        size: int | tuple[int, int],
        top: int | None = None,
        left: int | None = None,
        seed: int | None = None,
    ) -> None:
        self._take_options(size=size, top=top, left=left, seed=seed)
        if (top is None) != (left is None):
            raise InputError("inpaint:box: give both top and left, or neither")
        if seed is not None and top is not None:
            raise InputError("inpaint:box: a seed draws the place; leave out top and left")

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        room = torch.tensor([height - self.size[0], width - self.size[1]])
        if bool((room < 0).any()):
            raise InputError(
                f"inpaint:box: the hole is {size_text(self.size)} but the image is "
                f"{height}x{width}; choose a smaller size"
            )
        if not bool((room > 0).any()):
            raise InputError(
                f"inpaint:box: a hole of {size_text(self.size)} hides the whole image; choose a "
                f"smaller size"
            )
        if self.seed is not None:
            corners = (
                PerImageGenerator(self.seed, index, StreamId.MASK).rand(2) * (room + 1)
            ).long()
        elif self.top is not None and self.left is not None:
            corners = torch.tensor([[self.top, self.left]])
        else:
            corners = (room // 2)[None]
        if bool((corners > room).any()):
            raise InputError(
                f"inpaint:box: a hole of {size_text(self.size)} at row {self.top}, column "
                f"{self.left} leaves the image of {height}x{width}"
            )
        rows = _outside(corners[:, 0], self.size[0], height)[:, None, :, None]
        columns = _outside(corners[:, 1], self.size[1], width)[:, None, None, :]
        return (rows | columns).float()


class FileInpaint(Inpaint):
    """A mask from a file. Text form: "inpaint:file,path=mask.png".

    Args:
        path: The path of a file, at most 4096 characters: a grey picture, or a .npy array (H, W),
            or either with a mask for every image number: an array (N, H, W), a TIFF of N pages.
            It holds 0 where a pixel is hidden and one other value, 1 or the white of its type
            (255, 65535), where it is seen. It is read by `bind`.

    Raises:
        InputError: a path out of its bounds; from `bind`, a file that is not plainly a mask.
    """

    form = "inpaint:file"
    options: ClassVar[dict[str, Option]] = {"path": File()}
    path: str

    def __init__(self, path: str | Path) -> None:
        self._take_options(path=path)

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        masks = read_masks(self.form, self.path)
        if masks.shape[-2:] != (height, width):
            raise InputError(
                f"inpaint:file: the mask in {self.path} is {size_text(masks.shape[-2:])} but the "
                f"image is {height}x{width}; give a mask of the image's size"
            )
        return pick_rows(self.form, self.path, masks, index)[:, None]


def _outside(first: Tensor, length: int, total: int) -> Tensor:
    """(B, total) bool: which positions are not in [first, first + length)."""
    position = torch.arange(total)
    return (position < first[:, None]) | (position >= first[:, None] + length)
