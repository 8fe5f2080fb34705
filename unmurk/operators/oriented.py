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

import torch
from torch import Tensor

from ..errors import InputError
from .blur import Blur, check_pad, mirrored
from .lines import direction, distance

__all__ = ["AnisotropicBlur", "MotionBlur"]


class OrientedBlur(Blur):
    """What both share: an angle, and a kernel computed from it in double precision."""

    def _hold(self, kernel: Tensor) -> None:
        self.kernel = (kernel / kernel.sum()).float()[None, None]
        self.symmetric = mirrored(self.kernel)


class AnisotropicBlur(OrientedBlur):
    """A Gaussian kernel that is wider in one direction.

    Text form: "blur:anisotropic,sigma=3,ratio=0.3,angle=30". The kernel is cut at 3 sigma.

    Args:
        sigma: Standard deviation along the angle in pixels, > 0.
        ratio: Standard deviation across the angle, as a fraction of sigma, in (0, 1].
        angle: Direction of the wider axis in degrees, counter-clockwise; 0 lies along a row.
        pad: How the image continues outside, "reflect" or "circular".
    """

    form = "blur:anisotropic"
    options = {"sigma": float, "ratio": float, "angle": float, "pad": str}

    def __init__(
        self, sigma: float, ratio: float, angle: float = 0.0, pad: str = "reflect"
    ) -> None:
        if not 0 < sigma < float("inf"):
            raise InputError(f"{self.form}: sigma must be > 0, got {sigma}")
        if not 0 < ratio <= 1:
            raise InputError(f"{self.form}: ratio must be in (0, 1], got {ratio}")
        self.sigma, self.ratio = float(sigma), float(ratio)
        self.angle, self.pad = _angle(self.form, angle), check_pad(self.form, pad)
        down, across = direction(self.angle)
        reach = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1).double()
        rows, columns = reach[:, None], reach
        along = (down * rows + across * columns) / self.sigma
        aside = (across * rows - down * columns) / (self.ratio * self.sigma)
        self._hold(torch.exp(-0.5 * (along.square() + aside.square())))


class MotionBlur(OrientedBlur):
    """The trace of a steady straight motion. Text form: "blur:motion,length=9,angle=30".

    Args:
        length: Length of the trace in pixels, >= 1; 1 is no motion.
        angle: Direction of the motion in degrees, counter-clockwise; 0 is along a row.
        pad: How the image continues outside, "reflect" or "circular".
    """

    form = "blur:motion"
    options = {"length": float, "angle": float, "pad": str}

    def __init__(self, length: float, angle: float = 0.0, pad: str = "reflect") -> None:
        if not 1 <= length < float("inf"):
            raise InputError(f"{self.form}: length must be >= 1 pixel, got {length}")
        self.length = float(length)
        self.angle, self.pad = _angle(self.form, angle), check_pad(self.form, pad)
        end = (self.length - 1) / 2 * torch.tensor([direction(self.angle)], dtype=torch.float64)
        rows, columns = (
            torch.arange(-n, n + 1).double() for n in end.abs().ceil()[0].int().tolist()
        )
        self._hold((1 - distance(rows, columns, -end, end)[0]).clamp_min(0))


def _angle(form: str, angle: float) -> float:
    if not math.isfinite(angle):
        raise InputError(f"{form}: angle must be a finite number of degrees, got {angle}")
    return float(angle)
