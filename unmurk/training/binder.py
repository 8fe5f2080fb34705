"""Problems that are bound to the images of a step before the step needs them."""

import threading

import torch
from torch import Tensor

from ..problem import Problem

__all__ = ["ProblemBinder"]

HELD = 8  # problems bound ahead at most


class ProblemBinder:
    """A problem that is moved to a device once, and bound to images before a step needs it.

    Binding a problem to images may draw a mask for each of them on the CPU, and moving a problem
    drops the decompositions that its operator keeps. So a problem is moved once, and the thread
    that reads the measurements of the next steps also binds the problem to them.

    Args:
        problem: How the measurements were made.
        shape: Shape (C, H, W) of the images behind them.

    >>> binder = ProblemBinder(Problem("inpaint:random,keep=0.5", 0.1), (1, 8, 8))
    >>> bound = binder.bind(torch.tensor([3, 5]), torch.device("cpu"))
    >>> bound.index, bound.mask.shape
    ([3, 5], torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, problem: Problem, shape: tuple[int, int, int]) -> None:
        self.problem, self.shape = problem, shape
        self.moved: dict[torch.device, Problem] = {}
        self.ahead: dict[tuple[torch.device, tuple[int, ...]], Problem] = {}
        self.lock = threading.Lock()

    def prepare(self, index: Tensor, device: torch.device) -> None:
        """Bind the problem to the measurements with these numbers, (B,), for a later `bind`."""
        key = device, tuple(index.tolist())
        bound = self._bind(key)
        with self.lock:
            self.ahead[key] = bound
            while len(self.ahead) > HELD:
                del self.ahead[next(iter(self.ahead))]

    def bind(self, index: Tensor, device: torch.device) -> Problem:
        """Return the problem of the measurements with these numbers, (B,), on a device."""
        key = device, tuple(index.tolist())
        with self.lock:
            bound = self.ahead.pop(key, None)
        return self._bind(key) if bound is None else bound

    def _bind(self, key: tuple[torch.device, tuple[int, ...]]) -> Problem:
        device, numbers = key
        return self.on(device).bind(numbers, self.shape)

    def on(self, device: torch.device) -> Problem:
        """Return the problem on a device, not bound to images."""
        with self.lock:
            if device not in self.moved:
                self.moved[device] = self.problem.to(device)
            return self.moved[device]
