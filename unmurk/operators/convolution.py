r"""Convolution of images with a kernel h, the same for every channel, with two kinds of borders.

The kernel sums to 1, and has its center at :math:`c = (k_h // 2, k_w // 2)`:

.. math:: (A x)[i, j] = \sum_{a, b} h[a, b]\, x[i + c_h - a,\; j + c_w - b]

Outside, the image continues by reflection without repeating the edge ("reflect"), or periodically
("circular").

**Circular.** A is diagonal in the Fourier basis, :math:`A = F^{-1} \operatorname{diag}(H) F`. With
Z = F z and Y = F y,

.. math::

    A^+ y &= F^{-1} \left[ \bar H Y / |H|^2 \right]
        \text{ where } |H| > \mathtt{CUTOFF} \max |H|, \text{ zero elsewhere} \\
    \mathrm{prox}(z, y, \gamma)
        &= F^{-1} \left[ (Z + \gamma \bar H Y) / (1 + \gamma |H|^2) \right]

**Reflect.** A = K R, with R the reflection and K the convolution without borders. In
:math:`A^T = R^T K^T`, :math:`R^T` adds every reflected pixel back to its source: this is the exact
transpose. An image reflected again and again is periodic and even. So for a kernel that is
symmetric in both axes, A is diagonal in the cosines of the DCT-I,
:math:`A = C^{-1} \operatorname{diag}(H) C`. The cosines are orthogonal under weights w that count
pixels on an edge by 1/2 and those in a corner by 1/4. Then

.. math::

    A^+ y = C^{-1} \left[ C y / H \right]
        \text{ where } |H| > \mathtt{CUTOFF} \max |H|, \text{ zero elsewhere,}

and the prox comes from conjugate gradients on :math:`I + \gamma A^T A`, preconditioned by
:math:`C^{-1} \operatorname{diag}(1 / (1 + \gamma H^2))\, C / w`. The condition number is at most 4
for any gamma, because :math:`A^T A = w^{1/2} S w^{-1} S w^{1/2}` with
:math:`S = w^{1/2} A w^{-1/2}` symmetric and :math:`1 \le 1/w \le 4`.

This :math:`A^+` is the inverse where A has one. Elsewhere it is the pseudo-inverse in the weighted
norms, which does not darken the edges as the one in the plain norms does. For other kernels,
:math:`A^+` comes from conjugate gradients on the normal equations in the weighted norms. The
preconditioner of the prox then has the mean of :math:`|H|^2` over the kernel and its mirror image
in place of :math:`H^2`. No bound is known for it, but at gamma = 1e4 it saves most iterations.

Most blurs are singular for practical purposes. :math:`A^+` treats frequencies that keep less than
`CUTOFF` of their amplitude as not measured, because inverting them would multiply the noise by
more than 1 / `CUTOFF`. The conjugate gradients stop after `ITERATIONS` iterations for the same
reason. Where noise matters, the prox is the better estimate: it weighs every frequency.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Operator
from .compose import Local
from .crops import Window
from .linalg import Factors, Spectrum, conjugate_gradient, fourier, rfft2

__all__ = ["CUTOFF", "Blur", "fold", "mirrored"]

CUTOFF = 3e-2  # smallest singular value that A^+ inverts, relative to the largest
ITERATIONS = 20  # of conjugate gradients on A^T A x = A^T y for A^+ with reflecting borders
SMALL = 128  # pixels of a side up to which products with matrices are faster than convolutions


class Blur(Local):
    """Base class of all blurs. A subclass sets the kernel.

    Attributes:
        kernel: One kernel, or one for each image, (1 or B, 1, kh, kw); each sums to 1.
        pad: How the image continues outside, "reflect" or "circular".
        symmetric: Whether every kernel equals its mirror images in both axes.

    >>> from unmurk.operators import parse
    >>> A = parse("blur:uniform,size=3,pad=circular")
    >>> x = torch.zeros(1, 1, 4, 4)
    >>> x[0, 0, 1, 1] = 9
    >>> A.A(x)[0, 0].round().int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """

    tensors = ("kernel",)
    dagger_iterations = ITERATIONS
    kernel: Tensor | None = None
    pad: str = "reflect"
    symmetric: bool = True

    def _kernel_like(self, like: Tensor) -> Tensor:
        assert self.kernel is not None
        return self.kernel.to(like.dtype)

    @property
    def blurs(self) -> bool:  # type: ignore[override]
        """Whether the kernel has more than one pixel, or is not known yet."""
        return self.kernel is None or self.kernel[0].numel() > 1

    @property
    def turnable(self) -> bool:  # type: ignore[override]
        """Whether every kernel equals its mirror images and its transpose."""
        kernel = self.kernel
        if kernel is None or kernel.shape[-1] != kernel.shape[-2] or not mirrored(kernel):
            return False
        return torch.allclose(kernel, kernel.mT, rtol=0, atol=1e-9)

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        assert self.kernel is not None
        shape, centers = zip(*(self._support(axis) for axis in (-2, -1)), strict=True)
        window.check_margin(self.spec, shape)
        reach = [(k - 1 - c, c) for k, c in zip(shape, centers, strict=True)]
        return self, window.eroded(reach, fold if self.pad == "reflect" else None)

    def _support(self, axis: int) -> tuple[int, int]:
        """Pixels of the kernel on an axis that are not 0, and the position of its center in them;
        all pixels if each image has its own kernel."""
        assert self.kernel is not None
        size, center = self.kernel.shape[axis], self.kernel.shape[axis] // 2
        if len(self.kernel) > 1:
            return size, center
        used = (self.kernel[0, 0] != 0).any(-3 - axis).nonzero()[:, 0].tolist()
        first, last = min(used[0], center), max(used[-1], center)
        return last - first + 1, center - first

    def _A(self, x: Tensor) -> Tensor:
        if self.pad == "reflect":
            if not self._has_matrices(x):
                return self._convolve(x)
            on_columns, on_rows = self._matrices(x)
            return on_columns @ x @ on_rows.mT
        return _filter(x, self._transfer(x))

    def _A_adjoint(self, y: Tensor) -> Tensor:
        if self.pad == "reflect":
            if not self._has_matrices(y):
                return self._correlate(y)
            on_columns, on_rows = self._matrices(y)
            return on_columns.mT @ y @ on_rows
        return _filter(y, self._transfer(y).conj())

    def _A_dagger(self, y: Tensor) -> Tensor:
        if self.pad == "circular":
            return _filter(y, _inverse(self._transfer(y)))
        if self.symmetric:
            wide = _mirror(y)
            return _crop(_filter(wide, _inverse(self._transfer(wide))), y)
        root = _weights(y).sqrt()
        return conjugate_gradient(
            lambda u: self._correlate(root.square() * self._convolve(u / root)) / root,
            self._correlate(root.square() * y) / root,
            ITERATIONS,
        ).div(root)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        if self.pad == "circular":
            transfer = self._transfer(z)
            weight = gamma * transfer.conj() / (1 + gamma * transfer.abs().square())
            return z + _filter(y - self._A(z), weight)
        if self._is_factored(z):
            return super()._prox(z, y, gamma)
        step = conjugate_gradient(
            lambda x: x + gamma * self._correlate(self._convolve(x)),
            gamma * self._correlate(y - self._convolve(z)),
            precondition=self.preconditioner(z, gamma),
        )
        return z + step

    @property
    def _shared(self) -> bool:
        return self.kernel is not None and len(self.kernel) == 1

    def _has_structure(self, x: Tensor) -> bool:
        return self.pad == "circular" or super()._has_structure(x)

    def _structured(self, x: Tensor) -> Spectrum:
        if self.pad == "circular":
            return fourier(self._transfer(x), x.shape)
        return super()._structured(x)

    def _has_factors(self, shape: tuple[int, ...]) -> bool:
        assert self.kernel is not None
        kernel = self.kernel
        return self._cached("separable", lambda: _is_separable(kernel))  # comparing stalls a GPU

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        assert self.kernel is not None
        column, row = (part.double() for part in _column_and_row(self.kernel))
        channels, height, width = (torch.eye(n).to(column) for n in shape)
        return channels.cpu(), self._axis_matrix(column, height), self._axis_matrix(row, width)

    def _axis_matrix(self, kernel: Tensor, pixels: Tensor) -> Tensor:
        """A with a kernel that is one column or row, as a matrix on one axis of the image."""
        one = self._with(kernel=kernel)
        assert isinstance(one, Blur)
        unit = pixels[:, None, :, None] if kernel.shape[-1] == 1 else pixels[:, None, None]
        moved = one._convolve(unit) if self.pad == "reflect" else one._A(unit)
        return moved.reshape(pixels.shape).T.cpu()

    def _has_matrices(self, like: Tensor) -> bool:
        """Whether `_matrices` are faster: for small images, and kernels that are the product of a
        column and a row."""
        return max(like.shape[-2:]) <= SMALL and self._has_factors(tuple(like.shape[-3:]))

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(D, C) with A x = D x C^T, cached for images like these."""

        def make() -> tuple[Tensor, Tensor]:
            _, column, row = self._factors((1, *like.shape[-2:]))
            return column.to(like), row.to(like)

        return self._cached(("matrices", tuple(like.shape[-2:]), like.dtype, like.device), make)

    def preconditioner(self, like: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the inverse itself, or a map near it for kernels that do not factor; see
        `Operator.preconditioner`."""
        if self.pad == "circular":
            inverse = 1 / (1 + gamma * self._transfer(like).abs().square())
            return lambda r: _filter(r, inverse)
        if self._is_factored(like):
            return super().preconditioner(like, gamma)
        weights = _weights(like)
        power = self._transfer(_mirror(like)).abs().square()
        even = (power + power.flip(-2).roll(1, -2)) / 2  # at (k, l) and (-k, l)
        gain = 1 / (1 + gamma * even)
        return lambda r: _crop(_filter(_mirror(r / weights), gain), r)

    def _transfer(self, x: Tensor) -> Tensor:
        """H, the Fourier transform of h centered at the origin, (1 or B, 1, H, W // 2 + 1)."""
        key = "transfer", tuple(x.shape[-2:]), x.dtype, x.device
        return self._cached(key, lambda: self._transformed(x))

    def _transformed(self, x: Tensor) -> Tensor:
        kernel = self._kernel_like(x)
        rows, columns = (
            (torch.arange(k, device=x.device) - k // 2) % n
            for k, n in zip(kernel.shape[-2:], x.shape[-2:], strict=True)
        )
        tall = x.new_zeros(len(kernel), 1, x.shape[-2], kernel.shape[-1])
        wide = x.new_zeros(len(kernel), 1, *x.shape[-2:])
        return torch.fft.rfft2(wide.index_add(-1, columns, tall.index_add(-2, rows, kernel)))

    def _borders(self, shape: Sequence[int], device: torch.device) -> list[Tensor]:
        """The source pixel of each row, and column, of an image extended for the kernel."""
        assert self.kernel is not None
        return [
            fold(torch.arange(k // 2 - k + 1, n + k // 2, device=device), n)
            for n, k in zip(shape[-2:], self.kernel.shape[-2:], strict=True)
        ]

    def _passes(self, like: Tensor) -> Sequence[Tensor]:
        """Kernels whose chain is the kernel: a column and a row where it is their product."""

        def make() -> Sequence[Tensor]:
            kernel = self._kernel_like(like)
            return _column_and_row(kernel) if _is_separable(kernel) else (kernel,)

        return self._cached(("passes", like.dtype, like.device), make)  # comparing stalls a GPU

    def _convolve(self, x: Tensor) -> Tensor:
        rows, columns = self._borders(x.shape, x.device)
        wide = x.index_select(-2, rows).index_select(-1, columns)
        for kernel in self._passes(x):
            # conv2d correlates: the flip makes it a convolution
            wide = _per_channel(wide, kernel.flip(-2, -1))
        return wide

    def _correlate(self, y: Tensor) -> Tensor:
        """The transpose of `_convolve`."""
        rows, columns = self._borders(y.shape, y.device)
        wide = y
        for kernel in self._passes(y):
            # every pixel that the convolution reached: the full correlation
            wide = _per_channel(wide, kernel, (kernel.shape[-2] - 1, kernel.shape[-1] - 1))
        tall = wide.new_zeros(*wide.shape[:-1], y.shape[-1]).index_add(-1, columns, wide)
        return tall.new_zeros(*tall.shape[:-2], *y.shape[-2:]).index_add(-2, rows, tall)


def _filter(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply in the Fourier basis."""
    return torch.fft.irfft2(rfft2(x) * transfer, s=x.shape[-2:])


def _inverse(transfer: Tensor) -> Tensor:
    """1 / H where |H| > CUTOFF max |H|, else 0."""
    gain = transfer.abs()
    invertible = gain > CUTOFF * gain.amax((-2, -1), keepdim=True)
    return torch.where(invertible, 1 / torch.where(invertible, transfer, 1.0), 0.0)


def fold(position: Tensor, n: int) -> Tensor:
    """Return the source pixel of each position on a line of n pixels that is reflected forever.

    Args:
        position: Whole numbers, any shape, negative ones too.
        n: Number of pixels.

    >>> import torch
    >>> from unmurk.operators.convolution import fold
    >>> fold(torch.arange(-2, 6), 4)
    tensor([2, 1, 0, 1, 2, 3, 2, 1])
    """
    period = max(2 * (n - 1), 1)
    position = position % period
    return torch.minimum(position, period - position).clamp_max(n - 1)


def _mirror(x: Tensor) -> Tensor:
    """One period of x reflected forever, (B, C, 2 H - 2, 2 W - 2)."""
    rows, columns = (
        fold(torch.arange(max(2 * (n - 1), 1), device=x.device), n) for n in x.shape[-2:]
    )
    return x.index_select(-2, rows).index_select(-1, columns)


def _crop(wide: Tensor, like: Tensor) -> Tensor:
    """Invert `_mirror`: cut out the image."""
    return wide[..., : like.shape[-2], : like.shape[-1]]


def _weights(x: Tensor) -> Tensor:
    """w: 1 inside, 1/2 on the edges, 1/4 in the corners, (H, W)."""
    down, across = (x.new_ones(n) for n in x.shape[-2:])
    for axis in (down, across):
        axis[0] = axis[-1] = 0.5
    return down[:, None] * across


def _per_channel(x: Tensor, kernel: Tensor, border: tuple[int, int] = (0, 0)) -> Tensor:
    """Correlate each channel of x, with zeros around it, with the kernel of its image."""
    batch, channels = max(len(x), len(kernel)), x.shape[1]
    if len(kernel) == 1:
        flat = F.conv2d(x.reshape(-1, 1, *x.shape[-2:]), kernel, padding=border)
        return flat.reshape(batch, channels, *flat.shape[-2:])
    x = x.expand(batch, -1, -1, -1)
    weights = kernel.expand(batch, channels, -1, -1).reshape(-1, 1, *kernel.shape[-2:])
    x = x.reshape(1, -1, *x.shape[-2:])
    flat = F.conv2d(x, weights, padding=border, groups=batch * channels)
    return flat.reshape(batch, channels, *flat.shape[-2:])


def _is_separable(kernel: Tensor) -> bool:
    """Whether a kernel (1 or B, 1, kh, kw) is one product of a column and a row."""
    column, row = _column_and_row(kernel)
    return len(kernel) == 1 and torch.allclose(kernel, column * row, rtol=0, atol=1e-7)


def _column_and_row(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The column and the row whose product is a separable kernel (1, 1, kh, kw) of sum 1."""
    return kernel.sum(-1, keepdim=True), kernel.sum(-2, keepdim=True)


def mirrored(kernel: Tensor) -> bool:
    """Return whether kernels (..., kh, kw) equal their mirror images in both axes.

    >>> mirrored(torch.tensor([[1.0, 2.0, 1.0]])), mirrored(torch.tensor([[1.0, 2.0, 3.0]]))
    (True, False)
    """
    odd = all(n % 2 for n in kernel.shape[-2:])
    return odd and all(torch.equal(kernel, kernel.flip(axis)) for axis in (-1, -2))
