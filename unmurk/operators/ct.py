r"""Computed tomography with parallel beams: sums of the image over strips that cross it.

View k looks along the direction across :math:`e_k = (-\sin, \cos)` (row, column) of the angle
180 k / V degrees. The pixel (i, j) of an image of H x W is the unit square around

.. math:: t = e_k \cdot (i - (H - 1) / 2,\; j - (W - 1) / 2)

on the detector. Its D bins are as wide as a pixel and lie symmetrically about t = 0. Bin b holds
the mean, over its width, of the line integrals of the image, as a function that is constant on
each pixel. This is the area that the pixel shares with the strip of the bin,

.. math::

    A[(k, b), (i, j)] = h \left( G_k(b + 1 - D / 2 - t) - G_k(b - D / 2 - t) \right),
    \qquad h = 1 / \max(H, W).

:math:`G_k` is the running area of a unit square that is viewed at this angle, from its center.
With m and M the smaller and the larger of \|sin\| and \|cos\|, its shadow is flat for
\|t\| < (M - m) / 2 and falls from there to (M + m) / 2, so

.. math::

    G(t) &= \operatorname{sign}(t) \left( \tfrac12 - \frac{u^2}{2 m M} - \frac{v}{M} \right) \\
    u &= \operatorname{clamp}(\tfrac{M + m}{2} - |t|, 0, m) \\
    v &= \max(\tfrac{M - m}{2} - |t|, 0)

The unit of length is the larger side of the image. A line through a white image measures at most
sqrt(2), and y = 1 is white along that side. S.-C. B. Lo (1988), "Strip and line path integrals
with a square pixel matrix", IEEE Trans. Med. Imaging 7(4), compares strips with rays.

A is a sparse matrix in double precision, rounded to the type of the images; :math:`A^T` is its
transpose, entry by entry. The code is our own because :math:`A^T` must be that exact transpose,
and differentiable. Both matrices are cached for the sizes used last: in float32 some 36 bytes for
each pixel and view (140 MB for 256 x 256 pixels and 60 views).

:math:`A^+` and the prox come from conjugate gradients. The finer a structure is, the less of it A
passes, so the iterations for :math:`A^+` stop after `ITERATIONS`. Where y holds no noise, the
normal equations are then met to 1e-4 or better. Where it does, further iterations would do little
but amplify it.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..bounds import Option, Whole, check_tables
from ..errors import InputError, size_text
from .base import Operator
from .blur import direction

__all__ = ["ParallelCt"]

ITERATIONS = 30  # of conjugate gradients on A^T A x = A^T y for A^+
BYTES = 36.0  # of A and A^T for each pixel and view


class ParallelCt(Operator):
    """Parallel-beam tomography with views evenly spread over 180 degrees.

    Text form: "ct:parallel,angles=60". Measurements are (C, angles, detectors), one sinogram for
    each channel. View 0 holds the sums of the columns; the next views turn counter-clockwise.

    Args:
        angles: Number of views V, a whole number from 1 to 10000.
        detectors: Number of detector bins D, each as wide as a pixel, a whole number from 1 to
            65536. None takes just enough for the diagonal. With fewer, rays beside the detector
            are not measured.

    Attributes:
        shape: Shape (C, H, W) of the images it is bound to, or None. If it is not bound, images
            are assumed to be square.

    Raises:
        InputError: An option is out of its bounds; from `bind` and the maps, matrices or
            measurements are above the limit of `bounds.TABLES`.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("ct:parallel,angles=2,detectors=2")
    >>> A.A(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor([[[[0.0000, 1.0000],
              [0.5000, 0.5000]]]])
    """

    form = "ct:parallel"
    extent = "rays cross the whole image"
    pictorial = False
    options: ClassVar[dict[str, Option]] = {
        "angles": Whole(1, 10_000),
        "detectors": Whole(1, 65_536, optional=True),
    }
    angles: int
    detectors: int | None
    dagger_iterations = ITERATIONS

    def __init__(self, angles: int = 60, detectors: int | None = None) -> None:
        self._take_options(angles=angles, detectors=detectors)
        self.shape: tuple[int, ...] | None = None

    # -- binding to images and shapes ------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator for images of shape (C, H, W), the same for all images."""
        if self.shape == tuple(shape[-3:]):
            return self
        channels, views, bins = self.y_shape(shape)
        entries = BYTES * views * shape[-2] * shape[-1]
        check_tables(
            self.spec,
            f"the matrix for images of {size_text(shape[-2:])}",
            entries + 4.0 * channels * views * bins,
            "lower angles or detectors, or use smaller images",
        )
        return self._with(shape=tuple(shape[-3:]))

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        return self if self.shape == tuple(shape[-3:]) else self.bind((), shape)

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (C, angles, detectors)."""
        channels, height, width = x_shape[-3:]
        return channels, self.angles, self.detectors or _diagonal(height, width)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the images it is bound to, else that of a square image.

        Raises:
            InputError: It is not bound, and no square image has this many detector bins or
                `detectors` is given.
        """
        if self.shape is not None:
            return self.shape
        side = math.isqrt(y_shape[-1] ** 2 // 2)
        if self.detectors is not None or _diagonal(side, side) != y_shape[-1]:
            raise InputError(
                f"{self.form}: the size of the image behind {y_shape[-1]} detectors is not known:"
                f" bind it with bind(index, shape)"
            )
        return y_shape[-3], side, side

    # -- the maps --------------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        pair = self._pair(x.shape, x)
        return _apply(x, pair.forward, pair.back).unflatten(-1, (self.angles, -1))

    def _A_adjoint(self, y: Tensor) -> Tensor:
        shape = self.x_shape(y.shape)
        pair = self._pair(shape, y)
        return _apply(y, pair.back, pair.forward).unflatten(-1, shape[-2:])

    def _pair(self, x_shape: Sequence[int], like: Tensor) -> "_Pair":
        height, width = x_shape[-2:]
        bins = self.y_shape(x_shape)[-1]
        return _pair(height, width, self.angles, bins, like.dtype, like.device)


class _Pair(NamedTuple):
    """A and A^T as sparse matrices."""

    forward: Tensor  # (V D, H W)
    back: Tensor  # (H W, V D)


class _Product(torch.autograd.Function):
    """M x for a matrix and its transpose, with gradients of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        ctx.pair = matrix, transpose
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        matrix, transpose = ctx.pair
        return _Product.apply(grad, transpose, matrix), None, None


def _apply(batch: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
    """Multiply the matrix with every channel of a batch (B, C, .., ..), to (B, C, rows)."""
    columns = batch.reshape(batch.shape[0] * batch.shape[1], -1).T.contiguous()
    return _Product.apply(columns, matrix, transpose).T.reshape(*batch.shape[:2], -1)


def _diagonal(height: int, width: int) -> int:
    """Pixels along the diagonal, rounded up."""
    return math.isqrt(height**2 + width**2 - 1) + 1


@functools.lru_cache(maxsize=4)
def _pair(
    height: int, width: int, views: int, bins: int, dtype: torch.dtype, device: torch.device
) -> _Pair:
    with torch.inference_mode(False), torch.no_grad():  # it outlives the caller's mode
        parts = [_view(height, width, direction(180 * k / views), bins) for k in range(views)]
        row = torch.cat([bin + k * bins for k, (bin, _, _) in enumerate(parts)])
        pixel = torch.cat([part[1] for part in parts])
        value = torch.cat([part[2].to(dtype) for part in parts])
        forward = _sparse(row, pixel, value, (views * bins, height * width))
        order = pixel.argsort(stable=True)
        back = _sparse(pixel[order], row[order], value[order], (height * width, views * bins))
        return _Pair(forward.to(device), back.to(device))


def _view(
    height: int, width: int, axis: tuple[float, float], bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of A of one view, sorted by bin: bin, pixel and value."""
    small, large = sorted(abs(part) for part in axis)
    down, across = (torch.arange(n).double() - (n - 1) / 2 for n in (height, width))
    center = (axis[0] * down[:, None] + axis[1] * across).flatten() + bins / 2
    # the shadow of a pixel, at most sqrt(2) wide, falls on three bins or fewer
    first = (center - (small + large) / 2).floor()
    edges = first[:, None] + torch.arange(4)
    area = _running_area(edges - center[:, None], small, large).diff(dim=1)
    covered = (area > 1e-9) & (edges[:, :3] >= 0) & (edges[:, :3] < bins)
    bin, order = edges[:, :3][covered].int().sort(stable=True)
    pixel = torch.arange(height * width, dtype=torch.int32)[:, None].expand_as(area)[covered]
    return bin, pixel[order], area[covered][order] / max(height, width)


def _running_area(t: Tensor, small: float, large: float) -> Tensor:
    """G(t) of a unit square whose sides cast shadows of widths `small` and `large`."""
    slope = ((large + small) / 2 - t.abs()).clamp(0, small)
    flat = ((large - small) / 2 - t.abs()).clamp_min(0)
    bend = slope.square() / (2 * small) if small > 0 else 0.0
    return t.sign() * (0.5 - (bend + flat) / large)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Build a matrix in compressed sparse rows from entries that are sorted by row."""
    starts = torch.zeros(size[0] + 1, dtype=torch.int32)
    starts[1:] = rows.bincount(minlength=size[0]).cumsum(0)
    with warnings.catch_warnings():  # torch warns that this format is in beta state
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, size)
