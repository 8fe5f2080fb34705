"""Image files to tensors.

Inside unmurk an image is float32 (C, H, W) in units of [0, 1]. A file holds other numbers, and the
`Scale` of a set records how to return to them (see `scale`); `saving` does.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .axes import ALL, Selection
from .folders import pictures_in, read_files, usual_kind
from .formats.arrays import read_array, read_idx, split_key
from .formats.hdf5 import Kspace, is_hdf5
from .formats.pictures import (
    Nan,
    are_finite,
    check_finite,
    has_reader,
    single,
)
from .formats.readers import is_folder
from .formats.registry import real_path
from .layouts import images_in, layout_of, to_images
from .limits import check_free_memory
from .packaged import packaged
from .scale import Extent, Scale, Spans, joined, span_for

__all__ = [
    "ImageSet",
    "hidden",
    "layout_of",
    "load_images",
    "load_measurements",
    "measured_white",
    "pictures_in",
    "read_idx",
    "read_images",
    "to_images",
]


@dataclass
class ImageSet:
    """Images and where they came from.

    Attributes:
        images: (N, C, H, W) float32 in units of [0, 1].
        names: File names, or running numbers for the images of an array file.
        scale: How to write them back.
        skipped: Name and reason of each image that was left out.
        numbers: Position of each image in the file or the folder, counting those left out. The
            random draws of an image (its mask) depend on it.
        note: A remark about the scale for the user, or an empty text.
        select: The axes and channels that were given.

    >>> data = ImageSet(torch.ones(2, 1, 4, 4), ["a.png", "b.png"], Scale.of("uint8"))
    >>> len(data), int(data.scale.to_file(data.images).max())
    (2, 255)
    """

    images: Tensor
    names: list[str]
    scale: Scale
    skipped: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    note: str = ""
    select: Selection = ALL

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    path: str | Path,
    *,
    channels: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    span: Spans = None,
    nan: Nan = "refuse",
    axes: str = "",
    channel: int | str | Sequence[int | str] = (),
) -> ImageSet:
    """Read images of one size.

    Args:
        path: A folder of pictures (PNG, JPEG, TIFF, BMP, WebP, and the formats of registered
            readers), read in the order of their names; one such picture; a file of a microscope,
            or a data set of an HDF5 file, "scan.h5:name" (see the guide); a .npy or .npz array
            (N, H, W), (N, H, W, C), (N, C, H, W), (H, W) or (H, W, C) with 1 to 16 channels; or an
            idx file, gzipped or not. In a .npz file the array is called "images" or is the only
            one; any other is written as "file.npz:name". The names in `packaged.SETS` ("digits",
            "nuclei") stand for the images in the package.
        channels: Refuse images with another number of channels.
        skip_bad: Leave out, and list, pictures that cannot be read or differ from most in size,
            channels or type, and images that are not finite. Otherwise the first of them is an
            error.
        limit: Read at most this number of images.
        span: The numbers of black and white in the file, which become 0 and 1; None: see `scale`.
        nan: "mask" keeps images with numbers that are not finite as they are, and `learn` and
            `solve` treat those pixels as hidden.
        axes: The axes of the file or the array in its own order, such as "TZCYX": Y and X rows and
            columns, C channels (or S), all others number the images. Empty: those that the file
            names, or see the guide.
        channel: The channels to read, by number (from 0) or name; one or several. Empty: all.

    Raises:
        InputError: There is nothing at the path; or the images are unreadable, too large, not
            finite, or differ in size, channels or type.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "set.npy", np.full((2, 4, 4), 255, np.uint8))
    >>> data = load_images(folder / "set.npy")
    >>> tuple(data.images.shape), float(data.images.max()), data.scale.dtype
    ((2, 1, 4, 4), 1.0, 'uint8')
    """
    one = (channel,) if isinstance(channel, int | str) else tuple(channel)
    select = Selection(axes, tuple(map(str, one)))
    return read_images(
        path,
        channels=channels,
        skip_bad=skip_bad,
        limit=limit,
        span=span,
        nan=nan,
        select=select,
    )


def read_images(
    path: str | Path,
    *,
    channels: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    span: Spans = None,
    nan: Nan = "refuse",
    select: Selection = ALL,
) -> ImageSet:
    """Read images as `load_images` does, with axes and channels in one object.

    >>> np.save("set.npy", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    >>> read_images("set.npy", limit=1).images.shape
    torch.Size([1, 1, 3, 4])
    >>> read_images("set.npy", channels=3)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: expected images of 3 channels in set.npy, got 1
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be 1 or more, got {limit}")
    file, key = split_key(str(packaged(path) or path))
    _require(file)
    if is_folder(file):
        found = _load_pictures(pictures_in(file), skip_bad, limit, span, nan, select.of(key or ""))
    elif has_reader(file):
        found = _load_pictures([file], skip_bad, limit, span, nan, select.of(key or ""))
    else:
        found = _load_array(file, key, skip_bad, limit, span, nan, select)
    found.select = select
    if channels is not None and found.images.shape[1] != channels:
        raise InputError(
            f"expected images of {channels} channels in {file}, got {found.images.shape[1]}"
        )
    return found


def _require(path: Path) -> None:
    """Raise InputError if there is nothing at a path."""
    file = real_path(path)
    if not file.exists() and not file.is_symlink():
        raise InputError(f"there is nothing at {file}")


# -- pictures -------------------------------------------------------------------------------------


def _load_pictures(
    files: list[Path],
    skip_bad: bool,
    limit: int | None,
    span: Spans,
    nan: Nan,
    select: Selection,
) -> ImageSet:
    good, skipped = read_files(files, skip_bad, limit, nan, select)
    kinds = Counter(page.kind for page in good)
    usual = usual_kind([page.kind for page in good])
    if len(kinds) > 1 and not skip_bad:
        first, other = good[0], next(g for g in good if g.kind != good[0].kind)
        raise InputError(
            f"the pictures in {files[0].parent} differ: {first.name} is {first.kind} but "
            f"{other.name} is {other.kind}: make them alike, or leave the "
            "others out with --skip-bad"
        )
    skipped += [(g.name, f"{g.kind}, others are {usual}") for g in good if g.kind != usual]
    kept = [page for page in good if page.kind == usual][:limit]
    stack = np.stack([page.pixels for page in kept])
    spans = [page.span for page in kept if page.span is not None]
    span = span_for(span, stack.dtype) or joined(spans)
    scale, note = _scale_of(stack, span, max(page.bits for page in kept))
    scale = replace(scale, format="png" if any(map(single, files)) else "tif")
    images = hidden(to_images(stack, scale, "NHWC"), [page.bad for page in kept])
    names, numbers = [page.name for page in kept], [page.number for page in kept]
    return ImageSet(images, names, scale, sorted(skipped), numbers, note)


def hidden(images: Tensor, bad: Sequence[np.ndarray | None]) -> Tensor:
    """Set the pixels of images (N, C, H, W) that masks (H, W) mark as bad to NaN, in place.

    >>> bad = np.array([[False, True]])
    >>> hidden(torch.ones(1, 1, 1, 2), [bad]).flatten().tolist()
    [1.0, nan]
    """
    for image, mask in zip(images, bad, strict=True):
        if mask is not None:
            image[:, torch.from_numpy(mask)] = torch.nan
    return images


def _scale_of(stack: np.ndarray, span: Spans, bits: int = 0) -> tuple[Scale, str]:
    """Return the scale of a set, and a remark about it for the user."""
    if bits or span_for(span, stack.dtype) is not None:
        return Scale.of(stack.dtype, span, bits), ""
    extent = Extent(stack.dtype)
    extent.add(stack)
    return Scale.of(stack.dtype, bits=extent.bits), extent.note


# -- arrays ---------------------------------------------------------------------------------------


def _load_array(
    file: Path,
    key: str | None,
    skip_bad: bool,
    limit: int | None,
    span: Spans,
    nan: Nan,
    select: Selection,
) -> ImageSet:
    array, form, key = read_array(file, key)
    array, layout = images_in(file, array, select)
    array, numbers, bad = _finite(file, array, skip_bad, nan)
    scale, note = _scale_of(array, span)
    scale = replace(scale, format=form, layout=layout, key=key or "images")
    check_free_memory(file, 8 * array[:limit].size)
    images = to_images(array[:limit], scale, layout)
    return ImageSet(images, [_name(i) for i in numbers[:limit]], scale, bad, numbers[:limit], note)


def _finite(
    file: Path, array: np.ndarray, skip_bad: bool, nan: Nan
) -> tuple[np.ndarray, list[int], list[tuple[str, str]]]:
    """Return the images (N, ..) that are finite, their numbers, and the names of the others."""
    fine = are_finite(array, nan)
    bad = [(_name(int(i)), "not finite") for i in np.flatnonzero(~fine)]
    if not bad:
        return array, list(range(len(array))), []
    if not skip_bad or not fine.any():
        check_finite(array[~fine][:1], f"image {bad[0][0]} in {file}", nan)
    return array[fine], np.flatnonzero(fine).tolist(), bad


def _name(number: int) -> str:
    return f"{number:05d}"


def load_measurements(
    path: str | Path, *, skip_bad: bool = False, nan: Nan = "refuse", span: Spans = None
) -> ImageSet:
    """Read measurements that are not images (k-space, sinograms); their numbers are kept.

    Args:
        path: A .npy or .npz array (N, C, H, W) with any C, or (N, H, W) for C = 1. Or a data set
            of an HDF5 file, "scan.h5:kspace" (see `formats.hdf5.Kspace`), whose complex numbers
            become pairs of channels.
        skip_bad: Leave out, and list, measurements with values that are not finite.
        nan: See `load_images`.
        span: (0, white): the measurements are divided by white, which an image of value 1 stands
            for. None: 1, or the attribute `max` of a fastMRI file.

    Returns:
        The measurements, with a scale that writes images in units of [0, 1], float32.

    Raises:
        InputError: There is nothing at the path; or it holds pictures, complex numbers that are
            not in an HDF5 file, another number of axes, or values that are not finite; or black
            is not 0.

    >>> np.save("kspace.npy", np.array([[[[3.0, -4.0]]]]))
    >>> load_measurements("kspace.npy").images.flatten().tolist()  # the numbers of the file
    [3.0, -4.0]
    >>> load_measurements("kspace.npy", span=(0, 4)).images.flatten().tolist()
    [0.75, -1.0]
    """
    file, key = split_key(str(path))
    _require(file)
    if is_hdf5(file):
        return _load_hdf5(Path(path), skip_bad, nan, span)
    if is_folder(file) or has_reader(file):
        raise InputError(
            f"{file}: these measurements are numbers without a range, which pictures cannot hold: "
            "give a .npy or .npz array, or an HDF5 file"
        )
    array, form, key = read_array(file, key)
    if array.dtype.kind not in "buif" or array.ndim not in (3, 4) or not array.size:
        raise InputError(
            f"{file} holds {array.dtype} of shape {array.shape}, which is not (N, C, H, W) or "
            "(N, H, W): complex numbers are two channels, real and imaginary part"
        )
    array, numbers, bad = _finite(file, array, skip_bad, nan)
    with np.errstate(over="ignore"):  # to infinity, if `nan` masks them
        y = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    y = y[:, None] if y.ndim == 3 else y
    form = form if form in ("npy", "npz") else "npy"
    white = measured_white(span, array.dtype)
    scale = Scale(gain=white, format=form)
    return ImageSet(y.div_(white), [_name(i) for i in numbers], scale, bad, numbers)


def _load_hdf5(path: Path, skip_bad: bool, nan: Nan, span: Spans) -> ImageSet:
    """Read the measurements of a data set in an HDF5 file."""
    found = Kspace(path)
    check_free_memory(path, 8 * math.prod(found.shape))
    array, numbers, bad = _finite(path, found.read(list(range(len(found)))), skip_bad, nan)
    white = measured_white(span, "float32", found.white)
    names = [_name(i) for i in numbers]
    y = torch.from_numpy(np.ascontiguousarray(array)).div_(white)
    note = found.note if span is None else ""
    return ImageSet(y, names, Scale(gain=white), bad, numbers, note)


def measured_white(span: Spans, dtype: Any, known: float | None = None) -> float:
    """Return the number in measurements that an image of value 1 stands for.

    Args:
        span: Numbers of black and white given by the user; None: see `known`.
        dtype: The number type of the measurements.
        known: The number by the file; None: 1.

    Raises:
        InputError: Black is not 0: measurements of a linear operator have no black.

    >>> measured_white((0, 0.004), "float32")
    0.004
    """
    given = span_for(span, dtype)
    if given is None:
        return known or 1.0
    black, white = given.pairs[0]
    if len(given.pairs) > 1 or black != 0 or not 0 < white < math.inf:
        raise InputError(
            f"{given}: these measurements are no images, and have no black: give --range 0 WHITE"
            " once, with the number that an image of value 1 stands for"
        )
    return float(white)
