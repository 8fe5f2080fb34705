"""Writers of results: which format they get, and the formats TIFF and PNG.

A result comes back in the format that its file came in, if that format has a `registry.Writer`.
Photographs in formats that lose numbers (JPEG) become PNG files; every other format becomes TIFF,
with the metadata that OME-XML holds.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..atomic import Partial
from ..axes import ALL, Selection
from .pictures import open_pages
from .png import with_chunks
from .raster import chunks_of, encode_picture
from .readers import reader_of
from .registry import Writer, is_written, real_path, suffix_of, without_suffix
from .tiff import ENDINGS, Stack
from .tiff_tags import ome_description
from .tiff_writer import StackWriter

__all__ = [
    "PngWriter",
    "TiffWriter",
    "is_png",
    "is_tiff",
    "result_name",
    "std_suffix",
    "writer_for",
]

PNG = ".png"


def is_tiff(file: Path) -> bool:
    """Whether a name is that of a TIFF file.

    >>> is_tiff(Path("a.ome.tif")), is_tiff(Path("a.png"))
    (True, False)
    """
    return suffix_of(file) in ENDINGS


def is_png(file: Path) -> bool:
    """Whether a name is that of a PNG file.

    >>> is_png(Path("a.png")), is_png(Path("a.tif"))
    (True, False)
    """
    return suffix_of(file) == PNG


def result_name(file: Path) -> str:
    """Return the name of the result of a file: its own, or with the suffix of another format.

    >>> result_name(Path("a.png")), result_name(Path("b.jpg"))
    ('a.png', 'b.png')
    """
    name, reader = real_path(file).name, reader_of(file)
    if is_tiff(file) or is_png(file) or reader.writer is not None:
        return name
    return without_suffix(name) + (PNG if reader.single else ".tif")


def std_suffix(file: Path, out: Path) -> str:
    """Return the suffix of the standard deviations beside a result: its own if it holds floats.

    >>> std_suffix(Path("a.fits"), Path("b.fits")), std_suffix(Path("a.png"), Path("b.png"))
    ('.fits', '.tif')
    """
    reader = reader_of(file)
    own = reader.floats and reader_of(out if suffix_of(out) else file).name == reader.name
    return out.name[len(without_suffix(out.name)) :] if own or is_tiff(out) else ".tif"


def writer_for(
    file: Path,
    out: Path,
    history: str = "",
    floats: bool = False,
    select: Selection = ALL,
    repeats: int = 1,
) -> Writer:
    """Return the writer of the result of a file.

    Args:
        file: The file that the images came from, with its selection.
        out: The file to write.
        history: A line that says how the results were made.
        floats: Whether float32 is written whatever the file holds.
        select: The axes and channels that were read.
        repeats: Number of images of the file that each image of the result stands for.

    Raises:
        InputError: The file cannot be read again, the place cannot be written, or `out` has the
            suffix of a format that needs the metadata of a file of its own, or holds no scenes.

    >>> writer = writer_for(Path("a.jpg"), Path("new.png"))
    >>> type(writer).__name__
    'PngWriter'
    >>> writer.abandon()
    >>> writer_for(Path("a.jpg"), Path("new.fits"))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: new.fits: results of picture files are written as TIFF or PNG: ...
    """
    reader = reader_of(file)
    if is_png(out):
        return PngWriter(out, file, history, floats)
    if is_tiff(out):
        return TiffWriter(out, file, history, floats, select, repeats)
    known = reader_of(out) if is_written(out) else reader
    own = reader.writer is not None and (repeats == 1 or reader.scenes)
    if known.name != reader.name or not own or reader.writer is None:
        names = f"{reader.name}, TIFF or PNG" if own else "TIFF or PNG"
        raise InputError(
            f"{out}: results of {reader.name} files are written as {names}: give such a name"
        )
    more: dict[str, Any] = {"repeats": repeats} if repeats > 1 else {}
    if reader.selects:
        more["select"] = select
    return reader.writer(out, file, history, floats, **more)


class TiffWriter:
    """Write results into a TIFF file: with the tags of a TIFF source, or with OME-XML.

    Args:
        out, source, history, floats: See `registry.Writer`.
        select: The axes and channels that were read.
        repeats: Number of images of the source that each image of the result stands for.

    >>> file = Path("source.png")
    >>> _ = file.write_bytes(encode_picture(np.zeros((4, 6, 1), np.uint8)))
    >>> writer = TiffWriter(Path("result.tif"), file)
    >>> writer.write(np.full((4, 6, 1), 9, np.uint8))
    >>> writer.close()
    >>> with open_pages(Path("result.tif")) as pages:
    ...     int(pages.read(0).min())
    9
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        history: str = "",
        floats: bool = False,
        select: Selection = ALL,
        repeats: int = 1,
    ) -> None:
        self.out, self.source, self.floats, self.select = out, source, floats, select
        self.repeats = repeats
        self._like: Stack | None = None
        if is_tiff(source):
            like = Stack(real_path(source), select)
            if like.native and repeats == 1:  # else there are other pages to write
                self._like = like
            else:
                like.close()
        self._writer: StackWriter | None = None
        try:
            if self._like is not None:
                self._writer = StackWriter(out, self._like, floats)
        except BaseException:
            self.abandon()
            raise

    def write(self, pixels: np.ndarray) -> None:
        """Write the next image, (H, W, C)."""
        if self._writer is None:
            dtype = "float32" if self.floats else pixels.dtype.name
            with open_pages(self.source, self.select) as pages:
                text = ome_description(pages, pixels.shape, dtype, self.repeats)
                size = pages.shape[:2]
            tags = _resolution(self.source) if size == pixels.shape[:2] else {}
            self._writer = StackWriter(self.out, None, self.floats, text, tags)
        self._writer.write(pixels)

    def close(self) -> None:
        """Write what is left and give the file its name."""
        if self._writer is not None:
            self._writer.close()
        if self._like is not None:
            self._like.close()

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        if self._writer is not None:
            self._writer.abandon()
        if self._like is not None:
            self._like.close()


