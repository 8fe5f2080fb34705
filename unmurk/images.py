"""Image files to tensors and back.

Inside unmurk an image is float32 (C, H, W) in units of [0, 1]. A file holds other numbers, and the
`Scale` of a set remembers how to return to them:

    file value = offset + gain * image,    rounded and clipped to the range of the file's type

8 bits have gain 255, 16 bits 65535. Numbers of other types keep their value where they are already
in units of [0, 1] (noise may reach beyond it), have gain 255 where they lie in [0, 255], and else
an offset and gain that take the smallest to 0 and the largest to 1.
"""

import gzip
import io
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .pictures import ENDINGS, encode_picture, read_picture

__all__ = ["ImageSet", "Scale", "load_images", "read_idx", "save_images"]

FORMATS = ("png", "npy", "npz", "idx")
UNIT = (-2.0, 3.0)  # floats in here are in units of [0, 1] already: the range and strong noise
LARGEST = {"uint8": 255.0, "uint16": 65535.0}


@dataclass(frozen=True)
class Scale:
    """How to write images as the kind of file they came from.

    Attributes:
        offset: File value of image value 0.
        gain: File value of image value 1, less offset.
        dtype: Name of the file's number type.
        format: "png", "npy", "npz" or "idx".
        layout: Axes of an array file: "HW", "HWC", "NHW", "NHWC" or "NCHW".
        key: Name of the array in an npz file.
    """

    offset: float = 0.0
    gain: float = 1.0
    dtype: str = "float32"
    format: str = "npy"
    layout: str = "NCHW"
    key: str = "images"

    def to_file(self, images: Tensor) -> np.ndarray:
        """Images (..., H, W) as file values: scaled, rounded, and clipped to the type's range."""
        values = self.offset + self.gain * images.detach().cpu().double().numpy()
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return values.astype(kind)
        low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        return np.clip(np.rint(values), low, high).astype(kind)


