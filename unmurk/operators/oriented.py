"""Blurs along a direction: a rotated Gaussian and the motion of a camera.

With e = (-sin, cos) the unit vector (row, column) of the angle and n the one across it, the kernel
at the offset p = (row, column) from its centre is, up to the factor that makes it sum to 1,

    anisotropic   exp(-1/2 ((p . e) / sigma)^2 - 1/2 ((p . n) / (ratio sigma))^2)
    motion        max(0, 1 - d(p))

with d(p) the distance from p to the straight line of length - 1 pixels along e through the centre.
Along a row or a column an odd length is that many equal taps; at other angles the pixels that the
line passes by share its weight, so that the line has no stairs.

Neither kernel equals its mirror images unless it lies along a row or a column, so with reflecting
borders A is not symmetric; what `blur` says about kernels that are not symmetric holds for them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Option, Real
from ..errors import InputError
from .base import Operator, size_text
from .blur import PAD, WIDEST, Blur, mirrored
from .lines import direction, distance

__all__ = ["LENGTH", "AnisotropicBlur", "MotionBlur", "check_reach"]

ANGLE = Real(-3600, 3600)  # degrees
LENGTH = Real(1, 1024)  # pixels
SMALL = 64  # pixels of a kernel's side that go with any image
MULTIPLICATIONS = 1e13  # for each channel: minutes on two cores


def check_reach(where: str, kernel: Tensor, shape: Sequence[int]) -> None:
    """Refuse kernels (.., kh, kw) that are out of proportion to images (.., H, W).

    A kernel of 2 n - 1 pixels already links every two of n pixels; up to `SMALL` pixels go with
    any image. Kernels that are no product of two lines cost H W kh kw multiplications.

    Raises:
        InputError: a kernel that is longer than this, or needs more than `MULTIPLICATIONS`.
    """
    tall, wide = kernel.shape[-2:]
    far = any(k > max(2 * n - 1, SMALL) for k, n in zip((tall, wide), shape[-2:], strict=True))
    work = float(tall * wide) * shape[-2] * shape[-1]
    if far or work > MULTIPLICATIONS:
        raise InputError(
            f"{where} makes a kernel of {tall}x{wide} pixels, out of proportion to an image of"
            f" {size_text(shape[-2:])} ({work:.1e} multiplications): lower it"
        )


class OrientedBlur(Blur):
    """What both share: an angle, and a kernel computed from it in double precision."""

    def _hold(self, kernel: Tensor) -> None:
        self.kernel = (kernel / kernel.sum()).float()[None, None]
        self.symmetric = mirrored(self.kernel)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Self, after a look at whether the kernel is in proportion to the image."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.kernel is not None
        check_reach(self.spec, self.kernel, shape)


class AnisotropicBlur(OrientedBlur):
    """A Gaussian kernel that is wider in one direction.

    Text form: "blur:anisotropic,sigma=3,ratio=0.3,angle=30". The kernel is cut at 3 sigma.

    Args:
        sigma: Standard deviation along the angle in pixels, a number from 0.01 to 256.
        ratio: Standard deviation across the angle, as a fraction of sigma, a number from 0.001 to
            1.
        angle: Direction of the wider axis in degrees, counter-clockwise, a number from -3600 to
            3600; 0 lies along a row.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "blur:anisotropic"
    options: ClassVar[dict[str, Option]] = {
        "sigma": Real(0.01, WIDEST),
        "ratio": Real(0.001, 1),
        "angle": ANGLE,
        "pad": PAD,
    }
    sigma: float
    ratio: float
    angle: float

    def __init__(
        self, sigma: float, ratio: float, angle: float = 0.0, pad: str = "reflect"
    ) -> None:
        self._take_options(sigma=sigma, ratio=ratio, angle=angle, pad=pad)
        down, across = direction(self.angle)
        far = math.ceil(3 * self.sigma)
        reach = torch.arange(-far, far + 1).double()
        rows, columns = reach[:, None], reach
        along = (down * rows + across * columns) / self.sigma
        aside = (across * rows - down * columns) / (self.ratio * self.sigma)
        self._hold(torch.exp(-0.5 * (along.square() + aside.square())))


class MotionBlur(OrientedBlur):
    """The trace of a steady straight motion. Text form: "blur:motion,length=9,angle=30".

    Args:
        length: Length of the trace in pixels, a number from 1 to 1024; 1 is no motion.
        angle: Direction of the motion in degrees, counter-clockwise, a number from -3600 to 3600;
            0 is along a row.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "blur:motion"
    options: ClassVar[dict[str, Option]] = {"length": LENGTH, "angle": ANGLE, "pad": PAD}
    length: float
    angle: float

    def __init__(self, length: float, angle: float = 0.0, pad: str = "reflect") -> None:
        self._take_options(length=length, angle=angle, pad=pad)
        end = (self.length - 1) / 2 * torch.tensor([direction(self.angle)], dtype=torch.float64)
        rows, columns = (
            torch.arange(-n, n + 1).double() for n in end.abs().ceil()[0].int().tolist()
        )
        self._hold((1 - distance(rows, columns, -end, end)[0]).clamp_min(0))
