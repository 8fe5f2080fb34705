"""Axes of files: which of them number the images, which hold the channels, and which are chosen.

An axis is a letter. Y and X are the rows and columns of an image. C holds the channels; so does S,
the samples of a pixel, where there is no C. All other axes number the images, in the order of the
file: T time, Z depth, P position or scene, N, and the letters that tifffile gives to other axes.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .limits import check_free_memory

__all__ = ["ALL", "CHANNELS", "NUMBERED", "AxisMap", "Planes", "Selection", "by_scene", "in_order"]

NUMBERED = "TZPNIQRMVBA"
"""Letters of axes that number images."""

CHANNELS = 16  # most channels of an image
LONGEST = 16  # axes of a file


@dataclass(frozen=True)
class Selection:
    """What is read of a file: its axes, some of its channels, and one of its arrays.

    Attributes:
        axes: The axes of the file in its own order, such as "TZCYX". They name the axes of arrays,
            and take the place of the names that a file gives. Empty: those of the file.
        channels: The channels to read, by number (from 0) or by name; empty: all.
        member: Name of the data set or image in a file that holds several; empty: the only one.
        lenient: Whether `axes` concern only files with this number of axes. Those that a run was
            learned with are such.
        more: Whether `channels` concern only files with more channels, or with the same in
            another order, as those of a run do.
        results: Whether the files are results: with as many channels as are chosen, they have
            them in the chosen order.
        repeats: Number of captures of each scene. Where they lie along the axis T, the images are
            in another order than in the file, with the captures of a scene in a row: `by_scene`.

    Raises:
        InputError: The axes have no Y or X, repeat a letter, or have an unknown one; or a channel
            is given twice.

    >>> Selection("tzyx", ("DAPI",)).axes
    'TZYX'
    """

    axes: str = ""
    channels: tuple[str, ...] = ()
    member: str = ""
    lenient: bool = False
    more: bool = False
    results: bool = False
    repeats: int = 1

    def __post_init__(self) -> None:
        axes = self.axes.upper()
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "channels", tuple(str(c) for c in self.channels))
        if len(set(self.channels)) < len(self.channels):
            raise InputError(f"channel {' '.join(self.channels)}: give each channel once")
        if not axes:
            return
        known = "YXCS" + NUMBERED
        wrong = next((a for a in axes if a not in known), "")
        if wrong or len(axes) > LONGEST or len(set(axes)) < len(axes) or not {"Y", "X"} <= {*axes}:
            raise InputError(
                f"axes {axes[:40]}: name each axis once, with Y and X for rows and columns, C for "
                f"channels and any of {', '.join(NUMBERED)} for what numbers the images, such as "
                "TZCYX"
            )

    def of(self, member: str) -> "Selection":
        """Return the same selection in a certain array or image of the file."""
        return replace(self, member=member)

    def beside(self) -> "Selection":
        """Return the selection for images that belong to those of the data, such as noise maps.

        It counts for files with the same axes, and with more channels.
        """
        return replace(self, member="", lenient=True, more=True)

    def to_dict(self) -> dict[str, Any]:
        """Return axes and channels as far as they are given, fit for JSON."""
        found: dict[str, Any] = {"axes": self.axes} if self.axes else {}
        return found | ({"channels": list(self.channels)} if self.channels else {})

    def axes_for(self, file: Path, own: str, shape: Sequence[int]) -> str:
        """Return the axes of an array in a file.

        Args:
            file: The file, for messages.
            own: The axes by the file; empty: it does not name them.
            shape: The lengths of the axes.

        Raises:
            InputError: `axes` are given for another number of axes.
        """
        if not self.axes:
            return own
        if len(self.axes) == len(shape):
            return self.axes
        if self.lenient:
            return own
        named = f" ({own} by the file)" if own else ""
        raise InputError(
            f"{file} has {len(shape)} axes of lengths {tuple(map(int, shape))}{named}, and the "
            f"axes {self.axes} name {len(self.axes)}: name each axis of the file"
        )

    def chosen(self, file: Path, count: int, names: Sequence[str] = ()) -> list[int]:
        """Return the numbers of the chosen channels.

        Args:
            file: The file, for messages.
            count: The number of channels of its images.
            names: Their names, as far as they are known.

        Raises:
            InputError: There is no such channel.
        """
        if not self.channels:
            return list(range(count))
        if not self.more or count > len(self.channels):
            return [self._number(file, channel, count, names) for channel in self.channels]
        with suppress(InputError):
            found = [self._number(file, channel, count, names) for channel in self.channels]
            if not self.results and sorted(found) == list(range(count)):
                return found  # the same channels in another order
        return list(range(count))

    def _number(self, file: Path, channel: str, count: int, names: Sequence[str]) -> int:
        if list(names).count(channel) == 1:
            return list(names).index(channel)
        lower = [name.lower() for name in names]
        if lower.count(channel.lower()) == 1:
            return lower.index(channel.lower())
        if channel.isascii() and channel.isdecimal() and len(channel) < 4:
            if int(channel) < count:
                return int(channel)
        called = f" called {', '.join(names)}" if names else ""
        raise InputError(
            f"{file} has {count} channels{called}, numbered from 0, and none is '{channel[:40]}': "
            "give --channel one of these"
        )


ALL = Selection()
"""Everything in a file, with the axes that the file names."""


class AxisMap:
    """The images of an array of any axes: how to index one, and how to arrange what is found.

    Args:
        file: The file, for messages.
        axes: A letter for each axis.
        shape: The lengths of the axes.
        select: The chosen channels.
        names: The names of the channels, as far as they are known.

    Attributes:
        shape: Height, width and channels of an image.
        counts: Lengths of the axes that number the images, the slowest first.
        channels: The numbers of the chosen channels on their axis.
        names: The names of the chosen channels; empty if they are not known.

    Raises:
        InputError: The axes have no Y and X, leave open which axis holds the channels, or hold
            more than 16 channels of which none is chosen.

    >>> a = np.arange(24).reshape(2, 3, 4)
    >>> images = AxisMap(Path("a.npy"), "XTY", a.shape)
    >>> len(images), images.shape, images.image(a, 1)[..., 0].tolist()
    (3, (4, 2, 1), [[4, 16], [5, 17], [6, 18], [7, 19]])
    """

    def __init__(
        self,
        file: Path,
        axes: str,
        shape: Sequence[int],
        select: Selection = ALL,
        names: Sequence[str] = (),
    ) -> None:
        sizes = [int(n) for n in shape]
        wrong = [a for a in axes if a not in "YXCS" + NUMBERED]
        if len(axes) != len(sizes) or wrong or not {"Y", "X"} <= set(axes) or min(sizes) < 1:
            raise InputError(
                f"cannot read {file}: its axes are {axes or 'not named'} of lengths "
                f"{tuple(sizes)}: name them, such as --axes {_suggest(len(sizes))}"
            )
        self.file, self.axes, self.sizes = file, axes, sizes
        length = dict(zip(axes, sizes, strict=True))
        self._deep = "C" if "C" in axes else "S" if "S" in axes else ""
        both = self._both = self._deep == "C" and length.get("S", 1) > 1
        if both and not select.channels and length["C"] == 1:
            select = replace(select, channels=("0",))
        if both and len(select.channels) != 1:
            raise InputError(
                f"{file} has the axes {axes}, of which C and S may both hold the channels: choose "
                "one of C with --channel"
            )
        count = length.get(self._deep, 1)
        self.channels = select.chosen(file, count, names)
        if len(self.channels) > CHANNELS:
            raise InputError(
                f"{file} has {count} channels, and an image has at most {CHANNELS}: choose some "
                "with --channel, or name the axes with --axes"
            )
        self.names = [names[c] for c in self.channels] if len(names) == count else []
        samples = length["S"] if both else len(self.channels)
        self.shape: tuple[int, int, int] = (length["Y"], length["X"], samples)
        self._numbered = [i for i, a in enumerate(axes) if a not in "YXCS"]
        self.counts = tuple(sizes[i] for i in self._numbered)
        self._order = [a for a in axes if a in "YXCS"]

    def __len__(self) -> int:
        """The number of images."""
        return int(np.prod(self.counts, dtype=np.int64))

    def index(self, image: int) -> tuple[int | slice, ...]:
        """Return the index of the array that holds one image, and little else."""
        found = list(self.index_of(image, self.counts))
        if self._deep:
            low, high = min(self.channels), max(self.channels)
            found[self.axes.index(self._deep)] = slice(low, high + 1)
        return tuple(found)

    def arrange(self, found: np.ndarray) -> np.ndarray:
        """Return the array at `index` as an image (H, W, C)."""
        letters = self._order
        if self._deep:
            low = min(self.channels)
            wanted = [c - low for c in self.channels]
            found = np.take(found, wanted, letters.index(self._deep))
        others = [a for a in ("C", "S") if a in letters]
        order = [letters.index(a) for a in ("Y", "X", *others)]
        return np.ascontiguousarray(found.transpose(order).reshape(self.shape))

    def index_of(self, image: int, counts: Sequence[int]) -> tuple[int | slice, ...]:
        """Return the index of one image, with all channels, in an array of other images.

        Args:
            image: The number of the image.
            counts: Lengths of the axes that number the images, the slowest first.
        """
        found: list[int | slice] = [slice(None)] * len(self.axes)
        for axis, place in zip(self._numbered, np.unravel_index(image, counts), strict=True):
            found[axis] = int(place)
        return tuple(found)

    def sizes_for(self, shape: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths of the axes of an array of other images.

        Args:
            shape: Height, width and channels of the images.
            counts: Lengths of the axes that number them, the slowest first.

        >>> AxisMap(Path("a.npy"), "XTY", (2, 3, 4)).sizes_for((8, 4, 1), (6,))
        (4, 6, 8)
        """
        height, width, channels = shape
        held = {"Y": height, "X": width, "S" if self._both else self._deep: channels}
        numbered = dict(zip(self._numbered, counts, strict=True))
        return tuple(numbered.get(i, held.get(a, 1)) for i, a in enumerate(self.axes))

    def back(self, pixels: np.ndarray) -> np.ndarray:
        """Return an image (H, W, C) in the order of the axes of the array that hold an image.

        It is the inverse of `arrange` for images of any size, and for all of their channels.

        >>> AxisMap(Path("a.npy"), "CXY", (2, 3, 4)).back(np.zeros((8, 6, 2))).shape
        (2, 6, 8)
        """
        sizes = dict(zip(self.axes, self.sizes_for(pixels.shape, self.counts), strict=True))
        letters = ["Y", "X", *(a for a in ("C", "S") if a in self._order)]
        spread = pixels.reshape([sizes[a] for a in letters])
        return spread.transpose([letters.index(a) for a in self._order])

    def image(self, array: Any, image: int) -> np.ndarray:
        """Read one image (H, W, C) of an array, or of what is indexed like one."""
        return self.arrange(np.asarray(array[self.index(image)]))

    @property
    def channel_axis(self) -> int | None:
        """The axis of which `channels` are chosen, or None if there is none."""
        return self.axes.index(self._deep) if self._deep else None

    @property
    def rest(self) -> list[int]:
        """The axes that do not number images."""
        return [i for i in range(len(self.axes)) if i not in self._numbered]


