"""Checks of the chain of directories of a TIFF file before a library follows it.

Every page has a directory of tags, which says where the next one is. A damaged chain may lead back
to itself, or through the same bytes again and again, and reading it would not end.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError

__all__ = ["check_chain"]

SUBIFDS = 330  # the tag of further directories of a page
MOST_TAGS = 4096  # of a directory that tifffile reads


def check_chain(file: Path, tiff: Any) -> None:
    """Check that the chain of directories of an open TIFF file visits none of them twice.

    Each directory takes the bytes of at least one tag. This bounds the number of directories,
    including those that the pages refer to (SubIFDs), by the size of the file.

    Args:
        file: The file.
        tiff: The same file, opened as a `tifffile.TiffFile`.

    Raises:
        InputError: The chain leads back to a directory, or has more than the file has room for.

    >>> import numpy as np
    >>> import tifffile
    >>> tifffile.imwrite("pages.tif", np.zeros((2, 8, 8), np.uint8), photometric="minisblack")
    >>> with tifffile.TiffFile("pages.tif") as tiff:
    ...     check_chain(Path("pages.tif"), tiff)
    ...     len(tiff.pages)
    2
    """
    if not tiff.pages:
        return
    least = tiff.tiff.tagnosize + tiff.tiff.tagsize + tiff.tiff.offsetsize
    room = int(tiff.filehandle.size)
    taken = 0
    observed: dict[int, int] = {}
    for offset, tags in _directories(tiff):
        if offset in observed:
            raise InputError(
                f"cannot read {file}: after page {len(observed) - 1} comes page"
                f" {observed[offset]} again"
            )
        observed[offset] = len(observed)
        taken += least + len(tags) - tiff.tiff.tagsize + least * _following(tiff, tags)
        if not tags:
            raise InputError(f"cannot read {file}: page {observed[offset]} has no tags")
        if taken > room:
            raise InputError(f"cannot read {file}: it has more directories than bytes for them")


def _directories(tiff: Any) -> Iterator[tuple[int, bytes]]:
    """Iterate over directories (offset, tags) until tifffile considers the chain damaged."""
    layout, handle = tiff.tiff, tiff.filehandle
    offset = int(tiff.pages[0].offset)
    while 0 < offset < handle.size:
        handle.seek(offset)
        count = _number(layout.tagnoformat, handle.read(layout.tagnosize))
        if count > MOST_TAGS:
            return
        data = handle.read(count * layout.tagsize + layout.offsetsize)
        if len(data) < count * layout.tagsize + layout.offsetsize:
            return
        yield offset, data[: count * layout.tagsize]
        offset = _number(layout.offsetformat, data[count * layout.tagsize :])


def _number(form: str, data: bytes) -> int:
    return int(struct.unpack(form, data)[0]) if len(data) == struct.calcsize(form) else 0


def _following(tiff: Any, tags: bytes) -> int:
    """Count the directories that a page refers to."""
    size, order = tiff.tiff.tagsize, tiff.tiff.byteorder
    form = f"{order}HH{'Q' if size == 20 else 'I'}"
    heads = (struct.unpack_from(form, tags, start) for start in range(0, len(tags), size))
    return sum(count for code, _, count in heads if code == SUBIFDS)
