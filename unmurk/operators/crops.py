r"""Crops of images: where they lie, how they are turned, and what they determine.

Learning from large images uses random crops of them. With R the map that cuts a crop out of an
image, and turns it, an operator A on the image has a model :math:`A_R` on the crop:

.. math:: M R' A x = M A_R R x \quad \text{for all } x,

where R' cuts the measurements in the same way. M hides those that the crop does not determine,
because they depend on pixels outside: the margin of a blur, and padding. The misfit of a crop is
therefore the part of the misfit of the image that belongs to these measurements, exactly.

Where a crop touches the border of the image, the border model of A applies to the crop as well,
and nothing is hidden there.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, size_text

__all__ = ["Crop", "PackedMasks", "Window", "turn", "unturn"]

MASKS = 2**26  # bytes of packed masks that are kept: 128 masks of 2048x2048


@dataclass(frozen=True)
class Crop:
    """The place of a crop in an image.

    Attributes:
        number: Number of the image in the set, >= 0; masks are drawn by it.
        top: First row of the crop in the image x, in pixels, a multiple of `Operator.crop_grid`.
            A crop may reach beyond an image that is smaller than the crop.
        left: First column, likewise.
        height: Height of the image x in pixels.
        width: Width of the image x in pixels.
        turn: Orientation of the crop, a whole number from 0 to 7; see the function `turn`.

    Raises:
        InputError: A value is out of its bounds, or the crop begins beyond the image.

    >>> Crop(number=0, top=8, left=0, height=32, width=32).turn
    0
    """

    number: int
    top: int
    left: int
    height: int
    width: int
    turn: int = 0

    def __post_init__(self) -> None:
        if self.number < 0 or not 0 <= self.turn <= 7:
            raise InputError(
                f"a crop needs a number >= 0 and a turn from 0 to 7, got {self.number} and"
                f" {self.turn}"
            )
        if self.height < 1 or self.width < 1 or self.top >= self.height or self.left >= self.width:
            raise InputError(
                f"a crop at row {self.top}, column {self.left} is outside its image of"
                f" {size_text((self.height, self.width))}"
            )


def turn(x: Tensor, k: int) -> Tensor:
    """Turn images: flip them left to right if k >= 4, then make k % 4 quarter turns.

    Args:
        x: Images (..., H, W).
        k: One of the eight orientations, 0 to 7. 0 changes nothing.

    Returns:
        (..., H, W), or (..., W, H) for an odd k.

    >>> import torch
    >>> turn(torch.tensor([[1, 2], [3, 4]]), 1)
    tensor([[2, 4],
            [1, 3]])
    >>> turn(torch.tensor([[1, 2], [3, 4]]), 4)
    tensor([[2, 1],
            [4, 3]])
    """
    return torch.rot90(x.flip(-1) if k >= 4 else x, k % 4, (-2, -1))


def unturn(x: Tensor, k: int) -> Tensor:
    """Undo `turn`.

    Args:
        x: Images (..., H, W).
        k: The orientation, 0 to 7.

    >>> import torch
    >>> unturn(turn(torch.tensor([[1, 2], [3, 4]]), 5), 5)
    tensor([[1, 2],
            [3, 4]])
    """
    back = torch.rot90(x, -(k % 4), (-2, -1))
    return back.flip(-1) if k >= 4 else back


class Place(NamedTuple):
    """Where a crop lies: number and shape (H, W) of its image, and its first row and column."""

    number: int
    shape: tuple[int, int]
    first: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Window:
    """A batch of crops on their way through an operator, before they are turned.

    Attributes:
        crops: The crops, in pixels of the image x.
        size: Height and width of the crops at this point, after operators that reduce them.
        scale: Pixels of x for each pixel of this point.
        channels: Number of channels at this point, or None if it is not known.
        known: 1 where the pixels of the crop and the border model determine the value, else 0;
            (B, 1, h, w).

    >>> window = Window.of([Crop(0, 2, 2, 8, 8)], 4)
    >>> window.eroded([(1, 1), (1, 1)], None).known[0, 0].int()  # after a filter of 3 x 3 pixels
    tensor([[0, 0, 0, 0],
            [0, 1, 1, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """

    crops: tuple[Crop, ...]
    size: tuple[int, int]
    scale: int
    channels: int | None
    known: Tensor

    @classmethod
    def of(
        cls, crops: Sequence[Crop], side: int | tuple[int, int], channels: int | None = None
    ) -> "Window":
        """Create the window of crops of an image x.

        Args:
            crops: The crops, one or more.
            side: Side of the crops in pixels, or height and width.
            channels: Number of channels of x, if it is known.

        Raises:
            InputError: There is no crop, or crops that are not square are to be turned.
        """
        size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        if not crops or min(size) < 1:
            raise InputError(f"got {len(crops)} crops of {size_text(size)}: give one at least")
        if size[0] != size[1] and any(c.turn % 2 for c in crops):
            raise InputError(f"crops of {size_text(size)} cannot be turned by 90 degrees")
        window = cls(tuple(crops), size, 1, channels, torch.ones(len(crops), 1, *size))
        inside = [
            (position >= 0) & (position < length[:, None])
            for position, length in (window.positions(-2), window.positions(-1))
        ]
        return replace(
            window, known=(inside[0][:, None, :, None] & inside[1][:, None, None]) * 1.0
        )

    def positions(self, axis: int) -> tuple[Tensor, Tensor]:
        """Return where the pixels of an axis lie in the image.

        Args:
            axis: -2 for rows, -1 for columns.

        Returns:
            Positions (B, h or w), and the lengths of the axis in the image (B,), in pixels of this
            point.
        """
        starts = torch.tensor([c.top if axis == -2 else c.left for c in self.crops])
        lengths = torch.tensor([c.height if axis == -2 else c.width for c in self.crops])
        first = torch.div(starts, self.scale, rounding_mode="floor")
        return first[:, None] + torch.arange(self.size[axis]), lengths // self.scale

    def __len__(self) -> int:
        return len(self.crops)

    def measured(self, hidden: Tensor | None) -> Tensor:
        """Return the masks of the measurements, turned as the crops are.

        Args:
            hidden: Not 0 where a pixel is to be hidden too, (B, 1, h, w), or None.

        Returns:
            1 where a pixel is known and not hidden, else 0, (B, 1, h, w).

        Raises:
            InputError: `hidden` has another shape.
        """
        known = self.turn(self.known)
        if hidden is None:
            return known
        if hidden.shape != known.shape:
            raise InputError(
                f"hidden pixels of shape {tuple(hidden.shape)} do not fit measurements of"
                f" {tuple(known.shape)}: give one mask for each crop"
            )
        return torch.where(hidden.to(known.device) != 0, 0.0, known)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the images."""
        return [crop.number for crop in self.crops]

    @property
    def turned(self) -> bool:
        """Whether a crop is turned."""
        return any(crop.turn for crop in self.crops)

    def turn(self, images: Tensor) -> Tensor:
        """Turn each of the images (B, C, h, w) as its crop is turned."""
        if not self.turned:
            return images
        each = zip(images, self.crops, strict=True)
        return torch.stack([turn(image, crop.turn) for image, crop in each])

    def place(self, position: int) -> Place:
        """Return the place of one of the crops in its image, in pixels of this point."""
        crop, scale = self.crops[position], self.scale
        shape = crop.height // scale, crop.width // scale
        return Place(crop.number, shape, (crop.top // scale, crop.left // scale))

    def extended(
        self, reach: Sequence[tuple[int, int]], index: Callable[[Tensor, int], Tensor] | None
    ) -> Tensor:
        """Extend `known` beyond the crops, as the border model extends the images.

        Args:
            reach: Pixels before and after the crop, for rows and for columns.
            index: Map from the positions on an axis of n pixels, which may lie outside, to the
                pixels of the axis; None for images that continue periodically.

        Returns:
            (B, 1, h + before + after, w + before + after). Where the crop does not touch the
            border of the image, what lies beyond the crop is not known.
        """
        known = self.known
        for axis, (before, after) in zip((-2, -1), reach, strict=True):
            n = self.size[axis]
            position = torch.arange(-before, n + after)
            places, lengths = self.positions(axis)
            starts, ends = places[:, 0] == 0, places[:, -1] == lengths - 1
            if index is None:
                starts = ends = starts & ends
                source = position % n
            else:
                source = index(position, n)
            valid = (position >= 0) & (position < n)
            valid = valid | (starts[:, None] & (position < 0)) | (ends[:, None] & (position >= n))
            shape = [len(known), 1, 1, 1]
            shape[axis] = len(position)
            known = known.index_select(axis, source) * valid.reshape(shape)
        return known

    def eroded(
        self, reach: Sequence[tuple[int, int]], index: Callable[[Tensor, int], Tensor] | None
    ) -> "Window":
        """Return the window after a filter of the same size that spans a rectangle.

        Args:
            reach: Pixels that the filter spans before and after each pixel, for rows and columns.
            index: See `extended`.
        """
        unknown = 1 - self.extended(reach, index)
        for axis, (before, after) in zip((0, 1), reach, strict=True):
            span = [1, 1]
            span[axis] = before + after + 1
            unknown = F.max_pool2d(unknown, (span[0], span[1]), 1)
        return replace(self, known=1 - unknown)

    def reduced(self, factor: int, known: Tensor) -> "Window":
        """Return the window after a reduction by a factor, with what is then known."""
        size = self.size[0] // factor, self.size[1] // factor
        return replace(self, size=size, scale=self.scale * factor, known=known)

    def check_margin(self, spec: str, shape: Sequence[int]) -> None:
        """Refuse filters that leave nothing of a crop inside an image.

        Args:
            spec: The operator, for the message.
            shape: Height and width of the filter.

        Raises:
            InputError: The filter is larger than the crop.
        """
        if any(k > n for k, n in zip(shape, self.size, strict=True)):
            raise InputError(
                f"operator '{spec}' spans {size_text(tuple(shape))} pixels, so it determines"
                f" nothing of a crop of {size_text(self.size)}: use larger crops, or whole images"
                " (--crop 0)"
            )


def cut(
    image: Tensor, first: tuple[int, int], size: tuple[int, int], outside: float = 0.0
) -> Tensor:
    """Cut a rectangle out of an image; it may reach beyond the image.

    Args:
        image: The image (..., H, W).
        first: First row and column of the rectangle, negative ones too.
        size: Height and width of the rectangle.
        outside: Value of the pixels beyond the image.

    Returns:
        (..., h, w).
    """
    result = image.new_full((*image.shape[:-2], *size), outside)
    begin = [max(f, 0) for f in first]
    stop = [min(f + s, n) for f, s, n in zip(first, size, image.shape[-2:], strict=True)]
    if all(b < s for b, s in zip(begin, stop, strict=True)):
        into = [slice(b - f, s - f) for b, s, f in zip(begin, stop, first, strict=True)]
        result[..., into[0], into[1]] = image[..., begin[0] : stop[0], begin[1] : stop[1]]
    return result


class PackedMasks:
    """Masks of large images, one bit a pixel; the ones used last are kept.

    Args:
        limit: Bytes that the masks may take together.

    >>> store = PackedMasks(limit=1000)
    >>> store.get("a", lambda: torch.ones(1, 4, 4))[:2].tolist()
    [[240], [240]]
    """

    def __init__(self, limit: int = MASKS) -> None:
        self.limit = limit
        self._masks: OrderedDict[Hashable, Any] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Any:
        """Return the packed mask of a key, made by `make` where it is not kept.

        Args:
            key: What decides the mask.
            make: Function that returns the mask (1, H, W), not 0 where a pixel is measured.

        Returns:
            An array (H, ceil(W / 8)) of bytes, the first column in the highest bit.
        """
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        packed = np.packbits(make()[0].numpy() != 0, axis=1)
        with self._lock:
            if key not in self._masks:
                self._bytes += packed.nbytes
            self._masks[key] = packed
            while self._bytes > self.limit and len(self._masks) > 1:
                self._bytes -= self._masks.popitem(last=False)[1].nbytes
        return packed

    def cut(
        self,
        key: Hashable,
        make: Callable[[], Tensor],
        shape: tuple[int, int],
        first: tuple[int, int],
        size: tuple[int, int],
    ) -> Tensor:
        """Cut a rectangle out of the mask of a key; see `get` and the function `cut`.

        Args:
            key: What decides the mask.
            make: Function that returns the mask (1, H, W).
            shape: Its height and width.
            first: First row and column of the rectangle.
            size: Height and width of the rectangle.

        Returns:
            (1, h, w), 1 where a pixel is measured.
        """
        packed = self.get(key, make)
        begin, stop = max(first[0], 0), min(first[0] + size[0], shape[0])
        bits = np.unpackbits(packed[begin : max(stop, begin)], axis=1, count=shape[1])
        return cut(torch.from_numpy(bits).float()[None], (first[0] - begin, first[1]), size)