def _resolution(source: Path) -> dict[str, Any]:
    """Return the resolution of a TIFF file as tags of others; none of other files."""
    if not is_tiff(source):
        return {}
    with Stack(real_path(source)) as stack:
        known = stack.tags(0)
    names = ("resolution", "resolutionunit")
    return {name: known[name] for name in names if known["resolution"] is not None}


class PngWriter:
    """Write one result into a PNG file, with the texts, the resolution and the color profile of
    its source.

    Args:
        out, source, history, floats: See `registry.Writer`; `floats` is false.

    >>> file = Path("source.png")
    >>> _ = file.write_bytes(encode_picture(np.zeros((4, 6, 1), np.uint8)))
    >>> writer = PngWriter(Path("result.png"), file)
    >>> writer.write(np.full((4, 6, 1), 9, np.uint8))
    >>> writer.close()
    >>> with open_pages(Path("result.png")) as pages:
    ...     int(pages.read(0).min())
    9
    """

    def __init__(self, out: Path, source: Path, history: str = "", floats: bool = False) -> None:
        if floats:
            raise InputError(f"{out}: a PNG file holds integers: use .tif")
        self.out, self.source = out, source
        self._part = Partial(out)

    def write(self, pixels: np.ndarray) -> None:
        """Write the image, (H, W, C)."""
        if pixels.shape[-1] not in (1, 3):
            raise InputError(
                f"{self.out}: a PNG has 1 or 3 channels, not {pixels.shape[-1]}: use .npy or .tif"
            )
        known = reader_of(self.source).single
        chunks = chunks_of(real_path(self.source), pixels.shape) if known else []
        self._part.put(with_chunks(encode_picture(pixels), chunks))

    def close(self) -> None:
        """Give the file its name."""
        self._part.finish()

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        self._part.abandon()
