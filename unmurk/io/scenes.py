"""Repeated captures as scenes: a source whose items are all captures of a scene."""

from typing import Any

import torch
from torch import Tensor

from ..repeats import grouped, scenes
from .source import Source

__all__ = ["Scenes"]


class Scenes(Source):
    """Scenes with N captures each, read together.

    Args:
        captures: Captures (S N, C, H, W), those of a scene one after another.
        repeats: The number N.

    Raises:
        InputError: The captures are no whole number of scenes.

    >>> Scenes(torch.zeros(6, 1, 4, 4), 3)[torch.tensor([1])].shape
    torch.Size([1, 3, 1, 4, 4])
    """

    def __init__(self, captures: Tensor | Source, repeats: int) -> None:
        self.captures, self.repeats = captures, repeats
        self.shape = (scenes(len(captures), repeats), repeats, *captures.shape[1:])
        self.device = captures.device
        if isinstance(captures, Source):
            self.skipped, self.scale, self.note = captures.skipped, captures.scale, captures.note
            self.endless = captures.endless

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        numbers = [i * self.repeats + j for i in indices for j in range(self.repeats)]
        if isinstance(self.captures, Source):
            return grouped(self.captures.read(numbers), self.repeats)
        chosen = torch.tensor(numbers, device=self.captures.device)
        return grouped(self.captures[chosen].cpu(), self.repeats)

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the captures, if they are a source, with their number for a scene."""
        own = self.captures.fingerprint() if isinstance(self.captures, Source) else {}
        return own | {"repeats": self.repeats}
