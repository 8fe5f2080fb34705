"""Data sets for learning: whatever holds measurements, as a tensor or a source, and its batches.

The images of a batch are a function of (seed, step). The next batches are therefore known, and a
thread reads them while the networks work on the current one (`Batches`).
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..devices import host_to, reader
from ..errors import InputError
from ..problem import Problem
from .axes import ALL, Selection
from .formats.pictures import Nan
from .images import ImageSet
from .scale import Spans
from .source import (
    HELD,
    Array,
    PictureFolder,
    Simulated,
    Source,
    large,
    of_array,
    open_source,
)
from .torch_data import from_torch

__all__ = [
    "HELD",
    "Array",
    "Batches",
    "PictureFolder",
    "Simulated",
    "Source",
    "as_source",
    "head",
    "large",
    "open_source",
    "simulated",
]

AHEAD = 2  # batches read ahead
FEW = 512  # measurements that stand for a source without end


def head(y: Tensor | Source) -> Tensor:
    """Return measurements in memory: all, or the first of a source, up to `HELD` bytes.

    Of a source without end, they are the first `FEW`.

    >>> import torch
    >>> head(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 1, 8, 8])
    """
    if isinstance(y, Tensor):
        return y
    return y[:FEW] if y.endless else y[: max(1, HELD // (4 * math.prod(y.shape[1:])))]


def simulated(clean: Tensor | Source, problem: Problem, seed: int) -> Tensor | Source:
    """Simulate measurements of clean images; those of a source when they are needed.

    >>> import torch
    >>> from unmurk.problem import Problem
    >>> simulated(torch.ones(2, 1, 4, 4), Problem("sr:average,factor=2", 0.1), seed=0).shape
    torch.Size([2, 1, 2, 2])
    """
    if isinstance(clean, Tensor):
        return problem.simulate(clean, seed)
    return Simulated(clean, problem, seed)


def as_source(
    data: Any, span: Spans = None, nan: Nan = "refuse", select: Selection = ALL
) -> Tensor | Source:
    """Return measurements as a float32 tensor, or as a source of them.

    Args:
        data: A tensor or an array (N, C, H, W), of integers or in units of [0, 1]; an `ImageSet`;
            the path of a .npy file, of a file of images or of a folder of pictures; a source; a
            Dataset or DataLoader of torch (see `torch_data`); or an object whose attribute `y` is
            one of these.
        span: Numbers of black and white in integers and files; None: see `scale`.
        nan: See `load_images`.
        select: The axes of arrays and files, and the channels to read.

    Raises:
        InputError: The data are none of these, or cannot be read.

    >>> as_source(np.full((2, 1, 4, 4), 255, np.uint8))[:1].max().item()
    1.0
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, ImageSet):
        return data.images
    if isinstance(data, Tensor):
        if data.is_floating_point():
            return data.float()
        array = data.cpu().numpy()
        if array.ndim == 4:  # a tensor is always (N, C, H, W)
            return of_array("the tensor", array, span, "NCHW")
        data = array
    if isinstance(data, np.ndarray):
        if data.ndim < 3:
            raise InputError(f"expected measurements (N, C, H, W), got the shape {data.shape}")
        return of_array("the array", data, span, select=select)
    if isinstance(data, str | Path):
        return open_source(Path(data), span=span, nan=nan, select=select)
    if isinstance(data, torch.utils.data.Dataset | torch.utils.data.DataLoader):
        return from_torch(data)
    if not hasattr(data, "y"):
        raise InputError(
            "expected measurements as a tensor, an array, a path, a source, a torch Dataset or "
            f"DataLoader, or an object with an attribute y, got {type(data).__name__}"
        )
    return as_source(data.y, span, nan, select)


class Batches:
    """The indices and measurements of every step, read ahead by a thread.

    Args:
        y: Measurements (N, ...).
        choose: Returns the indices of a step, (B,).
        device: The device for the measurements.
        prepare: Called by the thread with the indices and the device of every batch that it reads;
            it prepares what else a step needs (masks to be drawn).

    >>> y = torch.arange(4.0).view(4, 1, 1, 1)
    >>> batches = Batches(y, lambda step: torch.tensor([step % 4, 0]), torch.device("cpu"))
    >>> index, measured = batches.batch_at(2)
    >>> index.tolist(), measured.flatten().tolist()
    ([2, 0], [2.0, 0.0])
    >>> batches.close()
    """

    def __init__(
        self,
        y: Tensor | Source,
        choose: Callable[[int], Tensor],
        device: torch.device,
        prepare: Callable[[Tensor, torch.device], None] | None = None,
    ) -> None:
        self.y, self.choose, self.device, self.prepare = y, choose, device, prepare
        self.pool = reader()
        self.coming: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the indices (B,) and measurements (B, ...) of a step."""
        wanted = range(step, step + 1 + AHEAD)
        self.coming = {k: v for k, v in self.coming.items() if k in wanted}
        for k in wanted:
            if k not in self.coming:
                self.coming[k] = self.pool.submit(self.read, k)
        return self.coming.pop(step).result()

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the same as `batch_at`, read at once."""
        indices = self.choose(step)
        y = host_to(self.y[indices.to(self.y.device)], self.device)
        if self.prepare is not None:
            self.prepare(indices, self.device)
        return indices, y

    def close(self) -> None:
        """Stop reading ahead."""
        self.pool.shutdown(cancel_futures=True)
