"""AmbientFlow: a flow as the prior, learnt together with the posterior flow on one bound.

Kelkar et al. (2023, arXiv 2309.04856). With an exact density log p(x) of a prior flow, and x_k
drawn from the posterior flow q(. | y),

    log w_k = log p(y | x_k) + log p(x_k) - log q(x_k | y),
    log p(y) >= E log (1/K sum_k w_k) >= E 1/K sum_k log w_k,

with equality where q is the true posterior: then every w_k is p(y). Both flows follow the bound,
by default the right one (the mean, which the authors' code follows), else the left one
(`bound="importance"`), whose weights are softmax(log w). K = `draws`: 2, theirs 2 to 10.

Schedule as theirs for MNIST: the prior flow starts by maximum likelihood on A^+ y (10 of 61
thousand steps), then both jointly; the posterior flow begins near N(A^+ y, (sigma_y / 2)^2) by
construction. Theirs weights log p(y | x) by 0.1 to 5, chosen for each data set, and adds a penalty
on gradients of x; with a weight other than 1 it is no bound on log p(y), and neither is done here.

Solvers need a denoiser. From the share FLOWS of the run on the flows stand still and a diffusion
prior is fitted by denoising score matching to fresh draws of the averaged prior flow: it is what
comes back as the prior, and at best as good as that flow. The flow itself is saved beside it, in
`glow/` (`unmurk.flows.glow.Glow.load`).
"""

import math
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..flows.glow import Glow
from ..flows.posterior import Posterior
from ..noise import Gaussian
from ..problem import Problem
from ..rng import normal
from .learner import Pair
from .losses import denoising, gaussian, levels
from .trainer import LRPhase

__all__ = ["AmbientFlow", "log_weights"]

WARM, FLOWS = 0.1, 0.6  # shares: the joint bound begins; the diffusion prior begins
PEAK = 0.4  # rate of the joint objectives, as for flowdiff's


class Density(Protocol):
    """A prior with an exact density."""

    def log_prob(self, x: Tensor) -> Tensor: ...


def log_weights(
    posterior: Posterior,
    prior: Density,
    y: Tensor,
    problem: Problem,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """log w of K draws for each measurement, (K, B), in nats."""
    context = posterior.context(y, problem)
    rows = []
    for _ in range(draws):
        z = gaussian(context.mean, generator)
        x, log_det = posterior.transform(z, context)
        normal = -z.flatten(1).square().sum(1) / 2 - z[0].numel() / 2 * math.log(2 * math.pi)
        rows.append(problem.log_likelihood(x, y) + prior.log_prob(x) - normal + log_det)
    return torch.stack(rows)


class AmbientFlow(Pair):
    """The method, for linear A.

    Args:
        y: Measurements (N, ...); never anything else.
        problem: How they were made.
        shape: Shape (C, H, W) of the images behind them.
        network: Preset of the networks.
        seed: Seed of the initial weights.
        bound: "elbo", or "importance" for the tighter one.
        draws: K, draws from the posterior flow for each measurement.
    """

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the method can learn from such measurements."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def __init__(
        self,
        y: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        seed: int = 0,
        bound: Literal["elbo", "importance"] = "elbo",
        draws: int = 2,
    ) -> None:
        if draws < 1:
            raise InputError(f"draws is {draws}: at least 1 is needed")
        self.bound, self.draws, self.spread = bound, draws, problem.sigma / 2
        super().__init__(y, problem, shape, network, seed)

    def others(self, network: str) -> dict[str, nn.Module]:
        """The prior flow."""
        return {"glow": Glow.create(network, self.shape)}

    def spans(self) -> dict[str, tuple[LRPhase, ...]]:
        """The prior flow, with the posterior flow, then the diffusion prior."""
        joint = (LRPhase(WARM, FLOWS, PEAK),)
        glow = (LRPhase(0.0, WARM, PEAK), *joint)
        return {"mean": joint, "flow": joint, "glow": glow, "prior": (LRPhase(FLOWS),)}

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; a prior flow counts as a
        posterior. See `memory`."""
        return [{"posterior": 2.0 * self.draws}, {"prior": 1.0}]

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a step at a progress from 0 to 1."""
        size = math.prod(self.shape)
        if progress >= FLOWS:
            with torch.no_grad():
                z = normal((len(y), *self.shape), generator)
                x = cast(Glow, self.ema["glow"]).draw(z)
            return {"prior": denoising(self.prior, x, levels(len(x), generator), generator)}
        glow, problem = cast(Glow, self.modules["glow"]), self.bind(rows, y)
        if progress < WARM:
            return {"glow": -glow.log_prob(problem.A_dagger(y)).mean() / size}
        each = log_weights(self.posterior, glow, y, problem, self.draws, generator)
        if self.bound == "importance":
            each = each.logsumexp(0) - math.log(self.draws)
        return {"bound": -each.mean() / size}
