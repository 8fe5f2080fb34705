"""Tensors to image files: pictures and arrays in the kind of file that the images came from."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import InputError, reason
from .atomic import write
from .formats.arrays import is_idx
from .formats.pictures import encode_picture, without_suffix
from .formats.registry import suffix_of
from .formats.tiff_writer import StackWriter
from .scale import Scale
from .streams import ImagesWriter

__all__ = [
    "array_file",
    "array_writer",
    "format_of",
    "pixels_of",
    "save_images",
    "stems",
    "write_tiff",
    "written_scale",
]

FORMATS = ("png", "tif", "npy", "npz", "idx")
UNWRITTEN = (".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".jp2")  # formats that lose numbers
PNG_TYPES = ("uint8", "uint16")


def save_images(
    images: Tensor,
    out: str | Path,
    names: Sequence[str] | None = None,
    scale: Scale | None = None,
    *,
    format: str | None = None,
) -> list[Path]:
    """Write images in the kind of file that they came from; each file whole or not at all.

    Args:
        images: (N, C, H, W) in units of [0, 1].
        out: For "png" and "tif" a folder (made if needed), or a file: .png for one image, .tif for
            any number. For the other formats a file; a name without the suffix of the format is a
            folder, and the file in it is called images.npy (.npz, -idx3-ubyte).
        names: One name for each image, used for pictures, with the suffix of the format. None:
            running numbers.
        scale: From `load_images`. None: float32 arrays, 8-bit PNG files. A PNG or an idx file has
            8 bits where it cannot hold the numbers of the scale.
        format: "png", "tif", "npy", "npz" or "idx". None: by the suffix of `out`, then by the
            scale.

    Returns:
        The files written.

    Raises:
        InputError: The images, names or format do not fit, or the place cannot be written.

    >>> import tempfile
    >>> import torch
    >>> files = save_images(torch.zeros(2, 1, 4, 4), Path(tempfile.mkdtemp()), format="png")
    >>> [file.name for file in files]
    ['00000.png', '00001.png']
    """
    out, scale = Path(out), scale or Scale()
    form = format or format_of(out) or scale.format
    if form not in FORMATS:
        raise InputError(f"format {form!r} is unknown: choose one of {', '.join(FORMATS)}")
    if images.ndim != 4 or not images.numel():
        raise InputError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        raise InputError("the images have values that are not finite: nothing was written")
    try:
        scale = written_scale(form, scale)
        if form in ("png", "tif"):
            return _save_pictures(images, out, names, scale, form)
        return [_save_array(images, out, scale, form)]
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason(error)}") from error


def format_of(out: Path) -> str | None:
    """Return the format that a file's name asks for; None for a folder.

    Raises:
        InputError: The name is that of a format that images are not written in: one that loses
            numbers, or one of scans, which need the file that they came from.

    >>> format_of(Path("a.TIFF")), format_of(Path("x-idx3-ubyte.gz")), format_of(Path("a"))
    ('tif', 'idx', None)
    """
    if out.is_dir():
        return None
    ending = out.suffix.lower().lstrip(".")
    ending = "tif" if ending == "tiff" else ending
    if f".{ending}" in UNWRITTEN:
        raise InputError(f"cannot write {out}: give .png, .tif, .npy or .npz, or a folder")
    if ending in FORMATS:
        return ending
    if suffix_of(out):
        raise InputError(
            f"cannot write {out}: images that were not read from such a file have no header for "
            "it: give .png, .tif, .npy or .npz, or a folder"
        )
    return "idx" if is_idx(out.name) else None


def written_scale(form: str, scale: Scale) -> Scale:
    """Return the scale if a format can hold its numbers, else that of 8 bits.

    >>> scale = Scale.of("float32")
    >>> written_scale("tif", scale).dtype, written_scale("png", scale).dtype
    ('float32', 'uint8')
    """
    if form == "png" and scale.dtype not in PNG_TYPES:
        return Scale(gain=255.0, dtype="uint8")
    if form == "idx":
        return Scale(gain=255.0, dtype="uint8") if scale.dtype != "uint8" else scale
    if form == "tif" and scale.dtype == "bool":
        return Scale(gain=255.0, dtype="uint8")
    return scale


def _save_pictures(
    images: Tensor, out: Path, names: Sequence[str] | None, scale: Scale, form: str
) -> list[Path]:
    if form == "png" and images.shape[1] not in (1, 3):
        raise InputError(
            f"{out}: a PNG has 1 or 3 channels, not {images.shape[1]}: use .npy or .tif"
        )
    if format_of(out) == form:
        if form == "tif":
            write_tiff(out, images, scale)
        elif len(images) > 1:
            raise InputError(f"{out} can hold one image, not {len(images)}: give a folder")
        else:
            write(out, encode_picture(pixels_of(images[0], scale)))
        return [out]
    files = [out / name for name in _file_names(names, len(images), form)]
    made: list[Path] = []
    fresh = not out.exists()
    try:
        for file, image in zip(files, images, strict=True):
            new = not file.exists()
            if form == "tif":
                write_tiff(file, image[None], scale)
            else:
                write(file, encode_picture(pixels_of(image, scale)))
            made += [file] if new else []
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        if fresh and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
    return files


def pixels_of(image: Tensor, scale: Scale) -> np.ndarray:
    """Convert an image (C, H, W) to pixels (H, W, C) in the numbers of its file.

    >>> import torch
    >>> pixels_of(torch.ones(3, 4, 5), Scale.of("uint16"))[0, 0].tolist()
    [65535, 65535, 65535]
    """
    return np.moveaxis(scale.to_file(image), 0, -1)


def write_tiff(out: Path, images: Tensor, scale: Scale) -> None:
    """Write images (N, C, H, W) to one TIFF file. Raises InputError as `StackWriter` does.

    >>> import torch
    >>> from unmurk.io.images import load_images
    >>> x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> write_tiff(Path("stack.tif"), x, Scale())
    >>> torch.equal(load_images("stack.tif").images, x)
    True
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = StackWriter(out)
    try:
        for image in images:
            writer.write(pixels_of(image, scale))
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _file_names(names: Sequence[str] | None, count: int, form: str) -> list[str]:
    """Return distinct file names with the suffix of a format."""
    given = [f"{i:05d}" for i in range(count)] if names is None else [str(n) for n in names]
    if len(given) != count:
        raise InputError(f"{count} images but {len(given)} names")
    return [f"{stem}.{form}" for stem in stems(given)]


