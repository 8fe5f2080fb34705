r"""Perturbed RED-diff: samples with the spread of the posterior.

Samples with the spread of the posterior take no more network evaluations than the point estimate
of `red_diff`, whose levels, pairs and steps these are (Mardani, Song, Kautz and Vahdat 2023, arXiv
2305.04391). For Gaussians a posterior can be sampled by optimizing (the randomize-then-optimize of
Bardsley, Solonen, Haario and Laine, 2014; Papandreou and Yuille, 2010): with the data at
:math:`y + \sigma_y n'` and a random force of covariance H, the prior's precision, added to the
gradient of :math:`-\log p`, the minimizer is an exact draw. A denoiser gives neither H nor its
root, but the pairs :math:`\mu + \sigma e`, :math:`\mu - \sigma e` of RED-diff contain them. For a
prior :math:`\mathcal{N}(m, S)` their odd half is

.. math::
    \delta = \sigma e - \tfrac12 \bigl(D(\mu + \sigma e, \sigma) - D(\mu - \sigma e, \sigma)\bigr)
      = \sigma^2 (S + \sigma^2 I)^{-1} \sigma e,

and since :math:`2\int_\sigma^\infty t\,(S + t^2 I)^{-2}\,dt = (S + \sigma^2 I)^{-1}`, the sum over
the levels passed so far,

.. math::
    f = \sum_{k \le K} \sqrt{2\log(\sigma_{k-1}/\sigma_k)}\; \delta_k/\sigma_k^2,
        \qquad \operatorname{Cov} f \approx (S + \sigma_K^2 I)^{-1},

is at every level a force with the precision of the prior blurred by that level, up to the error of
the sum that stands for the integral. (Above the first level :math:`\sigma_1` the prior has no
effect, and :math:`n/\sigma_1` replaces what is missing of the sum.) So each sample keeps its n'
and its f, and takes the steps of RED-diff,

.. math::
    z   &= h + \sigma^2 f \\
    \mu &\leftarrow \arg\min_x \frac{\lVert y + \sigma_y n' - A x\rVert^2}{2\sigma_y^2}
           + \frac{\lVert x - z\rVert^2}{2\sigma^2},

where h, the even half of the pair, is evaluated at momentum times the last change beyond
:math:`\mu`, which halves its lag behind the falling levels. With any other prior S is local: the
covariance that the denoiser has around :math:`\mu`. The spread is then that of a Gaussian fitted
at each level, from wide to narrow; modes are selected with nearly, not exactly, their weights.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..diffusion.samplers import karras
from .base import Level, Momentum, NoisySolver, ProximalSolver, Steps
from .red_diff import CITATION, look_ahead
from .state import State, gray

__all__ = ["RedDiffSpread"]


@dataclass(frozen=True, kw_only=True)
class RedDiffSpread(NoisySolver, ProximalSolver):
    """Perturbed RED-diff: every sample from its own data and prior.

    A step takes two network evaluations and no gradient. The mean of many samples replaces the
    point estimate of the default. `init` replaces the gray start alone: the levels begin at the
    highest all the same, since the force has to.

    Raises:
        InputError: An option is out of its bounds.

    >>> RedDiffSpread(steps=100).momentum
    0.5
    """

    name: ClassVar[str] = "red-diff"
    citation: ClassVar[str] = CITATION

    steps: Steps = 50
    """Noise levels. Each takes two network evaluations."""
    sigma_max: Level = 5.0
    """First noise level, no higher than the prior's highest; well above the prior's spread."""
    sigma_min: Level = 0.01
    """Last noise level."""
    momentum: Momentum = 0.5
    """Fraction of the last change of mu that is added before a step, 0 to below 1."""

    def schedule(self, state: State, init: bool) -> list[float]:
        """See `Solver.schedule`."""
        return karras(self.steps, self._first(state), self.sigma_min).tolist()

    def _first(self, state: State) -> float:
        return max(min(self.sigma_max, state.denoise.sigma_max), self.sigma_min)

    def start(self, state: State, init: Tensor | None) -> None:
        """Perturb the data, and start at mid-gray or `init`, without noise."""
        memory = state.memory
        state.levels = self.noise_levels(state, init is not None)
        memory.y = state.y + state.sigma_eff * state.randn(state.y)
        mu = gray(state.y, state.problem) if init is None else init
        memory.mu = memory.before = state.x = state.x_t = mu
        memory.last = self._first(state) if self.levels is None else state.levels[0]
        memory.force = state.randn(mu) / memory.last

    def step(self, state: State) -> None:
        """See the equations of this module."""
        memory, s = state.memory, state.sigma
        ahead, e = look_ahead(state, self.momentum)
        plus, minus = state.denoise(ahead + e, s), state.denoise(ahead - e, s)
        h, odd = (plus + minus) / 2, e - (plus - minus) / 2
        width = max(math.log(memory.last / s), 0.0)  # the first level is the last up to rounding
        memory.force = memory.force + math.sqrt(2 * width) * odd / s**2
        memory.mu = self.prox(state, h + s**2 * memory.force, s, memory.y)
        memory.last, state.denoised = s, h
        state.x = state.x_t = memory.mu
