"""The registry of image formats: what a reader and a writer are.

A reader opens a file and returns its `Pages`: a sequence of images (H, W, C) of one shape and one
number type, each read when it is asked for. Everything that reads image files (`load_images`,
folders, `learn`, `restore`, `solve`) goes through the registry, so a registered format works in
every command.

A format may have a `Writer` too, which writes the results of a file in the format that the file
came in, with its metadata. Results of a format without one become TIFF files.

A reader of files that hold several images or arrays takes a selection, which is written in
brackets behind the name: ``scan.fits[SCI]``. A selection behind the name of a folder applies to
every file in it whose reader takes one.

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
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ...errors import InputError
from ...plugins import load, offered

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ENDINGS",
    "GROUP",
    "MEMBERS",
    "Pages",
    "Reader",
    "Writer",
    "has_reader",
    "is_written",
    "member_of",
    "real_path",
    "register",
    "registered",
    "split_member",
    "suffix_of",
    "without_suffix",
]

HDF5 = (".h5", ".hdf5", ".nxs")
MEMBERS = (*HDF5, ".mat", ".czi", ".lif", ".zarr")
"""Suffixes of files that hold several arrays or images, one of which is named as FILE:NAME."""

FITS = (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fts.gz", ".fits.fz", ".fz")
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
ENDINGS = (*PICTURES, ".nd2", *MEMBERS, *FITS, *NIFTI, *DICOM)
"""Suffixes of the formats that unmurk itself reads."""

WRITTEN = (".png", ".tif", ".tiff", *FITS, *NIFTI, *DICOM, *HDF5)
"""Suffixes of the formats that unmurk itself writes."""

MAGIC = (128, b"DICM")  # where a DICOM file says what it is; its name often has no suffix
SELECTION = re.compile(r"^(.*[^/\\\[])\[([^\[\]]*)\]$", re.DOTALL)

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
        span: The numbers of black and white, where metadata define them for numbers that are not
            the stored ones (DICOM's rescaled units); else None.
        masked: Whether `bad` may return a mask.
        lead: Lengths of the axes that number the images, the slowest first; empty where one axis
            does, or the format has no names for them.
        note: A remark for the user about how the file is read, or an empty text.
        metadata: What else the file says, with the names of `metadata.NAMES`.

    >>> import numpy as np
    >>> class Ramps(Pages):
    ...     shape, dtype = (1, 3, 1), "uint8"
    ...     def __len__(self):
    ...         return 2
    ...     def read(self, page):
    ...         return np.arange(3, dtype=np.uint8).reshape(self.shape) * (page + 1)
    >>> with Ramps() as pages:
    ...     pages.read(1).flatten().tolist()
    [0, 2, 4]
    """

    file: Path
    shape: tuple[int, int, int]
    dtype: str
    bits: int = 0
    axes: str = ""
    span: tuple[float, float] | None = None
    masked: bool = False
    lead: tuple[int, ...] = ()
    note: str = ""
    metadata: Mapping[str, Any] = {}

    def __len__(self) -> int:
        """The number of images in the file."""
        return 1

    def read(self, page: int) -> "np.ndarray":
        """Return the pixels of one image, (H, W, C), in the numbers of the file."""
        raise NotImplementedError

    @property
    def stored_dtype(self) -> "np.dtype | str":
        """The number type of the file, with its byte order."""
        return self.dtype

    def offsets(self, page: int) -> tuple[int, ...]:
        """Return where the numbers of an image begin in the file.

        Returns:
            One offset for numbers (H, W, C) that lie in the file as `read` returns them, or one
            for each channel of planes (H, W). Empty where they have to be decoded.
        """
        return ()

    def bad(self, page: int) -> "np.ndarray | None":
        """Return which pixels of an image the file marks as bad, (H, W) bool; None: none."""
        return None

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Pages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer(Protocol):
    """A writer of one file of results; the file appears under its name on `close`.

    A format registers a callable ``writer(out, source, history, floats)`` that returns one. `out`
    is the file to write and `source` the file that the images came from, with its selection;
    `history` is one line that says how the results were made. The images come in the order of the
    pages of the source and in its number type, or as float32 where `floats` is true (standard
    deviations; only formats with `Reader.floats` are asked for it).

    A writer of a format with `Reader.scenes` also takes `repeats`: each image that it gets then
    stands for so many images of the source in a row, the repeated captures of a scene. The axes
    are those of the source, shortened by `scaled.scenes_along`. A writer of a format with
    `Reader.selects` also takes `select`, the axes and channels of the source that were read.

    The writer copies the metadata of the source that still hold. Height and width may differ from
    those of the source (super-resolution): the writer then scales what depends on the size of a
    pixel. All bytes go through `io.atomic`, so nothing half-written gets a name.

    >>> import numpy as np
    >>> from unmurk.io import atomic
    >>> class Sums:
    ...     def __init__(self, out, source, history, floats):
    ...         self.out, self.sums = out, []
    ...     def write(self, pixels):
    ...         self.sums.append(int(pixels.sum()))
    ...     def close(self):
    ...         atomic.write(self.out, str(self.sums).encode())
    ...     def abandon(self): ...
    >>> writer: Writer = Sums(Path("a.sums"), Path("a.cube"), "restored", False)
    >>> for value in (1, 2):
    ...     writer.write(np.full((4, 6, 1), value))
    >>> writer.close()
    >>> Path("a.sums").read_text()
    '[24, 48]'
    """

    def write(self, pixels: "np.ndarray") -> None:
        """Write the next image, (H, W, C)."""

    def close(self) -> None:
        """Write what is left and give the file its name."""

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""


