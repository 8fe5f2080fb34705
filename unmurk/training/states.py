"""The state file of a run, looked at before anything of it is used.

A run folder may come from a stranger, or from a disk that lost a part of it. What the file holds
is compared with the state that the trainer itself would write: the same names, tensors of the same
shapes and types, numbers within their bounds.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import out_of_memory
from ..errors import InputError

__all__ = ["Misfit", "compare", "damaged", "most", "read"]

FIGURES = {"measurement_swd", "chi2", "elbo"}


class Misfit(ValueError):
    """A state that is not one of this run."""


def most(own: Mapping[str, Any]) -> int:
    """Bytes that a state file of this run takes at most, generously."""
    return 8 * _size(own) + 2**26


def read(path: Path, data: bytes, own: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The state in the bytes of a file.

    Args:
        path: The file, for messages.
        data: Its bytes.
        own: The state of the trainer at hand.
        steps: Steps of the run.

    Raises:
        InputError: damaged, or of another version. Memory that runs out is raised as it is.
    """
    try:
        # on the host first: two copies of the networks may not fit into a GPU
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise damaged(path) from error
    try:
        _check(state, own, steps)
    except Misfit as error:
        raise damaged(path, error) from error
    return dict(state)


def damaged(path: Path, why: object = "it is no state") -> InputError:
    """What to say of a state that cannot be used."""
    return InputError(
        f"cannot read {path}: it is damaged, or of another version of unmurk ({why}): finish the "
        "run with that version, or remove the file to start again"
    )


def _check(state: Any, own: Mapping[str, Any], steps: int) -> None:
    if not isinstance(state, dict) or set(state) != set(own):
        raise Misfit("its entries are others")
    for key in ("modules", "ema", "buffers"):
        compare(state[key], own[key], key)
    _number(state, "step", int, 0, steps)
    _number(state, "skipped", int, 0, math.inf)
    _number(state, "seconds", float, 0, 1e12)
    _number(state, "factor", float, 1 / 64, 1)
    if state["precision"] not in ("auto", "fp32", "bf16"):
        raise Misfit("its precision is none")
    _check_best(state["best"], own, steps)


def _check_best(best: Any, own: Mapping[str, Any], steps: int) -> None:
    if best is None:
        return
    if not isinstance(best, dict) or set(best) != {"step", "figures", "ema"}:
        raise Misfit("its best step has other entries")
    _number(best, "step", int, 0, steps)
    figures = best["figures"]
    if not isinstance(figures, dict) or not set(figures) <= FIGURES:
        raise Misfit("the figures of its best step are others")
    if not all(isinstance(value, float) for value in figures.values()):
        raise Misfit("the figures of its best step are no numbers")
    compare(best["ema"], own["ema"], "best")


def _number(state: Mapping[str, Any], key: str, kind: type, low: float, high: float) -> None:
    value = state[key]
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        raise Misfit(f"its {key} is none")


def compare(found: Any, own: Any, where: str) -> None:
    """Compares nested dicts of tensors. Raises Misfit for other names, shapes or types."""
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.shape != own.shape:
            raise Misfit(f"{where} has another shape")
        if found.dtype != own.dtype or found.layout != own.layout or found.is_meta:
            raise Misfit(f"{where} is of another type")
    elif isinstance(own, Mapping):
        if not isinstance(found, dict) or set(found) != set(own):
            raise Misfit(f"{where} has other entries")
        for key, value in own.items():
            compare(found[key], value, f"{where}.{key}")
    elif type(found) is not type(own):  # what modules keep beside their tensors
        raise Misfit(f"{where} is of another type")


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value.values())) if isinstance(value, Mapping) else 0
