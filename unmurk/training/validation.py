"""How good a prior is, told from corrupted images alone: figures taken while learning.

No clean image is at hand, but what is learnt says what measurements it expects (y ~ A(x) + sigma_y
n under the prior) and the measurements say what they are:

    gap        sliced Wasserstein distance between A(x) + sigma_y n, x drawn from the prior, and y,
               each x with the operator of the y it stands beside; in units of the image. Near 0
               for the right prior. (With the features of FID for patches this is the "proximal
               FID" of restoration score distillation, 2025, arXiv 2505.13377.)
    residual   chi-square of posterior draws: the mean of ||y - A x||^2 / (m sigma_y^2). Over the
               y of a set and x ~ p(x | y) it is 1 for the exact posterior of the right prior;
               below 1 x keeps noise of y, above 1 it does not explain y.
    evidence   lower bound of log p(y) in nats for each number that y measures,

                   E_{x ~ q(.|y)} [ log p(y | x) + b(x) - log q(x | y) ] / m,

               b the prior's evidence bound: equal to log p(y) if q is the posterior and b tight.
               p is the model's own density of measurements, not the law that they come from.

All three are of the averaged weights. "measurement_swd" needs the prior alone; the other two need
the flow, and mean nothing before it is trained. Of the moments at which every part is in
training, the weights with the highest evidence are kept: it alone judges prior and posterior
together. Rates fall to zero over a run, so that these are as a rule the last.
docs/benchmark_choice.md has this choice beside others and beside an oracle's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.prior import Prior
from ..evaluation.metrics import sliced_wasserstein
from ..flows.posterior import Posterior
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, generator

__all__ = ["Checks", "evidence_bound", "measurement_swd", "preferred", "chi2"]

SHARES = 0.4, 0.6, 0.8, 1.0  # of the run at which figures are taken
EVALUATIONS = 15  # of the sampler: its error is the same at every check
FEWEST, MOST = 16, 512  # images behind a figure
BOUND = 4  # noise levels for each image of the evidence bound
PATCH = 7


@dataclass(frozen=True)
class Checks:
    """What is measured, how often, and on how many images.

    Args:
        y: Measurements (N, ...).
        problem: How they were made.
        shape: Shape (C, H, W) of the images.
        count: Images behind a figure.
        seed: Seed of the choice of measurements and of every draw; the same at every check.
    """

    y: Tensor
    problem: Problem
    shape: tuple[int, int, int]
    count: int
    seed: int = 0

    @classmethod
    def within(
        cls, y: Tensor, problem: Problem, shape: tuple[int, int, int], kimg: float, seed: int
    ) -> "Checks | None":
        """Checks that cost less than 5 % of a run; None where that is too few images to tell.

        An image costs a step of training about three evaluations of a network; a check takes
        EVALUATIONS for a sample of the prior and BOUND + 1 for the evidence.
        """
        each = EVALUATIONS + BOUND + 1
        count = min(int(0.05 * 3 * 1000 * kimg / (len(SHARES) * each)), MOST, len(y))
        return cls(y, problem, shape, count, seed) if count >= FEWEST else None

    def due(self, step: int, steps: int) -> bool:
        """Whether figures are taken after so many of so many steps."""
        return step in {round(share * steps) for share in SHARES}

    @torch.no_grad()
    def measure(self, prior: Prior, posterior: Posterior) -> dict[str, float]:
        """The three figures."""
        device = prior.log_levels.device
        noise = generator(self.seed, StreamId.VALIDATION, device=device)
        rows = torch.randperm(len(self.y), generator=generator(self.seed, StreamId.VALIDATION, 1))[
            : self.count
        ]
        y = self.y[rows.to(self.y.device)].to(device)
        x, total, numbers, square = [], 0.0, 0.0, 0.0
        most = max(1, prior.together(self.shape[1] * self.shape[2]) // BOUND)
        for part in torch.arange(len(rows)).split(most):
            streams = PerImageGenerator(
                self.seed, part.tolist(), StreamId.VALIDATION, device=device
            )
            x.append(prior.draw(streams, EVALUATIONS))
            some, held = rows[part].tolist(), y[part.to(device)]
            problem = self.problem.bind(some, self.shape).to(device)
            drawn = posterior.sample(held, problem, 1, self.seed, some)[0]
            measured = float(problem.measurements(held).sum())
            square += measured * chi2(drawn, held, problem)
            total += measured * evidence_bound(prior, posterior, held, problem, noise)
            numbers += measured
        full = self.problem.bind(rows.tolist(), self.shape).to(device)
        return {
            "measurement_swd": measurement_swd(torch.cat(x), y, full, noise),
            "chi2": square / numbers,
            "elbo": total / numbers,
        }


def preferred(figures: dict[str, float], to: dict[str, float]) -> bool:
    """Whether weights with these figures are kept rather than those with others."""
    return figures["elbo"] > to["elbo"]


def measurement_swd(x: Tensor, y: Tensor, problem: Problem, noise: torch.Generator) -> float:
    """Distance of re-corrupted images x (B, C, H, W) from measurements y (B, ...).

    Args:
        problem: Bound to the rows of both.
    """
    clean = problem.A(x)
    extra = torch.randn(clean.shape, generator=noise, device=noise.device)
    again = problem.operator.apply_mask(clean + problem.sigma * extra)
    if y.ndim != 4 or min(y.shape[-2:]) < PATCH:
        again, y = (v.reshape(len(v), 1, 1, -1) for v in (again, y))
        return sliced_wasserstein(again, y, patch=None)
    return sliced_wasserstein(again, problem.operator.apply_mask(y), patch=PATCH)


def chi2(x: Tensor, y: Tensor, problem: Problem) -> float:
    """Chi-square for each number measured, of images x (B, C, H, W) for measurements y."""
    square = problem.residual(x, y).square().sum()
    return float(square / (problem.sigma**2 * problem.measurements(y).sum()))


@torch.no_grad()
def evidence_bound(
    prior: Prior, posterior: Posterior, y: Tensor, problem: Problem, noise: torch.Generator
) -> float:
    """Lower bound of the mean log p(y), in nats for each number measured."""
    context = posterior.context(y, problem)
    z = torch.randn(context.mean.shape, generator=noise, device=noise.device)
    x = posterior.transform(z, context)[0]
    likelihood = problem.log_likelihood(x, y)
    bound = likelihood - prior.nelbo(x, noise, draws=BOUND) - posterior.log_density(x, context)
    return float(bound.sum() / problem.measurements(y).sum())