@dataclass(frozen=True)
class Reader:
    """A registered format.

    Attributes:
        name: The name of the format.
        suffixes: How names of its files end, in lower case, each with its leading dot.
        open: Opens a file: (path) -> `Pages`; see `selects` and `member`.
        single: Whether a file always holds exactly one image.
        number_type: Name of the number type of a file, from its header alone; None: the file has
            to be opened.
        selects: Whether it handles axes, channels and members itself: (path, `axes.Selection`) ->
            `Pages`. Channels of other formats are chosen after an image is read.
        member: Whether it handles the name of an image in the file: (path, name) -> `Pages`, with
            "" where none is given.
        folder: Whether its "files" may be folders.
        writer: Returns a `Writer`: (out, source, history, floats); None: the format is not
            written.
        floats: Whether the writer takes float32 pixels for any source.
        scenes: Whether the writer takes `repeats`, the number of captures of each scene.

    >>> from unmurk.io.formats.readers import reader_of
    >>> reader = reader_of(Path("a.fits"))
    >>> reader.name, reader.single, reader.floats
    ('FITS', False, True)
    """

    name: str
    suffixes: tuple[str, ...]
    open: Callable[..., Pages]
    single: bool = False
    number_type: Callable[[Path], str] | None = None
    selects: bool = False
    member: bool = False
    folder: bool = False
    writer: Callable[..., Writer] | None = None
    floats: bool = False
    scenes: bool = False


_readers: dict[str, Reader] = {}  # by suffix

Opener = TypeVar("Opener", bound=Callable[..., Any])


