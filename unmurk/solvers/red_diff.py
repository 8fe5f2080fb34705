r"""RED-diff: restoration as optimization, with the denoiser as regularizer.

Mardani, Song, Kautz and Vahdat (2023), arXiv 2305.04391. A point :math:`\mu` is fitted to y by

.. math::
    \min_\mu\; & \frac{\lVert y - A(\mu)\rVert^2}{2\sigma_y^2} + R(\mu), \\
    & \nabla R = \mathbb{E}_{t, e}\bigl[w(t)\,(\hat\epsilon(x_t, t) - e)\bigr],
    \qquad x_t = \alpha_t \mu + \sigma_t e,

where no gradient passes through the network, :math:`\hat\epsilon` is the noise that it predicts,
and e is standard normal. With :math:`\sigma = \sigma_t/\alpha_t` and the denoiser D,

.. math:: \sigma\,(\hat\epsilon - e) = \mu - D(\mu + \sigma e, \sigma), \tag{*}

so all that is needed of the prior is D. A Gaussian prior :math:`\mathcal{N}(m, S)` shows what the
weight means: the mean of (*) over e is :math:`\sigma^2 (S + \sigma^2 I)^{-1} (\mu - m)`, so (*)
divided by :math:`\sigma^2` is minus the score of the prior blurred by :math:`\sigma`, whatever S
is. Every other weight is right for one S at best.

**The default** (`RedDiff`). Levels fall along the Karras grid. At each, with h the average of D
over the pair :math:`\mu + \sigma e`, :math:`\mu - \sigma e` (which cancels the effect of e to
first order),

.. math::
    z   &= \mu + c\,(h - \mu) \qquad\text{a step against (*)}/\sigma^2 \\
    \mu &\leftarrow \arg\min_x \frac{\lVert y - A(x)\rVert^2}{2\sigma_y^2}
           + \frac{\lVert x - z\rVert^2}{2 c \sigma^2}.

This is one proximal gradient step of length :math:`c\sigma^2` on :math:`-\log p_\sigma(\mu) - \log
p(y \mid \mu)`. It uses the noise level of the data, and no parameter depends on the task. For
Gaussians the fixed point at level :math:`\sigma` is the posterior mean under the prior
:math:`\mathcal{N}(m, S + \sigma^2 I)`.

The step starts not at :math:`\mu` but slightly ahead, by `momentum` times the last change, which
halves the lag of :math:`\mu` behind the falling levels.

**The last step** estimates the mean of the posterior rather than its mode, from y's own noise in
place of e: levels end at the noise of y, and `posterior_mean` takes over (option `final`).

`red_diff_spread` has samples with the spread of the posterior from the same pairs, and
`red_diff_paper` the released algorithm.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from ..bounds import Real
from ..diffusion.samplers import karras
from ..problem import Problem
from .base import Claim, Level, Momentum, ProximalSolver, Steps
from .data_term import prox
from .posterior_mean import LABELS, PosteriorMean, last_level
from .state import State, gray

__all__ = ["CITATION", "RedDiff", "look_ahead"]

ENOUGH = 50  # steps, from which on the settings stay as they are
HIGHEST, LEAST = 5.0, 1.0  # first level with as many, and with few
FASTER = 4 / 7  # growth of c toward no steps at all: 1.4 with 15 of them

CITATION = """@inproceedings{mardani2024reddiff,
  title = {A Variational Perspective on Solving Inverse Problems with Diffusion Models},
  author = {Mardani, Morteza and Song, Jiaming and Kautz, Jan and Vahdat, Arash},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2305.04391},
  archiveprefix = {arXiv}
}"""


@dataclass(frozen=True, kw_only=True)
class RedDiff(ProximalSolver):
    """RED-diff in true units: it knows the noise of y and needs no tuning.

    A step takes two network evaluations and no gradient. With the option `levels` and
    final="mmse", levels below the noise of y are left out, and the last step is at that noise.

    Raises:
        InputError: An option is out of its bounds.

    >>> RedDiff(steps=30).final
    'mmse'
    """

    name: ClassVar[str] = "red-diff"
    claims: ClassVar[Claim] = "point"
    citation: ClassVar[str] = CITATION

    steps: Steps = 50
    """Noise levels. Each takes two network evaluations (one without `pairs`)."""
    sigma_max: Annotated[float | None, Real(1e-6, 1e6, optional=True)] = None
    """First noise level, no higher than the prior's highest. Unset: 5 from 50 steps on, with fewer
    5 (steps / 50)^(4/3), but at least 1: few levels are worth more where images take shape."""
    sigma_min: Level = 0.01
    """Last noise level: finer detail of the prior than this is not used."""
    relax: Annotated[float | None, Real(1e-3, 1.999, optional=True)] = None
    """c: length of a step in units of sigma^2, which is stable between 0 and 2. A smaller one
    averages more noise, and follows more slowly. Unset: 1 from 50 steps on, up to 1.57 with fewer,
    which have to follow faster; and 1.5 where A is neither linear nor ambiguous. A saturated value
    gives no gradient, so that the denoiser alone moves it (HDR: +0.5 to +0.8 dB; no change where
    nothing saturates)."""
    momentum: Momentum = 0.5
    """beta: fraction of the last change of mu that is added before a step."""
    pairs: bool = True
    """Whether every noise e is used together with -e."""
    init_sigma: Level = 0.3
    """First noise level where `init` is given: about the error of that image."""
    final: Literal["mean", "denoised", "mmse"] = "mmse"
    """The result: mu; or h (smoother, without the last correction by y); or, for a linear A and
    Gaussian noise, the denoised image of y's own noise, which is nearer the posterior mean."""

    def start(self, state: State, init: Tensor | None) -> None:
        """Start at a regularized pseudo-inverse or `init`, without noise."""
        memory, problem = state.memory, state.problem
        own, labels = self._last(problem, state.y)
        if self.levels is None:
            first = self._highest() if init is None else self.init_sigma
            first = max(min(first, state.denoise.sigma_max), self.sigma_min)
            steps = self.steps - max(len(labels) - 1, 0)
            levels = karras(steps, first, min(own or self.sigma_min, first)).tolist()
        else:
            levels = _until(self.noise_levels(state, init is not None), own)
            labels = labels if len(levels) > 1 else labels[:1]
        memory.first_label = len(levels)
        memory.labels, memory.signs = labels, (1, -1) if self.pairs else (1,)
        state.levels = levels + levels[-1:] * (len(labels) - 1)
        memory.c = self._length(problem, state.steps)
        if init is None:
            middle = gray(state.y, problem)
            init = prox(problem, middle, state.y, 0.5, state.sigma_eff, self.data_steps)
        memory.mu = memory.before = state.x = state.x_t = init

    def step(self, state: State) -> None:
        """See the equations of this module."""
        memory, sigma = state.memory, state.sigma
        if memory.labels and state.step >= memory.first_label:
            return self._last_step(state, state.step - memory.first_label)
        ahead, e = look_ahead(state, self.momentum)
        h = state.denoise(ahead + e, sigma)
        if self.pairs:
            h = (h + state.denoise(ahead - e, sigma)) / 2
        z = ahead + memory.c * (h - ahead)  # against the prior
        del ahead, e  # one image may be most of the memory
        memory.mu = self.prox(state, z, memory.c**0.5 * sigma)  # against the misfit
        state.denoised = h
        state.x = state.x_t = h if self.final == "denoised" else memory.mu

    def _last_step(self, state: State, k: int) -> None:
        """Add label k to the estimate of the posterior mean."""
        memory = state.memory
        if k == 0:
            ahead, e = look_ahead(state, self.momentum)
            memory.mu = memory.before = None
            state.x = state.x_t = state.denoised = ahead  # what they held is no longer needed
            memory.estimate = PosteriorMean(
                *(ahead, state.y, state.problem, state.sigma, e, memory.labels)
            )
            state.x = state.x_t = state.denoised = memory.estimate.v
            del ahead, e
        x, state.denoised = memory.estimate.add(state.denoise, k, memory.signs)
        state.x = state.x_t = x

    def _length(self, problem: Problem, steps: int) -> float:
        """Return c."""
        if self.relax is not None:
            return self.relax
        if problem.linear or problem.operator.ambiguous:
            return 1 + FASTER * (1 - min(steps / ENOUGH, 1.0))
        return 1.5

    def _highest(self) -> float:
        """Return the first level."""
        if self.sigma_max is not None:
            return self.sigma_max
        return max(HIGHEST * min(self.steps / ENOUGH, 1.0) ** (4 / 3), LEAST)

    def _last(self, problem: Problem, y: Tensor) -> tuple[float, tuple[float, ...]]:
        """Return the level at which y's own noise replaces e, and the labels that D is given.

        They are 0 and () where that level is below the grid.
        """
        if self.final != "mmse" or problem.sigma < self.sigma_min:
            return 0.0, ()
        level, full = last_level(problem, y)
        if level < self.sigma_min:
            return 0.0, ()
        enough = self.levels is not None or self.steps > len(LABELS)
        return level, LABELS if full and self.pairs and enough else LABELS[:1]


