"""HDF5 files, one data set of them: images, or measured numbers such as k-space.

A data set is named as "scan.h5:entry/data". Without a name it is the one that the file marks as
its default (NeXus), or the only one that can hold images. Data sets are read image by image, never
whole. Links to other files, data sets whose numbers lie in other files, and virtual data sets are
not followed.

The axes are those of --axes, else of the attribute `axistags` (ilastik) or of the labels of the
dimensions, else they follow from the shape as for .npy files. A .mat file of MATLAB 7.3 is an HDF5
file whose axes are reversed: its axes are named in the order of MATLAB, (row, column, ...).
"""

import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, size_text
from ..axes import AxisMap, Selection
from ..layouts import layout_of
from ..limits import check_file, check_numbers, check_pixels, reading
from .metadata import collect, micrometers
from .optional import library
from .registry import HDF5, Pages, split_member

__all__ = [
    "SUFFIXES",
    "Dataset",
    "Kspace",
    "check_storage",
    "complex_of",
    "has_dataset",
    "is_hdf5",
    "open_dataset",
    "read_part",
]

SUFFIXES = (*HDF5, ".mat")
VISITED = 10_000  # objects of a file that are looked at
LISTED = 12  # data sets that a message lists
DEPTH = 32  # links of a name
RATIO = 2**14  # what stored bytes may grow to
GZIP, FLETCHER = 1, 3  # numbers of filters
DEFLATE = 1032  # what bytes of a gzip stream may grow to
SMALL = 2**28  # bytes of a chunk that may be inflated without a check
PAIRS = (("real", "imag"), ("r", "i"))  # fields of complex numbers
LETTERS = {"H": "Y", "W": "X"}


def is_hdf5(path: str | Path) -> bool:
    """Whether a path names an HDF5 file, with or without a data set of it.

    >>> is_hdf5("scan.h5:kspace"), is_hdf5("scan.npy")
    (True, False)
    """
    return split_member(path)[0].name.lower().endswith(SUFFIXES)


@contextmanager
def open_dataset(path: str | Path, member: str = "", kind: str = "image") -> Iterator[Any]:
    """Open a data set of a file, as an `h5py.Dataset`.

    Args:
        path: The file, or the file and the data set: "scan.h5:kspace".
        member: The data set, if the path does not name it; empty: see the module.
        kind: "image" or "measurement", what is searched for without a name: real numbers, or
            complex ones too.

    Raises:
        InputError: h5py is missing, the file is damaged, it has no such data set or several to
            choose from, or the data set lies in another file or declares more than it holds.

    >>> import h5py
    >>> with h5py.File("scan.h5", "w") as file:
    ...     file["images"] = np.zeros((3, 8, 8), "f4")
    >>> with open_dataset("scan.h5:images") as data:
    ...     data.shape
    (3, 8, 8)
    """
    file, named = split_member(path)
    check_file(file)
    h5py = library(file, "h5py", "hdf5")
    if _old_matlab(file):
        raise InputError(
            f"cannot read {file}: it has the format of MATLAB 5: save it with save(..., '-v7.3')"
        )
    with reading(file), _opened(h5py, file) as opened:
        found = _Finder(h5py, file, opened)
        dataset = found.named(named or member) if named or member else found.only(kind)
        check_storage(file, dataset)
        yield dataset


def _opened(h5py: Any, file: Path) -> Any:
    """Open a file without a lock, or as this process has it open already."""
    for locking in (False, None):
        try:
            return h5py.File(file, "r", locking=locking)
        except OSError as error:
            if "locking" not in str(error):  # HDF5 asks for the lock of the other handle
                raise
    return h5py.File(file, "r", locking=True)


def has_dataset(path: str | Path, name: str) -> bool:
    """Whether an HDF5 file has a data set of this name.

    Raises:
        InputError: See `open_dataset`.

    >>> import h5py
    >>> with h5py.File("named.h5", "w") as file:
    ...     file["entry/images"] = np.zeros((3, 8, 8), "f4")
    >>> has_dataset("named.h5", "entry/images"), has_dataset("named.h5", "kspace")
    (True, False)
    """
    file, _ = split_member(path)
    check_file(file)
    h5py = library(file, "h5py", "hdf5")
    with reading(file), _opened(h5py, file) as opened:
        found = _Finder(h5py, file, opened)._walk(opened, name.split("/"), 0)
        return isinstance(found, h5py.Dataset)


