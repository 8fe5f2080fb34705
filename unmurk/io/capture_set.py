"""A set of captures with its scale, its missing pixels and its calibration frames."""

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import size_text
from .axes import ALL, Selection
from .formats.pictures import Nan, check_finite
from .frames import Frames
from .parts import Part
from .scale import Scale, finite

__all__ = ["Captures", "Gaps"]


@dataclass(eq=False)
class Captures:
    """Images of any sizes that share channels, number type and scale.

    Attributes:
        parts: The captures.
        scale: How file values become images; None: they are images.
        numbers: Position of each capture in the folder or file, counting those left out. Masks are
            drawn by it.
        identity: What tells this set from others, fit for JSON.
        skipped: Name and reason of each capture that was left out.
        note: A remark about the scale for the user, or an empty text.
        missing: Pixels that are not finite, one bit each, of the captures that have any.
        device: The device of the data.
        units: The scale of the files, where the images have been converted already.
        select: The axes and channels that were given for its files.
        frames: Calibration frames that the images are corrected with when they are read.
        total: Number of images of the folder or file, counting those left out.

    >>> from unmurk.io.captures import as_captures
    >>> captures = as_captures([torch.zeros(1, 5, 7), torch.ones(1, 8, 4)])
    >>> captures.sizes, captures.channels, captures.text
    ([(5, 7), (8, 4)], 1, '2 images of 8x4 to 5x7')
    >>> captures.region(1, 6, 1, 2, 3).shape
    torch.Size([1, 2, 3])
    """

    parts: list[Part]
    scale: Scale | None = None
    numbers: list[int] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str]] = ()
    note: str = ""
    missing: dict[int, np.ndarray] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    units: Scale | None = None
    select: Selection = ALL
    frames: Frames = field(default_factory=Frames)
    total: int = 0

    def __post_init__(self) -> None:
        self.numbers = self.numbers or list(range(len(self.parts)))
        self.total = max(self.total, *(number + 1 for number in self.numbers))

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each capture."""
        return [part.shape[:2] for part in self.parts]

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.parts[0].shape[2]

    @property
    def text(self) -> str:
        """Number and sizes in words."""
        least, most = (f(self.sizes, key=math.prod) for f in (min, max))
        size = size_text(least) if least == most else f"{size_text(least)} to {size_text(most)}"
        count = "1 image" if len(self) == 1 else f"{len(self)} images"
        return f"{count} of {size}"

    def region(self, position: int, row: int, column: int, height: int, width: int) -> Tensor:
        """Return a rectangle inside a capture, (C, height, width), float32.

        Pixels without a measurement are zeros; see `absent`.
        """
        pixels = self.parts[position].region(row, column, height, width)
        found = _images(pixels, self.scale)
        if self.frames:
            part = self.frames.part(row, column, height, width)
            found = part.correct(found[None])[0]
        lost = self.absent(position, row, column, height, width)
        return found if lost is None else found.masked_fill(torch.from_numpy(lost), 0.0)

    @property
    def hides(self) -> bool:
        """Whether some pixels hold no measurement."""
        return bool(self.missing) or self.frames.hidden is not None

    def corrected(self, frames: Frames) -> "Captures":
        """Return the captures with calibration frames applied when they are read.

        Raises:
            InputError: A capture has another size than the frames.
        """
        if frames:
            for height, width in set(self.sizes):
                frames.correct(torch.zeros(1, self.channels, height, width))
        return replace(self, frames=frames)

    def without(self, numbers: Collection[int], reason: str) -> "Captures":
        """Return the captures without some of them, which are listed as skipped.

        Args:
            numbers: Their numbers.
            reason: Why they are left out.
        """
        kept = [i for i, number in enumerate(self.numbers) if number not in numbers]
        lost = [(f"image {n}", reason) for n in self.numbers if n in numbers]
        return replace(
            self,
            parts=[self.parts[i] for i in kept],
            numbers=[self.numbers[i] for i in kept],
            missing={k: self.missing[i] for k, i in enumerate(kept) if i in self.missing},
            skipped=[*self.skipped, *lost],
        )

    def first(self, count: int = 64) -> Tensor:
        """Return the first captures (N, C, H, W), of those that have the size of the first."""
        size = self.sizes[0]
        same = [i for i, other in enumerate(self.sizes) if other == size][:count]
        return torch.stack([self.region(i, 0, 0, *size) for i in same])

    def absent(
        self, position: int, row: int, column: int, height: int, width: int
    ) -> np.ndarray | None:
        """Return which pixels of a rectangle are not finite, (height, width); None if all are."""
        found: np.ndarray | None = None
        if self.frames.hidden is not None:
            found = self.frames.hidden[row : row + height, column : column + width].numpy()
        bits = self.missing.get(position)
        if bits is None:
            return found
        length = self.parts[position].shape[1]
        lines = np.unpackbits(bits[row : row + height], axis=1, count=length)
        missing = lines[:, column : column + width] > 0
        return missing if found is None else missing | found

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the set, fit for JSON."""
        scale = {} if self.scale is None else self.scale.record()
        sizes = hashlib.sha256(json.dumps([p.shape for p in self.parts]).encode()).hexdigest()
        return {"images": self.text, "sizes": sizes, **scale, **self.identity}


def _images(pixels: np.ndarray, scale: Scale | None) -> Tensor:
    """Convert pixels (H, W, C) to an image (C, H, W)."""
    found = np.moveaxis(pixels, -1, 0)
    if scale is not None:
        return scale.from_file(found)
    return torch.from_numpy(np.ascontiguousarray(found, np.float32))


class Gaps:
    """The pixels of a set that are not finite, found capture by capture.

    Args:
        nan: "mask" notes them; "refuse" raises InputError.

    >>> gaps = Gaps("mask")
    >>> gaps.look(0, np.array([[[1.0], [np.nan], [0.5]]]), "image 0")
    >>> np.unpackbits(gaps.missing[0], axis=1)[:, :3].tolist()
    [[0, 1, 0]]
    """

    def __init__(self, nan: Nan) -> None:
        self.nan: Nan = nan
        self.missing: dict[int, np.ndarray] = {}

    def look(self, position: int, pixels: np.ndarray, where: str) -> None:
        """Examine the pixels (H, W, C) of a capture."""
        check_finite(pixels, where, self.nan)
        if pixels.dtype.kind == "f":
            bad = ~finite(pixels).all(-1)
            if bad.any():
                self.missing[position] = np.packbits(bad, axis=1)
