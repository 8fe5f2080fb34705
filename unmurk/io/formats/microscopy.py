"""Files of microscopes: ND2 (Nikon), LIF (Leica), CZI (Zeiss) and OME-Zarr.

The libraries nd2, liffile, pylibCZIrw and zarr read them; the extra `microscopy` installs all
four. None of them is under the GPL (pylibCZIrw is under the LGPL). Files are read plane by plane.
Parts that lie in other files are not followed.

Several images of one file (scenes, positions) number the images if they have one shape. Otherwise
one of them is chosen: "slide.czi:2", "cells.lif:Series001", "plate.zarr:A/1/0".
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, size_text
from ..axes import AxisMap, Planes, Selection
from ..layouts import layout_of
from ..limits import check_numbers, check_pixels
from .metadata import collect, micrometers
from .optional import library
from .registry import Pages, register

__all__ = ["Czi", "Lif", "Nd2", "OmeZarr"]

EXTRA = "microscopy"
LISTED = 12  # images that a message lists
RATIO = 2**14  # what stored bytes may grow to
METER = 1e6  # in micrometers
CODECS = {  # of Zarr; none of them runs code that a file holds
    *("blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma", "delta", "shuffle", "packbits"),
    *("fixedscaleoffset", "bitround", "quantize", "crc32", "crc32c", "adler32", "fletcher32"),
    *("bytes", "transpose", "sharding_indexed", "bytes_to_bytes", "endian", "default", "v2"),
    *("astype", "jenkins_lookup3"),
}
CZI_TYPES = {"Gray8": "uint8", "Gray16": "uint16", "Gray32Float": "float32"}
CZI_TYPES |= {"Bgr24": "uint8", "Bgr48": "uint16"}


class _Mapped(Pages):
    """Pages of an array of planes; a subclass calls `_map_axes` in its constructor."""

    _array: Any

    def _map_axes(
        self, array: Any, own: str, dtype: Any, select: Selection, names: Sequence[str] = ()
    ) -> None:
        """Set the attributes of `Pages` from an array and the axes that the file names."""
        self.axes = select.axes_for(self.file, own, array.shape)
        self._array = array
        self._map = AxisMap(self.file, self.axes, array.shape, select, names)
        self.shape, self.dtype = self._map.shape, np.dtype(dtype).name
        self.lead = self._map.counts
        check_pixels(self.file, *self.shape)
        check_numbers(self.file, math.prod(self.shape), np.dtype(dtype).itemsize)

    def _check_length(self, dtype: Any) -> None:
        """Compare the numbers that the file declares with its length, compressed or not."""
        size = math.prod(self._array.shape) * np.dtype(dtype).itemsize
        if size > RATIO * self.file.stat().st_size:
            raise InputError(f"cannot read {self.file}: it declares {size} bytes and is cut short")

    def __len__(self) -> int:
        return len(self._map)

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        return self._map.image(self._array, page)


@register("ND2", (".nd2",), selects=True)
class Nd2(_Mapped):
    """The images of an ND2 file of Nikon, by the library nd2.

    Args:
        file: The file.
        select: Its axes, and the channels to read.

    Raises:
        InputError: nd2 is missing, or the file is damaged or has axes that are not read.
    """

    def __init__(self, file: Path, select: Selection) -> None:
        self.file = file
        nd2 = library(file, "nd2", EXTRA)
        opened = self._opened = nd2.ND2File(file)
        try:
            if opened.is_legacy:
                raise InputError(f"cannot read {file}: ND2 files from before 2010 are not read")
            sizes = dict(opened.sizes)
            frame = [a for a in "CYXS" if a in sizes]
            lead = [a for a in sizes if a not in frame]
            planes = Planes(
                [sizes[a] for a in lead], [sizes[a] for a in frame], self._frame(len(frame))
            )
            names = [] if opened.is_rgb else _nd2_channels(opened)
            self._map_axes(planes, "".join(lead + frame), opened.dtype, select, names)
            self._check_length(opened.dtype)
            found = int(opened.attributes.bitsPerComponentSignificant)
            width = 8 * np.dtype(self.dtype).itemsize
            self.bits = found if np.dtype(self.dtype).kind in "iu" and 1 < found < width else 0
            self.metadata = _nd2_metadata(opened, self._map.names)
        except BaseException:
            opened.close()
            raise

    def _frame(self, count: int) -> Any:
        """Return a function that reads a frame, without axes of one entry that have no name."""

        def read(number: int) -> np.ndarray:
            found = np.asarray(self._opened.read_frame(number))
            while found.ndim > count and 1 in found.shape[:1] + found.shape[-1:]:
                found = found[0] if found.shape[0] == 1 else found[..., 0]
            return found

        return read

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def _nd2_channels(opened: Any) -> list[str]:
    with suppress(Exception):  # metadata of other programs
        return [str(c.channel.name) for c in opened.metadata.channels]
    return []


def _nd2_metadata(opened: Any, names: Sequence[str]) -> dict[str, Any]:
    with suppress(Exception):  # metadata of other programs
        size = opened.voxel_size()
        deep = size.z if "Z" in opened.sizes else None
        text = {str(k): str(v) for k, v in dict(opened.text_info).items()}
        return collect(size.y, size.x, deep, names, datetime=text.get("date"), source=text or None)
    return collect(channels=names)


@register("LIF", (".lif",), selects=True)
class Lif(_Mapped):
    """The images of a LIF file of Leica, by the library liffile.

    Args:
        file: The file.
        select: The name or number of an image in it, its axes, and the channels to read.

    Raises:
        InputError: liffile is missing, the file is damaged, or its images differ and none is
            chosen.
    """

    def __init__(self, file: Path, select: Selection) -> None:
        self.file = file
        liffile = library(file, "liffile", EXTRA)
        opened = self._opened = liffile.LifFile(file)
        try:
            if opened.type != liffile.LifFileType.LIF:
                raise InputError(f"cannot read {file}: it is no LIF file")
            found = [(str(image.name), image) for image in opened.images]
            chosen = _alike(file, found, select.member, _lif_kind)
            for image in chosen:
                self._check_image(liffile, image)
            first = chosen[0]
            frame = [a for a in first.dims if a in first.frames.frame_dims]
            lead = [a for a in first.dims if a not in frame]
            each = math.prod(first.sizes[a] for a in lead)

            def read(number: int) -> np.ndarray:
                shape = [first.sizes[a] for a in lead]
                places = np.unravel_index(number % each, shape) if lead else ()
                where = dict(zip(lead, map(int, places), strict=True))
                return np.asarray(chosen[number // each].frame(**where))

            sizes = [first.sizes[a] for a in lead]
            position = [len(chosen)] if len(chosen) > 1 else []
            planes = Planes([*position, *sizes], [first.sizes[a] for a in frame], read)
            own = "P" * len(position) + "".join(lead + frame)
            self._map_axes(planes, own, first.dtype, select)
            self._check_length(first.dtype)
            self.metadata = _lif_metadata(opened, first)
        except BaseException:
            opened.close()
            raise

    def _check_image(self, liffile: Any, image: Any) -> None:
        """Refuse lifetimes, and pixels that lie in other files."""
        if not isinstance(image, liffile.liffile.LifImage):
            raise InputError(f"cannot read {self.file}: {image.name} holds lifetimes, no image")
        block = image.memory_block
        if block.frames or block.offset < 0:
            raise InputError(
                f"cannot read {self.file}: the pixels of {image.name} lie in other files"
            )
        if block.offset + image.nbytes > self.file.stat().st_size:
            raise InputError(f"cannot read {self.file}: {image.name} is cut short")

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def _lif_kind(image: Any) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in image.sizes.items())
    return f"{sizes} {image.dtype}"


def _lif_metadata(opened: Any, image: Any) -> dict[str, Any]:
    step: dict[str, float | None] = {}
    with suppress(Exception):  # metadata of other programs
        for axis in "YXZ":
            values = image.coords.get(axis)
            apart = abs(float(values[1] - values[0])) if values is not None else 0.0
            step[axis] = micrometers(apart * METER)
    date = getattr(opened, "datetime", None)
    return collect(
        step.get("Y"), step.get("X"), step.get("Z"), datetime=str(date) if date else None
    )


def _alike(file: Path, found: list[tuple[str, Any]], member: str, kind: Any) -> list[Any]:
    """Return the image that `member` names, else all images if they are of one kind."""
    listed = ", ".join(f"{name} ({kind(image)})" for name, image in found[:LISTED])
    if not found:
        raise InputError(f"cannot read {file}: it holds no image")
    if member:
        named = [image for name, image in found if name == member]
        if not named and member.isascii() and member.isdecimal() and int(member) < len(found):
            named = [found[int(member)][1]]
        if len(named) != 1:
            raise InputError(f"{file} has no single image '{member}': it holds {listed}")
        return named
    if len({kind(image) for _, image in found}) > 1:
        raise InputError(f"the images in {file} differ: {listed}: choose one as {file.name}:NAME")
    return [image for _, image in found]


@register("CZI", (".czi",), selects=True)
class Czi(_Mapped):
    """The images of a CZI file of Zeiss, by the library pylibCZIrw.

    Args:
        file: The file.
        select: The number of a scene in it, its axes, and the channels to read.

    Raises:
        InputError: pylibCZIrw is missing, the file is damaged, or its scenes differ and none is
            chosen.
    """

    def __init__(self, file: Path, select: Selection) -> None:
        self.file = file
        czi = library(file, "pylibCZIrw.czi", EXTRA)
        self._context = czi.open_czi(str(file))
        opened = self._opened = self._context.__enter__()
        try:
            self._look(opened, select)
        except BaseException:
            self.close()
            raise

    def _look(self, opened: Any, select: Selection) -> None:
        file = self.file
        scenes = dict(opened.scenes_bounding_rectangle_no_pyramid)
        total = opened.total_bounding_rectangle_no_pyramid
        found = [(str(name), scenes[name]) for name in sorted(scenes)] or [("0", total)]
        chosen = _alike(file, found, select.member, lambda r: size_text((r.h, r.w)))
        kinds = set(opened.pixel_types.values())
        if len(kinds) != 1 or not kinds <= set(CZI_TYPES):
            raise InputError(
                f"cannot read {file}: its channels are {', '.join(sorted(kinds)) or 'none'}: save "
                "it with one type, of 8 or 16 bits or float32"
            )
        (kind,) = kinds
        box = dict(opened.total_bounding_box_no_pyramid)
        extra = [a for a in box if a not in "TZCYX" and box[a][1] - box[a][0] > 1]
        if extra:
            raise InputError(f"cannot read {file}: it has the axes {', '.join(extra)} too")
        start = {a: int(box[a][0]) for a in "TZC" if a in box}
        count = {a: int(box[a][1]) - start[a] for a in start}
        lead = [a for a in "TZC" if count.get(a, 1) > 1]
        each = math.prod(count[a] for a in lead)
        sides = (int(chosen[0].h), int(chosen[0].w))
        check_pixels(file, *sides)

        def read(number: int) -> np.ndarray:
            places = np.unravel_index(number % each, [count[a] for a in lead]) if lead else ()
            plane = dict(start)
            for axis, place in zip(lead, places, strict=True):
                plane[axis] += int(place)
            area = chosen[number // each]
            pixels = np.asarray(
                opened.read(roi=(area.x, area.y, area.w, area.h), plane=plane, pixel_type=kind)
            )
            return pixels[..., ::-1] if kind.startswith("Bgr") else pixels[..., 0]

        color = kind.startswith("Bgr")
        position = [len(chosen)] if len(chosen) > 1 else []
        planes = Planes(
            [*position, *(count[a] for a in lead)], [*sides, 3] if color else sides, read
        )
        own = "P" * len(position) + "".join(lead) + ("YXS" if color else "YX")
        text, names = "", []
        with suppress(Exception):  # metadata of other programs
            text = str(opened.raw_metadata)
            names = _czi_channels(opened.metadata)
        names = names if "C" in own and len(names) == count["C"] else []
        self._map_axes(planes, own, CZI_TYPES[kind], select, names)
        self._check_length(self.dtype)
        self.metadata = _czi_metadata(opened, text, self._map.names)

    def close(self) -> None:
        """Close the file."""
        self._context.__exit__(None, None, None)


def _czi_channels(given: Mapping[str, Any]) -> list[str]:
    found = given["ImageDocument"]["Metadata"]["Information"]["Image"]["Dimensions"]["Channels"]
    channels = found["Channel"]
    channels = channels if isinstance(channels, list) else [channels]
    return [str(channel.get("@Name", "")) for channel in channels]


def _czi_metadata(opened: Any, text: str, names: Sequence[str]) -> dict[str, Any]:
    sides: dict[str, float | None] = {}
    with suppress(Exception):  # metadata of other programs
        found = opened.metadata["ImageDocument"]["Metadata"]["Scaling"]["Items"]["Distance"]
        for item in found if isinstance(found, list) else [found]:
            sides[str(item["@Id"])] = micrometers(float(item["Value"]) * METER)
    return collect(sides.get("Y"), sides.get("X"), sides.get("Z"), names, source=text or None)


@register("OME-Zarr", (".zarr",), selects=True, folder=True)
class OmeZarr(_Mapped):
    """The images of an OME-Zarr folder (versions 0.4 and 0.5), by the library zarr.

    The full resolution is read. A Zarr array without OME metadata is read like a .npy file.

    Args:
        file: The folder.
        select: The path of an image or an array in it, its axes, and the channels to read.

    Raises:
        InputError: zarr is missing; the folder is damaged or holds several images of which none is
            chosen; or an array is stored with a codec that is not on a list of safe ones.
    """

    def __init__(self, file: Path, select: Selection) -> None:
        self.file = file
        zarr = library(file, "zarr", EXTRA)
        if not file.is_dir():
            raise InputError(f"cannot read {file}: it is no folder of OME-Zarr")
        root = zarr.open(zarr.storage.LocalStore(file, read_only=True), mode="r")
        node = self._inside(zarr, root, select.member)
        image: dict[str, Any] = {}
        if isinstance(node, zarr.Group):
            image = _multiscales(node)
            if not image:
                names = sorted(name for name, _ in node.members())[:LISTED]
                raise InputError(
                    f"{file} holds no image, but {', '.join(names) or 'nothing'}: choose one as "
                    f"{file.name}:NAME"
                )
            about, image = image, image["multiscales"][0]
            node = self._inside(zarr, node, str(image["datasets"][0]["path"]))
        if not isinstance(node, zarr.Array) or node.dtype.kind not in "buif":
            raise InputError(f"cannot read {file}: it holds no array of numbers")
        _check_codecs(file, node)
        own = _zarr_axes(image.get("axes")) if image else ""
        guess = own or select.axes_for(file, "", node.shape)
        if not guess:
            guess = layout_of(file, node).replace("H", "Y").replace("W", "X")
        names = _labels(about) if image else []
        names = names if "C" in guess and len(names) == node.shape[guess.index("C")] else []
        check_numbers(file, math.prod(node.chunks), node.dtype.itemsize)
        if getattr(node, "shards", None):
            check_numbers(file, math.prod(node.shards), node.dtype.itemsize)
        dtype = np.dtype("uint8") if node.dtype.kind == "b" else node.dtype.newbyteorder("=")
        self._map_axes(node, guess, dtype, select, names)
        self._check_length(dtype)
        self.metadata = _zarr_metadata(image, guess, self._map.names)

    def _check_length(self, dtype: Any) -> None:
        size = math.prod(self._array.shape) * np.dtype(dtype).itemsize
        stored = 0
        for length in _lengths(self.file):
            stored += length
            if size <= RATIO * stored:
                return
        raise InputError(f"cannot read {self.file}: it declares {size} bytes and holds {stored}")

    def _inside(self, zarr: Any, node: Any, path: str) -> Any:
        """Return an array or a group of the folder; a path that leaves it is refused."""
        parts = [part for part in path.split("/") if part]
        if any(part in (".", "..") or "\\" in part for part in parts):
            raise InputError(f"cannot read {self.file}: '{path}' is not inside it")
        if not parts:
            return node
        if not isinstance(node, zarr.Group) or "/".join(parts) not in node:
            raise InputError(f"{self.file} has no image or array '{path}'")
        return node["/".join(parts)]

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        pixels = super().read(page)
        if pixels.dtype.kind == "b":
            return pixels.astype(np.uint8) * np.uint8(255)
        return pixels


def _lengths(folder: Path) -> Iterator[int]:
    """Iterate over the lengths of the files in a folder; links count nothing."""
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            with suppress(OSError):
                yield 0 if os.path.islink(path) else os.path.getsize(path)


def _multiscales(group: Any) -> dict[str, Any]:
    """Return the OME metadata of a group; empty if it has none."""
    attributes = dict(group.attrs)
    about = attributes.get("ome", attributes)
    found = isinstance(about, dict) and about.get("multiscales")
    return about if found and isinstance(found, list) else {}


def _zarr_axes(axes: Any) -> str:
    """Return the letters of the axes of OME-Zarr; without them, those of version 0.1."""
    if not axes:
        return "TCZYX"
    names = [str(a["name"] if isinstance(a, dict) else a).upper() for a in axes]
    return "".join(name if len(name) == 1 else "?" for name in names)


def _labels(about: Mapping[str, Any]) -> list[str]:
    with suppress(Exception):  # metadata of other programs
        return [str(c["label"]) for c in about["omero"]["channels"]]
    return []


def _zarr_metadata(image: dict[str, Any], axes: str, names: Sequence[str]) -> dict[str, Any]:
    sides: dict[str, float | None] = {}
    step = None
    with suppress(Exception):  # metadata of other programs
        changes = image["datasets"][0]["coordinateTransformations"]
        scale = next(c["scale"] for c in changes if c["type"] == "scale")
        for letter, axis, size in zip(axes, image["axes"], scale, strict=True):
            if letter in "YXZ":
                sides[letter] = micrometers(size, axis.get("unit", ""))
            if letter == "T" and axis.get("unit") == "second":
                step = size
    return collect(
        sides.get("Y"), sides.get("X"), sides.get("Z"), names, time_step=step, source=image or None
    )


def _check_codecs(file: Path, array: Any) -> None:
    """Refuse an array whose chunks pass through codecs that are not known to be safe."""
    about = array.metadata.to_dict()
    for part in ("codecs", "filters", "compressor"):
        for name in _codec_names(about.get(part)):
            if name.removeprefix("numcodecs.").lower() not in CODECS:
                raise InputError(
                    f"cannot read {file}: it is stored with the codec '{name[:40]}', which is not "
                    "read: save it with blosc, zstd, gzip or without compression"
                )


def _codec_names(given: Any) -> Iterator[str]:
    if isinstance(given, Mapping):
        for key, value in given.items():
            if key in ("id", "name") and isinstance(value, str):
                yield value
            else:
                yield from _codec_names(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _codec_names(value)
