"""The registry of image readers, and what a reader is.

A reader opens a file and returns its `Pages`: a sequence of images (H, W, C) of one shape and one
number type, each read when it is asked for. Everything that reads image files (`load_images`,
folders, `learn`, `restore`, `solve`) goes through the registry, so a registered format works in
every command. Results of a format that unmurk cannot write become TIFF files.

There are two ways to add a format:

- the decorator `register`, in a program of one's own;
- an entry point of the group ``unmurk.readers`` in an installed package. Its name is the suffix
  without the leading dot, its value a callable ``open(path) -> Pages``. It is imported when a file
  with this suffix is first read:

      [project.entry-points."unmurk.readers"]
      cube = "my_package:Cube"

This module imports no heavy library.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ENDINGS",
    "GROUP",
    "MEMBERS",
    "Pages",
    "Reader",
    "has_reader",
    "reader_of",
    "register",
    "split_member",
    "without_suffix",
]

MEMBERS = (".h5", ".hdf5", ".nxs", ".mat", ".czi", ".lif", ".zarr")
"""Suffixes of files that hold several arrays or images, one of which is named as FILE:NAME."""

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".nd2", *MEMBERS)
"""Suffixes of the formats that unmurk itself reads."""

GROUP = "unmurk.readers"
"""The group of entry points that add readers."""


class Pages:
    """The images of one open file, all of one shape and type; a context manager.

    A subclass sets the attributes in its constructor, without reading pixels, and defines `read`
    and, for more than one image, `__len__`. The registry turns every exception of a reader into
    one line that names the file, and checks the declared size before any pixel is read.

    Attributes:
        file: The file.
        shape: Height, width and channels of every image.
        dtype: Name of the number type of the pixels, such as "uint16".
        bits: Significant bits of an integer, where metadata tell fewer than the type has; else 0.
        axes: The axes of the file, such as "TZCYX"; C (and S) become channels, the others except
            Y and X number the images. Empty where the format has no names for them.
        metadata: What else the file says, with the names of `metadata.NAMES`.
    """

    file: Path
    shape: tuple[int, int, int]
    dtype: str
    bits: int = 0
    axes: str = ""
    metadata: Mapping[str, Any] = {}

    def __len__(self) -> int:
        """The number of images in the file."""
        return 1

    def read(self, page: int) -> "np.ndarray":
        """Return the pixels of one image, (H, W, C), in the numbers of the file."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Pages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Reader:
    """A registered reader.

    Attributes:
        name: The name of the format.
        suffixes: How names of its files end, in lower case, each with its leading dot.
        open: Opens a file: (path) -> `Pages`; see `selects`.
        single: Whether a file always holds exactly one image.
        number_type: Name of the number type of a file, from its header alone; None: the file has
            to be opened.
        selects: Whether it handles axes, channels and members itself: (path, `axes.Selection`) ->
            `Pages`. Channels of other formats are chosen after an image is read.
        folder: Whether its "files" may be folders.
    """

    name: str
    suffixes: tuple[str, ...]
    open: Callable[..., Pages]
    single: bool = False
    number_type: Callable[[Path], str] | None = None
    selects: bool = False
    folder: bool = False


_readers: dict[str, Reader] = {}  # by suffix

Opener = TypeVar("Opener", bound=Callable[..., Any])


def register(
    name: str,
    suffixes: Sequence[str],
    *,
    single: bool = False,
    number_type: Callable[[Path], str] | None = None,
    selects: bool = False,
    folder: bool = False,
) -> Callable[[Opener], Opener]:
    """Register a reader: a decorator of a subclass of `Pages`, or of a function (path) -> `Pages`.

    Args:
        name: The name of the format, for messages.
        suffixes: How names of its files end, such as (".fits", ".fits.gz").
        single, number_type, selects, folder: See `Reader`.

    Returns:
        The decorator. It returns what it decorates unchanged.

    Raises:
        InputError: A suffix without a leading dot, or one that another format has.

    >>> @register("cube", suffixes=(".cube",))
    ... class Cube(Pages):
    ...     def __init__(self, path):
    ...         self.file, self.shape, self.dtype = path, (2, 2, 1), "uint8"
    >>> reader_of(Path("scan.cube")).name
    'cube'
    """
    ends = tuple(suffix.lower() for suffix in suffixes)
    for suffix in ends:
        if not suffix.startswith(".") or len(suffix) < 2:
            raise InputError(f"reader '{name}': a suffix is written as '.fits', not '{suffix}'")
        known = _readers.get(suffix)
        if known is not None and known.name != name:
            raise InputError(f"reader '{name}': '{known.name}' reads {suffix} files already")

    def add(opener: Opener) -> Opener:
        reader = Reader(name, ends, opener, single, number_type, selects, folder)
        _readers.update(dict.fromkeys(ends, reader))
        return opener

    return add


def split_member(path: str | Path) -> tuple[Path, str]:
    """Split "scan.h5:entry/data" into the file and the name of an array or image in it.

    The name is empty if the path gives none, or if there is a file of the whole name.

    >>> split_member("scan.h5:entry/data")[1], split_member("a:b.png")[1]
    ('entry/data', '')
    """
    text = str(path)
    for place in (i for i, letter in enumerate(text) if letter == ":"):
        if text[:place].lower().endswith(MEMBERS) and not os.path.lexists(text):
            return Path(text[:place]), text[place + 1 :].strip("/")
    return Path(path), ""


def has_reader(file: Path) -> bool:
    """Whether a file's name ends in the suffix of a registered reader or of an entry point.

    The name of an array in the file may follow it, as in scan.h5:images.
    """
    return bool(_suffix(split_member(file)[0].name))


def without_suffix(name: str) -> str:
    """Remove the suffix of a picture format from a file's name.

    >>> without_suffix("a.b.PNG"), without_suffix("a.b")
    ('a.b', 'a.b')
    """
    return name[: len(name) - len(_suffix(name))]


def _suffix(name: str) -> str:
    """The longest suffix with a reader that a file's name ends in; "" without one."""
    lower = name.lower()
    known = max((s for s in (*ENDINGS, *_readers) if lower.endswith(s)), key=len, default="")
    if known:
        return known
    return max((s for s in _plugins() if lower.endswith(s)), key=len, default="")


def reader_of(file: Path) -> Reader:
    """Return the reader of a file, chosen by the longest suffix that its name ends in.

    Registered readers come before entry points.

    Raises:
        InputError: No reader has such a suffix, or the package of the reader cannot be imported.
    """
    name = file.name.lower()
    suffix = max((s for s in _readers if name.endswith(s)), key=len, default=None)
    if suffix is not None:
        return _readers[suffix]
    suffix = _suffix(name)
    if suffix not in _plugins():
        raise InputError(
            f"cannot read {file}: no reader is known for files of this kind; save it as TIFF, PNG "
            "or .npy"
        )
    entry = _plugins()[suffix]
    try:
        opener = entry.load()
    except Exception as error:  # a package of a stranger may fail in any way
        raise InputError(
            f"cannot read {file}: the reader {entry.value} does not load "
            f"({' '.join(str(error).split()) or type(error).__name__}); install it again"
        ) from error
    _readers[suffix] = Reader(entry.name, (suffix,), opener)
    return _readers[suffix]


@cache
def _plugins() -> dict[str, packages.EntryPoint]:
    """The entry points that add readers, by suffix, none of them imported."""
    return {f".{entry.name.lower()}": entry for entry in packages.entry_points(group=GROUP)}
