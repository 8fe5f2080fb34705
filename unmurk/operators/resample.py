r"""Averages: super-resolution, which loses pixels, and gray images, which lose color.

**Block average.** Each pixel of the small image is the mean of a block of f x f pixels. The rows
of A have disjoint supports, so :math:`A A^T = I / f^2`, and all maps have closed forms:

.. math::

    A^T y = \operatorname{up}(y) / f^2, \qquad A^+ y = \operatorname{up}(y), \qquad
    \mathrm{prox}(z, y, \gamma) = z + \frac{\gamma}{1 + \gamma / f^2}\, A^T (y - A z),

where up repeats every pixel f x f times.

**Bicubic reduction.** The cubic kernel k of R. G. Keys (1981), "Cubic convolution interpolation
for digital image processing", IEEE Trans. ASSP 29(6), with a = -1/2, is stretched by f, so that it
filters out what the small image cannot show:

.. math::

    M[i, j] = \frac{k((j - c_i) / f)}{\sum_{j'} k((j' - c_i) / f)}, \qquad
    c_i = (i + \tfrac12) f - \tfrac12, \qquad
    A x = M_h x M_w^T, \qquad A^T y = M_h^T y M_w

Outside, the image continues by reflection that repeats the edge: x[-1] = x[0]. With
:math:`M_h = U_h \operatorname{diag}(s) V_h^T` and :math:`M_w = U_w \operatorname{diag}(t) V_w^T`,
the singular values of A are the products :math:`s_i t_j`, none of them zero, and

.. math::

    A^+ y &= V_h \left[ U_h^T y U_w / (s t^T) \right] V_w^T \\
    \mathrm{prox}(z, y, \gamma) &= z + V_h \left[ g \odot U_h^T (y - A z) U_w \right] V_w^T,
    \qquad g = \frac{\gamma s t^T}{1 + \gamma (s t^T)^2}

**Gray image.** y is the mean of the C channels, each with weight 1/C:

.. math::

    A^T y = (y, \dots, y) / C, \qquad A^+ y = (y, \dots, y), \qquad A A^T = I / C, \qquad
    \mathrm{prox}(z, y, \gamma) = z + \frac{\gamma}{C + \gamma} A^+ (y - A z)
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Option, Whole, check_tables
from ..errors import InputError, size_text
from .base import Operator
from .compose import Local
from .crops import Window
from .linalg import Factors

__all__ = ["AverageDown", "BicubicDown", "Grayscale"]


class Down(Local):
    """Base class of reductions: the factor f and the shapes."""

    options: ClassVar[dict[str, Option]] = {"factor": Whole(1, 256)}
    turnable = True
    factor: int

    def __init__(self, factor: int) -> None:
        self._take_options(factor=factor)

    @property
    def blurs(self) -> bool:  # type: ignore[override]
        """Whether the factor is above 1."""
        return self.factor > 1

    @property
    def crop_grid(self) -> int:  # type: ignore[override]
        """The factor."""
        return self.factor

    @property
    def _reduction(self) -> int:
        return self.factor

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        self._check((1, *window.size))
        for position in range(len(window)):
            Down._check(self, (1, *window.place(position).shape))
        return self, window.reduced(self.factor, self._known(window))

    def _known(self, window: Window) -> Tensor:
        """1 where a crop determines the small pixel, else 0, (B, 1, h / f, w / f)."""
        raise NotImplementedError

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Check that the factor divides the image, and return self."""
        self._check(tuple(shape))
        return self

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (C, H / f, W / f)."""
        self._check(tuple(x_shape))
        channels, height, width = x_shape[-3:]
        return channels, height // self.factor, width // self.factor

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (C, f H, f W).

        Raises:
            InputError: The image would be above the limit of `bounds.TABLES`.
        """
        channels, height, width = y_shape[-3:]
        check_tables(
            self.spec,
            f"the image behind measurements of {size_text(y_shape[-2:])}",
            4.0 * channels * height * width * self.factor**2,
            "lower the factor, or use smaller measurements",
        )
        return channels, height * self.factor, width * self.factor

    def _axis_matrix(self, n: int) -> Tensor:
        """A on one axis of n pixels, (n / f, n) in double precision."""
        raise NotImplementedError

    def _has_factors(self, shape: tuple[int, ...]) -> bool:
        return True

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        channels, height, width = shape
        return torch.eye(channels).double(), self._axis_matrix(height), self._axis_matrix(width)

    def _check(self, shape: tuple[int, ...]) -> None:
        if any(n % self.factor for n in shape[-2:]):
            raise InputError(
                f"{self.form}: the factor {self.factor} does not divide the image of"
                f" {size_text(shape[-2:])}: crop the image or choose another factor"
            )


