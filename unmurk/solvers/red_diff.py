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

**The last step** (`PosteriorMean`) estimates the mean of the posterior rather than its mode: D is
applied to an image on which y's own noise replaces e. For A = I it is :math:`D(y, \sigma_y)`, with
a check that D removes as much noise as there is. So levels end at the noise of y: `final`. Part of
the measurement noise is re-injected into the final iterate :math:`\mu`:

.. math:: v = \mu + (\sigma/\sigma_y)^2 A^\top (y - A \mu).

Where singular values of A are 1 and :math:`\sigma = \sigma_y`, v has just the noise that D
expects. In the null space of A the pair puts noise on v as before; between the two it puts
:math:`(I - (\sigma/\sigma_y)^2 A^\top A)\,\sigma e`. So levels end at :math:`\sigma_y/\lVert
A\rVert`, with the largest singular value of A (at :math:`\sigma_y` if that is below 1), and the
result is the denoised v.

Where all singular values of A are one :math:`\kappa`, :math:`A^\top A = \kappa^2 I`, as in
denoising, nothing of :math:`\mu` is left in v: with :math:`\sigma = \sigma_y/\kappa`

.. math:: v = A^\top y/\kappa^2 = x + \sigma n,\qquad \mathbb{E}[x \mid y] = D(v, \sigma)

if D is exact. A learned D need not be: trained on noisy images alone it tends to remove too much
where noise is low, and does better with a smaller noise level as its label. y itself can tell. For
:math:`h_\ell = D(v, \ell\sigma)`, with d values of an image,

.. math::
    R_\ell = \lVert v - h_\ell\rVert^2/\sigma^2 - d
        + 2\operatorname{tr}(\partial h_\ell/\partial v)

is Stein's (1981) unbiased estimate of :math:`\lVert x - h_\ell\rVert^2/\sigma^2`, and the result
is the mean

.. math:: \sum_\ell w_\ell h_\ell,\qquad w_\ell \propto q_\ell \exp(-R_\ell/8)

over a few labels :math:`\ell`, with :math:`\sum_\ell w_\ell = 1`. For linear estimates
:math:`h_\ell = B_\ell v` with symmetric :math:`B_\ell` that commute, the expected squared error of
this mean, over :math:`\sigma^2`, is at most that of any :math:`h_\ell` plus
:math:`8\log(1/q_\ell)` (Dalalyan and Salmon, 2012, arXiv 1104.3969). So an exact denoiser
(:math:`q_1` is near 1) loses next to nothing. Images lie in [0, 1], so :math:`h_\ell` is clipped
to it for :math:`R_\ell`. The trace is estimated along one draw of noise (Ramani, Blu and Unser,
2008, "Monte-Carlo SURE"). The pair

.. math::
    h_\ell = \tfrac12 \bigl(D(v + b, \ell\sigma) + D(v - b, \ell\sigma)\bigr),
        \qquad b = 0.1\,\sigma e,

gives its central difference at no further cost.

**Samples with the spread of the posterior** (`RedDiffSpread`) cost nothing more. For Gaussians a
posterior can be sampled by optimizing (the randomize-then-optimize of Bardsley, Solonen, Haario
and Laine, 2014; Papandreou and Yuille, 2010): with the data at :math:`y + \sigma_y n'` and a
random force of covariance H, the prior's precision, added to the gradient of :math:`-\log p`, the
minimizer is an exact draw. A denoiser gives neither H nor its root, but the pairs
:math:`\mu + \sigma e`, :math:`\mu - \sigma e` of RED-diff contain them. For a prior
:math:`\mathcal{N}(m, S)` their odd half is

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

`red_diff_paper` has the released algorithm.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..bounds import Real
from ..diffusion.samplers import karras
from ..operators.linalg import batch_dot, per_image
from ..operators.weighted import Weighted
from ..problem import Problem
from ..rng import generator
from .base import Claim, Level, Momentum, PositiveNoiseFloor, ProximalSolver, Steps
from .data_term import likelihood_grad, prox
from .state import CountingDenoiser, State, gray

