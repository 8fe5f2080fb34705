"""Images whose channels are equal, restored with a prior of grey images: they stay equal.

Such a prior treats channels one by one. Equal channels that met different noise would come back
with a tint, so they share the noise of the first.
"""

from typing import Any

import torch
from torch import Tensor

from ..rng import PerImageGenerator

__all__ = ["SharedChannelGenerator", "equal_channels"]


def equal_channels(x: Tensor, channels: int) -> Tensor:
    """Whether all channels of an image are equal, (B,) bool; False where x has others than these.

    Args:
        x: Images or measurements (B, ...).
        channels: Channels of an image; of one channel nothing is said.
    """
    if x.ndim != 4 or x.shape[1] != channels or channels < 2:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return (x == x[:, :1]).flatten(1).all(1)


class SharedChannelGenerator:
    """Streams of which some images get the same draws in every channel.

    Args:
        given: One stream for each row.
        alike: Which rows, (B,) bool.
        channels: Channels of an image; draws of another number are left as they are.
    """

    def __init__(self, given: PerImageGenerator, alike: Tensor, channels: int) -> None:
        self.given, self.alike, self.channels = given, alike, channels

    def __len__(self) -> int:
        return len(self.given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws, shape (B, *shape)."""
        return self._shared(self.given.randn(*shape))

    def rand(self, *shape: int) -> Tensor:
        """Draws uniform on [0, 1), shape (B, *shape)."""
        return self._shared(self.given.rand(*shape))

    def _shared(self, draws: Tensor) -> Tensor:
        if draws.ndim == 4 and draws.shape[1] == self.channels:
            draws[self.alike] = draws[self.alike, :1]
        return draws