def look_ahead(state: State, momentum: float) -> tuple[Tensor, Tensor]:
    """Move mu on by momentum times its last change, and draw noise of the level of the step.

    Args:
        state: The state of a run, whose memory holds mu and the mu before it.
        momentum: Fraction of the last change; none is added in the first two steps.

    Returns:
        mu after momentum and noise, both (B, C, H, W).

    >>> import torch
    >>> from types import SimpleNamespace
    >>> memory = SimpleNamespace(mu=torch.tensor(2.0), before=torch.tensor(1.0))
    >>> state = SimpleNamespace(step=3, sigma=0.5, memory=memory, randn=torch.ones_like)
    >>> look_ahead(state, momentum=0.5)
    (tensor(2.5000), tensor(0.5000))
    """
    memory = state.memory
    factor = momentum if state.step > 2 else 0.0
    ahead = memory.mu + factor * (memory.mu - memory.before)
    memory.before = memory.mu
    return ahead, state.sigma * state.randn(memory.mu)


def _until(levels: list[float], last: float) -> list[float]:
    """End falling levels at the level `last`, up to rounding; 0 leaves them as they are."""
    if last == 0:
        return levels
    above = [level for level in levels if level > last * (1 - 1e-6)]
    return above if above and above[-1] < last * (1 + 1e-6) else [*above, last]
