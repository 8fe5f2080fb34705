r"""AmbientFlow: a flow as the prior, learned together with the posterior flow by one bound.

Kelkar et al. (2023, arXiv 2309.04856). With the exact density :math:`p(x)` of a prior flow, and
:math:`x_k` drawn from the posterior flow :math:`q(\cdot \mid y)`,

.. math::

    \log w_k &= \log p(y \mid x_k) + \log p(x_k) - \log q(x_k \mid y), \\
    \log p(y) &\ge E \log \frac1K \sum_k w_k \ge E\, \frac1K \sum_k \log w_k,

with equality where :math:`q` is the true posterior, because then every :math:`w_k` is
:math:`p(y)`. Both flows follow the bound: by default the right one (the mean, which the authors'
code follows), or the left one (`bound="importance"`), whose weights are the softmax of
:math:`\log w`. The number of draws :math:`K` is 2; theirs is 2 to 10.

The schedule is theirs for MNIST. The prior flow starts by maximum likelihood on :math:`A^+ y` (10
of 61 thousand steps), then both flows are trained jointly. The posterior flow begins near
:math:`\mathcal N(A^+ y, (\sigma_y / 2)^2)` by construction. The authors weight
:math:`\log p(y \mid x)` by 0.1 to 5, chosen for each data set, and add a penalty on image
gradients. With a weight other than 1 the objective does not bound :math:`\log p(y)`, so we do
neither.

Solvers need a denoiser. In the last 40 % of the run the flows are fixed, and a diffusion prior is
fitted by denoising score matching to fresh draws of the EMA prior flow. This prior is the one
returned, and at best as good as that flow. The flow itself is saved beside it, in `glow/`
(`unmurk.flows.glow.Glow.load`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ..bounds import Whole
from ..flows.glow import Glow
from ..flows.posterior import Posterior
from ..noise import Gaussian
from ..operators.linalg import squared_norm
from ..problem import Problem
from ..rng import normal
from .learner import Learner
from .losses import denoising, gaussian, levels
from .schedule import LRPhase

__all__ = ["AmbientFlow", "log_weights"]

JOINT, DIFFUSION = 0.1, 0.6  # fractions at which the joint bound and the diffusion prior begin
PEAK = 0.4  # learning rate of the joint objectives, as for FlowDiff's


class Density(Protocol):
    """A prior with an exact density."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) of images (B, C, H, W), shape (B,), in nats."""


def log_weights(
    posterior: Posterior,
    prior: Density,
    y: Tensor,
    problem: Problem,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Compute log w of K draws for each measurement.

    Args:
        posterior: The posterior flow.
        prior: The prior flow; an object with `log_prob(x)`.
        y: Measurements (B, ...).
        problem: How they were made, bound to these images.
        draws: The number of draws K.
        generator: Source of the draws.

    Returns:
        Log weights in nats, shape (K, B).

    >>> from types import SimpleNamespace
    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # N(y, 0.1^2) at the start
    >>> flat = SimpleNamespace(log_prob=lambda x: torch.zeros(len(x)))  # so q is exact
    >>> problem = Problem("identity", 0.1).bind(range(3), (1, 8, 8))
    >>> noise = torch.Generator().manual_seed(0)
    >>> weights = log_weights(posterior, flat, torch.zeros(3, 1, 8, 8), problem, 2, noise)
    >>> weights.shape, bool((weights.abs() < 1e-3).all())  # every weight is p(y) = 1
    (torch.Size([2, 3]), True)
    """
    context = posterior.context(y, problem)
    weights = []
    for _ in range(draws):
        z = gaussian(context.mean, generator)
        x, log_det = posterior.transform(z, context)
        normal = -squared_norm(z) / 2 - z[0].numel() / 2 * math.log(2 * math.pi)
        weights.append(problem.log_likelihood(x, y) + prior.log_prob(x) - normal + log_det)
    return torch.stack(weights)


@dataclass(eq=False, kw_only=True)
class AmbientFlow(Learner):
    """AmbientFlow, for linear operators and Gaussian noise.

    Attributes:
        bound: "elbo", or "importance" for the tighter bound.
        draws: Draws K from the posterior flow for each measurement, a whole number from 1 to 1000.

    >>> AmbientFlow(bound="importance").draws, AmbientFlow.takes(Problem("identity", 0.1))
    (2, True)
    >>> AmbientFlow(draws=0)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: draws must be a whole number from 1 to 1000, got 0
    """

    citation: ClassVar[str] = """@misc{kelkar2023ambientflow,
  title = {AmbientFlow: Invertible Generative Models from Incomplete, Noisy Measurements},
  author = {Kelkar, Varun A. and Deshpande, Rucha and Banerjee, Arindam and Anastasio, Mark A.},
  year = {2023},
  eprint = {2309.04856},
  archivePrefix = {arXiv}
}"""

    bound: Literal["elbo", "importance"] = "elbo"
    draws: Annotated[int, Whole(1, 1000)] = 2

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the learner can learn from measurements of this kind."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def initial_spread(self) -> float:
        """Return the standard deviation of the posterior at the start, half of the noise."""
        return self.problem.sigma / 2

    def extra_modules(self) -> dict[str, nn.Module]:
        """Create the prior flow."""
        return {"glow": Glow.create(self.network, self.shape)}

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Train the prior flow, then both flows, then the diffusion prior."""
        joint = (LRPhase(JOINT, DIFFUSION, PEAK),)
        glow = (LRPhase(0.0, JOINT, PEAK), *joint)
        return {"mean": joint, "flow": joint, "glow": glow, "prior": (LRPhase(DIFFUSION),)}

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step; the prior flow counts as a posterior."""
        return [{"posterior": 2.0 * self.draws}, {"prior": 1.0}]

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step; see `Learner.losses`."""
        size = math.prod(self.shape)
        if progress >= DIFFUSION:
            with torch.no_grad():
                z = normal((len(y), *self.shape), generator)
                x = cast(Glow, self.ema["glow"]).draw(z)
            return {"prior": denoising(self.prior, x, levels(len(x), generator), generator)}
        glow, problem = cast(Glow, self.modules["glow"]), self.bind(index, y.device)
        if progress < JOINT:
            return {"glow": -glow.log_prob(problem.A_dagger(y)).mean() / size}
        each = log_weights(self.posterior, glow, y, problem, self.draws, generator)
        if self.bound == "importance":
            each = each.logsumexp(0) - math.log(self.draws)
        return {"bound": -each.mean() / size}
