r"""Blur kernels: Gaussian, uniform, anisotropic, motion, and kernels from files.

`convolution` describes the operator; this module makes its kernels, each of which sums to 1. With
e = (-sin, cos) the unit vector (row, column) of an angle, n the unit vector across it, and
p = (row, column) the offset from the center, the kernels are, up to a factor,

.. math::

    \text{gaussian} \quad & \exp\left( -\tfrac12 |p|^2 / \sigma^2 \right) \\
    \text{uniform} \quad & 1 \\
    \text{anisotropic} \quad & \exp\left( -\tfrac12 (p \cdot e)^2 / \sigma^2
        - \tfrac12 (p \cdot n)^2 / (\mathrm{ratio}\, \sigma)^2 \right) \\
    \text{motion} \quad & \max(0, 1 - d(p))

Here d(p) is the distance from p to the straight segment of length - 1 pixels along e through the
center. Along a row or a column, an odd length gives that many equal taps. At other angles, the
pixels near the segment share its weight, so that the trace has no steps.

The point of a segment from s to s + v that is nearest to p is s + t v with

.. math:: t = \operatorname{clamp}\left( (p - s) \cdot v / |v|^2, 0, 1 \right).

An anisotropic or a motion kernel equals its mirror images only along a row or a column. At other
angles, with reflecting borders, A is not symmetric; see `convolution` on such kernels.

Angles are in degrees, counter-clockwise from the direction of increasing columns as a picture is
viewed (rows count downwards).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Choice, File, Option, Real, Sides
from ..errors import InputError, size_text
from .base import Operator
from .convolution import CUTOFF, Blur, mirrored
from .crops import Window
from .files import read_kernels, select_images

__all__ = [
    "CUTOFF",
    "LENGTH",
    "AnisotropicBlur",
    "Blur",
    "FileBlur",
    "GaussianBlur",
    "MotionBlur",
    "UniformBlur",
    "check_kernel_size",
    "direction",
    "segment_distance",
]

WIDEST = 256  # pixels, the largest standard deviation; sides are at most 6 WIDEST + 1
PAD = Choice(("reflect", "circular"))
SIZE = Sides(1, 6 * WIDEST + 1, odd=True)
ANGLE = Real(-3600, 3600)  # degrees
LENGTH = Real(1, 1024)  # pixels
SMALL = 64  # pixels of a kernel's side that are allowed for any image
MULTIPLICATIONS = 1e13  # for each channel: minutes on two cores


# ---------------------------------------------------------------- geometry


def direction(angle: float) -> tuple[float, float]:
    """Return the unit vector (row, column) of an angle in degrees; exact at multiples of 90.

    >>> from unmurk.operators.blur import direction
    >>> direction(90)
    (-1.0, 0.0)
    """
    # rounded so that the cosine of 90 degrees is zero, not 6e-17
    sine, cosine = (round(f(math.radians(angle % 360)), 15) for f in (math.sin, math.cos))
    return -sine, cosine


def segment_distance(rows: Tensor, columns: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the distance of every pixel from the nearest point of every segment, in pixels.

    Args:
        rows: Positions of the rows, (H,).
        columns: Positions of the columns, (W,).
        start: Where the segments start, (row, column), (S, 2).
        end: Where they end, (S, 2). A segment may be a point.

    Returns:
        Distances (S, H, W).

    >>> start, end = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> segment_distance(torch.arange(2.0), torch.arange(4.0), start, end)
    tensor([[[0.0000, 0.0000, 0.0000, 1.0000],
             [1.0000, 1.0000, 1.0000, 1.4142]]])
    """
    down = rows[:, None] - start[:, 0, None, None]
    across = columns - start[:, 1, None, None]
    v = (end - start)[..., None, None]
    square = v.square().sum(1).clamp_min(torch.finfo(v.dtype).tiny)
    t = ((down * v[:, 0] + across * v[:, 1]) / square).clamp(0, 1)
    return torch.hypot(down - t * v[:, 0], across - t * v[:, 1])


