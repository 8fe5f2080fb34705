"""Image files to tensors and back.

Inside unmurk an image is float32 (C, H, W) in units of [0, 1]. A file holds other numbers, and the
`Scale` of a set remembers how to return to them (see `scale`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .atomic import write
from .formats.arrays import read_array, read_idx, split_key
from .formats.pictures import ENDINGS, encode_picture, read_pages
from .scale import LARGEST, Scale, Span
from .streams import ImagesWriter

__all__ = [
    "ImageSet",
    "array_file",
    "array_writer",
    "describe",
    "format_of",
    "layout_of",
    "load_images",
    "load_measurements",
    "names_of",
    "pictures_in",
    "read_idx",
    "save_images",
    "save_new",
    "stems",
    "to_images",
]

FORMATS = ("png", "npy", "npz", "idx")


@dataclass
class ImageSet:
    """Images and where they came from.

    Attributes:
        images: (N, C, H, W) float32 in units of [0, 1].
        names: File names, or running numbers for the images of an array file.
        scale: How to write them back.
        skipped: Name and reason of each image that was left out.
        numbers: Place of each image in the file or the folder, those left out counted too: what
            differs from image to image (a mask) goes by it.
    """

    images: Tensor
    names: list[str]
    scale: Scale
    skipped: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    path: str | Path,
    *,
    channels: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    span: Span | None = None,
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
        span: The file's numbers of black and white, which become 0 and 1; None: see `Scale`.

    Raises:
        InputError: nothing there, unreadable, mixed sizes, channels or bits, wrong channels.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    file, key = split_key(str(path))
    if not file.exists():
        raise InputError(f"there is nothing at {file}")
    if file.is_dir():
        found = _load_pictures(pictures_in(file), skip_bad, limit, span)
    elif file.suffix.lower() in ENDINGS:
        found = _load_pictures([file], False, limit, span)
    else:
        found = _load_array(file, key, skip_bad, limit, span)
    if channels is not None and found.images.shape[1] != channels:
        raise InputError(
            f"{file} has images of {found.images.shape[1]} channels where {channels} are needed"
        )
    return found


# -- pictures -------------------------------------------------------------------------------------


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, in the order of their names. Raises InputError for none."""
    files = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in ENDINGS and not f.name.startswith(".")
    )
    if not files:
        raise InputError(f"there is no PNG, JPEG, TIFF or BMP picture in the folder {folder}")
    return files


def _load_pictures(
    files: list[Path], skip_bad: bool, limit: int | None, span: Span | None
) -> ImageSet:
    good: list[tuple[int, str, np.ndarray]] = []
    skipped: list[tuple[str, str]] = []
    number = 0
    for file in files:
        if not skip_bad and limit is not None and len(good) >= limit:
            break
        try:
            pages = read_pages(file)
            good += [(number + i, name, page) for i, (name, page) in enumerate(pages)]
            number += len(pages)
        except InputError as error:
            if not skip_bad:
                raise
            skipped.append((file.name, str(error)))
            number += 1
    if not good:
        raise InputError(f"none of the {len(files)} pictures in {files[0].parent} can be read")
    kinds = Counter(describe(pixels) for _, _, pixels in good)
    usual = kinds.most_common(1)[0][0]
    if len(kinds) > 1 and not skip_bad:
        first, other = good[0], next(g for g in good if describe(g[2]) != describe(good[0][2]))
        raise InputError(
            f"the pictures in {files[0].parent} differ: {first[1]} is {describe(first[2])} but "
            f"{other[1]} is {describe(other[2])}; make them alike, or use skip_bad"
        )
    skipped += [
        (n, f"{describe(p)}, others are {usual}") for _, n, p in good if describe(p) != usual
    ]
    kept = [found for found in good if describe(found[2]) == usual][:limit]
    stack = np.stack([pixels for _, _, pixels in kept])
    scale = Scale.of(stack.dtype, (float(stack.min()), float(stack.max())), span)
    images = to_images(stack, replace(scale, format="png"), "NHWC")
    names, numbers = [name for _, name, _ in kept], [number for number, _, _ in kept]
    return ImageSet(images, names, replace(scale, format="png"), sorted(skipped), numbers)


def describe(pixels: np.ndarray) -> str:
    """Size, colour and type of a picture (H, W, C), in words."""
    height, width, channels = pixels.shape
    colour = "grey" if channels == 1 else "RGB"
    kind = " float" if pixels.dtype.kind == "f" else ""
    return f"{height}x{width} {colour} {8 * pixels.dtype.itemsize}-bit{kind}"


# -- arrays ---------------------------------------------------------------------------------------


def _load_array(
    file: Path, key: str | None, skip_bad: bool, limit: int | None, span: Span | None
) -> ImageSet:
    array, form, key = read_array(file, key)
    layout = layout_of(file, array)
    if "N" not in layout:
        array = array[None]
    array, numbers, bad = _finite(file, array, skip_bad)
    scale = Scale.of(array.dtype, (float(array.min()), float(array.max())), span)
    scale = replace(scale, format=form, layout=layout, key=key or "images")
    images = to_images(array[:limit], scale, layout)
    return ImageSet(images, [_name(i) for i in numbers[:limit]], scale, bad, numbers[:limit])


def _finite(
    file: Path, array: np.ndarray, skip_bad: bool
) -> tuple[np.ndarray, list[int], list[tuple[str, str]]]:
    """The images (N, ..) that are finite, their numbers, and the names of the others."""
    fine = np.isfinite(array.reshape(len(array), -1)).all(1)
    bad = [(_name(int(i)), "not finite") for i in np.flatnonzero(~fine)]
    if bad and (not skip_bad or not fine.any()):
        raise InputError(f"image {bad[0][0]} in {file} has values that are not finite")
    return array[fine], np.flatnonzero(fine).tolist(), bad


