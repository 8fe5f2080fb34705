"""Sets of measurements of one size, restored batch by batch into one array file.

Memory holds the measurements (up to `source.HELD` bytes; a larger set is read when it is needed)
and one batch of results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .formats.pictures import Nan
from .images import (
    ImageSet,
    array_file,
    array_writer,
    format_of,
    load_images,
    load_measurements,
    save_images,
)
from .jobs import Engine, together
from .ledger import Ledger
from .outputs import Output, key_of
from .scale import Scale, Spans
from .scenes import Scenes
from .source import Array, PictureFolder, Source, large, open_source
from .streams import ImagesWriter, NpyWriter

__all__ = ["Measurements", "by_scene", "measurements_of", "restore_set"]


@dataclass
class Measurements:
    """Measurements of one size, in memory or in a file.

    Attributes:
        y: (N, C, H, W); a slice of it is a tensor.
        numbers: The number of each image.
        scale: The scale for writing their images.
        skipped: Name and reason of each measurement that was left out.
        names: The name of each image.
    """

    y: Tensor | Source
    numbers: Sequence[int]
    scale: Scale
    skipped: dict[str, str]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.y)


def measurements_of(
    path: Path,
    pictorial: bool,
    skip_bad: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    read: Callable[..., ImageSet] = load_images,
) -> Measurements:
    """Read the measurements of a path, or open them as a source if they are large.

    Args:
        path: See `images.load_images` or, if they are not images, `images.load_measurements`.
        pictorial: Whether they are images.
        skip_bad, span, nan: See there.
        read: Reads images: `images.load_images`, or a function with the same arguments that also
            prints its remarks.

    Raises:
        InputError: See there.
    """
    if pictorial and not (skip_bad and path.is_dir()) and large(path):
        source = open_source(path, skip_bad, span, nan)
        kept = source.kept if isinstance(source, Array) else None
        numbers = range(len(source)) if kept is None else [int(n) for n in kept]
        names = [f"{number:05d}" for number in numbers]
        if isinstance(source, PictureFolder):
            names = [page.name for _, page in source.pages]
        assert source.scale is not None  # of a file
        return Measurements(source, numbers, source.scale, dict(source.skipped), names)
    if pictorial:
        data = read(path, skip_bad=skip_bad, span=span, nan=nan)
    else:
        data = load_measurements(path, skip_bad=skip_bad, nan=nan)
    return Measurements(data.images, data.numbers, data.scale, dict(data.skipped), data.names)


def by_scene(data: Measurements, repeats: int) -> Measurements:
    """Group measurements by the scenes that they show; a scene has the name of its first one.

    Args:
        data: Captures, those of a scene one after another.
        repeats: Number N of captures of each scene.

    Raises:
        InputError: They are no whole number of scenes, or some were left out.
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
            beside a file.
        batch, copies: See `jobs.together`.

    Returns:
        The number of images; "finished", the number that existed before; "skipped"; "out"; and the
        file of each array.

    Raises:
        InputError: A file of someone else or a result of other settings exists there, or the disk
            is full.
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
        for first in range(0, len(data), step):
            found = engine(data.y[first : first + step], list(data.numbers[first : first + step]))
            sink.write(first, {name: value.cpu() for name, value in found.items()})
        ledger.begin(names)
        sink.close()
    finally:
        sink.abandon()
    ledger.end(key, names)
    return {"images": len(data), **result}


def _file(to: Output, data: Measurements) -> Path:
    """Return the file of the restored images."""
    form = "png" if to.path.suffix.lower() == ".png" else format_of(to.path) or data.scale.format
    if form == "png" and (to.folder or len(data) > 1):
        raise InputError(
            f"{to.path} can hold one image, not {len(data)}: give a folder or a .npy file"
        )
    if not to.folder and to.path.suffix.lower() in (".tif", ".tiff"):
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
            value = found[name]
            if name not in self._arrays:
                shape = (*value.shape[:-4], len(self.data), *value.shape[-3:])
                self._arrays[name] = NpyWriter(path, shape)
            self._arrays[name].write(first, value.numpy(), -4)
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
