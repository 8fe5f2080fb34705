r"""TDS: the twisted diffusion sampler, sequential Monte Carlo on the reverse diffusion.

Wu, Trippe, Naesseth, Blei and Cunningham (2023), arXiv 2306.17775, Algorithm 1. K particles of an
image follow the reverse diffusion guided by y, with weights that correct for the guidance. With
the reverse step :math:`p(x_s \mid x_t) = \mathcal{N}(m, c^2 I)` from level t to level s, a
twisting function :math:`f_t(x_t)` that estimates :math:`p(y \mid x_t)`, and its gradient,

.. math::
    \text{resample}\quad & \text{the particles by their weights } w \\
    \text{propose}\quad & x_s \sim \mathcal{N}(m', c^2 I),\qquad
        m' = m \text{ with } D + t^2\,\nabla\log f_t(x_t) \text{ in place of } D \\
    \text{weight}\quad & w \leftarrow w\,
        \frac{p(x_s \mid x_t)\,f_s(x_s)}{\mathcal{N}(x_s; m', c^2 I)\,f_t(x_t)}.

At level 0 the twisting function is :math:`p(y \mid x_0)` itself, all others have canceled, and the
weighted particles represent :math:`p(x_0)\,p(y \mid x_0)`, with :math:`p(x_0)` the law of the
reverse diffusion. One of them is drawn by its weight. For K to infinity this is an exact draw for
any f: a poor f only needs more particles, and the bias falls like 1 / K. The error of the discrete
steps remains.

Twisting function. With :math:`x_0 = D(x_t, t)` and :math:`V = t^2 J`, :math:`J = \partial
D/\partial x_t`, the covariance of x given :math:`x_t` by Tweedie's formula, take :math:`p(x \mid
x_t) = \mathcal{N}(x_0, V)`, as in `mmps`. For a linear A

.. math::
    \log f &= -\tfrac12\,\delta^\top \Sigma^{-1} \delta,\qquad \delta = y - A x_0,\quad
        \Sigma = \sigma_y^2 I + A V A^\top \\
    \nabla\log f &= J^\top A^\top \Sigma^{-1} \delta \qquad\text{(V held constant)},

so that :math:`t^2\,\nabla\log f` moves D to the :math:`D_y` of `mmps`, whose samples tds weights.
For a Gaussian prior f is :math:`p(y \mid x_t)` up to a constant, and the weights only correct for
the finite steps: few particles suffice. For other priors it is an approximation. So it is where
the system of :math:`\Sigma` is solved roughly: after a few conjugate gradients it is still one
function of :math:`x_t`, which is all that the weights need. :math:`\log\det \Sigma` is left out,
and the derivative of V: both need more than products with J.

For a nonlinear A, V is replaced by :math:`r^2 I`, with v the prior's variance of a pixel:

.. math::
    \log f &= -\min_x \biggl[\frac{\lVert y - A(x)\rVert^2}{2\sigma_y^2}
              + \frac{\lVert x - x_0\rVert^2}{2 r^2}\biggr],\quad\text{attained at } \hat x \\
    \nabla\log f &= J^\top (\hat x - x_0)/r^2,\qquad r^2 = v t^2/(v + t^2).

If A were linear this f would be :math:`\mathcal{N}(y; A x_0, \sigma_y^2 I + r^2 A A^\top)` up to a
constant, the approximation of `pigdm`, with :math:`\hat x` the proximal map at :math:`x_0`. It
ignores the correlation of the
prior's pixels and needs more particles.

Steps are of second order (`diffusion.samplers`): m and m' extrapolate from the step before, whose
denoised images a particle carries along. The path stays a chain of Gaussian steps, so the weights
are right.

Particles pass through the network in calls of bounded size, those of one image together: memory is
that of 2^18 numbers of images, or of K images if they are larger, with the network's gradient.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..bounds import Real
from ..diffusion.samplers import Reverse
from ..operators.linalg import squared_norm
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import (
    Count,
    NoisySolver,
    PositiveWeight,
    ProximalSolver,
    ReverseSolver,
    Steps,
    Tolerance,
)
from .data_term import prox
from .moments import correction, tweedie_moments
from .state import CountingDenoiser, State, denoise_with_grad, gray, randn

__all__ = ["Tds", "moment_twist", "resample", "twist"]

NUMBERS = 2**18  # of images in one call of the network: 64 of 64 x 64 pixels


@dataclass(frozen=True, kw_only=True)
class Tds(NoisySolver, ProximalSolver, ReverseSolver):
    """The twisted diffusion sampler. Every sample has particles, and a filter, of its own.

    A step takes, for a sample, `particles` evaluations of the network and, with a linear operator,
    up to `iterations` + 1 back-propagations of each; else one. How many particles are enough
    depends on y: weights degenerate with the number of pixels that it measures, and the more so
    the lower its noise. With low noise and a hole the mean of 10 is off by 0.05 to 0.08 posterior
    standard deviations even on 8 x 8 pixels, so that no posterior is claimed. With noise 0.005
    take sigma_min=0.0005 and 60 steps, or the spread becomes wrong. A start at `init` does not
    follow the prior, and no number of particles compensates for it.

    Raises:
        InputError: An option is out of its bounds, or the prior cannot be differentiated.

    >>> Tds(particles=32).steps
    40
    """

    name: ClassVar[str] = "tds"
    citation: ClassVar[str] = """@inproceedings{wu2023tds,
  title = {Practical and Asymptotically Exact Conditional Sampling in Diffusion Models},
  author = {Wu, Luhuan and Trippe, Brian L. and Naesseth, Christian A. and Blei, David M. and
            Cunningham, John P.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2306.17775},
  archiveprefix = {arXiv}
}"""

    particles: Count = 10
    """K. More bring the samples closer to the posterior: 32 where the operator is not linear."""
    steps: Steps = 40
    """Noise levels: `particles` x `steps` network evaluations in all. If the weights vary strongly
    between levels, as with many pixels of low noise, increase `steps` before `particles`."""
    iterations: Count = 5
    """Most iterations of conjugate gradients for a twist, with a linear operator."""
    tolerance: Tolerance = 1e-3
    """Residual, relative to y - A x0, at which a twist takes no more of them."""
    pixel_std: PositiveWeight = 0.5
    """sqrt(v), the standard deviation of a pixel under the prior, where the operator is not
    linear. Too high is safe and costs few particles; too low trusts D too much, and no affordable
    number of particles compensates for it."""
    threshold: Annotated[float, Real(0, 2)] = 0.5
    """Fraction of K below which the effective number of particles triggers resampling."""

    def start(self, state: State, init: Tensor | None) -> None:
        """Start all particles; tensors in the memory are of (image, particle) pairs."""
        memory, images = state.memory, len(state.y)
        pairs = [image for image in range(images) for _ in range(self.particles)]
        memory.problem, memory.y = state.problem.index_select(pairs), state.y[pairs]
        memory.generator = _ParticleGenerator(state.generator, self.particles)
        state.levels = self.noise_levels(state, init is not None)
        middle = gray(memory.y, memory.problem) if init is None else init[pairs]
        memory.x = middle + state.levels[0] * randn(memory.generator, middle)
        memory.plain, memory.guided = Reverse(memory.generator), Reverse(memory.generator)
        memory.twist, memory.gradient, memory.x0 = self._twists(state, memory.x, state.levels[0])
        memory.weight = memory.twist.reshape(images, -1)

    def step(self, state: State) -> None:
        """See the equations of this module."""
        memory, t, s = state.memory, state.sigma, state.sigma_next
        # resample
        chosen, weight = resample(memory.weight, self._uniform(state), self.threshold)
        x, x0, gradient, before = (
            values[chosen] for values in (memory.x, memory.x0, memory.gradient, memory.twist)
        )
        for path in (memory.plain, memory.guided):
            path.index_select(chosen)
        if s > 0:
            # propose: m, c and m'
            mean, c = memory.plain.bridge(x, x0, t, s)
            moved, _ = memory.guided.bridge(x, x0 + t**2 * gradient, t, s)
            z, shift = randn(memory.generator, x), (moved - mean) / c
            x = moved + c * z
            # weight: log f_s - log f_t + log N(x_s; m) - log N(x_s; m')
            memory.twist, memory.gradient, x0 = self._twists(state, x, s)
            gain = memory.twist - before - (shift * (z + shift / 2)).double().flatten(1).sum(1)
        else:
            x, memory.twist, memory.gradient = x0, before, gradient
            gain = self._log_likelihood(state, x) - before
        memory.weight = weight + gain.reshape(weight.shape)
        memory.x, memory.x0 = x, x0
        drawn = _draw(memory.weight, self._uniform(state))
        state.x = state.x_t = x[drawn]
        state.denoised = x0[drawn]

    def _uniform(self, state: State) -> Tensor:
        """Draw one uniform number for each image, (B, 1)."""
        return state.generator.rand(1).to(state.memory.weight)

    def _twists(self, state: State, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the twist of all particles, a few images at a time: K evaluations for each."""
        memory, images = state.memory, len(state.y)
        together = max(1, NUMBERS // (self.particles * x[0].numel()))
        parts = torch.arange(len(x)).chunk(math.ceil(images / together))
        with state.denoise.counted_as(self.particles):
            found = [
                self._twist(
                    *(memory.problem.index_select(part), state.denoise, x[part]),
                    *(memory.y[part], t, state.sigma_eff),
                )
                for part in parts
            ]
        log_f, gradient, x0 = map(torch.cat, zip(*found, strict=True))
        return log_f, gradient, x0

    def _twist(
        self,
        problem: Problem,
        denoise: CountingDenoiser,
        x: Tensor,
        y: Tensor,
        t: float,
        sigma_eff: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if problem.operator.linear:
            return moment_twist(
                problem, denoise, x, y, t, sigma_eff, self.iterations, self.tolerance
            )
        r = self.pixel_std * t / math.sqrt(self.pixel_std**2 + t**2)
        return twist(problem, denoise, x, y, t, r, sigma_eff, self.data_steps)

    def _log_likelihood(self, state: State, x: Tensor) -> Tensor:
        """Compute log p(y | x) up to its constant, (B K,), float64."""
        residual = state.memory.problem.residual(x, state.memory.y)
        return -squared_norm(residual.double()) / (2 * state.sigma_eff**2)


class _ParticleGenerator(PerImageGenerator):
    """The random streams of the images, each drawn from for all its particles at once."""

    def __init__(self, given: PerImageGenerator, particles: int) -> None:
        self.generators, self.particles = given.generators, particles

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
    """Compute the twist of a linear operator, with Tweedie's covariance.

    Args:
        problem: A linear operator, bound to the images.
        denoise: The prior's denoiser.
        x: Noisy images (B, C, H, W) at level t.
        y: Measurements (B, ...).
        t: Noise level of x.
        sigma_eff: Standard deviation that the noise of y is taken to have.
        iterations: Most iterations of conjugate gradients; see `moments.correction`.
        tolerance: Relative residual at which an image takes no more of them.

    Returns:
        log f(x) (B,) in float64, its gradient and D(x, t), both (B, C, H, W).

    Raises:
        InputError: No gradient passes through the prior.

    >>> denoise = CountingDenoiser(lambda x, sigma: x / (1 + sigma**2))  # D = V = 0.5 at x = t = 1
    >>> x = y = torch.ones(1, 1, 1, 1)
    >>> log_f, gradient, x0 = moment_twist(Problem("identity", 0.1), denoise, x, y, 1.0, 0.5**0.5)
    >>> round(log_f.item(), 4), round(gradient.item(), 4)  # delta = 0.5, Sigma = 1
    (-0.125, 0.25)
    """
    x0, covariance = tweedie_moments(denoise, x, t, Tds.name)
    shift, square = correction(problem, x0, covariance, y, sigma_eff, iterations, tolerance)
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
    """Compute the twist of any operator, with N(D(x, t), r^2 I) for the clean image.

    Args:
        problem: An operator, bound to the images.
        denoise: The prior's denoiser.
        x: Noisy images (B, C, H, W) at level t.
        y: Measurements (B, ...).
        t: Noise level of x.
        r: Standard deviation of the clean image around D(x, t).
        sigma_eff: Standard deviation that the noise of y is taken to have.
        data_steps: Steps of the data fit where the operator is not linear.

    Returns:
        log f(x) (B,) in float64, its gradient and D(x, t), both (B, C, H, W).

    Raises:
        InputError: No gradient passes through the prior.

    >>> denoise = CountingDenoiser(lambda x, sigma: x / (1 + sigma**2))
    >>> x, y, s = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0.5**0.5
    >>> log_f, gradient, x0 = twist(Problem("identity", 0.1), denoise, x, y, 1.0, r=s, sigma_eff=s)
    >>> round(log_f.item(), 4), round(gradient.item(), 4)  # as `moment_twist` where V = r^2
    (-0.125, 0.25)
    """
    x, x0 = denoise_with_grad(denoise, x, t, Tds.name)
    with torch.no_grad():
        away = prox(problem, x0, y, r, sigma_eff, data_steps) - x0
        misfit = squared_norm(problem.residual(x0 + away, y).double()) / sigma_eff**2
        log_f = -(misfit + squared_norm(away.double()) / r**2) / 2
    return log_f, torch.autograd.grad(x0, x, away / r**2)[0], x0.detach()


def resample(weight: Tensor, u: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    r"""Resample the particles of each image systematically.

    Systematic resampling (Douc and Cappe 2005, arXiv cs/0507025, section 2.4): particle k gets
    :math:`K w_k` descendants, up to less than one more or less.

    Args:
        weight: Log weights (B, K), up to a constant of each image.
        u: Uniform numbers on [0, 1), (B, 1).
        threshold: Images whose effective number of particles :math:`1/\sum w^2` is at least this
            fraction of K keep them all, and their weights.

    Returns:
        Indices (B K,) into the flat list of particles, and log weights (B, K).

    >>> indices, weight = resample(torch.tensor([[0.0, -50.0, -50.0]]), torch.tensor([[0.5]]))
    >>> indices.tolist(), weight.tolist()
    ([0, 0, 0], [[0.0, 0.0, 0.0]])
    """
    share = weight.softmax(1)
    images, particles = share.shape
    edges = share.cumsum(1)[:, :-1].contiguous()  # the last edge is 1, whatever rounding gives
    places = torch.arange(particles, device=weight.device)
    heirs = torch.searchsorted(edges, (u + places) / particles, right=True)
    poor = 1 / share.square().sum(1, keepdim=True) < threshold * particles
    chosen = torch.where(poor, heirs, places)
    first = particles * torch.arange(images, device=weight.device)[:, None]
    return (first + chosen).flatten(), torch.where(poor, 0.0, weight)


def _draw(weight: Tensor, u: Tensor) -> Tensor:
    """Draw the index of one particle of each image (B,) by log weights (B, K); u as above."""
    edges = weight.softmax(1).cumsum(1)[:, :-1].contiguous()
    chosen = torch.searchsorted(edges, u, right=True)[:, 0]
    return weight.shape[1] * torch.arange(len(weight), device=weight.device) + chosen
