r"""HRDIS: RED-diff whose noise follows the network's estimate from level to level.

Dou, Li, Du, Yang, Yao and Deng (2025), "Hybrid Regularization Improves Diffusion-based Inverse
Problem Solving", ICLR, with the settings of the released code. At each level :math:`\sigma` of the
linear-beta grid, the point :math:`\mu` of RED-diff (`red_diff`) is noised not by fresh noise alone
but by

.. math::
    e &= \sqrt{1-\beta}\,\hat\epsilon_{\text{before}} + \sqrt\beta\,z,
        \qquad z \sim \mathcal{N}(0, I), \\
    \hat\epsilon &= (\mu + \sigma e - D(\mu + \sigma e, \sigma))/\sigma,

with :math:`\hat\epsilon_{\text{before}}` that of the level before (z itself at the first level,
where :math:`\mu` does not change). One Adam step then descends the gradient of RED-diff's loss,

.. math::
    \mathcal{L}(u) = \frac v2 \operatorname{mean}\bigl((y_u - A(u))^2\bigr) + \lambda\,g(2\sigma)
        \operatorname{mean}\bigl(\operatorname{stop}[\hat\epsilon - e]\,u\bigr),
    \qquad u = 2\mu - 1,

with images u and levels :math:`2\sigma` in the range [-1, 1] as in `RedDiffPaper`. beta = 1 is
RED-diff ("denoising regularization", whose draws average :math:`\mu` over modes). beta = 0 follows
one path of the deterministic reverse diffusion ("consistency regularization"). Values between them
are the hybrid. As in RED-diff the weights do not depend on the noise of y.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..diffusion.schedules import linear_beta
from ..problem import Problem
from .base import Fraction, Solver, Steps, Weight
from .data_term import Adam
from .red_diff_loss import PriorWeight, data_grad, prior_grad
from .state import State, pseudo_inverse

__all__ = ["Hrdis"]


@dataclass(frozen=True, kw_only=True)
class Hrdis(Solver):
    """HRDIS. A step takes one network evaluation and no gradient.

    The result is, as released, the image before the last Adam step. The run starts at the
    pseudo-inverse; an operator without one needs `init`.

    Raises:
        InputError: An option is out of its bounds, or the operator has no pseudo-inverse.

    >>> Hrdis(beta=1.0).lam
    0.25
    """

    name: ClassVar[str] = "hrdis"
    citation: ClassVar[str] = """@inproceedings{dou2025hrdis,
  title = {Hybrid Regularization Improves Diffusion-based Inverse Problem Solving},
  author = {Dou, Hongkun and Li, Zeyu and Du, Jinyang and Yang, Lijun and Yao, Wen and Deng, Yue},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://openreview.net/forum?id=d7pr2doXn3}
}"""

    steps: Steps = 100
    """Levels of the linear-beta grid, a divisor of 1000."""
    beta: Fraction = 0.2
    """Fraction of fresh noise in the variance, 0 to 1. Released: 0.2."""
    lam: Weight = 0.25
    """lambda, the weight of the prior. Released: 0.25, and 0.2 for super-resolution."""
    lr: Weight = 0.1
    """Step length of Adam, in units of [-1, 1] images. Released: 0.1, and 0.5 for
    super-resolution."""
    obs_weight: Weight = 1.0
    """v, the weight of the data. Released: 1, and 0.02 for nonlinear blur (with weight const)."""
    weight: PriorWeight = "linear"
    """g, the dependence of the prior's term on the noise level; see `RedDiffPaper`."""

    def schedule(self, state: State, init: bool) -> list[float]:
        """See `Solver.schedule`."""
        return linear_beta(self.steps).tolist()

    def start(self, state: State, init: Tensor | None) -> None:
        """Start at the pseudo-inverse or `init`, without noise."""
        state.levels = self.noise_levels(state, init is not None)
        state.x = state.x_t = pseudo_inverse(state.y, state.problem, init)
        state.memory.u = 2 * state.x - 1
        state.memory.adam, state.memory.eps_hat = Adam(self.lr), state.randn(state.x)

    def step(self, state: State) -> None:
        """See the equations of this module."""
        memory, sigma = state.memory, state.sigma
        x, e = (memory.u + 1) / 2, memory.eps_hat
        if state.step > 1:  # the noise of the first level is fresh
            e = math.sqrt(1 - self.beta) * e + math.sqrt(self.beta) * state.randn(x)
        noisy = x + sigma * e
        denoised = state.denoise(noisy, sigma)
        memory.eps_hat = (noisy - denoised) / sigma
        if state.step > 1:
            gradient = partial(self._gradient, state.problem, state.y, denoised, sigma)
            memory.u = memory.adam(memory.u, gradient)
        state.x = state.x_t = x
        state.denoised = denoised

    def _gradient(
        self, problem: Problem, y: Tensor, denoised: Tensor, sigma: float, u: Tensor
    ) -> Tensor:
        """Compute the gradient in u of the loss of one step, whose denoised image is fixed."""
        x = (u + 1) / 2
        prior = prior_grad(x, denoised, sigma, self.lam, self.weight)
        return self.obs_weight * data_grad(problem, x, y) + prior