def check_kernel_size(where: str, kernel: Tensor, shape: Sequence[int]) -> None:
    """Refuse kernels that are out of proportion to the images.

    A kernel of 2 n - 1 pixels already links every two of n pixels. Up to `SMALL` pixels are
    allowed for any image. A kernel that is not a column times a row costs H W kh kw
    multiplications.

    Args:
        where: The operator, for the message.
        kernel: Kernels (..., kh, kw).
        shape: Shape (..., H, W) of the images.

    Raises:
        InputError: A kernel is longer than this, or needs more than `MULTIPLICATIONS`.

    >>> check_kernel_size("blur", torch.ones(15, 15), (1, 8, 8))
    """
    tall, wide = kernel.shape[-2:]
    far = any(k > max(2 * n - 1, SMALL) for k, n in zip((tall, wide), shape[-2:], strict=True))
    work = float(tall * wide) * shape[-2] * shape[-1]
    if far or work > MULTIPLICATIONS:
        raise InputError(
            f"{where} makes a kernel of {size_text((tall, wide))} pixels, out of proportion to"
            " an image of"
            f" {size_text(shape[-2:])} ({work:.1e} multiplications): make it smaller"
        )


# ---------------------------------------------------------------- kernels


class GaussianBlur(Blur):
    """Blur with an isotropic Gaussian kernel. Text form: "blur:gaussian,sigma=1.5".

    Args:
        sigma: Standard deviation of the kernel in pixels, a number from 0.01 to 256.
        size: Side of the kernel in pixels, an odd number from 1 to 1537, or height and width,
            "9x5". None cuts it at 3 sigma.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: An option is out of its bounds.

    >>> from unmurk.operators import parse
    >>> A = parse("blur:gaussian,sigma=1.5")
    >>> A.kernel.shape, A.spec
    (torch.Size([1, 1, 11, 11]), 'blur:gaussian,sigma=1.5,pad=reflect')
    """

    form = "blur:gaussian"
    options: ClassVar[dict[str, Option]] = {
        "sigma": Real(0.01, WIDEST),
        "size": replace(SIZE, optional=True),
        "pad": PAD,
    }
    sigma: float
    size: tuple[int, int] | None

    def __init__(
        self, sigma: float, size: int | tuple[int, int] | None = None, pad: str = "reflect"
    ) -> None:
        self._take_options(sigma=sigma, size=size, pad=pad)
        taps = self.size or (2 * int(3 * self.sigma + 0.999999) + 1,) * 2
        column, row = (_gaussian(n, self.sigma) for n in taps)
        self.kernel = (column[:, None] * row).float()[None, None]


class UniformBlur(Blur):
    """Blur with a kernel of equal weights. Text form: "blur:uniform,size=9".

    Args:
        size: Side of the kernel in pixels, an odd number from 1 to 1537; or height and width,
            "9x5".
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: An option is out of its bounds.

    >>> from unmurk.operators import parse
    >>> parse("blur:uniform,size=1x3").kernel
    tensor([[[[0.3333, 0.3333, 0.3333]]]])
    """

    form = "blur:uniform"
    options: ClassVar[dict[str, Option]] = {"size": SIZE, "pad": PAD}
    size: tuple[int, int]

    def __init__(self, size: int | tuple[int, int], pad: str = "reflect") -> None:
        self._take_options(size=size, pad=pad)
        self.kernel = torch.full((1, 1, *self.size), 1 / (self.size[0] * self.size[1]))


