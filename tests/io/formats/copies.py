"""A copy of a file by the reader and the writer of its format."""

from pathlib import Path

import numpy as np

from unmurk.io.formats.pictures import open_pages
from unmurk.io.formats.readers import reader_of

__all__ = ["through"]


def through(source: Path, out: Path, floats: bool = False, grow: int = 1) -> list[np.ndarray]:
    """Write what the reader reads, each pixel `grow` times in both directions."""
    with open_pages(source) as pages:
        images = [pages.read(n) for n in range(len(pages))]
    writer = reader_of(source).writer(out, source, "a line", floats)
    for image in images:
        writer.write(np.kron(image, np.ones((grow, grow, 1), image.dtype)))
    writer.close()
    return images
