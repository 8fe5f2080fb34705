r"""SNIPS: annealed Langevin dynamics on the posterior of the noisy image.

Kawar, Vaksman and Elad (2021), arXiv 2105.14951. The noise of y is taken to be part of the noise
of :math:`x_t = x + t n`: with n and the noise of y coupled such that

.. math::
    y = A x_t + e,\qquad e \sim \mathcal{N}(0, R) \text{ independent of } x_t,\qquad
    R = \sigma_y^2 I - t^2 A A^\top,

:math:`x_t` has the posterior density :math:`p_t(x_t)\,\mathcal{N}(y; A x_t, R)`, whose score is
known exactly,

.. math:: (D(x_t, t) - x_t)/t^2 + A^\top R^{-1} (y - A x_t),

as long as R is positive, :math:`t < \sigma_y/\lVert A\rVert`. There the levels stop falling and
Langevin dynamics continues at that level. Finally the reverse diffusion :math:`p(x \mid x_t)`,
which does not depend on y, removes the rest of the noise. Above that level t in R stays at it, see
`coupling`.

The paper takes overdamped steps, with one length for each singular direction of A. Two things
differ here. Steps are preconditioned by :math:`P = (I/t^2 + A^\top R^{-1} A)^{-1} = t^2 (I - h
A^\top A)`, so that no stiff direction is left and P times the score is :math:`F(x_t) = D + h
A^\top (y - A D) - x_t`. And :math:`x_t` has a velocity v (underdamped, or kinetic, Langevin
dynamics),

.. math:: dx = v\,d\tau,\qquad dv = F(x)\,d\tau - g v\,d\tau + (2 g P)^{1/2}\,dW_\tau,

with the stationary law :math:`v \sim \mathcal{N}(0, P)`, because in a direction that y does not
measure, of prior variance u, the force is only :math:`t^2/(u + t^2)` times the distance:
overdamped dynamics needs about :math:`u/t^2` steps to cross it, these the square root of that
number. All of them forget at the rate g / 2, as long as it is not above
:math:`t/u^{1/2}`, so the friction g depends on the number of steps. One step is the splitting
BAOAB of Leimkuhler and Matthews (2013), "Rational construction of stochastic numerical methods for
molecular sampling", with one evaluation of D and step length :math:`\ell`,

.. math::
    v &\leftarrow v + \ell\,F(x),\qquad x \leftarrow x + \tfrac\ell2 v, \\
    v &\leftarrow k\,v + \sqrt{1-k^2}\;P^{1/2} n,\qquad x \leftarrow x + \tfrac\ell2 v,
      \qquad k = e^{-g\ell}.

When the level falls from t' to t, v is multiplied by t / t', which keeps its law where y measures
nothing. For Gaussian laws :math:`x_t` has the exact variance at any stable length (below 2).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..bounds import Real
from ..diffusion.samplers import diffuse, karras
from .base import Claim, Count, Level, PositiveWeight, Requirement, Steps
from .coupling import DEPTH, CoupledSolver
from .state import State

__all__ = ["Snips"]


@dataclass(frozen=True, kw_only=True)
class Snips(CoupledSolver):
    """Annealed Langevin dynamics with coupled noise. No gradient passes through the network.

    Raises:
        InputError: An option is out of its bounds.

    >>> Snips(steps=600).final
    10
    """

    name: ClassVar[str] = "snips"
    claims: ClassVar[Claim] = "posterior"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{kawar2021snips,
  title = {{SNIPS}: Solving Noisy Inverse Problems Stochastically},
  author = {Kawar, Bahjat and Vaksman, Gregory and Elad, Michael},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021},
  eprint = {2105.14951},
  archiveprefix = {arXiv}
}"""

    steps: Steps = 300
    """Langevin steps, one evaluation each: t falls during two thirds of them, and then stays."""
    length: Annotated[float, Real(1e-6, 1.999)] = 0.8
    """Length of a step; from 2 on it is unstable."""
    friction: PositiveWeight = 8.0
    """g, times the length of all steps at the last level: a lower one moves further, a higher one
    forgets the velocity sooner."""
    final: Count = 10
    """Levels of the reverse diffusion at the end."""
    sigma_max: Level = 1.0
    """First t, no higher than the prior's highest level."""

    def annealing(self) -> tuple[float, int]:
        """See `CoupledSolver.annealing`."""
        return self.sigma_max, self.steps

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`; the reverse diffusion follows as one more step."""
        super().start(state, init)
        memory, t = state.memory, state.levels[0]
        memory.before = t
        memory.velocity = memory.coupling.noise(state.generator, state.x_t, t)
        state.levels.append(DEPTH * state.levels[-1])

    def step(self, state: State) -> None:
        """See the equations of this module."""
        if state.step == state.steps:
            return self._diffuse(state)
        memory, t = state.memory, state.sigma
        x0 = state.x = state.denoised = state.denoise(state.x_t, t)
        keep = math.exp(-self.friction / max(self.steps // 3, 1))
        v = t / memory.before * memory.velocity
        v = v + self.length * (memory.coupling.mean(x0, t) - state.x_t)  # B: the force F
        x = state.x_t + self.length / 2 * v  # A: drift
        noise = memory.coupling.noise(state.generator, x, t)  # P^(1/2) n
        v = keep * v + math.sqrt(1 - keep**2) * noise  # O: friction and noise
        state.x_t = x + self.length / 2 * v  # A
        memory.velocity, memory.before = v, t

    def _diffuse(self, state: State) -> None:
        """Remove the noise of the last level by the reverse diffusion."""
        t = state.levels[-2]
        levels = karras(self.final, t, DEPTH * t).tolist()
        x = diffuse(state.denoise, state.x_t, levels, state.generator)
        state.x = state.x_t = state.denoised = x
