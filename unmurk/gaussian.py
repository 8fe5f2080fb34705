"""A Gaussian prior of whole images, and the exact posteriors that it gives for any linear A.

x ~ N(m, S), S = T^-1 diag(P) T: a mean image m, and powers P on the cosines of the orthonormal
DCT-II of channels that one rotation makes as good as uncorrelated (brightness and two colours). T
is orthogonal. Images of one kind are nearly stationary, and cosines nearly diagonalise what is
stationary, without tying opposite borders together as the Fourier basis does (Ahmed, Natarajan and
Rao, 1974, IEEE Trans. Computers C-23).

With y = A x + sigma_y n the posterior is Gaussian. In coordinates c = T (x - m),

    M c = b,   M = T A^T A T^-1 / sigma_y^2 + P^-1,   b = T A^T (y - A m) / sigma_y^2

gives its mean, the Wiener solution, and with

    b + T A^T n' / sigma_y + P^-1/2 n''

on the right-hand side a draw from it: the right-hand side then has covariance M, so c has M^-1
(Papandreou and Yuille, 2010, NIPS, "Gaussian sampling by local perturbations"). The system is
solved by conjugate gradients on w M w, w = (P^-1 + g / sigma_y^2)^-1/2, with g the mean of T A^T A
T^-1 over bands of frequencies, each image for itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .devices import filled, physics_outside_autocast
from .operators.base import conjugate_gradient, per_image
from .problem import Problem
from .rng import PerImageGenerator, StreamId, generator

__all__ = ["Wiener", "cosines", "power_law"]

FLOOR = 1e-7  # least power: a standard deviation of 0.0003 for each coefficient
QUIET = 1e-3  # least noise that a measurement is believed to have
BANDS = 8
TOLERANCE = 3e-4  # of the conjugate gradients
START, EXACT = 24, 60  # of their steps: for a start, and for draws


def cosines(n: int) -> Tensor:
    """(n, n) float64: the orthonormal cosine transform (DCT-II), a row for each frequency."""
    k = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(math.pi / n * k[:, None] * (k[None, :] + 0.5)) * (2 / n) ** 0.5
    waves[0] /= 2**0.5
    return waves


def power_law(shape: Sequence[int]) -> Tensor:
    """Powers (C, H, W) that fall with the third power of the frequency, below that of most images.

    A first guess had better be too smooth: what is too rough hardly leaves in a few rounds.
    """
    c, h, w = shape
    rows, columns = (torch.arange(n).double() / n for n in (h, w))
    square = rows[:, None].square() + columns.square() + 1 / max(h, w) ** 2
    return square.pow(-1.5).float().expand(c, h, w).clone()


class Wiener(nn.Module):
    """The prior N(m, S) of images of one shape; untrained, grey with a power law.

    Args:
        shape: Shape (C, H, W) of the images.
    """

    mean: Tensor
    basis: Tensor
    power: Tensor
    down: Tensor
    across: Tensor
    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        c, h, w = shape
        self.register_buffer("mean", torch.full(shape, 0.5))
        self.register_buffer("basis", torch.eye(c))
        self.register_buffer("power", power_law(shape))
        self.register_buffer("down", cosines(h).float(), persistent=False)
        self.register_buffer("across", cosines(w).float(), persistent=False)

    # -- coordinates -----------------------------------------------------------------------------

    def waves(self, x: Tensor) -> Tensor:
        """The cosine transform of images, (B, C, H, W)."""
        rows, columns = self.down.to(x), self.across.to(x)
        return ((x @ columns.mT).mT @ rows.mT).mT

    def into(self, x: Tensor) -> Tensor:
        """T x, (B, C, H, W)."""
        return _rotated(self.basis.mT, self.waves(x))

    def out(self, c: Tensor) -> Tensor:
        """T^-1 c = T^T c, (B, C, H, W)."""
        rows, columns = self.down.to(c), self.across.to(c)
        return ((_rotated(self.basis, c) @ columns).mT @ rows).mT

    def set(self, mean: Tensor, covariance: Tensor) -> None:
        """Takes a mean image (C, H, W) and covariances (H, W, C, C) of the cosines' channels."""
        covariance = covariance.double()
        size = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        basis = torch.linalg.eigh((covariance / size).mean((0, 1))).eigenvectors
        power = (basis.mT @ covariance @ basis).diagonal(dim1=-2, dim2=-1)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.power.copy_(power.permute(2, 0, 1).clamp_min(FLOOR))

    def covariance(self) -> Tensor:
        """Covariances (H, W, C, C) of the cosines' channels: what `set` takes."""
        power = torch.diag_embed(self.power.permute(1, 2, 0))
        return self.basis @ power @ self.basis.mT

    # -- the prior -------------------------------------------------------------------------------

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """E[image | x], (B, C, H, W), for x with noise of level sigma (a number or (B,))."""
        noise = per_image(filled(sigma, x).expand(len(x)), x).square()
        power = self.power.to(x)
        return self.mean.to(x) + self.out(power / (power + noise) * self.into(x - self.mean))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """New images (n, C, H, W); image i depends on (seed, i) only."""
        z = PerImageGenerator(
            seed, range(n), StreamId.GAUSSIAN_PRIOR, device=self.mean.device
        ).randn(*self.shape)
        return self.mean + self.out(self.power.sqrt() * z)

    def energy(self, d: Tensor) -> Tensor:
        """d^T S^-1 d, (B,), of differences of images (B, C, H, W)."""
        return (self.into(d.float()).square() / self.power).flatten(1).sum(1)

    # -- the posterior ---------------------------------------------------------------------------

    def restore(self, y: Tensor, problem: Problem, iterations: int = START) -> Tensor:
        """The Wiener solution E[x | y], (B, C, H, W), for a linear operator.

        After 24 steps of conjugate gradients masks leave an error of about a quarter of the
        posterior's standard deviation, blurs one of a hundredth.
        """
        with physics_outside_autocast(y.device):
            return self._solve(y, problem, None, iterations)

    def draw(
        self, y: Tensor, problem: Problem, noise: PerImageGenerator, iterations: int = EXACT
    ) -> Tensor:
        """One draw from p(x | y), (B, C, H, W), for each measurement and its stream."""
        with physics_outside_autocast(y.device):
            return self._solve(y, problem, noise, iterations)

    def _solve(
        self, y: Tensor, problem: Problem, noise: PerImageGenerator | None, iterations: int
    ) -> Tensor:
        """The mean of p(x | y), or a draw where there are streams."""
        operator, quiet = problem.operator, max(problem.sigma, QUIET)
        y, mean = y.float(), self.mean.expand(len(y), *self.shape)
        missing = operator.apply_mask(y - operator.A(mean)) / quiet
        inner = torch.zeros_like(mean)
        if noise is not None:
            missing = missing + operator.apply_mask(noise.randn(*y.shape[1:]).to(y))
            inner = noise.randn(*self.shape).to(y) / self.power.sqrt()
        b = self.into(operator.A_adjoint(missing)) / quiet + inner
        w = (1 / self.power + self._gain(problem, len(y)) / quiet**2).rsqrt()

        def system(e: Tensor) -> Tensor:
            c = w * e
            observed = self.into(operator.normal(self.out(c))) / quiet**2
            return w * (observed + c / self.power)

        c = w * conjugate_gradient(system, w * b, iterations, TOLERANCE)
        return mean + self.out(c)

    def _gain(self, problem: Problem, rows: int) -> Tensor:
        """Diagonal of T A^T A T^-1, (B, 1, H, W), its mean over bands of frequencies.

        From one probe of signs, the same for every image: what is off the diagonal averages out.
        """
        c, h, w = self.shape
        draw = torch.rand(self.shape, generator=generator(0, StreamId.GAUSSIAN_PROBE)).to(
            self.mean
        )
        signs = (2 * (draw < 0.5) - 1.0)[None]
        probe = self.out(signs).expand(rows, c, h, w)
        observed = problem.operator.normal(probe)
        square = (signs * self.into(observed)).mean(1).flatten(1)
        place = torch.maximum(torch.arange(h)[:, None] / h, torch.arange(w) / w)
        band = (BANDS * place).long().flatten().to(self.mean.device)
        inside = nn.functional.one_hot(band, BANDS).to(square)
        means = square @ (inside / inside.sum(0).clamp_min(1))
        means = torch.maximum(means, 1e-4 * means.amax(1, keepdim=True)).clamp_min(1e-8)
        return (means @ inside.T).view(rows, 1, h, w)


def _rotated(rotation: Tensor, c: Tensor) -> Tensor:
    """Channels of (B, C, H, W) turned by a matrix (C, C)."""
    return c if len(rotation) == 1 else (rotation.to(c) @ c.flatten(2)).view_as(c)
