r"""Masks: random pixels, boxes, freehand scribbles, and masks from files.

The module `inpainting` describes what a mask does.

Freehand scribbles (`FreeformInpaint`) follow random walks. A stroke has K = `SEGMENTS` straight
segments in an image of height H and width W. With u and u' uniform on [0, 1), independent for each
segment,

.. math::

    p_0 &\sim \mathrm{uniform\ in\ the\ image}, \qquad
    \theta_1 \sim \mathrm{uniform\ on\ } [0, 360)\ \mathrm{degrees} \\
    \theta_k &= \theta_{k-1} + \mathtt{TURN}\, (2 u_k - 1) \\
    p_k &= p_{k-1} + 2\, \mathtt{LENGTH}\, u'_k \min(H, W)\, (-\sin\theta_k, \cos\theta_k)

A walk that leaves the image is reflected back into it. A pixel is hidden if its center lies within
width / 2 of a segment. As K LENGTH = 1, a stroke is on average as long as the shorter side of the
image. It hides about width times as many pixels, and fewer where strokes cross.
"""

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import SEED, File, Option, Real, Sides, Whole
from ..errors import InputError, size_text
from ..rng import PerImageGenerator, StreamId
from .blur import segment_distance
from .files import read_masks, select_images
from .inpainting import Inpaint

__all__ = ["BoxInpaint", "FileInpaint", "FreeformInpaint", "RandomInpaint"]

MAX_SIDE = 65536  # pixels, above any image that fits memory
SEGMENTS = 8  # straight segments of a stroke
TURN = 60.0  # degrees, the largest turn between two segments
LENGTH = 0.125  # mean length of a segment, in shorter sides of the image


class RandomInpaint(Inpaint):
    """Measure every pixel with probability `keep`, independently; each image has its own mask.

    Text form: "inpaint:random,keep=0.4,seed=0".

    Args:
        keep: Expected fraction of measured pixels, a number from 1e-06 to 1.
        seed: Seed of the masks, a whole number from 0 to 9223372036854775807. The mask of an
            image depends on the seed and on the image's number.

    Raises:
        InputError: An option is out of its bounds.

    >>> from unmurk.operators import parse
    >>> A = parse("inpaint:random,keep=0.4,seed=0").bind([0, 1], (3, 32, 32))
    >>> A.mask.shape, round(float(A.mask.mean()), 1)
    (torch.Size([2, 1, 32, 32]), 0.4)
    """

    form = "inpaint:random"
    options: ClassVar[dict[str, Option]] = {"keep": Real(1e-6, 1), "seed": SEED}
    keep: float
    seed: int

    def __init__(self, keep: float, seed: int = 0) -> None:
        self._take_options(keep=keep, seed=seed)

    def _key(self) -> Hashable:
        return self.spec

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        draws = PerImageGenerator(self.seed, index, StreamId.MASK).rand(1, height, width)
        return (draws < self.keep).float()


