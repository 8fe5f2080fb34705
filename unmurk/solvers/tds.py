"""The twisted diffusion sampler: particles that go down the reverse diffusion and look ahead to y.

Wu, Trippe, Naesseth, Blei and Cunningham (2023), arXiv 2306.17775, Algorithm 1. Sequential Monte
Carlo: K particles of an image follow the reverse diffusion, pulled toward y, with weights that
undo what the pull has bent. With the reverse step p(x_s | x_t) = N(m, c^2 I) from level t to level
s, a twisting function f_t(x_t) that guesses p(y | x_t), and its gradient,

    resample     the particles by their weights w
    propose      x_s ~ N(m', c^2 I),     m' = m moved by t^2 grad log f_t(x_t)
    weigh        w  <-  w  p(x_s | x_t) f_s(x_s) / (N(x_s; m', c^2 I) f_t(x_t)).

At level 0 the twisting function is p(y | x_0) itself, all others have cancelled, and the weighted
particles stand for p(x_0) p(y | x_0), p(x_0) the law of the reverse diffusion. One of them is
drawn by its weight. For K to infinity this is an exact draw, whatever f was: a poor f only needs
more particles, and the bias falls like 1 / K. What remains is the error of the discrete steps.

Twisting function. With x0 = D(x_t, t) and V = t^2 J, J = dD / dx_t, the covariance of x given x_t
by Tweedie's formula, take p(x | x_t) = N(x0, V), as in `mmps`. For a linear A

    log f      = -m^T S^-1 m / 2,         m = y - A x0,  S = sigma_y^2 I + A V A^T
    grad log f = J^T A^T S^-1 m,          V taken for constant

so that t^2 grad log f moves D to the D_y of `mmps`, whose samples tds weighs. For a Gaussian prior
f is p(y | x_t) but for a constant, and the weights only make up for the finite steps: few
particles will do. For others it is a guess. So it is where S is solved roughly: cut short after a
few conjugate gradients it is still one function of x_t, which is all that the weights need.
log det S is left out, and the derivative of V: both need more than products with J.

Where A is not linear, V is replaced by r^2 I, with v the prior's variance of a pixel:

    log f = min_x -||y - A(x)||^2 / (2 sigma_y^2) - ||x - x0||^2 / (2 r^2)     at x = p, say
    grad log f = J^T (p - x0) / r^2,      r^2 = v t^2 / (v + t^2).

If A were linear this f would be N(y; A x0, sigma_y^2 I + r^2 A A^T), the guess of `pigdm`, with p
the prox of x0. It knows nothing of how the prior's pixels hang together and needs more particles.

Steps are of second order (`reverse`): m and m' extrapolate from the step before, whose denoised
images a particle carries along. The path stays a chain of Gaussian steps, so the weights hold.

Particles go through the network in calls of bounded size, those of one image together: memory is
that of 2^18 numbers of images, or of K images if they are larger, with the network's gradient.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.samplers import Reverse
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, prox, randn
from .mmps import correction, moments
from .start import begin

__all__ = ["Tds", "moment_twist", "resample", "twist"]

NUMBERS = 2**18  # of images in one call of the network: 64 of 64 x 64 pixels


@dataclass(frozen=True)
class Tds:
    """The twisted diffusion sampler. Every sample has particles, and a filter, of its own.

    A step costs a sample `particles` evaluations of the network and, with a linear operator, up to
    `iterations` + 1 back-propagations of each; else one. How many particles are enough hangs on
    y: weights degenerate with the number of pixels that it tells of, and the lower its noise. With
    low noise and a hole the mean of 10 is off by 0.05 to 0.08 posterior standard deviations even
    on 8 x 8 pixels, so that no posterior is claimed.

    Raises:
        InputError: An option is out of its range, or the prior cannot be differentiated.
    """

    name: ClassVar[str] = "tds"
    claims: ClassVar[Claim] = "heuristic"  # until particles and steps are enough for y
    requires: ClassVar[Requirement] = "differentiable"

    particles: int = 10
    """K. More bring the samples closer to the posterior: 32 where the operator is not linear."""
    steps: int = 40
    """Noise levels: `particles` x `steps` network evaluations in all. Particles that differ in
    weight from level to level, as many pixels of low noise make them, want more of these first."""
    iterations: int = 5
    """Most steps of conjugate gradients for a guess, with a linear operator."""
    tolerance: float = 1e-3
    """Residual, relative to y - A x0, at which a guess takes no more of them."""
    pixel_std: float = 0.5
    """sqrt(v), the standard deviation of a pixel under the prior, where the operator is not
    linear. Too high is safe and costs few particles; too low trusts D too much, and no affordable
    number of them makes up for it."""
    threshold: float = 0.5
    """Share of K below which the effective number of particles calls for resampling."""
    data_steps: int = 10
    """Steps of the inner data fit where the operator is not linear."""
    sigma_max: float = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.002
    """Last noise level; well below that of y, or the spread comes out wrong: with noise 0.005 take
    0.0005 and 60 steps."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used. Such a start is
    not the prior's, and no number of particles makes up for it."""

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise InputError(f"particles is {self.particles}: at least 1 is needed")
        if self.iterations < 1:
            raise InputError(f"iterations is {self.iterations}: at least 1 is needed")
        if self.pixel_std <= 0 or self.noise_floor <= 0:
            raise InputError(
                f"pixel_std is {self.pixel_std}, noise_floor {self.noise_floor}: both must be > 0"
            )

    @torch.no_grad()
    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: CountingDenoiser,
        x: Tensor | None,
        noise: PerImageGenerator,
        callback: StepCallback,
    ) -> Tensor:
        """See `Solver.run`. Rows of all tensors here are (image, particle) pairs."""
        crowd = _Crowd(noise, self.particles)
        everyone = [row for row in range(len(y)) for _ in range(self.particles)]
        repeated, goal = problem.index_select(everyone), y[everyone]
        span, start = (self.sigma_max, self.sigma_min), None if x is None else x[everyone]
        levels, x = begin(goal, repeated, denoise, start, crowd, self.steps, span, self.init_sigma)
        plain, bent = Reverse(crowd), Reverse(crowd)
        guess, likelihood_grad, x0 = self._look(repeated, denoise, x, goal, levels[0], len(y))
        weight = guess.reshape(len(y), -1)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            rows, weight = resample(weight, noise.rand(1).to(weight), self.threshold)
            x, x0, likelihood_grad, guess = x[rows], x0[rows], likelihood_grad[rows], guess[rows]
            for walk in (plain, bent):
                walk.index_select(rows)
            if s > 0:
                mean, c = plain.bridge(x, x0, t, s)
                moved, _ = bent.bridge(x, x0 + t**2 * likelihood_grad, t, s)
                z, shift = randn(crowd, x), (moved - mean) / c
                x, before = moved + c * z, guess
                guess, likelihood_grad, x0 = self._look(repeated, denoise, x, goal, s, len(y))
                gain = guess - before - (shift * (z + shift / 2)).double().flatten(1).sum(1)
            else:
                x = x0
                gain = self._likelihood(repeated, x, goal) - guess
            weight = weight + gain.reshape(weight.shape)
            chosen = _draw(weight, noise.rand(1).to(weight))
            if callback(step, len(levels), t, x[chosen], x0[chosen]):
                break
        return x[chosen]

    def _look(
        self,
        problem: Problem,
        denoise: CountingDenoiser,
        x: Tensor,
        y: Tensor,
        t: float,
        images: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The twist of all particles, some images at a time: K evaluations for each."""
        together = max(1, NUMBERS // (self.particles * x[0].numel()))
        rows = torch.arange(len(x)).chunk(math.ceil(images / together))
        with denoise.counted_as(self.particles):
            found = [
                self._twist(problem.index_select(own), denoise, x[own], y[own], t) for own in rows
            ]
        guess, likelihood_grad, x0 = map(torch.cat, zip(*found, strict=True))
        return guess, likelihood_grad, x0

    def _twist(
        self, problem: Problem, denoise: CountingDenoiser, x: Tensor, y: Tensor, t: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sigma_eff = max(problem.sigma, self.noise_floor)
        if problem.operator.linear:
            return moment_twist(
                problem, denoise, x, y, t, sigma_eff, self.iterations, self.tolerance
            )
        r = self.pixel_std * t / math.sqrt(self.pixel_std**2 + t**2)
        return twist(problem, denoise, x, y, t, r, sigma_eff, self.data_steps)

    def _likelihood(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) but for its constant, (rows,), float64."""
        square = problem.residual(x, y).double().square().flatten(1).sum(1)
        return -square / (2 * max(problem.sigma, self.noise_floor) ** 2)


class _Crowd(PerImageGenerator):
    """The streams of the images, each drawn from for all its particles at once."""

    def __init__(self, noise: PerImageGenerator, particles: int) -> None:
        self.generators, self.particles = noise.generators, particles

    def randn(self, *shape: int) -> Tensor:
        return super().randn(self.particles, *shape).flatten(0, 1)


def moment_twist(
    problem: Problem,
    denoise: CountingDenoiser,
    x: Tensor,
    y: Tensor,
    t: float,
    sigma_eff: float,
    iterations: int = 5,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """log f(x) (B,) in float64, its gradient and D(x, t), both (B, C, H, W), for a linear A.

    Args:
        x: Noisy images (B, C, H, W) at level t.
        trust: Noise level of y.
        iterations, tolerance: See `mmps.correction`.

    Raises:
        InputError: No gradient comes through the prior.
    """
    x0, spread = moments(denoise, x, t, Tds.name)
    shift, square = correction(problem, x0, spread, y, sigma_eff, iterations, tolerance)
    return -square / 2, shift / t**2, x0


def twist(
    problem: Problem,
    denoise: CountingDenoiser,
    x: Tensor,
    y: Tensor,
    t: float,
    r: float,
    sigma_eff: float,
    data_steps: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for any operator, believing the clean image to be N(D(x, t), r^2 I).

    Args:
        x: Noisy images (B, C, H, W) at level t.
        r: Standard deviation of the clean image around D(x, t).
        trust: Noise level of y.
        data_steps: Steps of the data fit where the operator is not linear.

    Raises:
        InputError: No gradient comes through the prior.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, t)
    if not x0.requires_grad:
        raise InputError("tds needs a prior that autograd can differentiate: use pnp-dm")
    with torch.no_grad():
        away = prox(problem, x0, y, r, sigma_eff, data_steps) - x0
        misfit = problem.residual(x0 + away, y).double().square().flatten(1).sum(1) / sigma_eff**2
        guess = -(misfit + away.double().square().flatten(1).sum(1) / r**2) / 2
    return guess, torch.autograd.grad(x0, x, away / r**2)[0], x0.detach()


def resample(weight: Tensor, u: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Which particles go on, and their weights, image by image.

    Systematic resampling (Douc and Cappe 2005, arXiv cs/0507025, section 2.4): particle k gets
    K w_k descendants, up to less than one more or less.

    Args:
        weight: log weights (B, K), up to a constant of each image.
        u: Uniform on [0, 1), (B, 1).
        threshold: Images whose effective number of particles 1 / sum w^2 is at least this share
            of K keep them all, and their weights.

    Returns:
        Rows (B K,) of the flat list of particles, and log weights (B, K).
    """
    share = weight.softmax(1)
    images, particles = share.shape
    edges = share.cumsum(1)[:, :-1].contiguous()  # the last edge is 1, whatever rounding says
    places = torch.arange(particles, device=weight.device)
    heirs = torch.searchsorted(edges, (u + places) / particles, right=True)
    poor = 1 / share.square().sum(1, keepdim=True) < threshold * particles
    kept = torch.where(poor, heirs, places)
    first = particles * torch.arange(images, device=weight.device)[:, None]
    return (first + kept).flatten(), torch.where(poor, 0.0, weight)


def _draw(weight: Tensor, u: Tensor) -> Tensor:
    """The row of one particle of each image (B,), by its log weight (B, K); u as above."""
    edges = weight.softmax(1).cumsum(1)[:, :-1].contiguous()
    chosen = torch.searchsorted(edges, u, right=True)[:, 0]
    return weight.shape[1] * torch.arange(len(weight), device=weight.device) + chosen
