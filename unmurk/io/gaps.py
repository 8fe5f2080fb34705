"""Measurements with numbers that are not finite: where they are, and zeros in their place."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .datasets import CHUNK, Source
from .formats.pictures import Nan

__all__ = ["Filled", "gaps", "full"]


class Filled(Source):
    """Measurements with zeros in place of numbers that are not finite.

    Args:
        given: Measurements.
    """

    def __init__(self, given: Source) -> None:
        self.given, self.shape = given, given.shape
        self.skipped, self.scale, self.note = given.skipped, given.scale, given.note

    def read(self, rows: list[int]) -> Tensor:
        y = self.given.read(rows)
        return torch.where(y.isfinite(), y, 0.0)

    def fingerprint(self) -> dict[str, Any]:
        """That of the measurements."""
        return self.given.fingerprint()


def gaps(y: Tensor | Source, nan: Nan) -> tuple[Tensor | Source, dict[int, Tensor]]:
    """Measurements without numbers that are not finite, and where these were.

    Args:
        y: Measurements (N, C, H, W).
        nan: "refuse" or "mask".

    Returns:
        y with zeros there, and by number of an image the places (row * W + column) of its pixels
        of which a channel is missing. Nothing is read of sources that hold integers.

    Raises:
        InputError: there are some, and they are to be refused.
    """
    if isinstance(y, Source) and not y.floats:
        return y, {}
    found: dict[int, Tensor] = {}
    step = max(1, CHUNK // (4 * math.prod(y.shape[1:])))
    for start in range(0, len(y), step):
        bad = ~y[start : start + step].isfinite().all(1).flatten(1)
        for row in bad.any(1).nonzero()[:, 0].tolist():
            if nan == "refuse":
                raise InputError(
                    f"measurement {start + row} has values that are not finite: mend it, leave it "
                    "out, or count such pixels as hidden with nan='mask' (--nan mask)"
                )
            found[start + row] = bad[row].nonzero()[:, 0].cpu()
    if not found:
        return y, {}
    return (Filled(y) if isinstance(y, Source) else torch.where(y.isfinite(), y, 0.0)), found


def full(y: Tensor) -> Tensor:
    """The measurements that lack no number.

    Raises:
        InputError: there are none.
    """
    kept = y.isfinite().flatten(1).all(1)
    if not bool(kept.any()):
        raise InputError("every image has missing pixels: give the noise as a number")
    return y if bool(kept.all()) else y[kept]