class AverageDown(Down):
    """Average blocks of pixels to a smaller image. Text form: "sr:average,factor=4".

    Args:
        factor: Side f of the blocks in pixels, a whole number from 1 to 256; it must divide
            height and width.

    Raises:
        InputError: The option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("sr:average,factor=2")
    >>> A.A(torch.tensor([[[[0.0, 1.0], [1.0, 2.0]]]]))
    tensor([[[[1.]]]])
    >>> A.A_dagger(torch.ones(1, 1, 1, 1))
    tensor([[[[1., 1.],
              [1., 1.]]]])
    """

    form = "sr:average"
    orthogonal_rows = True

    @property
    def gram(self) -> float:
        """1 / f^2, because the blocks are disjoint."""
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

    def _known(self, window: Window) -> Tensor:
        return 1 - F.max_pool2d(1 - window.known, self.factor)

    def _axis_matrix(self, n: int) -> Tensor:
        return torch.eye(n // self.factor).double().repeat_interleave(self.factor, 1) / self.factor


class BicubicDown(Down):
    """Reduce the image by bicubic interpolation without aliasing. Text form:
    "sr:bicubic,factor=4".

    Args:
        factor: The reduction f, a whole number from 1 to 256; it must divide height and width.

    Raises:
        InputError: The option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> parse("sr:bicubic,factor=4").A(torch.ones(1, 3, 8, 8)).shape
    torch.Size([1, 3, 2, 2])
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
            "raise the factor, or use smaller images",
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

    def _known(self, window: Window) -> Tensor:
        window.check_margin(self.spec, (4 * self.factor,) * 2)
        reach = 2 * self.factor
        unknown = 1 - window.extended([(reach, reach)] * 2, _reflect)
        # the extension is longer than the kernel, so that no border model enters
        down, across = (
            (_bicubic(n + 2 * reach, self.factor)[2:-2] != 0).to(unknown) for n in window.size
        )
        return (down @ unknown @ across.mT == 0).to(unknown)

    def _axis_matrix(self, n: int) -> Tensor:
        return _bicubic(n, self.factor)


class Grayscale(Local):
    """Average the channels of a color image to a gray image. Text form: "colour:grey".

    Args:
        channels: Number C of channels of the color image, a whole number from 2 to 1024. For an
            image of one channel, use identity.

    Raises:
        InputError: The option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> parse("colour:grey").A(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1))
    tensor([[[[0.5000]]]])
    """

    form = "colour:grey"
    options: ClassVar[dict[str, Option]] = {"channels": Whole(2, 1024)}
    orthogonal_rows = True
    turnable = True
    channels: int

    def __init__(self, channels: int = 3) -> None:
        self._take_options(channels=channels)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Check that the image has the right number of channels, and return self."""
        self._check(tuple(shape))
        return self

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (1, H, W)."""
        self._check(tuple(x_shape))
        return 1, *x_shape[-2:]

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (C, H, W). Raises InputError if y has more than one channel."""
        if y_shape[-3] != 1:
            raise InputError(
                f"colour:grey: a measurement has 1 channel, this one has {y_shape[-3]}: give"
                " gray images"
            )
        return self.channels, *y_shape[-2:]

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[-3] == 1:
            raise InputError(
                "colour:grey: the image has 1 channel, so there is no colour to lose: give a color"
                " image or use identity"
            )
        if shape[-3] != self.channels:
            raise InputError(
                f"colour:grey: the image has {shape[-3]} channels but channels={self.channels}:"
                f" write colour:grey,channels={shape[-3]}"
            )

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        return self, replace(window, channels=1)

    @property
    def gram(self) -> float:
        """1 / C, because every channel is part of one mean only."""
        return 1 / self.channels

    def _A(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self._A_dagger(y) / self.channels

    def _A_dagger(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1).clone()

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return z + gamma / (self.channels + gamma) * (y - self._A(z))

    def _has_factors(self, shape: tuple[int, ...]) -> bool:
        return True

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        height, width = (torch.eye(n).double() for n in shape[-2:])
        return torch.full((1, self.channels), 1 / self.channels).double(), height, width


class _Axis(NamedTuple):
    """One axis of n pixels: M (n / f, n) and its singular value decomposition u diag(s) v^T."""

    m: Tensor
    u: Tensor
    s: Tensor
    v: Tensor


@functools.lru_cache(maxsize=32)
def _axis(n: int, factor: int, dtype: torch.dtype, device: torch.device) -> _Axis:
    with torch.inference_mode(False), torch.no_grad():  # it outlives the caller's mode
        m = _bicubic(n, factor)
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
        return _Axis(*(part.to(device, dtype) for part in (m, u, s, vt.mT.contiguous())))


def _bicubic(n: int, factor: int) -> Tensor:
    """M, shape (n / factor, n), in double precision."""
    center = (torch.arange(n // factor).double() + 0.5) * factor - 0.5
    first = (center - 2 * factor).floor().long()
    taps = first[:, None] + torch.arange(4 * factor + 2)
    weights = _keys((taps - center[:, None]) / factor)
    position = _reflect(taps, n)
    m = torch.zeros(n // factor, n, dtype=torch.float64).scatter_add_(1, position, weights)
    return m / m.sum(1, keepdim=True)


def _reflect(position: Tensor, n: int) -> Tensor:
    """The source pixel of positions on a line of n pixels, reflected with the edge repeated."""
    position = position % (2 * n)
    return torch.minimum(position, 2 * n - 1 - position)


def _keys(t: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2; it is zero for |t| >= 2."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t.square() + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
