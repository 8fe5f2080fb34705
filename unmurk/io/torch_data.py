"""Measurements from a Dataset or a DataLoader of torch.

An item is y (C, H, W), or a tuple or list that begins with y; the rest of it (labels, clean
images) is not read. Image i of a Dataset is item i, so masks and noise that depend on an image's
number stay the same.

Learning draws its own batches. A DataLoader that only shuffles the items of a Dataset therefore
stands for the Dataset, in its own order. A loader that selects, repeats or collates items in
another way is read once, from its first batch to its last.

Sets of up to `HELD` bytes are held in memory. A larger set with a length is read item by item; a
larger one without a length is refused.
"""

import hashlib
import math
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import default_collate as collate

from ..errors import InputError
from .source import HELD, SAMPLE, Source

__all__ = ["Items", "from_torch"]


def from_torch(data: "Dataset[Any] | DataLoader[Any]") -> Tensor | Source:
    """Return the measurements of a Dataset or DataLoader, (N, C, H, W) float32.

    Raises:
        InputError: There are no items; or they are not y or (y, ...), differ in shape, or are not
            finite; or a set without a length has more than `HELD` bytes.

    >>> from torch.utils.data import TensorDataset
    >>> tuple(from_torch(TensorDataset(torch.zeros(3, 1, 4, 4))).shape)
    (3, 1, 4, 4)
    """
    if isinstance(data, DataLoader):
        if not _plain(data):
            return _gathered((_tensor(batch, 4) for batch in data), "the DataLoader")
        data = data.dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        return _gathered((_tensor(item, 3)[None] for item in _walk(data)), "the Dataset")
    source = Items(data)
    if 4 * math.prod(source.shape) <= HELD:
        return source.read(list(range(len(source))))
    return source


class Items(Source):
    """The items of a Dataset with a length, read when they are needed.

    Args:
        data: Items y (C, H, W) or (y, ...), of one shape.

    >>> data = torch.utils.data.TensorDataset(torch.arange(3.0).view(3, 1, 1, 1))
    >>> Items(data)[1:].flatten().tolist()
    [1.0, 2.0]
    """

    def __init__(self, data: "Dataset[Any]") -> None:
        self.data = data
        count = len(data)  # type: ignore[arg-type]
        if count < 1:
            raise InputError("the Dataset holds no items")
        self.shape = (count, *_tensor(data[0], 3).shape)
        self._lock = threading.Lock()  # a Dataset may share a file between its items

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        with self._lock:
            items = [_tensor(self.data[index], 3) for index in indices]
        for index, item in zip(indices, items, strict=True):
            _check(item, self.shape[1:], f"item {index} of the Dataset")
        return torch.stack(items)

    def fingerprint(self) -> dict[str, Any]:
        """Return the shape, and a hash of `SAMPLE` evenly spread items."""
        count = min(SAMPLE, len(self))
        places = sorted({round(i * (len(self) - 1) / max(1, count - 1)) for i in range(count)})
        digest = hashlib.sha256()
        for place in places:
            digest.update(self.read([place]).numpy().tobytes())
        sample = {"sha256": digest.hexdigest(), "of": f"{len(places)} items, evenly spread"}
        return {"shape": list(self.shape), **sample}


def _walk(data: Any) -> Iterable[Any]:
    """Iterate over the items of a Dataset that is iterable, or has no length."""
    return iter(data)


def _plain(loader: "DataLoader[Any]") -> bool:
    """Whether a loader returns every item of its Dataset once, collated as torch does."""
    sampler = loader.sampler
    every = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    full = every and loader.batch_size is not None and not loader.drop_last
    return full and loader.collate_fn is collate and hasattr(loader.dataset, "__len__")


def _gathered(parts: Iterable[Tensor], what: str) -> Tensor:
    """Concatenate the batches of a stream, up to `HELD` bytes."""
    found: list[Tensor] = []
    size = 0
    for part in parts:
        _check(
            part, found[0].shape[1:] if found else part.shape[1:], f"batch {len(found)} of {what}"
        )
        size += 4 * part.numel()
        if size > HELD:
            raise InputError(
                f"{what} gives more than {HELD // 2**20} MiB and has no length: give a Dataset"
                " with __len__ and __getitem__, or a .npy file"
            )
        found.append(part)
    if not found:
        raise InputError(f"{what} gives no items")
    return torch.cat(found)


def _tensor(item: Any, axes: int) -> Tensor:
    """Return y of an item or of a batch, float32."""
    y = item[0] if isinstance(item, tuple | list) and item else item
    y = torch.as_tensor(y) if not isinstance(y, str | dict | None.__class__) else None
    if y is None or y.is_complex() or y.ndim not in (axes - 1, axes) or not y.numel():
        held = f"{y.dtype} {tuple(y.shape)}" if y is not None else type(item).__name__
        shape = "(C, H, W)" if axes == 3 else "(B, C, H, W)"
        raise InputError(f"expected items y {shape} or tuples that begin with y, got {held}")
    y = y.unsqueeze(axes - 3) if y.ndim == axes - 1 else y
    full = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(y.dtype, 1.0)
    return y.detach().float().cpu() / full


def _check(y: Tensor, shape: Any, what: str) -> None:
    if tuple(y.shape[-len(shape) :]) != tuple(shape):
        raise InputError(
            f"{what} has the shape {tuple(y.shape)}, others {tuple(shape)}: make them alike"
        )
    if not bool(y.isfinite().all()):
        raise InputError(f"{what} has values that are not finite: correct it, or leave it out")
