"""RED-diff as it was released, with the variations of its ablations.

Mardani, Song, Kautz and Vahdat (2023), arXiv 2305.04391. One step of an optimiser at each level,
from high to low, of

    loss(u) = v/2 mean((y_u - A(u))^2) + lambda g(sg) mean(stop[eps_hat - e] u),   u = 2 mu - 1,

with means over one image, images and noise levels in [-1, 1], so that for a linear A
y_u - A(u) = 2 (y - A(mu)). Its results depend on lambda, which no noise level enters. The second
term is linear in u while the level lasts: with `parallel` levels in one step, each with its own
noise e, it is their mean, and the network runs once for each.

The released loops are those of Adam, with one level a step or (in a file of its own) a chunk of
neighbouring levels; plain gradient descent with momentum 0.9 and lr 1e6 stands in them as a
comment. For AdamW, L-BFGS and the EDM grid nothing was released to be compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..diffusion.schedules import linear_beta
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator, generator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, likelihood_grad, randn
from .optimise import Adam, Gradient, Sgd, lbfgs
from .start import pseudo_inverse

__all__ = ["WEIGHTS", "RedDiffPaper", "Weight", "data_slope", "prior_slope"]

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

ORDERS = ("descending", "ascending", "random")
OPTIMIZERS = ("adam", "adamw", "sgd", "lbfgs")
GRIDS = ("linear-beta", "edm")


@dataclass(frozen=True)
class RedDiffPaper:
    """The released RED-diff, step by step, in the paper's units. One network evaluation a level.

    At batch size 1 it is the released algorithm; there the means run over the batch too, which
    only rescales Adam's eps. Returned is, as released, the image before the last step. `init`
    replaces the pseudo-inverse; an operator without one needs it.

    Raises:
        InputError: An option is out of its range, or the operator has no pseudo-inverse.
    """

    name: ClassVar[str] = "red-diff"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 1000
    """Noise levels, each one network evaluation; on the released grid a divisor of 1000."""
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
    grid: Literal["linear-beta", "edm"] = "linear-beta"
    """Levels of the released schedule, or as many between the same ends on the grid of Karras et
    al. (2022, arXiv 2206.00364, eq. 5)."""
    parallel: int = 1
    """Neighbouring levels that share one step. Released: 1, with 10 and 25 as comments."""
    optimizer: Literal["adam", "adamw", "sgd", "lbfgs"] = "adam"
    """adam, adamw: betas (0.9, 0.99), eps 1e-8; sgd: momentum 0.9; lbfgs: some steps on the loss
    of each level, with memory of that level alone and lr in units of a quasi-Newton step."""
    decay: float = 0.01
    """Weight decay of adamw."""
    inner: int = 5
    """Steps of lbfgs at each level; they call A, not the network."""

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise InputError(f"weight '{self.weight}': choose from {', '.join(WEIGHTS)}")
        for name, known in (("order", ORDERS), ("optimizer", OPTIMIZERS), ("grid", GRIDS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} '{getattr(self, name)}': choose from {', '.join(known)}")
        if self.parallel < 1 or self.inner < 1:
            raise InputError(
                f"parallel is {self.parallel}, inner {self.inner}: both must be at least 1"
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
        """See `Solver.run`."""
        u = 2 * pseudo_inverse(y, problem, x) - 1
        advance, levels = self._optimizer(), self._levels()
        chunks = [levels[k : k + self.parallel] for k in range(0, len(levels), self.parallel)]
        for step, chunk in enumerate(chunks, 1):
            u0 = u + self.sigma_x0 * randn(noise, u) if self.sigma_x0 > 0 else u
            x0, prior = (u0 + 1) / 2, torch.zeros_like(u)
            for sigma in chunk:
                denoised = denoise(x0 + sigma * randn(noise, u), sigma)
                pulled = prior_slope(x0, denoised, sigma, self.lam, self.weight)
                prior = prior + pulled / len(chunk)
            u = advance(u, self._gradient(problem, y, prior, u0 - u))
            if callback(step, len(chunks), chunk[-1], x0, denoised):
                break
        return x0

    def _levels(self) -> list[float]:
        if self.grid == "edm":
            ends = linear_beta()
            levels = karras(self.steps, float(ends[0]), float(ends[-1])).tolist()
        else:
            levels = linear_beta(self.steps).tolist()
        if self.order == "ascending":
            return levels[::-1]
        if self.order == "random":
            # one draw for all images and batches: the network takes one level at a time
            picks = torch.randint(self.steps, (self.steps,), generator=generator(0))
            return [levels[i] for i in picks.tolist()]
        return levels

    def _optimizer(self) -> Callable[[Tensor, Gradient], Tensor]:
        if self.optimizer == "sgd":
            return Sgd(self.lr)
        if self.optimizer == "lbfgs":
            return lambda u, gradient: lbfgs(u, gradient, self.lr, self.inner)
        return Adam(self.lr, self.decay if self.optimizer == "adamw" else 0.0)

    def _gradient(self, problem: Problem, y: Tensor, prior: Tensor, jitter: Tensor) -> Gradient:
        """Gradient in u of the loss of one step, whose noise and prior's term are fixed."""

        def gradient(u: Tensor) -> Tensor:
            x = (u + jitter + 1) / 2
            return prior + self.obs_weight * data_slope(problem, x, y)

        return gradient


def data_slope(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of mean((y_u - A(u))^2) / 2 in u = 2 x - 1, (B, C, H, W)."""
    return -2 / y[0].numel() * likelihood_grad(problem, x, y)


def prior_slope(x: Tensor, denoised: Tensor, sigma: float, lam: float, weight: Weight) -> Tensor:
    """Gradient in u = 2 x - 1 of lam g(sg) mean((eps_hat - e) u), (B, C, H, W).

    Args:
        x: The image (B, C, H, W).
        denoised: D(x + sigma e, sigma), of which no gradient is taken.
        sigma: Noise level in units of [0, 1] images; sg is twice that.
    """
    excess = (x - denoised) / sigma  # eps_hat - e
    return lam * WEIGHTS[weight](2 * sigma) / x[0].numel() * excess
