"""Loss of colour: y is the mean of the C channels, the weights 1/C of every channel.

A^T y = (y, .., y) / C,    A^+ y = (y, .., y),    A A^T = I / C
prox_l2(z, y, gamma) = z + gamma / (C + gamma) A^+ (y - A z)
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Option, Whole
from ..errors import InputError
from .base import Operator
from .linalg import Factors

__all__ = ["Grey"]


class Grey(Operator):
    """The grey image of a colour image. Text form: "colour:grey".

    Args:
        channels: Channels C of the colour image, a whole number from 2 to 1024. (A grey image has
            no colour to lose: use identity.)

    Raises:
        InputError: an option out of its bounds.
    """

    form = "colour:grey"
    options: ClassVar[dict[str, Option]] = {"channels": Whole(2, 1024)}
    channels: int

    def __init__(self, channels: int = 3) -> None:
        self._take_options(channels=channels)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Self, after a look at whether the image has the right number of channels."""
        self._check(tuple(shape))
        return self

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """(1, H, W)."""
        self._check(tuple(x_shape))
        return 1, *x_shape[-2:]

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H, W). Raises InputError if y has more than one channel."""
        if y_shape[-3] != 1:
            raise InputError(
                f"colour:grey: a measurement has 1 channel, this one has {y_shape[-3]}"
            )
        return self.channels, *y_shape[-2:]

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[-3] == 1:
            raise InputError(
                "colour:grey: the image has 1 channel, so there is no colour to lose; give a "
                "colour image or use identity"
            )
        if shape[-3] != self.channels:
            raise InputError(
                f"colour:grey: the image has {shape[-3]} channels but channels={self.channels}; "
                f"write colour:grey,channels={shape[-3]}"
            )

    @property
    def gram(self) -> float:
        """1 / C: a pixel's channels are in no other pixel's mean."""
        return 1 / self.channels

    def _A(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self._A_dagger(y) / self.channels

    def _A_dagger(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1).clone()

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return z + gamma / (self.channels + gamma) * (y - self._A(z))

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        height, width = (torch.eye(n).double() for n in shape[-2:])
        return torch.full((1, self.channels), 1 / self.channels).double(), height, width