def _name(number: int) -> str:
    return f"{number:05d}"


def load_measurements(path: str | Path, *, skip_bad: bool = False) -> ImageSet:
    """Read measurements that are no images (k-space, sinograms): their numbers are kept.

    Args:
        path: A .npy or .npz array (N, C, H, W), or (N, H, W) for C = 1, of any C.
        skip_bad: Leave out, and list, those with values that are not finite.

    Returns:
        The measurements, with a scale that writes images in units of [0, 1], float32.

    Raises:
        InputError: nothing there, pictures, complex numbers, another number of axes, not finite.
    """
    file, key = split_key(str(path))
    if not file.exists():
        raise InputError(f"there is nothing at {file}")
    if file.is_dir() or file.suffix.lower() in ENDINGS:
        raise InputError(
            f"{file}: these measurements are numbers without a range, which pictures cannot hold; "
            "give a .npy or .npz array"
        )
    array, form, key = read_array(file, key)
    if array.dtype.kind not in "buif" or array.ndim not in (3, 4) or not array.size:
        raise InputError(
            f"{file} holds {array.dtype} of shape {array.shape}, which is not (N, C, H, W) or "
            "(N, H, W); complex numbers are two channels, real and imaginary part"
        )
    array, numbers, bad = _finite(file, array, skip_bad)
    y = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    y = y[:, None] if y.ndim == 3 else y
    form = form if form in ("npy", "npz") else "npy"
    return ImageSet(y, [_name(i) for i in numbers], Scale(format=form), bad, numbers)


def layout_of(file: Path, array: np.ndarray) -> str:
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


def to_images(array: np.ndarray, scale: Scale, layout: str) -> Tensor:
    """Numbers with an N axis as images (N, C, H, W)."""
    if layout in ("NHW", "HW"):
        array = array[:, None]
    elif layout != "NCHW":
        array = np.moveaxis(array, -1, 1)
    return scale.from_file(array)


# -- writing --------------------------------------------------------------------------------------


def save_images(
    images: Tensor,
    out: str | Path,
    names: Sequence[str] | None = None,
    scale: Scale | None = None,
    *,
    format: str | None = None,
) -> list[Path]:
    """Write images as what they came from; every file whole or not at all.

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
    form = format or format_of(out) or scale.format
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


def format_of(out: Path) -> str | None:
    """The format of an array file or PNG that a name stands for; None: of a folder."""
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
        write(out, encode_picture(pixels[0]))
        return [out]
    files = [out / name for name in _png_names(names, len(pixels))]
    made: list[Path] = []
    fresh = not out.exists()
    try:
        for file, array in zip(files, pixels, strict=True):
            new = not file.exists()
            write(file, encode_picture(array))
            made += [file] if new else []
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        if fresh and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
    return files


def _png_names(names: Sequence[str] | None, count: int) -> list[str]:
    """Distinct names of PNG files."""
    given = [_name(i) for i in range(count)] if names is None else [str(n) for n in names]
    if len(given) != count:
        raise InputError(f"{count} images but {len(given)} names")
    return [f"{stem}.png" for stem in stems(given)]


def names_of(count: int) -> list[str]:
    """Names of the pictures of so many new images."""
    return _png_names(None, count)


def stems(names: Sequence[str]) -> list[str]:
    """Names without their ending. Where a.jpg and a.png would meet, both keep it.

    Raises:
        InputError: names that are none of a file, or two that are the same.
    """
    wrong = [n for n in names if not n or Path(n).name != n]
    if wrong:
        raise InputError(f"{wrong[0]!r} is not the name of a file")
    short = [n[: -len(Path(n).suffix)] if Path(n).suffix.lower() in ENDINGS else n for n in names]
    often = Counter(short)
    found = [s if often[s] == 1 else n for s, n in zip(short, names, strict=True)]
    twice = [name for name, times in Counter(found).items() if times > 1]
    if twice:
        raise InputError(f"two images are called {twice[0]}; names must differ")
    return found


def _save_array(images: Tensor, out: Path, scale: Scale, form: str) -> Path:
    writer = array_writer(out, len(images), images.shape[1:], scale, form)
    try:
        writer.write(images)
        writer.close()
    finally:
        writer.abandon()
    return writer.out


def array_writer(
    out: Path, count: int, shape: Sequence[int], scale: Scale, form: str | None = None
) -> ImagesWriter:
    """What writes an array file of images (C, H, W) part by part.

    Args:
        out: The file, or the folder of a file images.npy (.npz, -idx3-ubyte).
        count: Number of images.
        shape: (C, H, W) of each.
        scale: From `load_images`.
        form: See `save_images`.
    """
    form = form or format_of(out) or scale.format
    if form == "idx" and scale.dtype != "uint8":
        scale = replace(scale, offset=0.0, gain=255.0, dtype="uint8")
    return ImagesWriter(array_file(out, form), count, tuple(shape), scale, form)


def array_file(out: Path, form: str) -> Path:
    """The array file of a format at `out`: `out` itself if it is named so, else a file in it."""
    if format_of(out) == form:
        return out
    return out / ("images-idx3-ubyte" if form == "idx" else f"images.{form}")


def save_new(images: Tensor, out: Path, like: ImageSet | None = None) -> None:
    """Images that come from no file: all values in an array file, else a folder of pictures."""
    if out.suffix.lower() in {".npy", ".npz"}:
        save_images(images, out)
    elif like is None:
        save_images(images, out, format="png")
    else:
        save_images(images, out, like.names, like.scale, format="png")
