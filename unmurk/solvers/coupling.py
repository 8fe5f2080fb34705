"""The Gaussian coupling of an image x and its noisy copy z, given the measurement y of z.

    z = x + rho n,    y = A z + e,    e ~ N(0, R),    R = sigma^2 I - tau^2 A A^T,

with sigma the noise of y and tau = min(rho, EDGE sigma / ||A||), so that R stays positive. Up to
rho = tau the noise of z is part of the noise of y, y = A x + N(0, sigma^2 I), and whatever samples
(x, z) given y samples the exact posterior of x (the auxiliary variable of Marnissi, Chouzenoux,
Benazza-Benyahia and Pesquet 2018, Entropy 20(2)). Above it y is believed less,
A x + N(0, sigma^2 I + (rho^2 - tau^2) A A^T), which is what annealing wants. (From
rho ||A|| = CONTRAST sigma on, sigma grows with rho: what is far below the noise of z need not be
resolved, and no system is worse conditioned than CONTRAST^2, which single precision and a hundred
conjugate gradients can solve.)

The conditional law of z is

    z | x, y ~ N(x + h A^T (y - A x), rho^2 (I - h A^T A)),
    h = rho^2 (sigma^2 I + (rho^2 - tau^2) A^T A)^-1.

All eigenvalues of I - h A^T A lie in (0, 1], so that no step of this kind makes an image grow.

Where A has a decomposition A = U diag(s) V^T at hand (`Operator.decomposed`), both moments are
exact on the coordinates V^T x. Elsewhere the draw is made in two exact steps through u,

    u | x, y ~ N(., ((rho^2 - tau^2)^-1 I + A^T A / sigma^2)^-1)     perturb and optimise: the prox
                                                     of x + (rho^2 - tau^2)^1/2 n and y + sigma n'
    z | u, y ~ N(u + g A^T (y - A u), tau^2 (I - g A^T A)),          g = tau^2 / sigma^2,

and the square root of I - g A^T A, whose eigenvalues lie in [1 - EDGE^2, 1], is a polynomial.
With q = EDGE^2 the function (1 - q (1 + v) / 2)^1/2 is analytic in v up to b = 2 / q - 1: inside
the Bernstein ellipse of parameter p = b + (b^2 - 1)^1/2, where it is below (2 - q)^1/2. So its
interpolant of degree N at Chebyshev points is off by at most

    4 (2 - q)^1/2 p^-N / (p - 1)

on [-1, 1] (Trefethen 2013, "Approximation Theory and Approximation Practice", theorem 8.2), and
still converges where ||A||^2 was found up to 1 / q - 1 too small.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.base import per_image
from ..operators.weighted import Weighted
from ..problem import Problem
from ..rng import PerImageGenerator, generator
from .base import randn
from .start import grey

__all__ = ["EDGE", "Coupling", "polynomial", "root_degree", "shared_norm"]

EDGE = 0.95  # largest part of the noise of y that z may carry, as a standard deviation
CONTRAST = 30.0  # noise of z over that of y beyond which the latter is believed to be larger
ACCURACY = 1e-6  # of the square root
POWER_ITERATIONS = 60
TINY, NOTHING = 1e-6, 1e-3  # least norm to divide by; norm below which A is taken for 0


class Coupling:
    """The law of z given x and y, for the images and measurements of one run.

    Args:
        problem: A linear operator, bound to the rows of y.
        y: Measurements (B, ...).
        sigma: Standard deviation that the noise of y is believed to have, > 0.
        probe: Noise (B, C, H, W), from which ||A|| is found where it is not known.
    """

    def __init__(self, problem: Problem, y: Tensor, sigma: float, probe: Tensor) -> None:
        self.problem, self.sigma = problem, sigma
        self.y = problem.operator.apply_mask(y)
        self.spectrum = problem.operator.decomposed(probe)
        if self.spectrum is None:
            self.norm = problem.operator.norm(probe, POWER_ITERATIONS)
        else:
            s = self.spectrum.s
            full = s.ndim < self.spectrum.into(probe[:1]).ndim  # one for all images
            largest = s.amax() if full else s.flatten(1).amax(1)
            self.norm = largest.clamp_min(TINY).expand(len(probe))
            self.measured = self.spectrum.measured(self.y)

    def mean(self, x: Tensor, rho: float) -> Tensor:
        """x + h A^T (y - A x), (B, C, H, W)."""
        if self.spectrum is not None:
            s = self.spectrum.s
            gain = self._h(rho, s) * s
            return x + self.spectrum.out(gain * (self.measured - s * self.spectrum.into(x)))
        tau, sigma = self._tau(rho), self._sigma(rho)
        u = self._prox(x, self.y, rho, tau)
        g = per_image((tau / sigma).square(), u)
        return u + g * self.problem.A_adjoint(self.problem.residual(u, self.y))

    def noise(self, streams: PerImageGenerator, like: Tensor, rho: float) -> Tensor:
        """A draw of N(0, rho^2 (I - h A^T A)), (B, C, H, W)."""
        n = randn(streams, like)
        if self.spectrum is not None:
            s = self.spectrum.s
            root = (1 - self._h(rho, s) * s.square()).clamp_min(0).sqrt()
            return rho * self.spectrum.out(root * self.spectrum.into(n))
        tau = self._tau(rho)
        g = (tau / self._sigma(rho)).square()
        last = per_image(tau, like) * self._root(n, g)
        if not bool((tau < rho).any()):
            return last
        wide = per_image((rho**2 - tau.square()).clamp_min(0).sqrt(), like)
        off = per_image(self._sigma(rho), self.y) * randn(streams, self.y)
        u = self._prox(
            wide * randn(streams, like), self.problem.operator.apply_mask(off), rho, tau
        )
        return u - per_image(g, u) * self.problem.operator.normal(u) + last

    def draw(self, x: Tensor, rho: float, streams: PerImageGenerator) -> Tensor:
        """A draw of z given x and y, (B, C, H, W)."""
        return self.mean(x, rho) + self.noise(streams, x, rho)

    def _sigma(self, rho: float) -> Tensor:
        """The noise that y is believed to have, (B,)."""
        return (rho / CONTRAST * self.norm).clamp_min(self.sigma)

    def _tau(self, rho: float) -> Tensor:
        """(B,)."""
        return (EDGE * self._sigma(rho) / self.norm).clamp_max(rho)

    def _h(self, rho: float, s: Tensor) -> Tensor:
        """h at the singular values s."""
        shape = (-1, *[1] * (self.measured.ndim - 1))
        spare = (rho**2 - self._tau(rho).square()).clamp_min(0).to(s).reshape(shape)
        noise = self._sigma(rho).square().to(s).reshape(shape)
        return rho**2 / (noise + spare * s.square())

    def _prox(self, x: Tensor, y: Tensor, rho: float, tau: Tensor) -> Tensor:
        """The mean of u given x and y."""
        gamma = (rho**2 - tau.square()).clamp_min(0) / self._sigma(rho).square()
        return self.problem.operator.prox_l2(x, y, gamma)

    def _root(self, n: Tensor, g: Tensor) -> Tensor:
        """(I - g A^T A)^1/2 n."""

        def root(s: Tensor) -> Tensor:
            return (1 - g.double() * s).clamp_min(0).sqrt()

        degree = root_degree(EDGE**2)
        return polynomial(self.problem.operator.normal, n, root, self.norm, degree)


def root_degree(q: float, accuracy: float = ACCURACY) -> int:
    """The degree at which the polynomial for (1 - q s)^1/2 on [0, 1], q < 1, is that accurate."""
    edge = 2 / q - 1
    p = edge + math.sqrt(edge**2 - 1)
    return math.ceil(math.log(4 * math.sqrt(2 - q) / ((p - 1) * accuracy)) / math.log(p))


def polynomial(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    f: Callable[[Tensor], Tensor],
    operator_norm: Tensor,
    degree: int,
) -> Tensor:
    """f(A^T A) b, (B, C, H, W), by a polynomial in A^T A.

    The polynomial meets f at the points (1 + cos(pi i / degree)) / 2 top^2, ends included, and is
    summed by the recurrence T_{k+1} = 2 M T_k - T_{k-1}, M = 2 A^T A / top^2 - I.

    Args:
        normal: The map A^T A.
        b: Images (B, C, H, W).
        f: A function of the squared singular values (points, B) of A, element by element.
        top: Largest singular value of A, shape (B,).
        degree: Degree, >= 1.
    """
    grid = torch.arange(degree + 1, dtype=torch.float64, device=b.device)
    chebyshev = torch.cos(math.pi / degree * grid[:, None] * grid)  # T_k at point i, [i, k]
    points = (1 + chebyshev[:, 1:2]) / 2 * operator_norm.double().square()
    weights = torch.linalg.solve(chebyshev, f(points))  # [k, image]

    def scaled(v: Tensor) -> Tensor:
        return per_image(2 / operator_norm.square(), v) * normal(v) - v

    before, now = b, scaled(b)
    total = per_image(weights[0], b) * before + per_image(weights[1], b) * now
    for weight in weights[2:]:
        before, now = now, 2 * scaled(now) - before
        total = total + per_image(weight, b) * now
    return total


def shared_norm(problem: Problem, y: Tensor) -> float:
    """||A||, one number for all images, since they share their noise levels.

    Image 0 speaks for all where the operator differs from image to image: levels must not depend
    on what else is in a batch. Of weighted measurements it is the norm without weights; of an
    operator that sees nothing it is 1.
    """
    operator = problem.operator
    while isinstance(operator, Weighted):
        operator = operator.operator
    like = grey(y[:1], problem)
    first = operator.bind([0], like.shape[1:])
    probe = torch.randn(like.shape[1:], generator=generator(0)).to(like)[None]
    norm = float(Coupling(Problem(first, 0.0), first.A(probe), 1.0, probe).norm)
    return norm if norm > NOTHING else 1.0
