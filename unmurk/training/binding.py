"""The problem of a step's measurements, bound before the step needs it.

Binding a problem to images may draw a mask for each of them, on the CPU, and moving one drops the
decompositions that its operator keeps. So the problem is moved to a device once, and the thread
that reads the measurements of the next steps also binds the problem to them.
"""

import threading

import torch
from torch import Tensor

from ..problem import Problem

__all__ = ["Binding"]

HELD = 8  # problems bound ahead that are kept at most


class Binding:
    """A problem that is moved once and bound ahead.

    Args:
        problem: How the measurements were made.
        shape: Shape (C, H, W) of the images behind them.
    """

    def __init__(self, problem: Problem, shape: tuple[int, int, int]) -> None:
        self.problem, self.shape = problem, shape
        self.moved: dict[torch.device, Problem] = {}
        self.ahead: dict[tuple[torch.device, tuple[int, ...]], Problem] = {}
        self.lock = threading.Lock()

    def prepare(self, rows: Tensor, device: torch.device) -> None:
        """Bind the problem to the measurements with these numbers, (B,), for a later `bind`."""
        key = device, tuple(rows.tolist())
        bound = self._bind(key)
        with self.lock:
            self.ahead[key] = bound
            while len(self.ahead) > HELD:
                del self.ahead[next(iter(self.ahead))]

    def bind(self, rows: Tensor, device: torch.device) -> Problem:
        """The problem of the measurements with these numbers, (B,), on a device."""
        key = device, tuple(rows.tolist())
        with self.lock:
            bound = self.ahead.pop(key, None)
        return self._bind(key) if bound is None else bound

    def _bind(self, key: tuple[torch.device, tuple[int, ...]]) -> Problem:
        device, numbers = key
        with self.lock:
            if device not in self.moved:
                self.moved[device] = self.problem.to(device)
            problem = self.moved[device]
        return problem.bind(numbers, self.shape)
