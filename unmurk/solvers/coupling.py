r"""The Gaussian coupling of an image x and its noisy copy z, given the measurement y of z.

.. math::
    z = x + \rho n,\qquad y = A z + e,\qquad e \sim \mathcal{N}(0, R),\qquad
    R = \sigma^2 I - \tau^2 A A^\top,

with :math:`\sigma` the noise of y and :math:`\tau = \min(\rho, \text{EDGE}\,\sigma/\lVert
A\rVert)`, so that R stays positive. Up to :math:`\rho = \tau` the noise of z is part of the noise
of y, :math:`y = A x + \mathcal{N}(0, \sigma^2 I)`, and a sampler of (x, z) given y samples the
exact posterior of x (the auxiliary variable of Marnissi, Chouzenoux, Benazza-Benyahia and Pesquet
2018, Entropy 20(2)). Above it y is trusted less, :math:`A x + \mathcal{N}(0, \sigma^2 I + (\rho^2
- \tau^2) A A^\top)`, as annealing needs. (From :math:`\rho\lVert A\rVert = \text{CONTRAST}\,
\sigma` on, :math:`\sigma` grows with :math:`\rho`: what is far below the noise of z need not be
resolved. No system is then worse conditioned than CONTRAST\ :sup:`2`, which single precision and a
hundred conjugate gradients can solve.)

The conditional law of z is

.. math::
    z \mid x, y &\sim \mathcal{N}\bigl(x + h A^\top (y - A x),\; \rho^2 (I - h A^\top A)\bigr), \\
    h &= \rho^2 \bigl(\sigma^2 I + (\rho^2 - \tau^2) A^\top A\bigr)^{-1}.

All eigenvalues of :math:`I - h A^\top A` lie in (0, 1], so no step of this kind amplifies an
image.

Where A has a decomposition :math:`A = U \operatorname{diag}(s) V^\top` (`Operator.has_cheap_svd`),
both moments are exact on the coordinates :math:`V^\top x`. Elsewhere the draw takes two exact
steps through u,

.. math::
    u \mid x, y &\sim \mathcal{N}\bigl(\cdot,\; ((\rho^2-\tau^2)^{-1} I
        + A^\top A/\sigma^2)^{-1}\bigr) \\
    z \mid u, y &\sim \mathcal{N}\bigl(u + g A^\top (y - A u),\; \tau^2 (I - g A^\top A)\bigr),
        \qquad g = \tau^2/\sigma^2.

The first is drawn by perturbing and optimizing: it is the proximal map at :math:`x +
(\rho^2-\tau^2)^{1/2} n` and :math:`y + \sigma n'`. The second needs the square root of
:math:`I - g A^\top A`, whose eigenvalues lie in [1 - EDGE\ :sup:`2`, 1]; it is a polynomial. With
:math:`q = \text{EDGE}^2` the function :math:`(1 - q (1 + v)/2)^{1/2}` is analytic in v up to
:math:`b = 2/q - 1`, that is inside the Bernstein ellipse of parameter :math:`p = b + (b^2 -
1)^{1/2}`, where it is below :math:`(2 - q)^{1/2}`. So the error of its interpolant of degree N at
Chebyshev points is at most

.. math:: \frac{4\,(2 - q)^{1/2}\, p^{-N}}{p - 1}

on [-1, 1] (Trefethen 2013, "Approximation Theory and Approximation Practice", theorem 8.2), and
the interpolant still converges where the estimate of :math:`\lVert A\rVert^2` is too small by up
to a fraction :math:`1/q - 1`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.samplers import karras
from ..operators.base import per_image
from ..operators.weighted import Weighted
from ..problem import Problem
from ..rng import PerImageGenerator, generator
from .base import Level, NoisySolver, PositiveWeight
from .state import State, gray, randn

__all__ = [
    "DEPTH",
    "EDGE",
    "CoupledSolver",
    "Coupling",
    "polynomial",
    "root_degree",
    "shared_norm",
]

EDGE = 0.95  # largest part of the noise of y that z may carry, as a standard deviation
CONTRAST = 30.0  # largest noise of z over that of y; above it the latter is taken to be larger
ACCURACY = 1e-6  # of the square root
POWER_ITERATIONS = 60
DEPTH = 0.03  # last level of a reverse diffusion from z, in units of its first
TINY, NOTHING = 1e-6, 1e-3  # least norm to divide by; norm below which A is taken for 0


class Coupling:
    """The conditional law of z given x and y, for the images and measurements of one run.

    Args:
        problem: A linear operator, bound to the images of y.
        y: Measurements (B, ...).
        sigma: Standard deviation that the noise of y is taken to have, > 0.
        probe: Noise (B, C, H, W), from which ||A|| is estimated where it is not known.

    >>> problem, y = Problem("identity", 0.1).bind([0], (1, 1, 2)), torch.ones(1, 1, 1, 2)
    >>> coupling = Coupling(problem, y, sigma=0.1, probe=y)
    >>> coupling.mean(torch.zeros_like(y), rho=0.05)  # rho^2 / sigma^2 of the way to y
    tensor([[[[0.2500, 0.2500]]]])
    """

    def __init__(self, problem: Problem, y: Tensor, sigma: float, probe: Tensor) -> None:
        self.problem, self.sigma = problem, sigma
        self.y = problem.operator.apply_mask(y)
        cheap = problem.operator.has_cheap_svd(probe)
        self.spectrum = problem.operator.svd(probe) if cheap else None
        if self.spectrum is None:
            self.norm = problem.operator.norm(probe, POWER_ITERATIONS)
        else:
            s = self.spectrum.s
            full = s.ndim < self.spectrum.into(probe[:1]).ndim  # one for all images
            largest = s.amax() if full else s.flatten(1).amax(1)
            self.norm = largest.clamp_min(TINY).expand(len(probe))
            self.measured = self.spectrum.measured(self.y)

    def mean(self, x: Tensor, rho: float) -> Tensor:
        r"""Compute :math:`x + h A^\top (y - A x)`, (B, C, H, W)."""
        if self.spectrum is not None:
            s = self.spectrum.s
            gain = self._h(rho, s) * s
            return x + self.spectrum.out(gain * (self.measured - s * self.spectrum.into(x)))
        tau, sigma = self._tau(rho), self._sigma(rho)
        u = self._prox(x, self.y, rho, tau)
        g = per_image((tau / sigma).square(), u)
        return u + g * self.problem.A_adjoint(self.problem.residual(u, self.y))

    def noise(self, random: PerImageGenerator, like: Tensor, rho: float) -> Tensor:
        r"""Draw from :math:`\mathcal{N}(0, \rho^2 (I - h A^\top A))`, (B, C, H, W)."""
        n = randn(random, like)
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
        off = per_image(self._sigma(rho), self.y) * randn(random, self.y)
        u = self._prox(wide * randn(random, like), self.problem.operator.apply_mask(off), rho, tau)
        return u - per_image(g, u) * self.problem.operator.normal(u) + last

    def draw(self, x: Tensor, rho: float, random: PerImageGenerator) -> Tensor:
        """Draw z given x and y, (B, C, H, W)."""
        return self.mean(x, rho) + self.noise(random, x, rho)

    def _sigma(self, rho: float) -> Tensor:
        """Return the noise that y is taken to have, (B,)."""
        return (rho / CONTRAST * self.norm).clamp_min(self.sigma)

    def _tau(self, rho: float) -> Tensor:
        r"""Return :math:`\tau`, (B,)."""
        return (EDGE * self._sigma(rho) / self.norm).clamp_max(rho)

    def _h(self, rho: float, s: Tensor) -> Tensor:
        """Return h at the singular values s."""
        shape = (-1, *[1] * (self.measured.ndim - 1))
        spare = (rho**2 - self._tau(rho).square()).clamp_min(0).to(s).reshape(shape)
        noise = self._sigma(rho).square().to(s).reshape(shape)
        return rho**2 / (noise + spare * s.square())

    def _prox(self, x: Tensor, y: Tensor, rho: float, tau: Tensor) -> Tensor:
        """Return the mean of u given x and y."""
        gamma = (rho**2 - tau.square()).clamp_min(0) / self._sigma(rho).square()
        return self.problem.operator.prox_l2(x, y, gamma)

    def _root(self, n: Tensor, g: Tensor) -> Tensor:
        r"""Compute :math:`(I - g A^\top A)^{1/2} n`."""

        def root(s: Tensor) -> Tensor:
            return (1 - g.double() * s).clamp_min(0).sqrt()

        degree = root_degree(EDGE**2)
        return polynomial(self.problem.operator.normal, n, root, self.norm, degree)


def root_degree(q: float, accuracy: float = ACCURACY) -> int:
    r"""Return the degree of the polynomial for :math:`(1 - q s)^{1/2}` on [0, 1], q < 1.

    >>> root_degree(0.5, accuracy=1e-3)
    4
    """
    b = 2 / q - 1
    p = b + math.sqrt(b**2 - 1)
    return math.ceil(math.log(4 * math.sqrt(2 - q) / ((p - 1) * accuracy)) / math.log(p))


def polynomial(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    f: Callable[[Tensor], Tensor],
    operator_norm: Tensor,
    degree: int,
) -> Tensor:
    r"""Compute :math:`f(A^\top A)\,b` by a polynomial in :math:`A^\top A`.

    The polynomial interpolates f at the points :math:`\tfrac12 (1 + \cos(\pi i/N)) \lVert
    A\rVert^2`, :math:`i = 0, \dots, N`, with N the degree. It is summed by the recurrence

    .. math:: T_{k+1} = 2 M T_k - T_{k-1},\qquad M = 2 A^\top A/\lVert A\rVert^2 - I.

    Args:
        normal: The map A^T A.
        b: Images (B, C, H, W).
        f: A function of the squared singular values (points, B) of A, element by element.
        operator_norm: Largest singular value of A, shape (B,).
        degree: Degree, >= 1.

    Returns:
        Images (B, C, H, W).

    >>> s, b = torch.tensor([[[[0.25, 1.0]]]]), torch.ones(1, 1, 1, 2)
    >>> polynomial(lambda v: s * v, b, lambda u: 1 / (1 + u), torch.ones(1), 20)  # 1 / (1 + s)
    tensor([[[[0.8000, 0.5000]]]])
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
    r"""Return :math:`\lVert A\rVert`, one number for all images, which share their noise levels.

    Where the operator differs from image to image it is that of image 0: levels must not depend on
    the other images of a batch. For weighted measurements it is the norm without weights, and for
    an operator that measures nothing it is 1.

    >>> round(shared_norm(Problem("sr:average,factor=2", 0.1), torch.zeros(1, 1, 4, 4)), 3)
    0.5
    """
    operator = problem.operator
    while isinstance(operator, Weighted):
        operator = operator.operator
    like = gray(y[:1], problem)
    first = operator.bind([0], like.shape[1:])
    probe = torch.randn(like.shape[1:], generator=generator(0)).to(like)[None]
    norm = float(Coupling(Problem(first, 0.0), first.A(probe), 1.0, probe).norm)
    return norm if norm > NOTHING else 1.0