@dataclass
class ImageSet:
    """Images and where they came from.

    Attributes:
        images: (N, C, H, W) float32 in units of [0, 1].
        names: File names, or running numbers for the images of an array file.
        scale: How to write them back.
        skipped: Name and reason of each image that was left out.
    """

    images: Tensor
    names: list[str]
    scale: Scale
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    path: str | Path,
    *,
    channels: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> ImageSet:
    """Read images of one size.

    Args:
        path: A folder of PNG, JPEG, TIFF or BMP pictures (grey or RGB, 8 or 16 bits; taken in
            the order of their names), one such picture, a .npy or .npz array (N, H, W),
            (N, H, W, C), (N, C, H, W), (H, W) or (H, W, C), or an idx file, gzipped or not. The
            array of an npz file is called "images" or is the only one; else "file.npz:name".
        channels: Refuse images with another number of channels.
        skip_bad: Leave out, and list, pictures that cannot be read or differ in size, channels or
            bits from most, and array images that are not finite. Otherwise the first stops it.
        limit: Read at most so many.

    Raises:
        InputError: nothing there, unreadable, mixed sizes, channels or bits, wrong channels.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    file, key = _split_key(str(path))
    if not file.exists():
        raise InputError(f"there is nothing at {file}")
    if file.is_dir():
        found = _load_pictures(_pictures_in(file), skip_bad, limit)
    elif file.suffix.lower() in ENDINGS:
        found = _load_pictures([file], False, None)
    else:
        found = _load_array(file, key, skip_bad, limit)
    if channels is not None and found.images.shape[1] != channels:
        raise InputError(
            f"{file} has images of {found.images.shape[1]} channels where {channels} are needed"
        )
    return found


# -- pictures -------------------------------------------------------------------------------------


def _pictures_in(folder: Path) -> list[Path]:
    files = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in ENDINGS and not f.name.startswith(".")
    )
    if not files:
        raise InputError(f"there is no PNG, JPEG, TIFF or BMP picture in the folder {folder}")
    return files


def _load_pictures(files: list[Path], skip_bad: bool, limit: int | None) -> ImageSet:
    good: list[tuple[str, np.ndarray]] = []
    skipped: list[tuple[str, str]] = []
    for file in files if skip_bad else files[:limit]:
        try:
            good.append((file.name, read_picture(file)))
        except InputError as error:
            if not skip_bad:
                raise
            skipped.append((file.name, str(error)))
    if not good:
        raise InputError(f"none of the {len(files)} pictures in {files[0].parent} can be read")
    kinds = Counter(_kind(pixels) for _, pixels in good)
    usual = kinds.most_common(1)[0][0]
    if len(kinds) > 1 and not skip_bad:
        first, other = good[0], next(g for g in good if _kind(g[1]) != _kind(good[0][1]))
        raise InputError(
            f"the pictures in {files[0].parent} differ: {first[0]} is {_kind(first[1])} but "
            f"{other[0]} is {_kind(other[1])}; make them alike, or use skip_bad"
        )
    skipped += [(n, f"{_kind(p)}, others are {usual}") for n, p in good if _kind(p) != usual]
    kept = [(name, pixels) for name, pixels in good if _kind(pixels) == usual][:limit]
    stack = np.stack([pixels for _, pixels in kept])
    scale = Scale(gain=LARGEST[stack.dtype.name], dtype=stack.dtype.name, format="png")
    images = _to_images(stack, scale, "NHWC")
    return ImageSet(images, [name for name, _ in kept], scale, sorted(skipped))


def _kind(pixels: np.ndarray) -> str:
    height, width, channels = pixels.shape
    colour = "grey" if channels == 1 else "RGB"
    return f"{height}x{width} {colour} {8 * pixels.dtype.itemsize}-bit"


# -- arrays ---------------------------------------------------------------------------------------


def _split_key(path: str) -> tuple[Path, str | None]:
    """ "set.npz:train" -> the file and the name of the array in it."""
    head, colon, key = path.rpartition(":")
    if colon and head.lower().endswith(".npz"):
        return Path(head), key
    return Path(path), None


def _load_array(file: Path, key: str | None, skip_bad: bool, limit: int | None) -> ImageSet:
    try:
        array, form, key = _read_array(file, key)
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        RuntimeError,
        zlib.error,
        BadZipFile,
    ) as error:
        raise InputError(f"cannot read {file}: {_line(error)}") from error
    layout = _layout(file, array)
    if "N" not in layout:
        array = array[None]
    fine = np.isfinite(array.reshape(len(array), -1)).all(1)
    names = [f"{i:05d}" for i in range(len(array))]
    bad = [(names[i], "not finite") for i in np.flatnonzero(~fine)]
    if bad and (not skip_bad or not fine.any()):
        raise InputError(f"image {bad[0][0]} in {file} has values that are not finite")
    array = array[fine]
    offset, gain = _range(array)
    scale = Scale(offset, gain, array.dtype.name, form, layout, key or "images")
    kept = [name for name, good in zip(names, fine, strict=True) if good][:limit]
    return ImageSet(_to_images(array[:limit], scale, layout), kept, scale, bad)


def _read_array(file: Path, key: str | None) -> tuple[np.ndarray, str, str | None]:
    """The array, the format, and the array's name."""
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return np.load(file, allow_pickle=False), "npy", None
    if suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            key = key or ("images" if "images" in arrays.files else None)
            if key is None and len(arrays.files) == 1:
                key = arrays.files[0]
            if key not in arrays.files:
                raise InputError(
                    f"{file} holds the arrays {', '.join(arrays.files) or 'none'}; choose one as "
                    f"{file.name}:name"
                )
            return arrays[key], "npz", key
    if suffix == ".gz" or "idx" in file.name:
        return read_idx(file), "idx", None
    raise InputError(
        f"{file}: unknown type of file; known are a folder, png, jpg, tif, bmp, npy, npz and idx"
    )


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array of an idx file (the format of MNIST; images or labels), gzipped or not.

    Raises:
        InputError: not such a file, or cut short.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {_line(error)}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise InputError(f"{path} is not an idx file of bytes")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise InputError(f"{path} is cut short or damaged")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _layout(file: Path, array: np.ndarray) -> str:
    """What the axes are. A channel axis has at most 4 entries, 1 or 3 in a single image."""
    shape = array.shape
    layout = ""
    if array.dtype.kind in "buif" and array.size:
        if array.ndim == 2:
            layout = "HW"
        elif array.ndim == 3:
            layout = "HWC" if shape[2] in (1, 3) else "NHW"
        elif array.ndim == 4 and shape[3] <= 4:
            layout = "NHWC"
        elif array.ndim == 4 and shape[1] <= 4:
            layout = "NCHW"
    if not layout:
        raise InputError(
            f"{file} holds {array.dtype} of shape {shape}, which is not (N, H, W), (N, H, W, C) "
            f"or (N, C, H, W) with at most 4 channels"
        )
    return layout


def _range(array: np.ndarray) -> tuple[float, float]:
    """Offset and gain of numbers of any type."""
    if array.dtype.name in LARGEST:
        return 0.0, LARGEST[array.dtype.name]
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "b" or (UNIT[0] <= low and high <= UNIT[1]):
        return 0.0, 1.0
    if low >= 0 and high <= 255:
        return 0.0, 255.0
    return low, (high - low) or 1.0


def _to_images(array: np.ndarray, scale: Scale, layout: str) -> Tensor:
    """Numbers with an N axis as images (N, C, H, W)."""
    if layout in ("NHW", "HW"):
        array = array[:, None]
    elif layout != "NCHW":
        array = np.moveaxis(array, -1, 1)
    if array.dtype.name in LARGEST:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).div_(scale.gain)
    values = (array.astype(np.float64) - scale.offset) / scale.gain
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# -- writing --------------------------------------------------------------------------------------


