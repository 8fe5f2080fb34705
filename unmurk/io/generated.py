"""Writing images that come from no file (samples, simulated measurements), batch by batch.

Memory holds one batch. An array file keeps every value; a folder gets one picture for each image,
as PNG or TIFF files.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import InputError, reason
from .atomic import write
from .formats.pictures import encode_picture
from .formats.tiff_writer import StackWriter
from .saving import PNG_TYPES, array_writer, format_of, pixels_of, stems, write_tiff, written_scale
from .scale import Scale
from .streams import ImagesWriter

__all__ = ["GeneratedWriter", "clipped_text", "numbered"]


def numbered(count: int, form: str = "png") -> Iterator[str]:
    """Names of the pictures of new images: 00000.png and so on.

    >>> list(numbered(2))
    ['00000.png', '00001.png']
    """
    return (f"{number:05d}.{form}" for number in range(count))


def clipped_text(share: float, out: Path, dtype: str = "the number type") -> str:
    """Say that a fraction of the numbers lay outside the range of the files, and was clipped.

    >>> clipped_text(0.25, Path("new"), "uint8").partition(", ")[0]
    '25 % of the numbers are outside the range of uint8 in new and were clipped'
    """
    return (
        f"{100 * share:.3g} % of the numbers are outside the range of {dtype} in {out} and were "
        "clipped, so their noise is not the one given: --out x.npy keeps every value"
    )


class GeneratedWriter:
    """Write new images in the order of their numbers; a context manager.

    Args:
        out: A .npy or .npz file (float32, every value), an idx file, a .tif file, a .png file for
            one image, or a folder. A folder gets TIFF files if the source images were TIFF files,
            or have numbers that PNG cannot hold; else PNG files.
        count: How many images are written in all.
        scale: The scale of the images that they were made of; None: 8 bits.
        names: The names of those images; None: numbers.

    Attributes:
        clipped: Fraction of the numbers so far that lay outside the range of the file type.

    Raises:
        InputError: The format cannot hold the images, or the place cannot be written.

    >>> import torch
    >>> with GeneratedWriter(Path("generated"), 2) as writer:
    ...     writer.write(torch.tensor([0.5, 1.5]).view(2, 1, 1, 1).expand(2, 1, 4, 4))
    ...     text = writer.close()
    >>> sorted(path.name for path in Path("generated").iterdir()), writer.clipped
    (['00000.png', '00001.png'], 0.5)
    """

    def __init__(
        self,
        out: Path,
        count: int,
        scale: Scale | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.out, self.count, self.written, self.clipped = out, count, 0, 0.0
        form = format_of(out)
        self.single = form is not None
        scale = Scale(gain=255.0, dtype="uint8") if scale is None else scale
        if form is None:
            wide = np.dtype(scale.dtype).kind in "iu" and scale.dtype not in PNG_TYPES
            form = "tif" if wide or scale.format == "tif" else "png"
        self.form = form
        self.scale = Scale() if form in ("npy", "npz") else written_scale(form, scale)
        self._names = numbered(count, form)
        if names is not None:
            if len(names) != count:
                raise InputError(f"{count} images but {len(names)} names")
            self._names = (f"{stem}.{form}" for stem in stems(names))
        if form == "png" and self.single and count > 1:
            raise InputError(f"{out} can hold one image, not {count}: give a folder")
        self._array: ImagesWriter | None = None
        self._stack: StackWriter | None = None

    def write(self, images: Tensor) -> None:
        """Write the next images (n, C, H, W), in units of [0, 1].

        Raises:
            InputError: They are not finite, have channels that the format cannot hold, or the disk
                is full.
        """
        if not bool(images.isfinite().all()):
            raise InputError("the images have values that are not finite: nothing was written")
        if self.form == "png" and images.shape[1] not in (1, 3):
            raise InputError(
                f"{self.out}: a PNG has 1 or 3 channels, not {images.shape[1]}: use .npy or .tif"
            )
        try:
            if self.form in ("npy", "npz", "idx"):
                self._write_array(images)
            else:
                for image in images:
                    self._write_picture(image)
        except OSError as error:
            raise InputError(f"cannot write {self.out}: {reason(error)}") from error
        share = self.scale.clipped(images) * len(images)
        self.clipped = (self.clipped * self.written + share) / (self.written + len(images))
        self.written += len(images)

    def _write_array(self, images: Tensor) -> None:
        if self._array is None:
            shape = images.shape[1:]
            self._array = array_writer(self.out, self.count, shape, self.scale, self.form)
        self._array.write(images)

    def _write_picture(self, image: Tensor) -> None:
        if self.form == "tif" and self.single:
            self._stack = self._stack or StackWriter(self.out)
            self._stack.write(pixels_of(image, self.scale))
            return
        file = self.out if self.single else self.out / next(self._names)
        if self.form == "png":
            write(file, encode_picture(pixels_of(image, self.scale)))
            return
        write_tiff(file, image[None], self.scale)

    def close(self) -> str:
        """Give the files their names.

        Returns:
            What the files could not hold, in one line; or an empty text.
        """
        for writer in (self._array, self._stack):
            if writer is not None:
                writer.close()
        if not self.clipped:
            return ""
        return clipped_text(self.clipped, self.out, self.scale.dtype)

    def __enter__(self) -> "GeneratedWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what is not finished."""
        for writer in (self._array, self._stack):
            if writer is not None:
                writer.abandon()
