"""The state of a run: written atomically, and checked before anything of it is used.

The state is one file, `state/latest.pt`, written beside the old one and renamed over it, so that a
complete state is on disk at any moment. A run folder may come from a stranger, or from a disk that
lost a part of it. So `load` compares the file with the state that the run itself would write: the
same names, tensors of the same shapes and types, numbers within their bounds. Files are read with
`weights_only=True` and never unpickled.
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
from ..io.atomic import write
from ..io.limits import check_file
from ..io.weights import unpacked

__all__ = ["Checkpoint", "StateMismatch", "check_like"]

SCORES = {"measurement_swd", "chi2", "elbo"}


class StateMismatch(ValueError):
    """A state does not belong to this run.

    >>> check_like({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, "modules")
    Traceback (most recent call last):
        ...
    unmurk.training.checkpoint.StateMismatch: modules.w has another shape
    """


class Checkpoint:
    """The state file of a run.

    Args:
        folder: The run folder.

    Attributes:
        path: The state file.

    >>> checkpoint = Checkpoint(Path("continued"))
    >>> checkpoint.exists()
    False
    >>> checkpoint.save({"step": 3})
    >>> checkpoint.exists(), len(checkpoint.read({})) == checkpoint.path.stat().st_size
    (True, True)
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state" / "latest.pt"

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state atomically.

        Raises:
            InputError: The file cannot be written.
        """
        stream = io.BytesIO()
        torch.save(dict(state), stream)
        write(self.path, stream.getvalue())

    def exists(self) -> bool:
        """Whether a state has been written.

        Raises:
            InputError: The folder cannot be read.
        """
        try:
            return self.path.exists()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error

    def read(self, own: Mapping[str, Any]) -> bytes:
        """Read the bytes of the state file.

        Args:
            own: The state that the run would write now, which bounds the size of the file.

        Raises:
            InputError: The file cannot be read, or is far too large.
        """
        check_file(self.path)
        try:
            if self.path.stat().st_size > 8 * _size(own) + 2**26:
                raise self.damaged("it is far too large")
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error

    def parse(self, data: bytes, own: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Decode the bytes of a state file and check them.

        Args:
            data: The bytes of the file.
            own: The state that the run would write now.
            steps: Number of steps of the run.

        Returns:
            The state, on the CPU.

        Raises:
            InputError: The state is damaged, or of another version. If memory runs out, that error
                is raised as it is.
        """
        try:
            # The state goes to the CPU first: two copies of the networks may not fit into a GPU.
            state = unpacked(io.BytesIO(data))
        except Exception as error:
            if out_of_memory(error):
                raise
            raise self.damaged() from error
        if isinstance(state, dict):
            state.setdefault("steps", steps)  # states of earlier versions do not have these
            state.setdefault("checked", True)
        try:
            _check_state(state, own, steps)
        except StateMismatch as error:
            raise self.damaged(error) from error
        return dict(state)

    def damaged(self, why: object = "it is no state") -> InputError:
        """Return the error for a state that cannot be used."""
        return InputError(
            f"cannot read {self.path}: it is damaged, or of another version of unmurk ({why}): "
            "finish the run with that version, or remove the file to start again"
        )


def _check_state(state: Any, own: Mapping[str, Any], steps: int) -> None:
    """Raise StateMismatch unless a state has the entries of this run's own."""
    if not isinstance(state, dict) or set(state) != set(own):
        raise StateMismatch("its entries are others")
    for key in ("modules", "ema", "buffers"):
        check_like(state[key], own[key], key)
    _check_number(state, "step", int, 0, steps)
    _check_number(state, "steps", int, 1, steps)
    _check_number(state, "skipped", int, 0, math.inf)
    _check_number(state, "seconds", float, 0, 1e12)
    _check_number(state, "factor", float, 1 / 64, 1)
    if state["precision"] not in ("auto", "fp32", "bf16"):
        raise StateMismatch("its precision is unknown")
    if not isinstance(state["checked"], bool):
        raise StateMismatch("it does not tell whether its last step was checked")
    _check_best(state["best"], own, steps)


def _check_best(best: Any, own: Mapping[str, Any], steps: int) -> None:
    """Raise StateMismatch unless the best weights so far are None or belong to this run."""
    if best is None:
        return
    if not isinstance(best, dict) or set(best) != {"step", "figures", "ema"}:
        raise StateMismatch("its best step has other entries")
    _check_number(best, "step", int, 0, steps)
    figures = best["figures"]
    if not isinstance(figures, dict) or not set(figures) <= SCORES:
        raise StateMismatch("the figures of its best step are others")
    if not all(isinstance(value, float) for value in figures.values()):
        raise StateMismatch("the figures of its best step are no numbers")
    check_like(best["ema"], own["ema"], "best")


def _check_number(state: Mapping[str, Any], key: str, kind: type, low: float, high: float) -> None:
    """Raise StateMismatch unless an entry is a number of a type within its bounds."""
    value = state[key]
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        raise StateMismatch(f"its {key} is out of bounds")


def check_like(found: Any, own: Any, where: str) -> None:
    """Compare nested dicts of tensors.

    Args:
        found: What a file holds.
        own: What it should look like.
        where: The name of the place, for the message.

    Raises:
        StateMismatch: Names, shapes or types differ.

    >>> check_like({"w": torch.zeros(3)}, {"w": torch.ones(3)}, "modules")
    >>> check_like({"v": torch.zeros(3)}, {"w": torch.ones(3)}, "modules")
    Traceback (most recent call last):
        ...
    unmurk.training.checkpoint.StateMismatch: modules has other entries
    """
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.shape != own.shape:
            raise StateMismatch(f"{where} has another shape")
        if found.dtype != own.dtype or found.layout != own.layout or found.is_meta:
            raise StateMismatch(f"{where} is of another type")
    elif isinstance(own, Mapping):
        if not isinstance(found, dict) or set(found) != set(own):
            raise StateMismatch(f"{where} has other entries")
        for key, value in own.items():
            check_like(found[key], value, f"{where}.{key}")
    elif type(found) is not type(own):  # what modules keep beside their tensors
        raise StateMismatch(f"{where} is of another type")


def _size(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value.values())) if isinstance(value, Mapping) else 0