class Planes:
    """An array of which only planes can be read; it is indexed as `AxisMap.index` says.

    Args:
        lead: The lengths of the axes that number the planes.
        plane: The shape of a plane.
        read: Returns the plane of a number.

    >>> array = Planes((2, 3), (4,), lambda number: np.full(4, number))
    >>> array[slice(None), 1, 2].tolist()
    [1, 4]
    """

    def __init__(
        self, lead: Sequence[int], plane: Sequence[int], read: Callable[[int], np.ndarray]
    ) -> None:
        self.lead, self.read = tuple(lead), read
        self.shape = (*self.lead, *plane)

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        first, inside = index[: len(self.lead)], index[len(self.lead) :]
        count = int(np.prod(self.lead, dtype=np.int64))
        numbers = np.arange(count).reshape(self.lead)[first]
        parts = [np.array(self.read(int(n))[inside]) for n in numbers.ravel()]
        return np.stack(parts).reshape(*numbers.shape, *parts[0].shape)


def by_scene(file: Path, array: np.ndarray, letters: str, repeats: int) -> np.ndarray:
    """Move the captures of each scene, which lie along T, next to each other.

    Args:
        file: The file, for messages.
        array: An array whose first axes number the images.
        letters: These axes.
        repeats: Number N of captures of each scene.

    Returns:
        The array, with T split into scenes and N captures, of which the latter is the last axis
        that numbers the images. The array as it is if images in a row are captures of a scene: T
        is their fastest axis, or there is none, or scenes are whole parts of the file.

    Raises:
        InputError: The times are no whole number of scenes.

    >>> by_scene(Path("a.tif"), np.arange(8).reshape(4, 2), "TZ", 2).tolist()  # 2 planes
    [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]
    """
    axis = letters.find("T")
    times = array.shape[axis] if axis >= 0 else 1
    faster = int(np.prod(array.shape[axis + 1 : len(letters)], dtype=np.int64))
    if repeats == 1 or times == 1 or faster == 1:
        return array
    if times % repeats == 0:
        sides = array.shape[:axis] + (times // repeats, repeats) + array.shape[axis + 1 :]
        return np.moveaxis(array.reshape(sides), axis + 1, len(letters))
    if repeats % faster == 0:
        return array
    raise InputError(
        f"{file} has {times} times of {faster} images each (axes {letters}YX), no whole number of"
        f" scenes of {repeats}: give the number of captures that lie along T, or name another axis"
        " T with --axes"
    )


def in_order(file: Path, array: np.ndarray, axes: str, select: Selection) -> np.ndarray:
    """Return the images of an array of any axes, (N, C, H, W), as a view where possible.

    Args:
        file: The file, for messages.
        array: The array, which may be mapped from a file.
        axes: Its axes.
        select: The chosen channels.

    >>> in_order(Path("a.npy"), np.zeros((4, 5, 3, 2)), "YXCT", ALL).shape
    (2, 3, 4, 5)
    """
    images = AxisMap(file, axes, array.shape, select)
    numbered = [i for i in range(array.ndim) if i not in images.rest]
    both = "C" in axes and "S" in axes
    deep = [axes.index(a) for a in ("C", "S") if a in axes]
    view = array.transpose([*numbered, *deep, axes.index("Y"), axes.index("X")])
    if deep:
        view = _chosen_channels(view, len(numbered), images.channels)
    height, width, channels = images.shape
    if both:
        view = view.squeeze(len(numbered))
    view = by_scene(file, view, "".join(axes[i] for i in numbered), select.repeats)
    shape = (len(images), channels, height, width)
    if len(numbered) > 1 and not view.flags.c_contiguous:
        check_free_memory(file, view.nbytes)  # it may be copied
    return view.reshape(shape)


def _chosen_channels(view: np.ndarray, axis: int, wanted: list[int]) -> np.ndarray:
    """Return some entries of an axis, as a view if they are neighbors."""
    low, high = min(wanted), max(wanted)
    if wanted == list(range(low, high + 1)):
        return view[(slice(None),) * axis + (slice(low, high + 1),)]
    return np.take(view, wanted, axis)


def _suggest(count: int) -> str:
    return {2: "YX", 3: "TYX", 4: "TCYX", 5: "TZCYX"}.get(count, "TZCYX")