class FileBlur(Blur):
    """Blur with a kernel from a file. Text form: "blur:file,path=kernel.npy".

    Args:
        path: The path of a file, at most 4096 characters: a .npy array (kh, kw), or (N, kh, kw)
            with a kernel for every image number, or a gray picture. Axes of one entry are
            dropped: (9, 9, 1) is one kernel of 9x9. Both sides are odd, so that the center is a
            pixel, (kh // 2, kw // 2), and not larger than the image. `bind` reads the file and
            divides each kernel by its sum, which must be positive.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: An option is out of its bounds; from `bind`, the file holds no kernels.

    >>> import numpy as np
    >>> np.save("kernel.npy", np.array([[1.0, 2.0, 1.0]]))
    >>> A = FileBlur("kernel.npy").bind([0], (1, 1, 4))
    >>> A.A(torch.tensor([[[[0.0, 0.0, 4.0, 0.0]]]]))
    tensor([[[[0., 1., 2., 2.]]]])
    """

    form = "blur:file"
    options: ClassVar[dict[str, Option]] = {"path": File(), "pad": PAD}
    path: str

    def __init__(self, path: str | Path, pad: str = "reflect") -> None:
        self._take_options(path=path, pad=pad)

    @property
    def _shared(self) -> bool:
        return False

    @property
    def turnable(self) -> bool:  # type: ignore[override]
        """Whether all kernels of the file equal their mirror images and their transposes."""
        kernels = read_kernels(self.form, self.path)
        other = Blur()
        other.kernel = kernels.reshape(-1, 1, *kernels.shape[-2:])
        return other.turnable

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        kernels = read_kernels(self.form, self.path)
        for position in range(len(window)):
            self._check_size(kernels, window.place(position).shape)
        own = select_images(self.form, self.path, kernels, window.numbers)
        given = Blur()
        given.kernel, given.symmetric = own[:, None].to(self.device), mirrored(own)
        given.pad, given.device = self.pad, self.device
        given.__dict__["form"] = f"python:{self.spec}"
        return given._crop(window)

    def _check_size(self, kernels: Tensor, shape: Sequence[int]) -> None:
        if any(k > n for k, n in zip(kernels.shape[-2:], shape[-2:], strict=True)):
            raise InputError(
                f"blur:file: the kernel in {self.path} is {size_text(kernels.shape[-2:])} but the"
                f" image is only {size_text(shape[-2:])}: give a kernel not larger than the image"
            )

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator with the kernels of these images; see `Operator.bind`."""
        kernels = read_kernels(self.form, self.path)
        self._check_size(kernels, shape)
        own = select_images(self.form, self.path, kernels, [int(i) for i in index])
        return self._with(kernel=own[:, None].to(self.device), symmetric=mirrored(own))


class OrientedBlur(Blur):
    """Base class of blurs at an angle, whose kernels are computed in double precision."""

    def _set_kernel(self, kernel: Tensor) -> None:
        self.kernel = (kernel / kernel.sum()).float()[None, None]
        self.symmetric = mirrored(self.kernel)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Check that the kernel is in proportion to the image, and return self."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.kernel is not None
        check_kernel_size(self.spec, self.kernel, shape)


class AnisotropicBlur(OrientedBlur):
    """Blur with a Gaussian kernel that is wider in one direction.

    Text form: "blur:anisotropic,sigma=3,ratio=0.3,angle=30". The kernel is cut at 3 sigma.

    Args:
        sigma: Standard deviation along the angle in pixels, a number from 0.01 to 256.
        ratio: Standard deviation across the angle, as a fraction of sigma, a number from 0.001 to
            1.
        angle: Direction of the wider axis in degrees, counter-clockwise, a number from -3600 to
            3600; 0 is along a row.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: An option is out of its bounds.

    >>> from unmurk.operators import parse
    >>> parse("blur:anisotropic,sigma=3,ratio=0.3,angle=30").kernel.shape
    torch.Size([1, 1, 19, 19])
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
        radius = math.ceil(3 * self.sigma)
        offset = torch.arange(-radius, radius + 1).double()
        rows, columns = offset[:, None], offset
        along = (down * rows + across * columns) / self.sigma
        aside = (across * rows - down * columns) / (self.ratio * self.sigma)
        self._set_kernel(torch.exp(-0.5 * (along.square() + aside.square())))


class MotionBlur(OrientedBlur):
    """Blur by a steady straight motion. Text form: "blur:motion,length=9,angle=30".

    Args:
        length: Length of the trace in pixels, a number from 1 to 1024; 1 is no motion.
        angle: Direction of the motion in degrees, counter-clockwise, a number from -3600 to 3600;
            0 is along a row.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: An option is out of its bounds.

    >>> from unmurk.operators import parse
    >>> parse("blur:motion,length=2,angle=90").kernel[0, 0]
    tensor([[0.2500],
            [0.5000],
            [0.2500]])
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
        self._set_kernel((1 - segment_distance(rows, columns, -end, end)[0]).clamp_min(0))


def _gaussian(taps: int, sigma: float) -> Tensor:
    """A sampled Gaussian of `taps` values that sums to 1."""
    position = torch.arange(taps, dtype=torch.float64) - taps // 2
    values = torch.exp(-position.square() / (2 * sigma**2))
    return values / values.sum()