def _old_matlab(file: Path) -> bool:
    with reading(file), file.open("rb") as stream:
        return stream.read(10) == b"MATLAB 5.0"


class _Finder:
    """Data sets of a file, found without following links to other files."""

    def __init__(self, h5py: Any, file: Path, opened: Any) -> None:
        self.h5py, self.file, self.opened = h5py, file, opened

    def named(self, name: str, depth: int = 0) -> Any:
        """Return the data set of a name."""
        found = self._walk(self.opened, [p for p in name.split("/") if p], depth)
        if not isinstance(found, self.h5py.Dataset):
            raise InputError(f"{self.file} has no data set '{name}'{self._list()}")
        return found

    def _walk(self, start: Any, parts: list[str], depth: int) -> Any:
        """Follow a path of hard links, and of soft links inside the file; None: nowhere."""
        here = start
        for part in parts:
            if depth + len(parts) > DEPTH or not isinstance(here, self.h5py.Group):
                return None
            # `in` would follow the link
            exists = here.id.links.exists(part.encode())
            link = here.get(part, getlink=True) if exists else None
            if isinstance(link, self.h5py.ExternalLink):
                raise InputError(
                    f"cannot read {self.file}: '{part}' is a link to another file, "
                    f"{link.filename}: give that file"
                )
            if isinstance(link, self.h5py.SoftLink):
                first = self.opened if link.path.startswith("/") else here
                steps = [p for p in link.path.split("/") if p not in ("", ".")]
                here = self._walk(first, steps, depth + len(parts))
            elif isinstance(link, self.h5py.HardLink):
                here = here[part]
            else:
                return None
        return here

    def datasets(self) -> Iterator[tuple[str, Any]]:
        """Iterate over names and data sets, each of them once."""
        left: list[tuple[str, Any]] = [("", self.opened)]
        observed: set[Any] = set()
        while left:
            where, group = left.pop()
            for name in group.keys():
                link = group.get(name, getlink=True)
                if len(observed) >= VISITED or not isinstance(link, self.h5py.HardLink):
                    continue
                found = group[name]
                token = self.h5py.h5o.get_info(found.id).addr
                if token in observed or name == "#refs#":  # cells of MATLAB
                    continue
                observed.add(token)
                if isinstance(found, self.h5py.Group):
                    left.append((f"{where}{name}/", found))
                elif isinstance(found, self.h5py.Dataset):
                    yield f"{where}{name}", found

    def only(self, kind: str) -> Any:
        """Return the default data set, or the only one that can hold what is searched for."""
        default = self._default()
        if default is not None:
            return default
        found = [d for _, d in self.datasets() if _fits(d, kind)]
        if kind == "measurement":
            complex_ones = [d for d in found if complex_of(d.dtype)]
            found = [d for d in complex_ones if d.name == "/kspace"] or complex_ones or found
        if len(found) != 1:
            how_many = "several data sets" if found else "no data set"
            raise InputError(
                f"{self.file} has {how_many} that can hold {kind}s{self._list()}: choose one as "
                f"{self.file.name}:NAME"
            )
        return found[0]

    def _default(self) -> Any:
        """Return the data set of the default plot of a NeXus file; None without one."""
        group = self.opened
        with suppress(Exception):  # attributes of other programs
            for _ in range(4):
                if "signal" in group.attrs:
                    found = self._walk(group, [str(group.attrs["signal"])], 0)
                    return found if isinstance(found, self.h5py.Dataset) else None
                group = self._walk(group, [str(group.attrs["default"])], 0)
        return None

    def _list(self) -> str:
        shapes = [
            f"{name} {size_text(d.shape or ()) or 'scalar'} {d.dtype}"
            for name, d in sorted(self.datasets())
        ]
        more = f" and {len(shapes) - LISTED} more" if len(shapes) > LISTED else ""
        return f": it holds {', '.join(shapes[:LISTED]) or 'none'}{more}"


