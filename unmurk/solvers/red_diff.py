"""RED-diff: restoring as optimisation, with the denoiser as regulariser.

Mardani, Song, Kautz and Vahdat (2023), arXiv 2305.04391. A point mu is fitted to y by

    minimise  ||y - A(mu)||^2 / (2 sigma_y^2) + R(mu),
    grad R    = E_{t, e} [ w(t) (eps_hat(x_t, t) - e) ],    x_t = alpha_t mu + sigma_t e,

where no gradient passes through the network. With sg = sigma_t / alpha_t and the denoiser D,

    sg (eps_hat - e) = mu - D(mu + sg e, sg),                                            (*)

so all that is needed of the prior is D. A Gaussian prior N(m, S) shows what the weight means:
E_e of (*) is sg^2 (S + sg^2)^-1 (mu - m), so that (*) divided by sg^2 is minus the score of the
prior blurred by sg, whatever S is; every other weight is right for one S at best.

`RedDiff`, the default. Levels fall along the Karras grid. At each, with h the average of D over
the pair mu + sg e, mu - sg e (the pair cancels what e adds to first order),

    z  = mu + c (h - mu)                                        a step against (*) / sg^2
    mu = argmin_x ||y - A x||^2 / (2 sigma_y^2) + ||x - z||^2 / (2 c sg^2)

that is, one proximal gradient step of length c sg^2 on -log p_sg(mu) - log p(y | mu). The noise
level of the data enters by itself, and there is nothing to tune for a task. Where all is Gaussian
the fixed point at level sg is the posterior mean under the prior N(m, S + sg^2).

The first of them is taken not from mu but a little ahead, by `momentum` times the last change,
which halves how far mu lags behind the falling levels.

Last comes an estimate nearer the mean of the posterior than its mode, `red_diff_last.py`: what D
makes of an image on which y's own noise is left in the place of e. For A = I it is D(y, sigma_y),
with a check that D takes as much noise off as there is. So levels end at the noise of y: `final`.

The released algorithm is in `red_diff_paper.py`, samples with the posterior's spread in
`red_diff_spread.py`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, prox, randn
from .red_diff_last import LABELS, last_level, posterior_mean
from .start import grey

__all__ = ["RedDiff"]

ENOUGH = 50  # steps, from which on the settings stay as they are
HIGHEST, LEAST = 5.0, 1.0  # first level with as many, and with few
FASTER = 4 / 7  # how much c grows toward no steps at all: 1.4 with 15 of them


@dataclass(frozen=True)
class RedDiff:
    """RED-diff in true units: noise-aware, nothing to tune. Two network evaluations a step.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "red-diff"
    claims: ClassVar[Claim] = "point"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 50
    """Noise levels. Each costs two network evaluations (one without `pairs`)."""
    sigma_max: float | None = None
    """First noise level, no higher than the prior's highest. Unset: 5 from 50 steps on, with fewer
    5 (steps / 50)^(4/3), but at least 1: so few levels are worth more where images take shape."""
    sigma_min: float = 0.01
    """Last noise level: finer detail of the prior than this is not used."""
    relax: float | None = None
    """c: length of a step in units of sg^2; smaller averages more noise, and follows slower.
    Unset: 1 from 50 steps on, up to 1.57 with fewer, which have to follow faster; and 1.5 where A
    is neither linear nor ambiguous. What saturates gives no gradient, so
    that the denoiser alone moves it (HDR: +0.5 to +0.8 dB; no change where nothing saturates)."""
    momentum: float = 0.5
    """beta: how much of the last change of mu is added before a step."""
    pairs: bool = True
    """Whether every noise e is used together with -e."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have; 0 makes noiseless linear data exact."""
    data_steps: int = 10
    """Steps of the inner data fit where the operator is not linear."""
    init_sigma: float = 0.3
    """First noise level where `init` is given: about the error of that image."""
    final: Literal["mean", "denoised", "mmse"] = "mmse"
    """Return mu, or h of the last level (smoother; does not know y's last word), or for a linear
    A and Gaussian noise what the denoiser makes of y's own noise: nearer the posterior's mean."""

    def __post_init__(self) -> None:
        if self.relax is not None and not 0 < self.relax < 2:
            raise InputError(f"relax is {self.relax}: the step is stable between 0 and 2")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum}: it is stable from 0 to below 1")
        if self.noise_floor < 0:
            raise InputError(f"noise_floor is {self.noise_floor}: a noise level is 0 or more")

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
        """See `Solver.run`."""
        sigma_eff = max(problem.sigma, self.noise_floor)
        c = self._length(problem)
        first = self._highest() if x is None else self.init_sigma
        first = max(min(first, denoise.sigma_max), self.sigma_min)
        own, labels = self._last(problem, y)
        steps = self.steps - max(len(labels) - 1, 0)
        levels = karras(steps, first, min(own or self.sigma_min, first)).tolist()
        mu = self._start(y, problem, sigma_eff) if x is None else x
        before = mu
        for step, sg in enumerate(levels, 1):
            ahead = mu + (self.momentum if step > 2 else 0.0) * (mu - before)
            before, e = mu, sg * randn(noise, mu)
            if labels and step == steps:

                def report(k: int, mean: Tensor, h: Tensor, sg: float = sg) -> bool:
                    return callback(steps + k, self.steps, sg, mean, h)

                signs = (1, -1) if self.pairs else (1,)
                return posterior_mean(ahead, y, problem, denoise, sg, e, labels, signs, report)
            h = denoise(ahead + e, sg)
            if self.pairs:
                h = (h + denoise(ahead - e, sg)) / 2
            z = ahead + c * (h - ahead)
            mu = prox(problem, z, y, c**0.5 * sg, sigma_eff, self.data_steps)
            if callback(step, self.steps, sg, mu, h):
                break
        return h if self.final == "denoised" else mu

    def _length(self, problem: Problem) -> float:
        """c."""
        if self.relax is not None:
            return self.relax
        if problem.linear or problem.operator.ambiguous:
            return 1 + FASTER * (1 - self._share())
        return 1.5

    def _share(self) -> float:
        """The steps there are, of those from which on more change nothing but the noise."""
        return min(self.steps / ENOUGH, 1.0)

    def _highest(self) -> float:
        """The first level."""
        if self.sigma_max is not None:
            return self.sigma_max
        return max(HIGHEST * self._share() ** (4 / 3), LEAST)

    def _last(self, problem: Problem, y: Tensor) -> tuple[float, tuple[float, ...]]:
        """The level at which y's own noise stands for e, and what D is told of it; 0 and nothing
        where that is below the grid."""
        if self.final != "mmse" or problem.sigma < self.sigma_min:
            return 0.0, ()
        level, full = last_level(problem, y)
        if level < self.sigma_min:
            return 0.0, ()
        return level, LABELS if full and self.pairs and self.steps > len(LABELS) else LABELS[:1]

    def _start(self, y: Tensor, problem: Problem, sigma_eff: float) -> Tensor:
        """Grey as far as y does not say otherwise: a pseudo-inverse that fears noise."""
        return prox(problem, grey(y, problem), y, 0.5, sigma_eff, self.data_steps)