__all__ = ["CITATION", "LABELS", "PosteriorMean", "RedDiff", "RedDiffSpread", "last_level", "risk"]

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

LABELS = (1.0, 0.85, 0.7, 0.5)
"""Labels: noise levels that D is given, as fractions of the true one."""
BELIEF = (0.91, 0.03, 0.03, 0.03)
"""q: prior weight of each label."""
TEMPERATURE = 8.0
PROBE = 0.1  # length of b in units of sigma
TOLERANCE = 1e-3  # relative, of A^T A = kappa^2 I


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
        ahead, e = self._look_ahead(state)
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
            ahead, e = self._look_ahead(state)
            memory.mu = memory.before = None
            state.x = state.x_t = state.denoised = ahead  # what they held is no longer needed
            memory.estimate = PosteriorMean(
                *(ahead, state.y, state.problem, state.sigma, e, memory.labels)
            )
            state.x = state.x_t = state.denoised = memory.estimate.v
            del ahead, e
        x, state.denoised = memory.estimate.add(state.denoise, k, memory.signs)
        state.x = state.x_t = x

    def _look_ahead(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mu after momentum, and noise of this level."""
        memory = state.memory
        momentum = self.momentum if state.step > 2 else 0.0
        ahead = memory.mu + momentum * (memory.mu - memory.before)
        memory.before = memory.mu
        return ahead, state.sigma * state.randn(memory.mu)

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


def _until(levels: list[float], last: float) -> list[float]:
    """End falling levels at the level `last`, up to rounding; 0 leaves them as they are."""
    if last == 0:
        return levels
    above = [level for level in levels if level > last * (1 - 1e-6)]
    return above if above and above[-1] < last * (1 + 1e-6) else [*above, last]


# -- the last step: from the image fitted to y to the mean of the posterior -----------------------


def last_level(problem: Problem, y: Tensor) -> tuple[float, bool]:
    r"""Return the level of y's own noise on an image, and whether :math:`A^\top A = \kappa^2 I`.

    The level is 0 where there is none: without noise, for a nonlinear A, and for weighted data,
    whose weights differ from image to image. It is that of image 0, as levels are shared and must
    not depend on the other images of a batch.

    >>> level, full = last_level(Problem("identity", 0.1), torch.zeros(1, 1, 4, 4))
    >>> round(level, 4), full
    (0.1, True)
    """
    operator = problem.operator
    if problem.sigma == 0 or not operator.linear or isinstance(operator, Weighted):
        return 0.0, False
    like = gray(y[:1], problem)
    first = operator.bind([0], like.shape[1:])
    x = torch.randn(like.shape[1:], generator=generator(0)).to(like)[None]
    observed = first.A_adjoint(first.A(x))
    square = float((x * observed).sum() / x.square().sum())
    if square > 0 and (observed - square * x).norm() <= TOLERANCE * observed.norm():
        return problem.sigma / square**0.5, True
    for _ in range(20):  # power iterations
        x = first.A_adjoint(first.A(x / x.norm()))
    return problem.sigma / max(1.0, float(x.norm().sqrt())), False


class PosteriorMean:
    """The denoised v, averaged over labels that are added one by one.

    Args:
        mu: The image fitted to y, (B, C, H, W).
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images.
        sigma: The level that `last_level` found.
        e: Noise of that level, shaped like mu.
        labels: The first of `LABELS`. Labels other than 1 are used where A^T A = kappa^2 I only.

    >>> mu, y, e = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> estimate = PosteriorMean(mu, y, Problem("identity", 0.5), 0.5, e, labels=(1.0,))
    >>> estimate.add(CountingDenoiser(lambda x, sigma: x / (1 + sigma**2)), 0, (1, -1))[0]
    tensor([[[[0.8000, 0.8000]]]])
    """

    def __init__(
        self,
        mu: Tensor,
        y: Tensor,
        problem: Problem,
        sigma: float,
        e: Tensor,
        labels: tuple[float, ...],
    ) -> None:
        self.sigma, self.labels = sigma, labels
        weight = (sigma / problem.sigma) ** 2
        self.v = mu + weight * likelihood_grad(problem, mu, y)
        b = e - weight * problem.A_adjoint(problem.A(e))
        self.full = b.flatten(1).norm(dim=1) <= TOLERANCE * e.flatten(1).norm(dim=1)
        several = len(labels) > 1
        self.b = torch.where(per_image(self.full, e) > 0, PROBE * e, b) if several else b
        self.found: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(
        self, denoise: CountingDenoiser, k: int, signs: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Add label k.

        Args:
            denoise: The prior's denoiser.
            k: Number of the label, in order from 0.
            signs: Signs of b: (1, -1) for pairs, which several labels need.

        Returns:
            The mean over all labels so far and the estimate h of this one, both (B, C, H, W).
        """
        v, label = self.v, self.labels[k]
        estimates = [denoise(v + sign * self.b, label * self.sigma) for sign in signs]
        mean = sum(estimates[1:], estimates[0])
        self.found.append(mean if len(estimates) == 1 else mean.div_(len(estimates)))
        logit = torch.full_like(self.full, math.log(BELIEF[k]), dtype=v.dtype)
        if len(self.labels) > 1:
            pair = torch.stack(estimates).clamp(0, 1)
            logit = logit - risk(v, pair, self.b, self.sigma) / TEMPERATURE
        self.logits.append(logit if k == 0 else torch.where(self.full, logit, -torch.inf))
        weights = torch.stack(self.logits).softmax(0)
        if k == 0:  # its weight is 1
            return self.found[0], self.found[0]
        parts = [per_image(w, v) * h for w, h in zip(weights, self.found, strict=True)]
        return torch.stack(parts).sum(0), self.found[k]


def risk(v: Tensor, pair: Tensor, b: Tensor, sigma: float) -> Tensor:
    r"""Estimate :math:`\lVert x - h\rVert^2/\sigma^2` where :math:`v = x + \sigma n`, shape (B,).

    Args:
        v: Noisy images (B, C, H, W).
        pair: The estimates at v + b and at v - b, (2, B, C, H, W); h is their mean.
        b: A short step in a random direction, noise of level `PROBE` sigma.
        sigma: Noise level of v.

    >>> v, b = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.1 * PROBE)
    >>> shrunk = torch.stack([(v + b) / 2, (v - b) / 2])  # h(v) = v / 2: a trace of 4 / 2
    >>> risk(v, shrunk, b, sigma=0.1)  # 4 (0.25 / 0.1)^2 - 4 + 2 x 2
    tensor([25.0000])
    """
    misfit = (v - pair.mean(0)).square().flatten(1).sum(1) / sigma**2
    slope = batch_dot(b, (pair[0] - pair[1]) / 2) / (PROBE * sigma) ** 2
    return misfit - v[0].numel() + 2 * slope


# -- samples with the spread of the posterior -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RedDiffSpread(ProximalSolver):
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
    noise_floor: PositiveNoiseFloor = 1e-3
    """Least noise level that y is taken to have."""

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
        momentum = self.momentum if state.step > 2 else 0.0
        ahead = memory.mu + momentum * (memory.mu - memory.before)
        memory.before, e = memory.mu, s * state.randn(memory.mu)
        plus, minus = state.denoise(ahead + e, s), state.denoise(ahead - e, s)
        h, odd = (plus + minus) / 2, e - (plus - minus) / 2
        width = max(math.log(memory.last / s), 0.0)  # the first level is the last up to rounding
        memory.force = memory.force + math.sqrt(2 * width) * odd / s**2
        memory.mu = self.prox(state, h + s**2 * memory.force, s, memory.y)
        memory.last, state.denoised = s, h
        state.x = state.x_t = memory.mu