def _fits(dataset: Any, kind: str) -> bool:
    """Whether a data set can hold images, or measurements."""
    numbers = dataset.dtype.kind in "buif" or (kind == "measurement" and complex_of(dataset.dtype))
    sides = sorted(dataset.shape or ())
    return bool(numbers) and len(sides) >= 2 and sides[-2] > 3 and sides[0] > 0


def complex_of(dtype: np.dtype) -> tuple[str, str] | None:
    """Return the fields of complex numbers, ("", "") for a complex type; None for other types.

    >>> complex_of(np.dtype([("real", "f4"), ("imag", "f4")]))
    ('real', 'imag')
    """
    if dtype.kind == "c":
        return "", ""
    names = dtype.names or ()
    return next((pair for pair in PAIRS if tuple(names) == pair), None)


def check_storage(file: Path, dataset: Any) -> None:
    """Check where a data set lies, and its size against the bytes that are stored.

    Raises:
        InputError: It has no numbers, lies in other files, or declares more than it holds.

    >>> import h5py
    >>> with h5py.File("none.h5", "w") as file:
    ...     file["images"] = np.zeros((0, 8, 8))
    ...     check_storage(Path("none.h5"), file["images"])
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read none.h5: /images holds no array
    """
    shape = dataset.shape
    if shape is None or not len(shape) or min(shape) < 1:
        raise InputError(f"cannot read {file}: {dataset.name} holds no array")
    if dataset.is_virtual or dataset.external:
        raise InputError(
            f"cannot read {file}: the numbers of {dataset.name} lie in other files: give a file "
            "that holds them"
        )
    size = dataset.size * dataset.dtype.itemsize
    stored = min(int(dataset.id.get_storage_size()), file.stat().st_size)
    if size > stored * (RATIO if dataset.chunks else 1):
        raise InputError(
            f"cannot read {file}: {dataset.name} declares {size} bytes and holds {stored}"
        )
    if dataset.chunks:
        check_numbers(file, int(np.prod(dataset.chunks, dtype=float)), dataset.dtype.itemsize)


def read_part(file: Path, dataset: Any, index: Any) -> np.ndarray:
    """Return a part of a data set, after a check of what its compressed chunks inflate to.

    Args:
        file: The file, which a message names.
        dataset: The open data set, an `h5py.Dataset`.
        index: What NumPy takes as an index of it; () is the whole of it.

    Raises:
        InputError: A chunk inflates to more than it declares.

    >>> import h5py
    >>> with h5py.File("part.h5", "w") as file:
    ...     file["scale"] = np.arange(12).reshape(3, 4)
    >>> with open_dataset("part.h5:scale") as dataset:
    ...     read_part(Path("part.h5"), dataset, 1)
    array([4, 5, 6, 7])
    """
    if dataset.chunks and _deflated(dataset) and file.stat().st_size * DEFLATE > SMALL:
        index = index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (len(dataset.shape) - len(index)))
        _check_chunks(file, dataset, index)
    return np.asarray(dataset[index])


def _deflated(dataset: Any) -> bool:
    """Whether the chunks are stored as gzip streams."""
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(n)[0] for n in range(properties.get_nfilters())]
    return [f for f in filters if f != FLETCHER][-1:] == [GZIP]


