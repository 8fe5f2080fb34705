r"""RED-diff as released, with the variations of its ablations.

Mardani, Song, Kautz and Vahdat (2023), arXiv 2305.04391. At each level, from high to low, an
optimizer takes one step on

.. math::
    \mathcal{L}(u) &= \frac v2 \operatorname{mean}\bigl((y_u - A(u))^2\bigr) + \lambda\,g(2\sigma)
        \operatorname{mean}\bigl(\operatorname{stop}[\hat\epsilon - e]\,u\bigr),
        \qquad u = 2\mu - 1, \\
    \hat\epsilon - e &= \bigl(\mu - D(\mu + \sigma e, \sigma)\bigr)/\sigma,

with means over one image. Images u and levels :math:`2\sigma` are in the range [-1, 1], so that
for a linear A :math:`y_u - A(u) = 2 (y - A(\mu))`. The results depend on :math:`\lambda`, which
does not depend on the noise level of y. The second term is linear in u within a level: with
`parallel` levels in one step, each with its own noise e, it is their mean, and the network runs
once for each.

The released loops are those of Adam, with one level a step or (in a file of its own) a chunk of
neighboring levels. Plain gradient descent with momentum 0.9 and lr 1e6 is there as a comment. For
AdamW, L-BFGS and the EDM grid there is no release to compare with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..diffusion.samplers import karras
from ..diffusion.schedules import linear_beta
from ..problem import Problem
from ..rng import generator
from .base import Count, Solver, Steps, Weight
from .data_term import Adam, Gradient, Sgd, lbfgs
from .red_diff import CITATION
from .red_diff_loss import PriorWeight, data_grad, prior_grad
from .state import State, pseudo_inverse

__all__ = ["RedDiffPaper"]


@dataclass(frozen=True, kw_only=True)
class RedDiffPaper(Solver):
    """The released RED-diff, step by step, in the paper's units.

    A level takes one network evaluation and no gradient. At batch size 1 it is the released
    algorithm; there the means run over the batch too, which only rescales Adam's eps. The result
    is, as released, the image before the last step. `init` replaces the pseudo-inverse; an
    operator without one needs it.

    Raises:
        InputError: An option is out of its bounds, or the operator has no pseudo-inverse.

    >>> RedDiffPaper(steps=100, optimizer="adamw").lam
    0.25
    """

    name: ClassVar[str] = "red-diff"
    citation: ClassVar[str] = CITATION

    steps: Steps = 1000
    """Noise levels, each one network evaluation; on the released grid a divisor of 1000."""
    lam: Weight = 0.25
    """lambda, the weight of the prior."""
    lr: Weight = 0.1
    """Step length of the optimizer, in units of [-1, 1] images. Released: 0.1 to 0.5, by task."""
    obs_weight: Weight = 1.0
    """v, the weight of the data."""
    sigma_x0: Weight = 0.0
    """Noise put on mu before every step, in units of [-1, 1] images. Released: 0 or 1e-4."""
    weight: PriorWeight = "linear"
    """g, the dependence of the prior's term on the noise level."""
    order: Literal["descending", "ascending", "random"] = "descending"
    """Order of the levels; random draws each level anew, the same in every run."""
    grid: Literal["linear-beta", "edm"] = "linear-beta"
    """Levels of the released schedule, or as many between the same ends on the grid of Karras et
    al. (2022, arXiv 2206.00364, eq. 5)."""
    parallel: Count = 1
    """Neighboring levels that share one step. Released: 1, with 10 and 25 as comments."""
    optimizer: Literal["adam", "adamw", "sgd", "lbfgs"] = "adam"
    """adam, adamw: betas (0.9, 0.99), eps 1e-8; sgd: momentum 0.9; lbfgs: a few steps on the loss
    of each level, with memory of that level alone and lr in units of a quasi-Newton step."""
    decay: Weight = 0.01
    """Weight decay of adamw."""
    inner: Count = 5
    """Steps of lbfgs at each level; they evaluate A, not the network."""

    def schedule(self, state: State, init: bool) -> list[float]:
        """See `Solver.schedule`."""
        if self.grid == "edm":
            ends = linear_beta()
            return karras(self.steps, float(ends[0]), float(ends[-1])).tolist()
        return linear_beta(self.steps).tolist()

    def start(self, state: State, init: Tensor | None) -> None:
        """Start at the pseudo-inverse or `init`, without noise."""
        state.x = state.x_t = pseudo_inverse(state.y, state.problem, init)
        levels = self._order(self.noise_levels(state, init is not None))
        chunks = [levels[k : k + self.parallel] for k in range(0, len(levels), self.parallel)]
        state.levels = [chunk[-1] for chunk in chunks]
        memory = state.memory
        memory.u, memory.chunks, memory.advance = 2 * state.x - 1, chunks, self._optimizer()

    def step(self, state: State) -> None:
        """See the equations of this module."""
        memory, u = state.memory, state.memory.u
        u0 = u + self.sigma_x0 * state.randn(u) if self.sigma_x0 > 0 else u
        x, prior = (u0 + 1) / 2, torch.zeros_like(u)
        chunk = memory.chunks[state.step - 1]
        for sigma in chunk:
            state.denoised = state.denoise(x + sigma * state.randn(u), sigma)
            gradient = prior_grad(x, state.denoised, sigma, self.lam, self.weight)
            prior = prior + gradient / len(chunk)
        loss_grad = self._gradient(state.problem, state.y, prior, u0 - u)
        memory.u = memory.advance(u, loss_grad)
        state.x = state.x_t = x

    def _order(self, levels: list[float]) -> list[float]:
        if self.order == "ascending":
            return levels[::-1]
        if self.order == "random":
            # one draw for all images and batches: the network takes one level at a time
            picks = torch.randint(len(levels), (len(levels),), generator=generator(0))
            return [levels[i] for i in picks.tolist()]
        return levels

    def _optimizer(self) -> Callable[[Tensor, Gradient], Tensor]:
        if self.optimizer == "sgd":
            return Sgd(self.lr)
        if self.optimizer == "lbfgs":
            return lambda u, gradient: lbfgs(u, gradient, self.lr, self.inner)
        return Adam(self.lr, self.decay if self.optimizer == "adamw" else 0.0)

    def _gradient(self, problem: Problem, y: Tensor, prior: Tensor, jitter: Tensor) -> Gradient:
        """Return the gradient in u of the loss of one step, whose noise and prior are fixed."""

        def gradient(u: Tensor) -> Tensor:
            x = (u + jitter + 1) / 2
            return prior + self.obs_weight * data_grad(problem, x, y)

        return gradient
