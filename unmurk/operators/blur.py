"""Blur: true two-dimensional convolution of every channel with one kernel h that sums to 1.

    (A x)[i, j] = sum_ab h[a, b] x[i + ca - a, j + cb - b],    ca, cb = centre of h (size // 2)

Outside the image x continues by reflection without repeating the edge ("reflect") or
periodically ("circular").

circular: A is diagonal in the Fourier basis, A = F^-1 diag(H) F, and with Z = F z, Y = F y

    A^+ y   = F^-1 [ conj(H) Y / |H|^2 ]  where |H| > CUTOFF max|H|, zero elsewhere
    prox_l2 = F^-1 [ (Z + gamma conj(H) Y) / (1 + gamma |H|^2) ]

reflect: A = K R with R the reflection and K the convolution without borders. A^T = R^T K^T with
R^T adding every reflected pixel back to where it came from: an exact transpose. An image that is
reflected on and on is periodic and even, so for a kernel that is symmetric in both axes A is
diagonal in the cosines of the DCT-I: A = C^-1 diag(H) C. These are orthogonal once pixels on an
edge count half and those in a corner a quarter; with w these weights,

    A^+ y   = C^-1 [ C y / H ]  where |H| > CUTOFF max|H|, zero elsewhere
    prox_l2 = conjugate gradients on I + gamma A^T A, preconditioned by
              C^-1 diag(1 / (1 + gamma H^2)) C / w    (condition number <= 4 for any gamma, as
              A^T A = w^1/2 S w^-1 S w^1/2 with S = w^1/2 A w^-1/2 symmetric and 1 <= 1/w <= 4)

This A^+ is the inverse where A has one; else it is the pseudo-inverse in the weighted norms, which
does not darken the edges as that in the plain ones does. For other kernels A^+ comes from
conjugate gradients on the normal equations in the weighted norms, and the preconditioner of
prox_l2 has the mean of |H|^2 over the kernel and its mirror image in place of H^2: no bound is
known, but at gamma = 1e4 it saves most of the steps.

Most blurs are singular for practical purposes. A^+ treats frequencies that pass with less than
CUTOFF of their amplitude as unseen, because bringing them back would multiply the noise by more
than 1 / CUTOFF; the conjugate gradients stop after ITERATIONS steps to the same end. Where the
noise matters, prox_l2 is the better estimate: it weighs every frequency.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Choice, File, Option, Real, Sides
from ..errors import InputError
from .base import Operator, conjugate_gradient, size_text
from .linalg import Factors, Spectrum, fourier
from .reading import pick_rows, read_kernels

__all__ = ["PAD", "WIDEST", "Blur", "FileBlur", "GaussianBlur", "UniformBlur", "fold", "mirrored"]

CUTOFF = 3e-2  # smallest singular value that A^+ inverts, relative to the largest
ITERATIONS = 20  # of conjugate gradients on A^T A x = A^T y for A^+ with reflecting borders
SMALL = 128  # pixels of a side up to which products with matrices are faster than convolutions
WIDEST = (
    256  # pixels, the largest standard deviation of a kernel; its side is 6 WIDEST + 1 at most
)
PAD = Choice(("reflect", "circular"))
SIZE = Sides(1, 6 * WIDEST + 1, odd=True)


class Blur(Operator):
    """What all blurs share. Members set `kernel`, shape (1 or B, 1, kh, kw), each summing to 1."""

    tensors = ("kernel",)
    dagger_iterations = ITERATIONS
    kernel: Tensor | None = None
    pad: str = "reflect"
    symmetric: bool = True  # the kernel equals its mirror images in both axes

    def _held(self, like: Tensor) -> Tensor:
        assert self.kernel is not None
        return self.kernel.to(like.dtype)

    def _A(self, x: Tensor) -> Tensor:
        if self.pad == "reflect":
            lines = self._matrices(x)
            return self._convolve(x) if lines is None else lines[0] @ x @ lines[1].mT
        return _filter(x, self._transfer(x))

    def _A_adjoint(self, y: Tensor) -> Tensor:
        if self.pad == "reflect":
            lines = self._matrices(y)
            return self._correlate(y) if lines is None else lines[0].mT @ y @ lines[1]
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
        if self._factored(z) is not None:
            return super()._prox(z, y, gamma)
        step = conjugate_gradient(
            lambda x: x + gamma * self._correlate(self._convolve(x)),
            gamma * self._correlate(y - self._convolve(z)),
            precondition=self.near_inverse(z, gamma),
        )
        return z + step

    @property
    def _shared(self) -> bool:
        return True  # but for kernels from a file

    def _structured(self, x: Tensor) -> Spectrum | None:
        if self.pad == "circular":
            return fourier(self._transfer(x), x.shape)
        return super()._structured(x)

    def _factors(self, shape: tuple[int, ...]) -> Factors | None:
        assert self.kernel is not None
        lines = _lines(self.kernel)
        if lines is None:
            return None
        down, across = (line.double() for line in lines)
        channels, height, width = (torch.eye(n).to(down) for n in shape)
        return channels.cpu(), self._line(down, height), self._line(across, width)

    def _line(self, kernel: Tensor, pixels: Tensor) -> Tensor:
        """A with a kernel that is one line, as a matrix on a line of as many pixels."""
        one = self._with(kernel=kernel)
        assert isinstance(one, Blur)
        unit = pixels[:, None, :, None] if kernel.shape[-1] == 1 else pixels[:, None, None]
        moved = one._convolve(unit) if self.pad == "reflect" else one._A(unit)
        return moved.reshape(pixels.shape).T.cpu()

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(D, C) with A x = D x C^T, kept for images like these; None for large ones, and for
        kernels that are not the product of two lines. Small images are blurred faster so."""
        if max(like.shape[-2:]) > SMALL:
            return None
        key = "lines", tuple(like.shape[-2:]), like.dtype, like.device
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                factors = self._factors((1, *like.shape[-2:]))
                found = None if factors is None else (factors[1].to(like), factors[2].to(like))
            self._kept = {**self._kept, key: found}
        return self._kept[key]

    def near_inverse(self, like: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        """See `Operator.near_inverse`: the inverse itself, but for kernels that do not factor."""
        if self.pad == "circular":
            inverse = 1 / (1 + gamma * self._transfer(like).abs().square())
            return lambda r: _filter(r, inverse)
        exact = super().near_inverse(like, gamma)
        if exact is not None:
            return exact
        weights = _weights(like)
        power = self._transfer(_mirror(like)).abs().square()
        even = (power + power.flip(-2).roll(1, -2)) / 2  # at (k, l) and (-k, l)
        gain = 1 / (1 + gamma * even)
        return lambda r: _crop(_filter(_mirror(r / weights), gain), r)

    def _transfer(self, x: Tensor) -> Tensor:
        """H, the Fourier transform of h centred at the origin, (1 or B, 1, H, W // 2 + 1)."""
        key = "transfer", tuple(x.shape[-2:]), x.dtype, x.device
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = {**self._kept, key: self._transformed(x)}
        return self._kept[key]

    def _transformed(self, x: Tensor) -> Tensor:
        kernel = self._held(x)
        rows, columns = (
            (torch.arange(k, device=x.device) - k // 2) % n
            for k, n in zip(kernel.shape[-2:], x.shape[-2:], strict=True)
        )
        tall = x.new_zeros(len(kernel), 1, x.shape[-2], kernel.shape[-1])
        wide = x.new_zeros(len(kernel), 1, *x.shape[-2:])
        return torch.fft.rfft2(wide.index_add(-1, columns, tall.index_add(-2, rows, kernel)))

    def _borders(self, shape: Sequence[int], device: torch.device) -> list[Tensor]:
        """Which pixel stands at each row, and column, of an image extended for the kernel."""
        assert self.kernel is not None
        return [
            fold(torch.arange(k // 2 - k + 1, n + k // 2, device=device), n)
            for n, k in zip(shape[-2:], self.kernel.shape[-2:], strict=True)
        ]

    def _passes(self, like: Tensor) -> Sequence[Tensor]:
        """Kernels that one after another are the kernel: two lines where it is their product."""
        key = "passes", like.dtype, like.device  # kept: to compare numbers waits for a GPU
        if key not in self._kept:
            kernel = self._held(like)
            self._kept = {**self._kept, key: _lines(kernel) or (kernel,)}
        return self._kept[key]

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
            # every place that a tap of the convolution reached: the whole correlation
            wide = _per_channel(wide, kernel, (kernel.shape[-2] - 1, kernel.shape[-1] - 1))
        tall = wide.new_zeros(*wide.shape[:-1], y.shape[-1]).index_add(-1, columns, wide)
        return tall.new_zeros(*tall.shape[:-2], *y.shape[-2:]).index_add(-2, rows, tall)


class GaussianBlur(Blur):
    """An isotropic Gaussian kernel. Text form: "blur:gaussian,sigma=1.5".

    Args:
        sigma: Standard deviation of the kernel in pixels, a number from 0.01 to 256.
        size: Side of the kernel in pixels, an odd number from 1 to 1537, or height and width,
            "9x5". None cuts it at 3 sigma.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: an option out of its bounds.
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
        down, across = (_bell(n, self.sigma) for n in taps)
        self.kernel = (down[:, None] * across).float()[None, None]


class UniformBlur(Blur):
    """A kernel of equal weights. Text form: "blur:uniform,size=9".

    Args:
        size: Side of the kernel in pixels, an odd number from 1 to 1537; or height and width,
            "9x5".
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "blur:uniform"
    options: ClassVar[dict[str, Option]] = {"size": SIZE, "pad": PAD}
    size: tuple[int, int]

    def __init__(self, size: int | tuple[int, int], pad: str = "reflect") -> None:
        self._take_options(size=size, pad=pad)
        self.kernel = torch.full((1, 1, *self.size), 1 / (self.size[0] * self.size[1]))


class FileBlur(Blur):
    """A kernel from a file. Text form: "blur:file,path=kernel.npy".

    Args:
        path: The path of a file, at most 4096 characters: a .npy array (kh, kw), or (N, kh, kw)
            with a kernel for every image number, or a grey picture. Axes of one entry are left
            out: (9, 9, 1) is one kernel of 9x9. Both sides are odd, so that the centre is a
            pixel, (kh // 2, kw // 2), and not larger than the image. It is read by `bind` and
            divided by its sum, which must be positive.
        pad: How the image continues outside, one of reflect, circular.

    Raises:
        InputError: an option out of its bounds; from `bind`, a file that holds no kernels.
    """

    form = "blur:file"
    options: ClassVar[dict[str, Option]] = {"path": File(), "pad": PAD}
    path: str

    def __init__(self, path: str | Path, pad: str = "reflect") -> None:
        self._take_options(path=path, pad=pad)

    @property
    def _shared(self) -> bool:
        return False

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """The operator with the kernels of these images; see `Operator.bind`."""
        kernels = read_kernels(self.form, self.path)
        if any(k > n for k, n in zip(kernels.shape[-2:], shape[-2:], strict=True)):
            raise InputError(
                f"blur:file: the kernel in {self.path} is {size_text(kernels.shape[-2:])} but the "
                f"image is only {size_text(shape[-2:])}; give a kernel not larger than the image"
            )
        rows = pick_rows(self.form, self.path, kernels, [int(i) for i in index])
        return self._with(kernel=rows[:, None].to(self.device), symmetric=mirrored(rows))


def _filter(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply in the Fourier basis."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])


def _inverse(transfer: Tensor) -> Tensor:
    """1 / H where |H| > CUTOFF max |H|, else 0."""
    gain = transfer.abs()
    kept = gain > CUTOFF * gain.amax((-2, -1), keepdim=True)
    return torch.where(kept, 1 / torch.where(kept, transfer, 1.0), 0.0)


def fold(position: Tensor, n: int) -> Tensor:
    """Which of n pixels stands at each position when their row is reflected on and on."""
    period = max(2 * (n - 1), 1)
    position = position % period
    return torch.minimum(position, period - position).clamp_max(n - 1)


def _mirror(x: Tensor) -> Tensor:
    """One period of x reflected on and on, (B, C, 2 H - 2, 2 W - 2)."""
    rows, columns = (
        fold(torch.arange(max(2 * (n - 1), 1), device=x.device), n) for n in x.shape[-2:]
    )
    return x.index_select(-2, rows).index_select(-1, columns)


def _crop(wide: Tensor, like: Tensor) -> Tensor:
    """What `_mirror` started from."""
    return wide[..., : like.shape[-2], : like.shape[-1]]


def _weights(x: Tensor) -> Tensor:
    """w: 1 inside, 1/2 on the edges, 1/4 in the corners, (H, W)."""
    down, across = (x.new_ones(n) for n in x.shape[-2:])
    for axis in (down, across):
        axis[0] = axis[-1] = 0.5
    return down[:, None] * across


def _per_channel(x: Tensor, kernel: Tensor, border: tuple[int, int] = (0, 0)) -> Tensor:
    """Correlate each channel of x, with zeros around it, with the kernel of its image."""
    rows, channels = max(len(x), len(kernel)), x.shape[1]
    if len(kernel) == 1:
        flat = F.conv2d(x.reshape(-1, 1, *x.shape[-2:]), kernel, padding=border)
        return flat.reshape(rows, channels, *flat.shape[-2:])
    x = x.expand(rows, -1, -1, -1)
    weights = kernel.expand(rows, channels, -1, -1).reshape(-1, 1, *kernel.shape[-2:])
    x = x.reshape(1, -1, *x.shape[-2:])
    flat = F.conv2d(x, weights, padding=border, groups=rows * channels)
    return flat.reshape(rows, channels, *flat.shape[-2:])


def _lines(kernel: Tensor) -> tuple[Tensor, Tensor] | None:
    """The column and the row whose product a kernel (1, 1, kh, kw) that sums to 1 is, if it is."""
    down, across = kernel.sum(-1, keepdim=True), kernel.sum(-2, keepdim=True)
    if len(kernel) > 1 or not torch.allclose(kernel, down * across, rtol=0, atol=1e-7):
        return None
    return down, across


def _bell(taps: int, sigma: float) -> Tensor:
    """A sampled Gaussian of `taps` values that sums to 1."""
    position = torch.arange(taps, dtype=torch.float64) - taps // 2
    values = torch.exp(-position.square() / (2 * sigma**2))
    return values / values.sum()


def mirrored(kernel: Tensor) -> bool:
    """Whether kernels (.., kh, kw) equal their mirror images in both axes about their centres."""
    odd = all(n % 2 for n in kernel.shape[-2:])
    return odd and all(torch.equal(kernel, kernel.flip(axis)) for axis in (-1, -2))