def _check_chunks(file: Path, dataset: Any, index: tuple[Any, ...]) -> None:
    """Check that the chunks of a part inflate to no more than they declare.

    The HDF5 library inflates a chunk to the end, however long that is.

    Raises:
        InputError: One does not.
    """
    size = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    starts = []
    for place, length, chunk in zip(index, dataset.shape, dataset.chunks, strict=True):
        first, last = (place, place + 1) if isinstance(place, int) else place.indices(length)[:2]
        starts.append(range(first // chunk * chunk, last, chunk))
    for corner in itertools.product(*starts):
        about = dataset.id.get_chunk_info_by_coord(corner)
        if about.byte_offset is None or about.size * DEFLATE <= SMALL:
            continue
        stored = dataset.id.read_direct_chunk(corner)[1]
        found = zlib.decompressobj().decompress(stored, size + 1)
        if len(found) > size:
            raise InputError(
                f"cannot read {file}: a chunk of {dataset.name} holds more than the {size} bytes "
                "that it declares"
            )


class Dataset(Pages):
    """The images of a data set in an HDF5 file.

    Args:
        file: The file.
        select: The data set, its axes, and the channels to read.

    Attributes:
        dataset: The `h5py.Dataset`.
        map: Where its images lie.

    Raises:
        InputError: See `open_dataset`; or the numbers are complex, the axes leave open which of
            them holds the channels, or an image is too large.

    >>> import h5py
    >>> with h5py.File("set.h5", "w") as file:
    ...     file["images"] = np.arange(40, dtype=np.uint16).reshape(2, 4, 5)
    >>> with Dataset(Path("set.h5"), Selection()) as pages:
    ...     len(pages), pages.shape, int(pages.read(1).max())
    (2, (4, 5, 1), 39)
    """

    def __init__(self, file: Path, select: Selection) -> None:
        self.file = file
        self._open = open_dataset(file, select.member)
        dataset = self.dataset = self._open.__enter__()
        try:
            if dataset.dtype.kind not in "buif":
                what = "complex numbers, which are no image: use the operator mri:file"
                what = what if complex_of(dataset.dtype) else f"{dataset.dtype}, not numbers"
                raise InputError(f"cannot read {file}: {dataset.name} holds {what}")
            self._bool = dataset.dtype.kind == "b"
            self.axes = _axes(file, dataset, select)
            self.map = AxisMap(file, self.axes, dataset.shape, select)
            self.shape, self.lead = self.map.shape, self.map.counts
            check_pixels(file, *self.shape)
            check_numbers(file, int(np.prod(self.shape)), dataset.dtype.itemsize)
            self.dtype = "uint8" if self._bool else dataset.dtype.name
            self.metadata = _metadata(dataset, self.axes)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.map)

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        with reading(self.file):
            found = read_part(self.file, self.dataset, self.map.index(page))
        pixels = self.map.arrange(found)
        if self._bool:
            return pixels.astype(np.uint8) * np.uint8(255)
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)

    def close(self) -> None:
        """Close the file."""
        self._open.__exit__(None, None, None)


def _axes(file: Path, dataset: Any, select: Selection) -> str:
    """Return the axes of a data set, in the order of the file."""
    shape = dataset.shape
    if file.suffix.lower() == ".mat":
        shape = shape[::-1]
        return select.axes_for(file, _matlab(shape), shape)[::-1]
    found = select.axes_for(file, _named(dataset), shape)
    return found or "".join(LETTERS.get(a, a) for a in _guessed(file, dataset))


def _guessed(file: Path, dataset: Any) -> str:
    if len(dataset.shape) > 4:
        raise InputError(
            f"{file}: {dataset.name} has {len(dataset.shape)} axes of lengths {dataset.shape}: "
            "name them, such as --axes TZCYX"
        )
    return layout_of(file, dataset)


def _matlab(shape: tuple[int, ...]) -> str:
    """Return the axes of a MATLAB array: rows and columns come first, images last."""
    color = len(shape) == 3 and shape[2] in (1, 3)
    return {2: "YX", 3: "YXC" if color else "YXN", 4: "YXCN"}.get(len(shape), "")


def _named(dataset: Any) -> str:
    """Return the axes that a data set names; empty if it names none, or unknown ones."""
    names: list[str] = []
    with suppress(Exception):  # attributes of other programs
        if "axistags" in dataset.attrs:
            tags = json.loads(str(dataset.attrs["axistags"]))["axes"]
            names = [str(tag["key"]) for tag in tags]
        else:
            names = [str(d.label) for d in dataset.dims]
    axes = "".join(names).upper()
    known = [len(name) == 1 for name in names]
    if not known or not all(known) or len(set(axes)) < len(axes) or not {"Y", "X"} <= set(axes):
        return ""
    return axes