class BoxInpaint(Inpaint):
    """Hide a rectangle: in the center, at a given place, or at a random place in each image.

    Text form: "inpaint:box,size=12", "inpaint:box,size=12x8,top=3,left=5" or
    "inpaint:box,size=12,seed=0".

    Args:
        size: Height and width of the hole in pixels, a whole number from 1 to 65536, or two of
            them as in 12x8. At least one pixel of the image must stay visible.
        top: First hidden row, a whole number from 0 to 65536; with `left`.
        left: First hidden column, a whole number from 0 to 65536; with `top`.
        seed: Draw the place of each image's hole from (seed, image number), a whole number from 0
            to 9223372036854775807.

    Raises:
        InputError: An option is out of its bounds, or two options exclude each other.

    >>> from unmurk.operators import parse
    >>> parse("inpaint:box,size=2").bind([0], (1, 4, 4)).mask[0, 0].int()
    tensor([[1, 1, 1, 1],
            [1, 0, 0, 1],
            [1, 0, 0, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    """

    form = "inpaint:box"
    options: ClassVar[dict[str, Option]] = {
        "size": Sides(1, MAX_SIDE),
        "top": Whole(0, MAX_SIDE, optional=True),
        "left": Whole(0, MAX_SIDE, optional=True),
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
            raise InputError("inpaint:box: the seed draws the place: leave out top and left")

    def _key(self) -> Hashable:
        return self.spec

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        room = torch.tensor([height - self.size[0], width - self.size[1]])
        if bool((room < 0).any()):
            raise InputError(
                f"inpaint:box: the hole is {size_text(self.size)} but the image is"
                f" {size_text((height, width))}: choose a smaller size"
            )
        if not bool((room > 0).any()):
            raise InputError(
                f"inpaint:box: a hole of {size_text(self.size)} hides the whole image: choose a"
                f" smaller size"
            )
        if self.seed is not None:
            draws = PerImageGenerator(self.seed, index, StreamId.MASK).rand(2)
            corners = (draws * (room + 1)).long()
        elif self.top is not None and self.left is not None:
            corners = torch.tensor([[self.top, self.left]])
        else:
            corners = (room // 2)[None]
        if bool((corners > room).any()):
            raise InputError(
                f"inpaint:box: a hole of {size_text(self.size)} at row {self.top}, column"
                f" {self.left} leaves the image of {size_text((height, width))}: lower top or left"
            )
        rows = _outside(corners[:, 0], self.size[0], height)[:, None, :, None]
        columns = _outside(corners[:, 1], self.size[1], width)[:, None, None, :]
        return (rows | columns).float()


class FreeformInpaint(Inpaint):
    """Hide thick brush strokes; each image has its own, the same in all its channels.

    Text form: "inpaint:freeform,strokes=4,width=6,seed=0". The module describes the strokes.

    Args:
        strokes: Number of strokes, a whole number from 1 to 1000.
        width: Thickness of the brush in pixels, a number from 1 to 1024.
        seed: Seed of the masks, a whole number from 0 to 9223372036854775807. The mask of an
            image depends on the seed and on the image's number.

    Raises:
        InputError: An option is out of its bounds.

    >>> from unmurk.operators import parse
    >>> A = parse("inpaint:freeform,strokes=1,width=2").bind([0], (1, 16, 16))
    >>> 0 < int((A.mask == 0).sum()) < 128
    True
    """

    form = "inpaint:freeform"
    options: ClassVar[dict[str, Option]] = {
        "strokes": Whole(1, 1000),
        "width": Real(1, 1024),
        "seed": SEED,
    }
    strokes: int
    width: float
    seed: int

    def __init__(self, strokes: int, width: float, seed: int = 0) -> None:
        self._take_options(strokes=strokes, width=width, seed=seed)

    def _key(self) -> Hashable:
        return self.spec

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        # the path is longer than that of other masks, so that the draws are other numbers
        streams = PerImageGenerator(self.seed, index, StreamId.MASK, 1)
        walks = _walks(streams.rand(self.strokes, 3 + 2 * SEGMENTS), height, width)
        rows, columns = torch.arange(height), torch.arange(width)
        masks = torch.ones(len(index), 1, height, width)
        for mask, strokes in zip(masks, walks, strict=True):
            for corners in strokes:
                for k in range(SEGMENTS):  # one at a time: each is as large as the image
                    start, end = corners[k : k + 1], corners[k + 1 : k + 2]
                    mask[segment_distance(rows, columns, start, end) <= self.width / 2] = 0
        return masks


class FileInpaint(Inpaint):
    """Read the mask from a file. Text form: "inpaint:file,path=mask.png".

    Args:
        path: The path of a file, at most 4096 characters: a gray picture, or a .npy array (H, W).
            For a mask for every image number, give an array (N, H, W) or a TIFF of N pages. The
            file holds 0 where a pixel is hidden and one other value, 1 or the white of its type
            (255, 65535), where it is measured. `bind` reads it.

    Raises:
        InputError: The path is out of its bounds; from `bind`, the file is not clearly a mask.

    >>> import numpy as np
    >>> np.save("mask.npy", np.array([[1, 0, 1]], np.uint8))
    >>> FileInpaint("mask.npy").A(torch.ones(1, 1, 1, 3))
    tensor([[[[1., 0., 1.]]]])
    """

    form = "inpaint:file"
    options: ClassVar[dict[str, Option]] = {"path": File()}
    path: str

    def __init__(self, path: str | Path) -> None:
        self._take_options(path=path)

    def _key(self) -> Hashable:
        state = Path(self.path).stat() if Path(self.path).is_file() else None
        return None if state is None else (self.spec, state.st_mtime_ns, state.st_size)

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        masks = read_masks(self.form, self.path)
        if masks.shape[-2:] != (height, width):
            raise InputError(
                f"inpaint:file: the mask in {self.path} is {size_text(masks.shape[-2:])} but the"
                f" image is {size_text((height, width))}: give a mask of the image's size"
            )
        return select_images(self.form, self.path, masks, index)[:, None]


def _outside(first: Tensor, length: int, total: int) -> Tensor:
    """(B, total) bool: which positions are not in [first, first + length)."""
    position = torch.arange(total)
    return (position < first[:, None]) | (position >= first[:, None] + length)


def _walks(draws: Tensor, height: int, width: int) -> Tensor:
    """Corners (B, strokes, SEGMENTS + 1, 2) of the strokes as row and column."""
    sides = torch.tensor([height - 1, width - 1])
    start = draws[..., None, :2] * sides
    angles, lengths = draws[..., 3:].chunk(2, -1)
    heading = 360 * draws[..., 2:3] + TURN * (2 * angles - 1).cumsum(-1)
    step = 2 * LENGTH * min(height, width) * lengths
    radians = heading.deg2rad()
    moves = step[..., None] * torch.stack([-radians.sin(), radians.cos()], -1)
    walk = torch.cat([start, start + moves.cumsum(-2)], -2)
    # reflection: the distance to the nearest multiple of twice the side
    period = 2 * sides.clamp_min(1)
    return (walk - period * (walk / period).round()).abs().minimum(sides)