def register(
    name: str,
    suffixes: Sequence[str],
    *,
    single: bool = False,
    number_type: Callable[[Path], str] | None = None,
    selects: bool = False,
    member: bool = False,
    folder: bool = False,
    writer: Callable[..., Writer] | None = None,
    floats: bool = False,
    scenes: bool = False,
) -> Callable[[Opener], Opener]:
    """Register a reader: a decorator of a subclass of `Pages`, or of a function (path) -> `Pages`.

    Args:
        name: The name of the format, for messages.
        suffixes: How names of its files end, such as (".fits", ".fits.gz").
        single, number_type, selects, member, folder, writer, floats, scenes: See `Reader`.

    Returns:
        The decorator. It returns what it decorates unchanged.

    Raises:
        InputError: A suffix without a leading dot, or one that another format has.

    >>> @register("cube", suffixes=(".cube",))
    ... class Cube(Pages):
    ...     def __init__(self, path):
    ...         self.file, self.shape, self.dtype = path, (2, 2, 1), "uint8"
    >>> registered(Path("scan.cube")).name
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
        kinds = (single, number_type, selects, member, folder, writer, floats, scenes)
        reader = Reader(name, ends, opener, *kinds)
        _readers.update(dict.fromkeys(ends, reader))
        return opener

    return add


def split_member(path: str | Path) -> tuple[Path, str]:
    """Split "scan.h5:entry/data" or "scan.fits[SCI]" into the file and the name in it.

    The name is empty if the path gives none, or if there is a file of the whole name.

    >>> split_member("scan.h5:entry/data")[1], split_member("night/scan.fits[SCI,2]")[1]
    ('entry/data', 'SCI,2')
    >>> split_member("a:b.png")[1]
    ''
    """
    text = str(path)
    bracketed = SELECTION.match(text)
    if bracketed is not None:
        return (Path(path), "") if _exists(text) else (Path(bracketed[1]), bracketed[2])
    for place in (i for i, letter in enumerate(text) if letter == ":"):
        if text[:place].lower().endswith(MEMBERS) and not _exists(text):
            return Path(text[:place]), text[place + 1 :].strip("/")
    return Path(path), ""


def has_reader(file: Path) -> bool:
    """Whether a file has a reader: by the suffix of its name, or as DICOM by its content.

    The name of an array in the file may follow it, as in scan.h5:images or scan.fits[SCI].

    >>> has_reader(Path("a.fits[SCI]")), has_reader(Path("notes.txt"))
    (True, False)
    """
    return bool(suffix_of(file)) or _is_dicom(real_path(file))


def real_path(path: Path) -> Path:
    """Return the path of the file or the folder itself, without the name of a part of it.

    >>> real_path(Path("night/a.fits[SCI]")).name
    'a.fits'
    """
    return split_member(path)[0]


def member_of(path: Path) -> str:
    """Return the name of an array or image in a file that follows its path; "" without one.

    >>> member_of(Path("a.fits[SCI]")), member_of(Path("scan.h5:images"))
    ('SCI', 'images')
    """
    return split_member(path)[1]


def is_written(path: Path) -> bool:
    """Whether the suffix of a name is that of a format that unmurk writes.

    >>> is_written(Path("a.tif")), is_written(Path("a.czi"))
    (True, False)
    """
    suffix = suffix_of(path)
    known = _readers.get(suffix)
    return suffix in WRITTEN or (known is not None and known.writer is not None)


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_dicom(file: Path) -> bool:
    """Whether the bytes of a regular file are those of DICOM; the index of a disk is none."""
    try:
        if not file.is_file() or file.name == "DICOMDIR":
            return False
        with file.open("rb") as stream:
            start, magic = MAGIC
            return stream.read(start + len(magic))[start:] == magic
    except (OSError, ValueError):
        return False


def without_suffix(name: str) -> str:
    """Remove the suffix of a picture format from a file's name.

    >>> without_suffix("a.b.PNG"), without_suffix("a.nii.gz"), without_suffix("a.b")
    ('a.b', 'a', 'a.b')
    """
    return name[: len(name) - len(suffix_of(Path(name)))]


def suffix_of(file: Path) -> str:
    """Return the suffix of a file's name that has a reader, in lower case; "" without one.

    >>> suffix_of(Path("a.OME.TIF")), suffix_of(Path("notes.txt"))
    ('.tif', '')
    """
    return _suffix(real_path(file).name)


def _suffix(name: str) -> str:
    """The longest suffix with a reader that a file's name ends in; "" without one."""
    lower = name.lower()
    known = max((s for s in (*ENDINGS, *_readers) if lower.endswith(s)), key=len, default="")
    if known:
        return known
    return max((s for s in _plugins() if lower.endswith(s)), key=len, default="")


def registered(file: Path) -> Reader:
    """Return the registered reader of a file, chosen by the longest suffix that its name ends in.

    Registered readers come before entry points. A file without a known suffix may be DICOM.
    The readers of this package count once their modules are imported; see `readers.reader_of`.

    Raises:
        InputError: No reader has such a suffix, or the package of the reader cannot be imported.

    >>> registered(Path("notes.txt"))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read notes.txt: no reader is known for files of this kind; ...
    """
    name = real_path(file).name.lower()
    suffix = max((s for s in _readers if name.endswith(s)), key=len, default=None)
    if suffix is not None:
        return _readers[suffix]
    suffix = _suffix(name)
    if suffix not in _plugins() and DICOM[0] in _readers and _is_dicom(real_path(file)):
        return _readers[DICOM[0]]
    if suffix not in _plugins():
        raise InputError(
            f"cannot read {file}: no reader is known for files of this kind; save it as TIFF, PNG "
            "or .npy"
        )
    entry = _plugins()[suffix]
    opener = load(entry, f"cannot read {file}: its reader")
    _readers[suffix] = Reader(entry.name, (suffix,), opener)
    return _readers[suffix]


@cache
def _plugins() -> dict[str, EntryPoint]:
    """The entry points that add readers, by suffix, none of them imported."""
    return {f".{name.lower()}": entry for name, entry in offered(GROUP).items()}
