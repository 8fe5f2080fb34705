"""Random crops of captures, as a source of measurements.

A source of crops stands for `COUNT` crops of one size. The place and the orientation of crop n are
a function of (seed, n): a capture is drawn in proportion to its area, then a position on the grid
of the operator, then one of eight orientations. So batches, masks, replay and checkpoints, which
know images by their numbers, know crops in the same way, and a run that was killed ends bit for
bit as one that was not.

An operator may reduce the image: then positions are in pixels of the image x, and the crop of the
measurements is smaller by the same factor.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, size_text
from ..operators import Operator
from ..operators.cropped import on_numbered_crops
from ..operators.crops import Crop, turn
from ..problem import Problem
from ..repeats import scenes
from ..rng import StreamId, generator
from .capture_set import Captures
from .source import Source

__all__ = [
    "COUNT",
    "CROP",
    "LARGE",
    "Crops",
    "crop_side",
    "croppable",
    "cut_by_default",
    "side_within",
    "tile_crops",
    "tiles",
]

COUNT = 2**20  # crops that a set stands for
CROP = 64  # pixels to a side, unless images are smaller
LEAST = 32  # least side of crops that are made smaller so that no image is padded
LARGE = 96  # longest side of images that are learned from without crops
MULTIPLE = 8  # of which sides are multiples, for the networks
TILES = 2**22  # pixel values of the tiles that noise is estimated from


Region = Callable[[int, tuple[int, int, int, int]], Tensor]
"""Returns a part of the image of a capture, by its position and the rectangle: first row, first
column, height and width."""


class Crops(Source):
    """Random crops of captures.

    Args:
        captures: Measurements of any sizes.
        operator: How they were made.
        side: Side of the crops in pixels of the image x.
        augment: Whether crops are flipped and turned; None: if the operator allows it.
        seed: Seed of places and orientations.
        places: The crops themselves, in place of random ones.
        repeats: Number N of captures of each scene, one after another. The crops i N, ..., i N + N
            - 1 then have one place, in the captures of one scene.

    Raises:
        InputError: The operator does not work on crops, on crops of this size, or on turned ones.

    >>> from unmurk.io.captures import as_captures
    >>> from unmurk.operators import parse
    >>> captures = as_captures(torch.rand(2, 1, 100, 120))
    >>> crops = Crops(captures, parse("identity"), 64)
    >>> crops.shape
    (1048576, 1, 64, 64)
    >>> crop = crops.place(3)
    >>> patch = captures.region(crop.number, crop.top, crop.left, 64, 64)
    >>> torch.equal(crops[torch.tensor([3])][0], turn(patch, crop.turn))
    True
    """

    endless = True
    lost: Region | None
    """Further pixels of a rectangle that hold no measurement, (height, width) bool."""

    def __init__(
        self,
        captures: Captures,
        operator: Operator,
        side: int = CROP,
        augment: bool | None = None,
        seed: int = 0,
        places: Sequence[tuple[int, int, int]] | None = None,
        repeats: int = 1,
    ) -> None:
        if not croppable(operator):
            operator.on_crops([Crop(0, 0, 0, side, side)], side)  # says why there are none
        self.captures, self.operator, self.side, self.seed = captures, operator, side, seed
        self.scale = captures.scale if captures.units is None else captures.units
        self.skipped, self.note, self.device = captures.skipped, captures.note, captures.device
        self.places, self.repeats, self.lost = places, repeats, None
        if repeats > 1:
            _check_scenes(captures, repeats)
        self.sizes = _image_sizes(captures, operator)
        self.factor = self.sizes[0][0] // captures.sizes[0][0]
        measured = side // self.factor
        count = COUNT // repeats * repeats if places is None else len(places)
        self.shape = (count, captures.channels, measured, measured)
        if side % operator.crop_grid:
            raise InputError(
                f"crops of {side} do not fit operator '{operator.spec}': give a multiple of "
                f"{operator.crop_grid}"
            )
        first = Crop(captures.numbers[0], 0, 0, *self.sizes[0])
        operator.on_crops([first], side, channels=operator.x_shape(self.shape)[0])
        self.augment = operator.turnable if augment is None else augment
        if self.augment and not operator.turnable:
            raise InputError(
                f"operator '{operator.spec}' changes if an image is flipped or turned: learn "
                "without augmentation (--augment off)"
            )
        self.area = list(itertools.accumulate(math.prod(size) for size in self.sizes[::repeats]))
        self.padded = any(min(size) < side for size in self.sizes)

    @property
    def masked(self) -> bool:
        """Whether pixels of some crops are hidden: padding, or pixels that are not finite."""
        return self.padded or self.captures.hides or self.lost is not None

    @property
    def text(self) -> str:
        """The captures and the crops in words."""
        return f"{self.captures.text}, crops of {self.side}"

    def place(self, number: int) -> Crop:
        """Return the place of a crop by its number."""
        return self._crop(*self._place(number))

    def _crop(self, position: int, row: int, column: int, orientation: int) -> Crop:
        numbers = self.captures.numbers
        return Crop(numbers[position], row, column, *self.sizes[position], orientation)

    def _place(self, number: int) -> tuple[int, int, int, int]:
        """Return capture, row, column and orientation of a crop."""
        if self.places is not None:
            return (*self.places[number], 0)
        draws = generator(self.seed, number // self.repeats, StreamId.CROP)
        u = torch.rand(4, generator=draws, dtype=torch.float64).tolist()
        scene = bisect.bisect_right(self.area, int(u[0] * self.area[-1]))
        position = scene * self.repeats + number % self.repeats
        grid = self.operator.crop_grid
        steps = [max(0, size - self.side) // grid + 1 for size in self.sizes[position]]
        row, column = (grid * int(v * n) for v, n in zip(u[1:3], steps, strict=True))
        return position, row, column, int(8 * u[3]) if self.augment else 0

    def _measured(self, number: int) -> tuple[int, int, tuple[int, int, int, int]]:
        """Return capture, orientation, and the rectangle of a crop inside the capture."""
        position, row, column, orientation = self._place(number)
        sizes, side = self.captures.sizes[position], self.shape[-1]
        row, column = row // self.factor, column // self.factor
        height, width = (min(side, n - k) for n, k in zip(sizes, (row, column), strict=True))
        return position, orientation, (row, column, height, width)

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        return self.cut(indices, lambda position, place: self.captures.region(position, *place))

    def cut(self, numbers: Sequence[int], region: Region, channels: int | None = None) -> Tensor:
        """Cut numbered crops out of images that belong to the captures, and turn them.

        Args:
            numbers: Numbers of the crops.
            region: Returns a rectangle (C, height, width) of the image of a capture, by its
                position in the set.
            channels: Number of channels of the images; None: that of the captures.

        Returns:
            (B, C, h, w), 0 beyond the captures.
        """
        shape = (channels or self.shape[1], *self.shape[2:])
        found = torch.zeros(len(numbers), *shape)
        for crop, number in zip(found, numbers, strict=True):
            position, orientation, place = self._measured(number)
            crop[:, : place[2], : place[3]] = region(position, place)
            if orientation:
                crop.copy_(turn(crop.clone(), orientation))
        return found

    def hidden(self, numbers: Sequence[int]) -> Tensor | None:
        """Return where crops hold no measurement, (B, 1, h, w); None if no crop of the set hides.

        A measurement is hidden if it lies beyond its capture, or is not finite.
        """
        if not self.masked:
            return None
        found = torch.ones(len(numbers), 1, *self.shape[-2:])
        for crop, number in zip(found, numbers, strict=True):
            position, orientation, place = self._measured(number)
            absent = self.captures.absent(position, *place)
            inside = torch.zeros(place[2:]) if absent is None else torch.from_numpy(absent).float()
            if self.lost is not None:
                inside = torch.maximum(inside, self.lost(position, place).float())
            crop[:, : place[2], : place[3]] = inside
            crop.copy_(turn(crop.clone(), orientation))
        return found

    def problem(self, problem: Problem) -> Problem:
        """Return the problem of numbered crops: of the operator on images, and its noise."""
        if problem.operator.spec == "identity" and not self.masked:
            return problem
        operator = on_numbered_crops(problem.operator, self.side, self.place, self.hidden)
        return Problem(operator, problem.noise)

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the captures, with the size of the crops."""
        crops = {"crop": self.side, "augment": self.augment}
        return {"shape": list(self.shape[1:]), **crops, **self.captures.fingerprint()}


