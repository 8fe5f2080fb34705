"""Computed tomography with parallel beams: sums of the image over strips that cross it.

View k looks along the direction across e_k = (-sin, cos) (row, column) of the angle 180 k / V
degrees. The pixel (i, j) of an image of H x W is the unit square around

    t = e_k . (i - (H - 1) / 2, j - (W - 1) / 2)

on the detector, whose D bins are as wide as a pixel and lie symmetrically about t = 0. Bin b holds
the mean, over its width, of the line integrals of the image as a function that is constant on each
pixel; that is the area which the pixel shares with the strip of the bin,

    A[(k, b), (i, j)] = h (G_k(b + 1 - D / 2 - t) - G_k(b - D / 2 - t)),    h = 1 / max(H, W).

G_k is the running area of a unit square seen under this angle, from its centre. With m and M the
smaller and the larger of |sin| and |cos|, its shadow is flat for |t| < b = (M - m) / 2 and slopes
down from there to a = (M + m) / 2, so

    G(t) = sign(t) (1/2 - u^2 / (2 m M) - v / M),    u = clamp(a - |t|, 0, m), v = max(b - |t|, 0).

The unit of length is the larger side of the image: a line through a white image measures at most
sqrt(2), and y = 1 is white along that side. S.-C. B. Lo (1988), "Strip and line path integrals
with a square pixel matrix", IEEE Trans. Med. Imaging 7(4), compares strips with rays.

A is a sparse matrix in double precision, rounded to the type of the images; A^T is its transpose,
entry by entry. Both are kept, for the sizes used last: in float32 some 36 bytes for each pixel and
view (140 MB for 256 x 256 pixels and 60 views).

A^+ and the prox come from conjugate gradients. Structure passes the less the finer it is, and so
those of A^+ stop after ITERATIONS steps: where y holds no noise the normal equations are then met
to 1e-4 or better, and where it does the steps after that would do little but amplify it.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..bounds import Option, Whole, check_tables
from ..errors import InputError
from .base import Operator, size_text
from .lines import direction

__all__ = ["ParallelCt"]

ITERATIONS = 30  # of conjugate gradients on A^T A x = A^T y for A^+
BYTES = 36.0  # of A and A^T for each pixel and view


class ParallelCt(Operator):
    """Parallel-beam tomography with views evenly spread over 180 degrees.

    Text form: "ct:parallel,angles=60". Measurements are (C, angles, detectors): every channel is
    measured alike. View 0 holds the sums of the columns; the next turn counter-clockwise.

    Args:
        angles: Number of views V, a whole number from 1 to 10000.
        detectors: Number of detector bins D, each as wide as a pixel, a whole number from 1 to
            65536. None takes just enough to hold the diagonal; with fewer, what falls beside them
            is not measured.

    Attributes:
        shape: Shape (C, H, W) of the images it was bound to, or None. Unbound, a measurement is
            taken to be of a square image.

    Raises:
        InputError: an option out of its bounds; from `bind` and the maps, matrices or measurements
            above the limit of `bounds.TABLES`.
    """

    form = "ct:parallel"
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
        """The operator for images of shape (C, H, W); the same for all numbers."""
        if self.shape == tuple(shape[-3:]):
            return self
        channels, views, bins = self.y_shape(shape)
        entries = BYTES * views * shape[-2] * shape[-1]
        check_tables(
            self.spec,
            f"the matrix for images of {size_text(shape[-2:])}",
            entries + 4.0 * channels * views * bins,
            "lower angles or detectors, or give smaller images",
        )
        return self._with(shape=tuple(shape[-3:]))

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        return self if self.shape == tuple(shape[-3:]) else self.bind((), shape)

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, angles, detectors)."""
        channels, height, width = x_shape[-3:]
        return channels, self.angles, self.detectors or _diagonal(height, width)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of the images it was bound to, else of a square image.

        Raises:
            InputError: if no square image has this many detector bins, or `detectors` is given,
                and it is not bound.
        """
        if self.shape is not None:
            return self.shape
        side = math.isqrt(y_shape[-1] ** 2 // 2)
        if self.detectors is not None or _diagonal(side, side) != y_shape[-1]:
            raise InputError(
                f"{self.form}: the size of the image behind {y_shape[-1]} detectors is not known; "
                f"bind it with at(index, shape)"
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
    """M x for a matrix and its transpose, and with them the gradient of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        ctx.pair = matrix, transpose
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        matrix, transpose = ctx.pair
        return _Product.apply(grad, transpose, matrix), None, None


def _apply(batch: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
    """The matrix times every channel of a batch (B, C, .., ..), (B, C, rows)."""
    columns = batch.reshape(batch.shape[0] * batch.shape[1], -1).T.contiguous()
    return _Product.apply(columns, matrix, transpose).T.reshape(*batch.shape[:2], -1)


def _diagonal(height: int, width: int) -> int:
    """Pixels along the diagonal, rounded up."""
    return math.isqrt(height**2 + width**2 - 1) + 1


@functools.lru_cache(maxsize=4)
def _pair(
    height: int, width: int, views: int, bins: int, dtype: torch.dtype, device: torch.device
) -> _Pair:
    with torch.inference_mode(False), torch.no_grad():  # it outlives the mode it is built in
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
    centre = (axis[0] * down[:, None] + axis[1] * across).flatten() + bins / 2
    # the shadow of a pixel, at most sqrt(2) wide, falls on three bins or fewer
    first = (centre - (small + large) / 2).floor()
    edges = first[:, None] + torch.arange(4)
    area = _running_area(edges - centre[:, None], small, large).diff(dim=1)
    held = (area > 1e-9) & (edges[:, :3] >= 0) & (edges[:, :3] < bins)
    bin, order = edges[:, :3][held].int().sort(stable=True)
    pixel = torch.arange(height * width, dtype=torch.int32)[:, None].expand_as(area)[held]
    return bin, pixel[order], area[held][order] / max(height, width)


def _running_area(t: Tensor, small: float, large: float) -> Tensor:
    """G(t) of a unit square whose sides cast shadows of widths `small` and `large`."""
    slope = ((large + small) / 2 - t.abs()).clamp(0, small)
    flat = ((large - small) / 2 - t.abs()).clamp_min(0)
    bend = slope.square() / (2 * small) if small > 0 else 0.0
    return t.sign() * (0.5 - (bend + flat) / large)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A matrix in compressed rows from entries that are sorted by row."""
    starts = torch.zeros(size[0] + 1, dtype=torch.int32)
    starts[1:] = rows.bincount(minlength=size[0]).cumsum(0)
    with warnings.catch_warnings():  # torch says that compressed rows are young, and unchecked
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, size)
