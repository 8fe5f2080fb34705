"""Results of HDF5 files: a file with the data set that the images came from, written with h5py.

The data set has the name, the axes, the number type, the compression and the attributes of the
source, and so have the groups that it lies in (a NeXus file still marks it as its default). The
coordinates along an axis (dimension scales, and the `axes` of NeXus) are copied if the axis has
the same length. Other data sets are left out, because masks and errors of the source do not hold
for the result. A line is added to the attribute `history`.

Files of MATLAB (.mat) are not written: only MATLAB writes what it can be sure to read.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...errors import InputError
from ..atomic import unwritable
from ..axes import ALL, Selection
from ..limits import reading
from .hdf5 import Dataset, check_storage, read_part
from .optional import library
from .registry import HDF5, member_of, real_path, register
from .scaled import HeaderWriter

__all__ = ["Hdf5Writer"]

OWN = {"CLASS", "NAME", "DIMENSION_LABELS", "DIMENSION_LIST", "REFERENCE_LIST"}  # of h5py's scales
STALE = {"actual_range", "checksum", "md5"}  # of the numbers of the source
HISTORY = "history"
SIZE = "element_size_um"  # of a voxel, along z, y and x
CHUNK = 2**26  # most bytes of a chunk
ATTRIBUTES, LARGEST = 1024, 2**20  # attributes of an object, and bytes of one, that are copied
COORDINATES = 2**20  # most numbers of the coordinates along an axis


@dataclass(frozen=True)
class _Attribute:
    """An attribute: its value, and the type and shape that it is stored in."""

    value: Any
    dtype: Any
    shape: Any


@dataclass(frozen=True)
class _Coordinates:
    """Numbers along an axis of the data set: a data set of their own."""

    name: str
    values: np.ndarray
    attributes: dict[str, _Attribute]
    axis: int
    label: str | None
    """What the axis calls it, as a dimension scale; None: it is none."""


@dataclass(frozen=True)
class _Source:
    """What a result takes over from its source, beside numbers."""

    groups: dict[str, dict[str, _Attribute]]
    attributes: dict[str, _Attribute]
    labels: list[str]
    coordinates: list[_Coordinates] = field(default_factory=list)


class Hdf5Writer(HeaderWriter):
    """Write images into an HDF5 file, as a data set like the one that they came from.

    Args:
        out: The file.
        source: The file that the images came from, with the name of the data set.
        history: A line that says how they were made.
        floats: Whether the numbers are written as float32.
        repeats: Number of captures of each scene; see `registry.Writer`.
        select: The axes and channels that were read.

    >>> import h5py
    >>> with h5py.File("raw.h5", "w") as file:
    ...     file["entry/cells"] = np.zeros((2, 4, 5), np.uint16)
    ...     file["entry/cells"].attrs["stain"] = "DAPI"
    >>> writer = Hdf5Writer(Path("result.h5"), Path("raw.h5:entry/cells"), history="restored")
    >>> for value in (1, 2):
    ...     writer.write(np.full((4, 5, 1), value, np.uint16))
    >>> writer.close()
    >>> with h5py.File("result.h5") as file:
    ...     cells = file["entry/cells"]
    ...     cells.shape, cells.dtype.name, cells[:, 0, 0].tolist(), dict(cells.attrs)
    ((2, 4, 5), 'uint16', [1, 2], {'history': 'restored', 'stain': 'DAPI'})
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        history: str = "",
        floats: bool = False,
        repeats: int = 1,
        select: Selection = ALL,
    ) -> None:
        file, member = real_path(source), member_of(source)
        self._h5py = library(file, "h5py", "hdf5")
        self._like = Dataset(file, select.of(member) if member else select)
        self._data: Any = None
        self._written = 0
        super().__init__(out, self._like, history, floats, repeats)
        try:
            with reading(file):
                self._known = self._look()
        except BaseException:
            self.abandon()
            raise

    def write(self, pixels: np.ndarray) -> None:
        """Write the next image, (H, W, C)."""
        images = self._like.map
        try:
            if self._data is None:
                self._data = self._create(images.sizes_for(pixels.shape, self.lead))
            place = images.index_of(self._written, self.lead)
            self._data[place] = images.back(pixels)
        except (OSError, RuntimeError) as error:
            raise unwritable(self.out, error) from error
        self._written += 1

    # -- what the source says ---------------------------------------------------------------------

    def _look(self) -> _Source:
        dataset = self._like.dataset
        group, groups = dataset.parent, {}
        while True:
            groups[group.name] = self._attributes(group)
            if group.name == "/":
                break
            group = group.parent
        found = _Source(groups, self._attributes(dataset), [d.label for d in dataset.dims])
        held = {dataset.name}
        for axis, dim in enumerate(dataset.dims):
            for label, scale in dim.items():
                self._add(found, held, scale, axis, label)
        names = _texts(dataset.parent.attrs, "axes")  # of NeXus, one for each axis
        for axis, name in enumerate(names if len(names) == dataset.ndim else ()):
            if self._is_inside(dataset.parent, name):
                self._add(found, held, dataset.parent[name], axis, None)
        return found

    def _is_inside(self, group: Any, name: str) -> bool:
        """Whether a group has a data set of this name itself, and no link to another file."""
        if name in ("", ".") or "/" in name or not group.id.links.exists(name.encode()):
            return False
        hard = isinstance(group.get(name, getlink=True), self._h5py.HardLink)
        return hard and isinstance(group[name], self._h5py.Dataset)

    def _add(
        self, found: _Source, held: set[str], scale: Any, axis: int, label: str | None
    ) -> None:
        """Add the coordinates along an axis, unless they are too many or stored elsewhere."""
        length = self._like.dataset.shape[axis]
        if not scale.name or scale.name in held or scale.shape != (length,):
            return
        if scale.dtype.kind not in "iuf" or length > COORDINATES:
            return
        with suppress(InputError):
            check_storage(self._like.file, scale)
            held.add(scale.name)
            values = read_part(self._like.file, scale, slice(None))
            if axis == self._like.map.channel_axis:
                values = values[self._like.map.channels]
            found.coordinates.append(
                _Coordinates(scale.name, values, self._attributes(scale), axis, label)
            )

    def _attributes(self, holder: Any) -> dict[str, _Attribute]:
        """Return the attributes that hold numbers or text."""
        found: dict[str, _Attribute] = {}
        for name in list(holder.attrs)[:ATTRIBUTES]:
            if name in OWN or name.lower() in STALE:
                continue
            with suppress(Exception):  # types of other programs
                stored = holder.attrs.get_id(name)
                text = self._h5py.check_string_dtype(stored.dtype) is not None
                plain = text or stored.dtype.kind in "biufS"
                empty = stored.get_space().get_simple_extent_type() == self._h5py.h5s.NULL
                if plain and (empty or stored.get_storage_size() <= LARGEST):
                    shape = None if empty else stored.shape
                    found[name] = _Attribute(holder.attrs[name], stored.dtype, shape)
        return found

    # -- the file ---------------------------------------------------------------------------------

    def _create(self, sizes: tuple[int, ...]) -> Any:
        """Make the file and the data set, with everything but its numbers."""
        like, known = self._like.dataset, self._known
        file = self._h5py.File(self._part.path, "w", locking=False)
        self._open.callback(_shut, file)
        for name, attributes in known.groups.items():
            _give(file.require_group(name), attributes)
        dtype = "float32" if self.floats else "uint8" if like.dtype.kind == "b" else like.dtype
        data = file.create_dataset(like.name, sizes, dtype, **self._storage(sizes, dtype))
        changed = [new / old for new, old in zip(sizes, like.shape, strict=True)]
        _give(data, self._known.attributes | self._marks(changed))
        for axis, label in enumerate(known.labels):
            if label:
                data.dims[axis].label = label
        for one in known.coordinates:
            if len(one.values) == sizes[one.axis] and one.name not in file:
                scale = file.create_dataset(one.name, data=one.values)
                _give(scale, one.attributes)
                if one.label is not None:
                    scale.make_scale(one.label)
                    data.dims[one.axis].attach_scale(scale)
        return data

    def _storage(self, sizes: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        """Return how the numbers are stored: compressed as in the source, an image a chunk."""
        like = self._like.dataset
        if like.chunks is None:
            return {}
        numbered = [i for i in range(len(sizes)) if i not in self._like.map.rest]
        chunk = [1 if i in numbered else n for i, n in enumerate(sizes)]
        row = self._like.axes.index("Y")
        while int(np.prod(chunk)) * np.dtype(dtype).itemsize > CHUNK and chunk[row] > 1:
            chunk[row] = -(-chunk[row] // 2)
        packed = like.id.get_create_plist().get_nfilters() > 0
        known = like.compression in ("gzip", "lzf")
        found: dict[str, Any] = {"chunks": tuple(chunk)}
        if packed:
            found["compression"] = like.compression if known else "gzip"
            found["compression_opts"] = like.compression_opts if known else None
            found["shuffle"], found["fletcher32"] = True, bool(like.fletcher32)
        return found

    def _marks(self, changed: list[float]) -> dict[str, _Attribute]:
        """Return the attributes that differ from those of the source."""
        text = self.history or f"written by unmurk {__version__}"
        known = self._known.attributes
        before = known[HISTORY].value if HISTORY in known else ""
        if isinstance(before, bytes | str) and len(before):
            before = before.decode("utf-8", "replace") if isinstance(before, bytes) else before
            text = f"{before}\n{text}"
        found = {HISTORY: _Attribute(text, self._h5py.string_dtype(), ())}
        size, axes = known.get(SIZE), self._like.axes
        if size is not None and size.shape == (3,) and size.dtype.kind == "f":
            factors = [changed[axes.index(a)] if a in axes else 1.0 for a in "ZYX"]
            value = np.asarray(size.value) / factors
            found[SIZE] = _Attribute(value, size.dtype, size.shape)
        return found


def _texts(attributes: Any, name: str) -> list[str]:
    """Return the texts of an attribute, such as the names of axes; those of NeXus before 2014 are
    one text with colons."""
    with suppress(Exception):  # attributes of other programs
        value = attributes[name]
        if isinstance(value, bytes | str):
            value = (value.decode() if isinstance(value, bytes) else value).strip("[]")
            return [part.strip() for part in value.replace(",", ":").split(":")]
        return [v.decode() if isinstance(v, bytes) else str(v) for v in np.ravel(value)[:32]]
    return []


def _give(holder: Any, attributes: dict[str, _Attribute]) -> None:
    for name, one in attributes.items():
        holder.attrs.create(name, one.value, one.shape, one.dtype)


def _shut(file: Any) -> None:
    """Close a file. What does not fit on the disk is an OSError."""
    try:
        file.close()
    except RuntimeError as error:
        raise OSError(str(error)) from error


register("HDF5", HDF5, selects=True, writer=Hdf5Writer, floats=True, scenes=True)(Dataset)
register("MATLAB", (".mat",), selects=True)(Dataset)
