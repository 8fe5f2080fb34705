"""What the files of a folder have in common, looked up once before they are worked off one by one.

Only what a decision needs is read: integers until a number shows that a set fills its type, and a
few images of floats. 8-bit files are not opened.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .formats.pictures import Pages, number_type, open_pages
from .scale import Extent, Spans, check_units, span_for

__all__ = ["survey"]

FLOATS = 64  # images of floats that are looked at
PIXELS = 4096  # and so many of their numbers


def survey(
    files: Sequence[Path], spans: Spans = None, sigma: float | None = None
) -> dict[str, Extent]:
    """How far the integers of a set of files reach, by number type.

    Args:
        files: Pictures; those that cannot be read are passed over.
        spans: What is known already.
        sigma: Standard deviation of the noise, for `scale.check_units`; None: no check.

    Returns:
        The types of more than 8 bits for which no span is known.

    Raises:
        InputError: floats that are no images in units of [0, 1].
    """
    extents: dict[str, Extent] = {}
    floats: list[torch.Tensor] = []
    for file in files:
        try:
            known = number_type(file)
            if known is not None and not _open(known, spans, extents):
                continue
            with open_pages(file) as pages:
                _look(pages, spans, extents, floats)
        except InputError:
            continue  # named, or left out, when it is its turn
    if floats and sigma is not None:
        check_units(files[0] if len(files) == 1 else files[0].parent, torch.cat(floats), sigma)
    return extents


def _open(dtype: str, spans: Spans, extents: dict[str, Extent]) -> bool:
    """Whether images of a type can still tell something."""
    if span_for(spans, dtype) is not None:
        return False
    return not extents.setdefault(dtype, Extent(dtype)).full


def _look(
    pages: Pages, spans: Spans, extents: dict[str, Extent], floats: list[torch.Tensor]
) -> None:
    if pages.bits or span_for(spans, pages.dtype) is not None:
        return
    for page in range(len(pages)):
        if np.dtype(pages.dtype).kind == "f":
            if len(floats) >= FLOATS:
                return
            values = pages.read(page).ravel()
            some = values[:: max(1, len(values) // PIXELS)]
            with np.errstate(over="ignore"):  # named when the file is read
                floats.append(torch.from_numpy(some.astype(np.float32)))
        elif _open(pages.dtype, spans, extents):
            extents[pages.dtype].add(pages.read(page))
        else:
            return
