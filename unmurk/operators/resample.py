"""Super-resolution: A makes an image f times smaller in height and width.

average: the mean of blocks of f x f pixels. The rows of A have disjoint support, so
A A^T = I / f^2 and everything is in closed form:

    A^T y = up(y) / f^2,    A^+ y = up(y)           (up repeats every pixel f x f times)
    prox_l2(z, y, gamma) = z + gamma / (1 + gamma / f^2) A^T (y - A z)

bicubic: the cubic kernel k of R. G. Keys (1981), "Cubic convolution interpolation for digital
image processing", IEEE Trans. ASSP 29(6), with a = -1/2, stretched by f so that what the small
image cannot show is filtered out:

    M[i, j] = k((j - c_i) / f) / sum_j' k((j' - c_i) / f),    c_i = (i + 1/2) f - 1/2
    A x = M_h x M_w^T,    A^T y = M_h^T y M_w

Outside, the image continues by reflection with its edge repeated (x[-1] = x[0], as a row of whole
pixels seen in a mirror). With M_h = U_h diag(s) V_h^T and M_w = U_w diag(t) V_w^T the singular
values of A are the products s_i t_j, none of them zero, and

    A^+ y = V_h [ U_h^T y U_w / (s t^T) ] V_w^T
    prox_l2(z, y, gamma) = z + V_h [ g U_h^T (y - A z) U_w ] V_w^T,
    g = gamma s t^T / (1 + gamma (s t^T)^2)
"""

import functools
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Option, Whole, check_tables
from ..errors import InputError
from .base import Operator, size_text
from .linalg import Factors

__all__ = ["AverageDown", "BicubicDown"]


class Down(Operator):
    """What both share: the factor and the shapes."""

    options: ClassVar[dict[str, Option]] = {"factor": Whole(1, 256)}
    factor: int

    def __init__(self, factor: int) -> None:
        self._take_options(factor=factor)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Self, after a look at whether the factor divides the image."""
        self._check(tuple(shape))
        return self

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, H / f, W / f)."""
        self._check(tuple(x_shape))
        channels, height, width = x_shape[-3:]
        return channels, height // self.factor, width // self.factor

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, f H, f W). Raises InputError for images above the limit of `bounds.TABLES`."""
        channels, height, width = y_shape[-3:]
        check_tables(
            self.spec,
            f"the image behind measurements of {size_text(y_shape[-2:])}",
            4.0 * channels * height * width * self.factor**2,
            "lower the factor, or give smaller measurements",
        )
        return channels, height * self.factor, width * self.factor

    def _line(self, n: int) -> Tensor:
        """A on one axis of n pixels, (n / f, n) in double precision."""
        raise NotImplementedError

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        channels, height, width = shape
        return torch.eye(channels).double(), self._line(height), self._line(width)

    def _check(self, shape: tuple[int, ...]) -> None:
        if any(n % self.factor for n in shape[-2:]):
            raise InputError(
                f"{self.form}: the factor {self.factor} does not divide the image of "
                f"{size_text(shape[-2:])}; crop the image or choose another factor"
            )


class AverageDown(Down):
    """Block average to a smaller image. Text form: "sr:average,factor=4".

    Args:
        factor: Side f of the blocks in pixels, a whole number from 1 to 256; it must divide
            height and width.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "sr:average"

    @property
    def gram(self) -> float:
        """1 / f^2: the blocks are disjoint."""
        return 1 / self.factor**2

    def _up(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)

    def _A(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self._up(y) / self.factor**2

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self._up(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        weight = gamma / self.factor**2
        return z + weight / (1 + weight) * self._up(y - self._A(z))

    def _line(self, n: int) -> Tensor:
        return torch.eye(n // self.factor).double().repeat_interleave(self.factor, 1) / self.factor


class BicubicDown(Down):
    """Bicubic reduction to a smaller image, without aliasing. Text form: "sr:bicubic,factor=4".

    Args:
        factor: How many times smaller, f, a whole number from 1 to 256; it must divide height
            and width.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "sr:bicubic"

    def _check(self, shape: tuple[int, ...]) -> None:
        super()._check(shape)
        side = max(shape[-2:])
        small = side // self.factor
        check_tables(
            self.spec,
            f"the decomposition of its matrix for {side} pixels",
            8.0 * small * (2 * side + small),
            "raise the factor, or give smaller images",
        )

    def _axes(self, x_shape: Sequence[int], like: Tensor) -> tuple["_Axis", "_Axis"]:
        height, width = x_shape[-2:]
        return (
            _axis(height, self.factor, like.dtype, like.device),
            _axis(width, self.factor, like.dtype, like.device),
        )

    def _A(self, x: Tensor) -> Tensor:
        h, w = self._axes(x.shape, x)
        return h.m @ x @ w.m.mT

    def _A_adjoint(self, y: Tensor) -> Tensor:
        h, w = self._axes(self.x_shape(y.shape), y)
        return h.m.mT @ y @ w.m

    def _A_dagger(self, y: Tensor) -> Tensor:
        h, w = self._axes(self.x_shape(y.shape), y)
        return h.v @ (h.u.mT @ y @ w.u / (h.s[:, None] * w.s)) @ w.v.mT

    def _line(self, n: int) -> Tensor:
        return _bicubic(n, self.factor)


class _Axis(NamedTuple):
    """One axis of n pixels: M (n / f, n) and its singular value decomposition u diag(s) v^T."""

    m: Tensor
    u: Tensor
    s: Tensor
    v: Tensor


@functools.lru_cache(maxsize=32)
def _axis(n: int, factor: int, dtype: torch.dtype, device: torch.device) -> _Axis:
    with torch.inference_mode(False), torch.no_grad():  # it outlives the mode it is built in
        m = _bicubic(n, factor)
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
        return _Axis(*(part.to(device, dtype) for part in (m, u, s, vt.mT.contiguous())))


def _bicubic(n: int, factor: int) -> Tensor:
    """M, shape (n / factor, n), in double precision."""
    centre = (torch.arange(n // factor).double() + 0.5) * factor - 0.5
    first = (centre - 2 * factor).floor().long()
    taps = first[:, None] + torch.arange(4 * factor + 2)
    weights = _keys((taps - centre[:, None]) / factor)
    position = taps % (2 * n)
    position = torch.minimum(position, 2 * n - 1 - position)
    m = torch.zeros(n // factor, n, dtype=torch.float64).scatter_add_(1, position, weights)
    return m / m.sum(1, keepdim=True)


def _keys(t: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2; zero from |t| = 2 on."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t.square() + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