def cut_by_default(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether images of these sizes are learned from in crops if nothing else is asked for.

    They are if one has a side above 96 pixels. They also are if sizes differ, or a side is not a
    multiple of 4, unless a side is below 32.

    >>> cut_by_default([(64, 64), (64, 64)]), cut_by_default([(64, 64), (68, 64)])
    (False, True)
    """
    if max(map(max, sizes), default=0) > LARGE:
        return True
    fit = len(set(sizes)) < 2 and not any(n % 4 for size in sizes for n in size)
    return not fit and min(map(min, sizes)) >= LEAST


def croppable(operator: Operator) -> bool:
    """Whether an operator is local, so that it has a model on crops.

    >>> from unmurk.operators import parse
    >>> croppable(parse("blur:gaussian,sigma=1")), croppable(parse("mri:cartesian,acceleration=2"))
    (True, False)
    """
    members = getattr(operator, "members", (operator,))
    return all(type(member)._crop is not Operator._crop for member in members)


def _check_scenes(captures: Captures, repeats: int) -> None:
    """Check that captures, `repeats` at a time, show one scene each.

    Raises:
        InputError: Some are missing, or captures of one scene differ in size.
    """
    scenes(len(captures), repeats)
    if captures.skipped:
        raise InputError(
            f"{captures.skipped[0][0]} was left out, and each scene has {repeats} captures: "
            "correct it, or leave out all captures of its scene"
        )
    for first in range(0, len(captures), repeats):
        sizes = captures.sizes[first : first + repeats]
        other = next((size for size in sizes if size != sizes[0]), None)
        if other is not None:
            raise InputError(
                f"captures {first} to {first + repeats - 1} are one scene, but have sizes "
                f"{size_text(sizes[0])} and {size_text(other)}: sort the files by scene"
            )


def _image_sizes(captures: Captures, operator: Operator) -> list[tuple[int, int]]:
    """Return height and width of the images x behind captures.

    Raises:
        InputError: The captures are not images of x, at one scale.
    """
    found = []
    for height, width in captures.sizes:
        x = operator.x_shape((captures.channels, height, width))[-2:]
        if any(n % m or n // m != x[0] // height for n, m in zip(x, (height, width), strict=True)):
            raise InputError(
                f"measurements of '{operator.spec}' of {size_text((height, width))} are no image "
                "of which crops can be cut: learn from whole images (--crop 0)"
            )
        found.append((int(x[0]), int(x[1])))
    return found


def crop_side(captures: Captures, operator: Operator) -> int:
    """Return the side of the crops of a set: `CROP` pixels of x.

    It is smaller where an image is smaller, down to `LEAST`, so that nothing is padded. It is a
    multiple of the operator's grid and of 8.

    >>> from unmurk.io.captures import as_captures
    >>> from unmurk.operators import parse
    >>> captures = as_captures([torch.rand(1, 200, 300), torch.rand(1, 50, 120)])
    >>> crop_side(captures, parse("identity"))  # a multiple of 8 that fits into 50 pixels
    48
    """
    shortest = min(min(size) for size in _image_sizes(captures, operator))
    step = math.lcm(MULTIPLE, operator.crop_grid)
    most = CROP if shortest < LEAST else min(CROP, shortest)
    return max(step, most // step * step)


def side_within(captures: Captures, operator: Operator, side: int) -> int:
    """Return the side of crops that is asked for, or the largest that an image fills.

    Crops that reach beyond every image, in height and in width, hold only more padding.

    >>> from unmurk.io.captures import as_captures
    >>> from unmurk.operators import parse
    >>> captures = as_captures(torch.rand(2, 1, 40, 50))
    >>> side_within(captures, parse("identity"), 512), side_within(captures, parse("identity"), 48)
    (56, 48)
    """
    longest = max(max(size) for size in _image_sizes(captures, operator))
    step = math.lcm(MULTIPLE, operator.crop_grid)
    return min(side, -(-longest // step) * step)


def tiles(captures: Captures, operator: Operator, repeats: int = 1) -> tuple[Tensor, Operator]:
    """Cut captures into tiles, for estimates that need images of one size.

    Args:
        captures: The captures.
        operator: How they were made.
        repeats: Number of captures of each scene, one after another. The tiles of one place in a
            scene then follow each other.

    Returns:
        Tiles (N, C, h, w) that cover the captures, evenly chosen if there are more than some
        million values; and the operator, whose images are these tiles.

    Raises:
        InputError: The captures are no whole number of scenes, or one scene has several sizes.

    >>> from unmurk.io.captures import as_captures
    >>> from unmurk.operators import parse
    >>> tiles(as_captures(torch.rand(2, 1, 128, 192)), parse("identity"))[0].shape
    torch.Size([12, 1, 64, 64])
    """
    crops = tile_crops(captures, operator, repeats)
    return crops[:], crops.problem(Problem(operator, 0.0)).operator


def tile_crops(captures: Captures, operator: Operator, repeats: int = 1) -> Crops:
    """Return the crops that `tiles` reads.

    >>> from unmurk.io.captures import as_captures
    >>> from unmurk.operators import parse
    >>> tile_crops(as_captures(torch.rand(2, 1, 128, 192)), parse("identity")).shape
    (12, 1, 64, 64)
    """
    if repeats > 1:
        _check_scenes(captures, repeats)
    grid = operator.crop_grid
    sizes = _image_sizes(captures, operator)
    side = crop_side(captures, operator)
    places = [
        (position, row, column)
        for position, size in list(enumerate(sizes))[::repeats]
        for row in _starts(size[0], side, grid)
        for column in _starts(size[1], side, grid)
    ]
    most = max(1, TILES // (captures.channels * side**2 * repeats))
    picked = torch.linspace(0, len(places) - 1, min(most, len(places))).long().unique().tolist()
    chosen = [(places[i][0] + j, *places[i][1:]) for i in picked for j in range(repeats)]
    return Crops(captures, operator, side, False, 0, chosen)


def _starts(length: int, side: int, grid: int) -> list[int]:
    """Return where tiles begin that cover a length; those of one side do not overlap."""
    return list(range(0, max(length - side, 0) + 1, max(side, grid)))