@dataclass(frozen=True, kw_only=True)
class CoupledSolver(NoisySolver):
    r"""A solver that anneals a coupled noisy image, and then holds its level.

    The levels fall during two thirds of the steps to :math:`\text{coupling}\;\sigma_y / \lVert
    A\rVert`, where the noise of the image is just part of the noise of y. They stay there during
    the last third. The option `levels` replaces the falling part.

    >>> from unmurk.solvers import PnpDm
    >>> y, problem = torch.full((1, 1, 2, 2), 0.5), Problem("identity", 0.1)
    >>> states = PnpDm(iterations=6).iterate(y, problem, lambda x, sigma: x / (1 + sigma**2))
    >>> [round(state.sigma, 3) for state in states][-3:]  # held at 0.95 sigma_y
    [0.095, 0.095, 0.095]
    """

    coupling: PositiveWeight = EDGE
    """Last level in units of sigma_y / ||A||. Up to 0.95 the samples follow the posterior; more
    mixes faster, and adds noise."""
    init_sigma: Level = 0.3
    """First level where `init` is given: the level it is noised to."""

    def annealing(self) -> tuple[float, int]:
        """Return the highest level, and the number of steps that fall and hold."""
        raise NotImplementedError

    def schedule(self, state: State, init: bool) -> list[float]:
        """Return the falling levels; see `Solver.schedule`."""
        highest, steps = self.annealing()
        edge = self.coupling * state.sigma_eff
        last = edge / shared_norm(state.problem, state.y)
        last = min(last, max(highest, edge), state.denoise.sigma_max)
        first = max(min(self.init_sigma if init else highest, state.denoise.sigma_max), last)
        return karras(steps - steps // 3, first, last).tolist()

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`."""
        super().start(state, init)
        state.levels += state.levels[-1:] * (self.annealing()[1] // 3)
        state.memory.coupling = Coupling(state.problem, state.y, state.sigma_eff, state.x_t)
