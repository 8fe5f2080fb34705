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

`RedDiffPaper`, `preset="paper"`. The released algorithm, one Adam step at each level:

    loss(u) = v/2 mean((y_u - A(u))^2) + lambda g(sg) mean(stop[eps_hat - e] u),   u = 2 mu - 1,

with means over one image, images and noise levels in [-1, 1], so that for a linear A
y_u - A(u) = 2 (y - A(mu)). Its results depend on lambda, which no noise level enters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..prior import karras
from ..problem import Problem
from ..seeds import Streams, generator
from .base import Claim, Denoiser, Report, Requirement, prox, pull, randn
from .schedule import linear_beta

__all__ = ["WEIGHTS", "RedDiff", "RedDiffPaper"]

WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda sg: sg,
    "sqrt": lambda sg: sg**0.5,
    "square": lambda sg: sg**2,
    "log": lambda sg: float(torch.tensor(sg).double().log1p()),
    "trunc_linear": lambda sg: min(sg, 1.0),
    "power2over3": lambda sg: sg ** (2 / 3),
    "const": lambda sg: 1.0,
}
"""g(sg), the weight of (eps_hat - e) in the prior's term; sg in units of [-1, 1] images."""

Weight = Literal["linear", "sqrt", "square", "log", "trunc_linear", "power2over3", "const"]


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
    sigma_max: float = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.01
    """Last noise level: finer detail of the prior than this is not used."""
    relax: float = 1.0
    """c: length of a step in units of sg^2; smaller averages more noise, and follows slower."""
    pairs: bool = True
    """Whether every noise e is used together with -e."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have; 0 makes noiseless linear data exact."""
    data_steps: int = 10
    """Steps of the inner data fit where the operator is not linear."""
    init_sigma: float = 0.3
    """First noise level where `init` is given: about the error of that image."""
    final: Literal["mean", "denoised"] = "mean"
    """Return mu, or h of the last level (smoother; does not know y's last word)."""

    def __post_init__(self) -> None:
        if not 0 < self.relax < 2:
            raise InputError(f"relax is {self.relax}: the step is stable between 0 and 2")
        if self.noise_floor < 0:
            raise InputError(f"noise_floor is {self.noise_floor}: a noise level is 0 or more")

    @torch.no_grad()
    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: Denoiser,
        x: Tensor | None,
        noise: Streams,
        callback: Report,
    ) -> Tensor:
        """See `Solver.run`."""
        trust = max(problem.sigma, self.noise_floor)
        first = self.sigma_max if x is None else self.init_sigma
        first = max(min(first, denoise.sigma_max), self.sigma_min)
        levels = karras(self.steps, first, self.sigma_min).tolist()
        mu = self._start(y, problem, trust) if x is None else x
        for step, sg in enumerate(levels, 1):
            e = sg * randn(noise, mu)
            h = denoise(mu + e, sg)
            if self.pairs:
                h = (h + denoise(mu - e, sg)) / 2
            z = mu + self.relax * (h - mu)
            mu = prox(problem, z, y, self.relax**0.5 * sg, trust, self.data_steps)
            if callback(step, self.steps, sg, mu, h):
                break
        return mu if self.final == "mean" else h

    def _start(self, y: Tensor, problem: Problem, trust: float) -> Tensor:
        """Grey as far as y does not say otherwise: a pseudo-inverse that fears noise."""
        shape = problem.operator.x_shape(y.shape)
        grey = torch.full((len(y), *shape[-3:]), 0.5, dtype=y.dtype, device=y.device)
        return prox(problem, grey, y, 0.5, trust, self.data_steps)


@dataclass(frozen=True)
class RedDiffPaper:
    """The released RED-diff, step by step, in the paper's units. One network evaluation a step.

    At batch size 1 it is the released algorithm; there the means run over the batch too, which
    only rescales Adam's eps. Returned is, as released, the image before the last Adam step.
    `init` replaces the pseudo-inverse; an operator without one needs it.

    Raises:
        InputError: An option is out of its range, or the operator has no pseudo-inverse.
    """

    name: ClassVar[str] = "red-diff"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 1000
    """Levels of the linear-beta grid, a divisor of 1000. Each costs one network evaluation."""
    lam: float = 0.25
    """lambda, the weight of the prior."""
    lr: float = 0.1
    """Step of the optimiser, in units of [-1, 1] images. Released: 0.1 to 0.5, by task."""
    obs_weight: float = 1.0
    """v, the weight of the data."""
    sigma_x0: float = 0.0
    """Noise put on mu before every step, in units of [-1, 1] images. Released: 0 or 1e-4."""
    weight: Weight = "linear"
    """g, how the prior's term depends on the noise level."""
    order: Literal["descending", "ascending", "random"] = "descending"
    """Order of the levels; random draws each level afresh, alike in every run."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam with betas (0.9, 0.99) and eps 1e-8, or gradient descent with momentum 0.9."""

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise InputError(f"weight '{self.weight}': choose from {', '.join(WEIGHTS)}")
        if self.order not in ("descending", "ascending", "random"):
            raise InputError(f"order '{self.order}': choose descending, ascending or random")
        if self.optimizer not in ("adam", "sgd"):
            raise InputError(f"optimizer '{self.optimizer}': choose adam or sgd")

    @torch.no_grad()
    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: Denoiser,
        x: Tensor | None,
        noise: Streams,
        callback: Report,
    ) -> Tensor:
        """See `Solver.run`."""
        if x is None and not problem.operator.linear:
            raise InputError(
                f"operator '{problem.operator.spec}' is not linear and has no pseudo-inverse to"
                " start from: give init, or leave out preset='paper'"
            )
        u = 2 * (problem.A_dagger(y) if x is None else x) - 1
        momentum, square = torch.zeros_like(u), torch.zeros_like(u)
        for step, sigma in enumerate(self._levels(), 1):
            u0 = u + self.sigma_x0 * randn(noise, u) if self.sigma_x0 > 0 else u
            x0 = (u0 + 1) / 2
            denoised = denoise(x0 + sigma * randn(noise, u), sigma)
            gradient = self._gradient(problem, y, x0, denoised, 2 * sigma)
            if self.optimizer == "adam":
                momentum = 0.9 * momentum + 0.1 * gradient
                square = 0.99 * square + 0.01 * gradient**2
                scale = (square / (1 - 0.99**step)).sqrt() + 1e-8
                u = u - self.lr / (1 - 0.9**step) * momentum / scale
            else:
                momentum = 0.9 * momentum + gradient
                u = u - self.lr * momentum
            if callback(step, self.steps, sigma, x0, denoised):
                break
        return x0

    def _levels(self) -> list[float]:
        levels = linear_beta(self.steps).tolist()
        if self.order == "ascending":
            return levels[::-1]
        if self.order == "random":
            # one draw for all images and batches: the network takes one level at a time
            picks = torch.randint(self.steps, (self.steps,), generator=generator(0))
            return [levels[i] for i in picks.tolist()]
        return levels

    def _gradient(
        self, problem: Problem, y: Tensor, x0: Tensor, denoised: Tensor, sg: float
    ) -> Tensor:
        """Gradient of the loss in u; sg is the level in units of [-1, 1]."""
        data = -2 * self.obs_weight / y[0].numel() * pull(problem, x0, y)
        excess = 2 * (x0 - denoised) / sg  # eps_hat - e
        return data + self.lam * WEIGHTS[self.weight](sg) / x0[0].numel() * excess