def save_images(
    images: Tensor,
    out: str | Path,
    names: Sequence[str] | None = None,
    scale: Scale | None = None,
    *,
    format: str | None = None,
) -> list[Path]:
    """Write images as what they came from, whole or not at all.

    Args:
        images: (N, C, H, W) in units of [0, 1].
        out: For "png" a folder (made if needed), or a .png file for one image. For the others a
            file; without the format's ending it is a folder, and the file in it is called
            images.npy (.npz, -idx3-ubyte).
        names: One for each image; pictures are called after them, with the ending .png. None
            numbers them.
        scale: From `load_images`. None: float32 arrays, 8-bit pictures.
        format: "png", "npy", "npz" or "idx". None follows the ending of `out`, then the scale.

    Returns:
        The files written.

    Raises:
        InputError: images, names or format that do not fit, or the disk says no.
    """
    out, scale = Path(out), scale or Scale()
    form = format or _format_of(out) or scale.format
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}; known are {', '.join(FORMATS)}")
    if images.ndim != 4 or not images.numel():
        raise InputError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        raise InputError("the images have values that are not finite; nothing was written")
    try:
        if form == "png":
            return _save_pictures(images, out, names, scale)
        return [_save_array(images, out, scale, form)]
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def _format_of(out: Path) -> str | None:
    if out.is_dir():
        return None
    if "idx" in out.name:
        return "idx"
    ending = out.suffix.lower().lstrip(".")
    return ending if ending in FORMATS else None


def _save_pictures(
    images: Tensor, out: Path, names: Sequence[str] | None, scale: Scale
) -> list[Path]:
    if images.shape[1] not in (1, 3):
        raise InputError(f"a PNG has 1 or 3 channels, not {images.shape[1]}; use npy")
    if scale.dtype not in LARGEST:
        scale = Scale(gain=255.0, dtype="uint8")
    pixels = np.moveaxis(scale.to_file(images), 1, -1)
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(pixels) > 1:
            raise InputError(f"{out} can hold one image, not {len(pixels)}; give a folder")
        _write(out, encode_picture(pixels[0]))
        return [out]
    files = _file_names(names, len(pixels))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = _part(out)
    part.mkdir(exist_ok=True)
    try:
        for file, array in zip(files, pixels, strict=True):
            (part / file).write_bytes(encode_picture(array))
        if out.is_dir():
            for file in files:
                os.replace(part / file, out / file)
        else:
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [out / file for file in files]


def _file_names(names: Sequence[str] | None, count: int) -> list[str]:
    """Distinct names of PNG files. Where a.jpg and a.png would meet, both keep their ending."""
    given = [f"{i:05d}" for i in range(count)] if names is None else [str(n) for n in names]
    if len(given) != count:
        raise InputError(f"{count} images but {len(given)} names")
    wrong = [n for n in given if not n or Path(n).name != n]
    if wrong:
        raise InputError(f"{wrong[0]!r} is not the name of a file")
    stems = [n[: -len(Path(n).suffix)] if Path(n).suffix.lower() in ENDINGS else n for n in given]
    often = Counter(stems)
    files = [f"{s if often[s] == 1 else n}.png" for s, n in zip(stems, given, strict=True)]
    twice = [name for name, times in Counter(files).items() if times > 1]
    if twice:
        raise InputError(f"two images are called {twice[0]}; names must differ")
    return files


def _save_array(images: Tensor, out: Path, scale: Scale, form: str) -> Path:
    if form == "idx":
        if images.shape[1] != 1:
            raise InputError(f"an idx file holds grey images, not {images.shape[1]} channels")
        if scale.dtype != "uint8":
            scale = Scale(gain=255.0, dtype="uint8")
        scale = replace(scale, layout="NHW")
    array = _arranged(scale.to_file(images), scale.layout)
    if _format_of(out) != form:
        out = out / ("images-idx3-ubyte" if form == "idx" else f"images.{form}")
    _write(out, _array_bytes(array, form, scale.key, out.suffix.lower() == ".gz"))
    return out


def _array_bytes(array: np.ndarray, form: str, key: str, compress: bool) -> bytes:
    if form == "idx":
        data = b"\0\0\x08\x03" + np.array(array.shape, ">u4").tobytes() + array.tobytes()
        return gzip.compress(data, 9, mtime=0) if compress else data
    buffer = io.BytesIO()
    if form == "npy":
        np.save(buffer, array)
    else:
        arrays: dict[str, Any] = {key: array}
        np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _arranged(array: np.ndarray, layout: str) -> np.ndarray:
    """(N, C, H, W) in another layout, as far as numbers of images and channels allow."""
    if "C" not in layout and array.shape[1] == 1:
        array = array[:, 0]
    elif layout != "NCHW":
        array = np.moveaxis(array, 1, -1)
    return array[0] if "N" not in layout and len(array) == 1 else array


def _part(out: Path) -> Path:
    """Where `out` is put together: beside it, so that one rename finishes it."""
    return out.with_name(f".{out.name}.{os.getpid()}.part")


def _write(out: Path, data: bytes) -> None:
    """Write a file under another name, flush it to disk, and give it its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = _part(out)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
