"""Sets of measurements of one size, restored batch by batch into one array file.

Memory holds the measurements (up to `source.HELD` bytes; a larger set is read when it is needed)
and one batch of results.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..progress import each
from .axes import ALL, Selection
from .formats.hdf5 import is_hdf5
from .formats.pictures import Nan, holds_images
from .formats.readers import is_folder
from .images import ImageSet, load_measurements, read_images
from .job_list import STD
from .jobs import Engine, together
from .ledger import Ledger
from .outputs import Output, key_of
from .saving import array_file, array_writer, format_of, save_images
from .scale import Scale, Spans, narrowed
from .scenes import Scenes
from .source import HELD, Array, Measured, PictureFolder, Source, large, open_source
from .streams import ImagesWriter, NpyWriter

__all__ = ["Measurements", "group_scenes", "measurements_of", "restore_set"]


@dataclass
class Measurements:
    """Measurements of one size, in memory or in a file.

    Attributes:
        y: (N, C, H, W); a slice of it is a tensor.
        numbers: The number of each image.
        scale: The scale for writing their images.
        skipped: Name and reason of each measurement that was left out.
        names: The name of each image.
        note: A remark about the scale for the user, or an empty text; images print theirs.

    >>> import torch
    >>> y, names = torch.zeros(2, 1, 4, 4), ["a.png", "c.png"]
    >>> data = Measurements(y, [0, 2], Scale(), {"b.png": "not finite"}, names)
    >>> len(data), dict(zip(data.numbers, data.names))
    (2, {0: 'a.png', 2: 'c.png'})
    """

    y: Tensor | Source
    numbers: Sequence[int]
    scale: Scale
    skipped: dict[str, str]
    names: Sequence[str]
    note: str = ""

    def __len__(self) -> int:
        return len(self.y)


def measurements_of(
    path: Path,
    pictorial: bool,
    skip_bad: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    read: Callable[..., ImageSet] = read_images,
    select: Selection = ALL,
) -> Measurements:
    """Read the measurements of a path, or open them as a source if they are large.

    Args:
        path: See `images.load_images` or, if they are not images, `images.load_measurements`.
        pictorial: Whether they are images.
        skip_bad, span, nan: See there.
        read: Reads images: `images.read_images`, or a function with the same arguments that also
            prints its remarks.
        select: The axes of the files, and the channels to read.

    Raises:
        InputError: See there.

    >>> import numpy as np
    >>> np.save("set.npy", np.full((2, 4, 4), 255, np.uint8))
    >>> y = measurements_of(Path("set.npy"), pictorial=True)
    >>> y.y.shape, float(y.y.max()), y.names
    (torch.Size([2, 1, 4, 4]), 1.0, ['00000', '00001'])
    """
    pictures = is_folder(path) or holds_images(path)
    if pictorial and not (skip_bad and pictures) and large(path):
        source = open_source(path, skip_bad, span, nan, select)
        kept = source.kept if isinstance(source, Array) else None
        numbers = range(len(source)) if kept is None else [int(n) for n in kept]
        names = [f"{number:05d}" for number in numbers]
        if isinstance(source, PictureFolder):
            names = [page.name for _, page in source.pages]
        assert source.scale is not None  # of a file
        return Measurements(source, numbers, source.scale, dict(source.skipped), names)
    if pictorial:
        data = read(path, skip_bad=skip_bad, span=span, nan=nan, select=select)
    else:
        if is_hdf5(path) and not skip_bad:
            measured = Measured(path, span)
            if 4 * math.prod(measured.shape) > HELD:
                every = range(len(measured))
                names = [f"{number:05d}" for number in every]
                assert measured.scale is not None
                return Measurements(measured, every, measured.scale, {}, names, measured.note)
        data = load_measurements(path, skip_bad=skip_bad, nan=nan, span=span)
    note = "" if pictorial else data.note
    skipped = dict(data.skipped)
    return Measurements(data.images, data.numbers, data.scale, skipped, data.names, note)


def group_scenes(data: Measurements, repeats: int) -> Measurements:
    """Group measurements by the scenes that they show; a scene has the name of its first one.

    Args:
        data: Captures, those of a scene one after another.
        repeats: Number N of captures of each scene.

    Raises:
        InputError: They are no whole number of scenes, or some were left out.

    >>> import torch
    >>> names = ["a1", "a2", "b1", "b2"]
    >>> data = Measurements(torch.zeros(4, 1, 8, 8), range(4), Scale(), {}, names)
    >>> grouped = group_scenes(data, repeats=2)
    >>> grouped.y.shape, grouped.names
    ((2, 2, 1, 8, 8), ['a1', 'b1'])
    """
    if data.skipped:
        raise InputError(
            f"{len(data.skipped)} images were left out, and each scene has {repeats} captures:"
            f" correct {next(iter(data.skipped))}, or leave out all captures of its scene"
        )
    y = Scenes(data.y, repeats)
    return replace(data, y=y, numbers=range(len(y)), names=list(data.names)[::repeats])


def restore_set(
    data: Measurements,
    key_file: Path,
    engine: Engine,
    to: Output,
    ledger: Ledger,
    *,
    arrays: Sequence[str] = (),
    batch: int | None = None,
    copies: int = 1,
) -> dict[str, Any]:
    """Restore a set into one file (or a file in a folder), with further arrays beside it.

    Args:
        data: The measurements.
        key_file: The file or folder that they were read from.
        engine: Restores a batch.
        to: The place of the results.
        ledger: Its log.
        arrays: Names of the arrays that come with the images: std.npy in a folder, NAME-std.npy
            beside a file. Standard deviations are in the numbers of the file.
        batch, copies: See `jobs.together`.

    Returns:
        The number of images; "finished", the number that existed before; "skipped"; "out"; and the
        file of each array.

    Raises:
        InputError: A file of someone else or a result of other settings exists there, or the disk
            is full.

    >>> import numpy as np
    >>> np.save("set.npy", np.full((2, 4, 4), 51, np.uint8))
    >>> data, to = measurements_of(Path("set.npy"), True), Output(Path("negatives.npy"))
    >>> ledger = to.record()
    >>> done = restore_set(data, Path("set.npy"), lambda y, n: {"images": 1 - y}, to, ledger)
    >>> done["images"], int(np.load("negatives.npy").max())  # 255 - 51
    (2, 204)
    """
    file = _file(to, data)
    beside = {
        name: file.with_name(f"{name}.npy" if to.folder else f"{file.stem}-{name}.npy")
        for name in arrays
    }
    result = {"skipped": data.skipped, "out": file, **beside}
    key, names = key_of(key_file), [path.name for path in (*beside.values(), file)]
    if ledger.finished(key, names):
        return {"images": 0, "finished": len(data), **result}
    to.expect(names)
    height, width = data.y.shape[-2:]
    step = together(height * width, batch, copies)
    sink = _Sink(file, beside, data)
    try:
        for first in each(range(0, len(data), step)):
            found = engine(_batch(data.y, first, step), list(data.numbers[first : first + step]))
            sink.write(first, {name: value.cpu() for name, value in found.items()})
        ledger.begin(names)
        sink.close()
    finally:
        sink.abandon()
    ledger.end(key, names)
    return {"images": len(data), **result}


def _batch(y: Tensor | Source, first: int, count: int) -> Tensor:
    """Return measurements. Whether those of a source are finite was checked when it was opened."""
    if isinstance(y, Source):
        return y.read(list(range(first, min(first + count, len(y)))))
    return y[first : first + count]


def _file(to: Output, data: Measurements) -> Path:
    """Return the file of the restored images."""
    named = "png" if to.path.suffix.lower() == ".png" else format_of(to.path)
    form = named or data.scale.format
    if form == "png" and (to.folder or len(data) > 1):
        raise InputError(
            f"{to.path} can hold one image, not {len(data)}: give a folder or a .npy file"
        )
    if not to.folder and named == "tif":
        raise InputError(f"{to.path}: an array is written as .npy, .npz or idx: give such a name")
    return to.path if form == "png" else array_file(to.path, form)


class _Sink:
    """Write the results of a set; the files are opened when the first batch gives their shapes."""

    def __init__(self, file: Path, beside: dict[str, Path], data: Measurements) -> None:
        self.file, self.beside, self.data = file, beside, data
        self._images: ImagesWriter | None = None
        self._arrays: dict[str, NpyWriter] = {}
        self._picture: Tensor | None = None

    def write(self, first: int, found: dict[str, Tensor]) -> None:
        """Write results from image `first` on: "images" (B, C, H, W), arrays (.., B, C, H, W)."""
        for name, path in self.beside.items():
            wide = found[name].double()
            value = (wide * self.data.scale.step if name == STD else wide).numpy()
            if name not in self._arrays:
                shape = (*value.shape[:-4], len(self.data), *value.shape[-3:])
                self._arrays[name] = NpyWriter(path, shape)
            self._arrays[name].write(first, narrowed(value, "float32"), -4)
        images = found["images"]
        if self.file.suffix.lower() == ".png":
            self._picture = images
            return
        if self._images is None:
            shape, scale = tuple(images.shape[1:]), self.data.scale
            self._images = array_writer(self.file, len(self.data), shape, scale)
        self._images.write(images)

    def close(self) -> None:
        """Give every file its name, the images last."""
        for writer in self._arrays.values():
            writer.close()
        if self._picture is not None:
            save_images(self._picture, self.file, scale=self.data.scale)
        if self._images is not None:
            self._images.close()

    def abandon(self) -> None:
        """Remove the partial files."""
        for writer in (*self._arrays.values(), self._images):
            if writer is not None:
                writer.abandon()