def stems(names: Sequence[str]) -> list[str]:
    """Remove the suffixes of names; a.jpg and a.png both keep theirs.

    Raises:
        InputError: A name is not the name of a file, or two are the same.

    >>> stems(["a.png", "b.jpg", "c.jpg", "c.png"])
    ['a', 'b', 'c.jpg', 'c.png']
    """
    wrong = [n for n in names if not n or Path(n).name != n]
    if wrong:
        raise InputError(f"{wrong[0]!r} is not the name of a file")
    short = [without_suffix(name) for name in names]
    often = Counter(short)
    found = [s if often[s] == 1 else n for s, n in zip(short, names, strict=True)]
    twice = [name for name, times in Counter(found).items() if times > 1]
    if twice:
        raise InputError(f"two images are called {twice[0]}: give each image its own name")
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
    """Return a writer of an array file of images (C, H, W), batch by batch.

    Args:
        out: The file, or the folder of a file images.npy (.npz, -idx3-ubyte).
        count: Number of images.
        shape: (C, H, W) of each.
        scale: From `load_images`.
        form: The format; None: by the suffix of `out`, then by the scale.

    >>> import torch
    >>> writer = array_writer(Path("x.npy"), 2, (1, 1, 3), Scale())
    >>> for value in (0.0, 1.0):
    ...     writer.write(torch.full((1, 1, 1, 3), value))
    >>> writer.close()
    >>> np.load("x.npy").tolist()
    [[[[0.0, 0.0, 0.0]]], [[[1.0, 1.0, 1.0]]]]
    """
    form = form or format_of(out) or scale.format
    scale = written_scale(form, scale) if form == "idx" else scale
    return ImagesWriter(array_file(out, form), count, tuple(shape), scale, form)


def array_file(out: Path, form: str) -> Path:
    """Return `out` if its suffix is that of the format, else the array file in this folder.

    >>> str(array_file(Path("out"), "npz")), str(array_file(Path("x.npz"), "npz"))
    ('out/images.npz', 'x.npz')
    """
    if format_of(out) == form:
        return out
    return out / ("images-idx3-ubyte" if form == "idx" else f"images.{form}")