def _metadata(dataset: Any, axes: str) -> dict[str, Any]:
    """Return metadata of the attributes that microscopy programs write."""
    attributes: dict[str, Any] = {}
    with suppress(Exception):  # attributes of other programs
        for name, value in list(dataset.attrs.items())[:256]:
            array = np.asarray(value)
            if array.size <= 64 and array.dtype.kind in "buifSUO":
                text = array.dtype.kind in "SUO"
                attributes[str(name)] = str(value)[:4096] if text else array.tolist()
    sides: dict[str, Any] = {}
    size = attributes.get("element_size_um")
    if isinstance(size, list) and len(size) == 3:
        sides = dict(zip("zyx", (micrometers(s) for s in size), strict=True))
    return collect(
        **sides,
        exposure=attributes.get("exposure"),
        units=attributes.get("units"),
        source=attributes or None,
    )


class Kspace:
    """Measurements in a data set, read one by one; complex numbers become pairs of channels.

    Args:
        path: The file, or the file and the data set: "scan.h5:kspace". Without a name it is
            "kspace", as in fastMRI, or the only one that holds complex numbers, or the only one.

    Attributes:
        shape: (N, C, H, W). Complex data (N, coils, H, W), or (N, H, W) for one coil, have 2 coils
            channels: coil by coil, the real and the imaginary part.
        is_complex: Whether the numbers are complex.
        white: The attribute `max` of fastMRI, the largest value of the reference images; None
            without it.

    Raises:
        InputError: See `open_dataset`; or the data set has another number of axes.

    >>> import h5py
    >>> with h5py.File("coils.h5", "w") as file:
    ...     file["kspace"] = np.full((5, 2, 8, 8), 3 + 4j, np.complex64)
    >>> kspace = Kspace("coils.h5")
    >>> kspace.shape, kspace.read([0])[0, :, 0, 0].tolist()  # 2 coils: 4 channels
    ((5, 4, 8, 8), [3.0, 4.0, 3.0, 4.0])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with open_dataset(path, kind="measurement") as dataset:
            fields, shape = complex_of(dataset.dtype), tuple(int(n) for n in dataset.shape)
            if len(shape) not in (3, 4) or (fields is None and dataset.dtype.kind not in "buif"):
                raise InputError(
                    f"{path} holds {dataset.dtype} of shape {shape}, which is not (slices, coils, "
                    "H, W) or (slices, H, W)"
                )
            self.is_complex, self.name = fields is not None, str(dataset.name).strip("/")
            shape = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
            self.white = _white(dataset) if self.is_complex else None
        self.shape = (shape[0], shape[1] * (2 if self.is_complex else 1), *shape[2:])
        check_pixels(split_member(path)[0], *self.shape[-2:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def note(self) -> str:
        """A remark about `white` for the user; empty without it."""
        if self.white is None:
            return ""
        return (
            f"an image of value 1 stands for {self.white:g}, the attribute max of the file; "
            "--range 0 WHITE sets another number"
        )

    def read(self, numbers: list[int]) -> np.ndarray:
        """Return measurements (B, C, H, W), float32."""
        found = np.empty((len(numbers), *self.shape[1:]), np.float32)
        file = split_member(self.path)[0]
        with open_dataset(file, self.name, "measurement") as dataset:
            for entry, number in zip(found, numbers, strict=True):
                with np.errstate(over="ignore"):
                    _fill(entry, read_part(file, dataset, number))
        return found


def _fill(entry: np.ndarray, values: np.ndarray) -> None:
    """Write the numbers of a measurement, (coils, H, W) or (H, W), to channels (C, H, W)."""
    fields = complex_of(values.dtype)
    values = values if values.ndim == 3 else values[None]
    if fields is None:
        entry[:] = values
        return
    real, imag = fields
    entry[0::2] = values[real] if real else values.real
    entry[1::2] = values[imag] if imag else values.imag


def _white(dataset: Any) -> float | None:
    with suppress(Exception):  # attributes of other programs
        found = float(dataset.file.attrs["max"])
        return found if 0 < found < float("inf") else None
    return None
