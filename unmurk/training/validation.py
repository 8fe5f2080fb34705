r"""Checks of what is learned, made from corrupted images alone.

There are no clean images to compare with. But a learned model says which measurements it expects
(:math:`y \sim A(x) + \sigma_y n` under the prior), and the measurements say what they are. With
:math:`d_y` values measured, the checks are

=================  ===============================================================================
`measurement_swd`  Sliced Wasserstein distance between :math:`A(x) + \sigma_y n`, with x drawn
                   from the prior, and y. Each x has the operator of the y that it is compared
                   with. The unit is that of images, and the right prior gives nearly 0. (With FID
                   features of patches this is the "proximal FID" of restoration score
                   distillation, 2025, arXiv 2505.13377.)
`chi2`             Mean of :math:`\lVert y - A x \rVert^2 / (d_y \sigma_y^2)` over posterior
                   samples x. For the exact posterior of the right prior it is 1. Below 1, x keeps
                   noise of y; above 1, x does not explain y.
`elbo`             Lower bound of :math:`\log p(y)` in nats for each value measured,
=================  ===============================================================================

.. math::

    \frac{1}{d_y} E_{x \sim q(\cdot \mid y)} \bigl[
        \log p(y \mid x) + b(x) - \log q(x \mid y) \bigr],

where :math:`b` is the prior's evidence bound. It equals :math:`\log p(y)` if :math:`q` is the
posterior and :math:`b` is tight. Here :math:`p` is the model's own density of measurements, not
the law that they come from.

All three are computed with the EMA weights. `measurement_swd` needs the prior alone; the other two
need the flow, and mean nothing before it is trained. Among the checks at which every part is in
training, the weights with the highest `elbo` are kept, since it alone judges prior and posterior
together. Learning rates fall to zero over a run, so these are usually the last weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.prior import Prior
from ..evaluation.metrics import sliced_wasserstein
from ..flows.posterior import Posterior
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, generator

__all__ = ["Checks", "chi2", "evidence_bound", "measurement_swd", "preferred"]

FRACTIONS = 0.4, 0.6, 0.8, 1.0  # of the run at which checks are made
EVALUATIONS = 15  # of the sampler, whose error is the same at every check
MIN_IMAGES, MAX_IMAGES = 16, 512  # images of a check
BOUND = 4  # noise levels for each image in the evidence bound
PATCH = 7


@dataclass(frozen=True)
class Checks:
    """The checks of a run: on which measurements, how many, and when.

    Args:
        y: Measurements (N, ...).
        problem: How they were made.
        shape: Shape (C, H, W) of the images.
        count: Images of a check; with 0 no check is made.
        seed: Seed of the choice of measurements and of all draws, which are the same at every
            check.

    >>> y = torch.zeros(1, 1, 1, 1).expand(12_000, 1, 28, 28)
    >>> checks = Checks.within(y, Problem("identity", 0.1), (1, 28, 28), kimg=100, seed=0)
    >>> checks.count, [step for step in range(1, 101) if checks.due(step, 100)]
    (187, [40, 60, 80, 100])
    """

    y: Tensor
    problem: Problem
    shape: tuple[int, int, int]
    count: int
    seed: int = 0

    @classmethod
    def within(
        cls, y: Tensor, problem: Problem, shape: tuple[int, int, int], kimg: float, seed: int
    ) -> "Checks":
        """Return checks that cost less than 5 % of a run, or none if that allows too few images.

        A training step takes about three network evaluations for an image. A check takes 15 for a
        sample of the prior, and 5 for the evidence bound.

        Args:
            y: Measurements (N, ...).
            problem: How they were made.
            shape: Shape (C, H, W) of the images.
            kimg: Budget of the run in thousands of images.
            seed: Seed of all draws.
        """
        each = EVALUATIONS + BOUND + 1
        count = min(int(0.05 * 3 * 1000 * kimg / (len(FRACTIONS) * each)), MAX_IMAGES, len(y))
        return cls(y, problem, shape, count if count >= MIN_IMAGES else 0, seed)

    def due(self, step: int, steps: int) -> bool:
        """Whether a check is made after so many of so many steps."""
        return self.count > 0 and step in {round(share * steps) for share in FRACTIONS}

    @torch.no_grad()
    def measure(self, prior: Prior, posterior: Posterior) -> dict[str, float]:
        """Compute the checks of a prior and a posterior.

        Returns:
            The values of "measurement_swd", "chi2" and "elbo".
        """
        device = prior.log_levels.device
        noise = generator(self.seed, StreamId.VALIDATION, device=device)
        choose = generator(self.seed, StreamId.VALIDATION, 1)
        index = torch.randperm(len(self.y), generator=choose)[: self.count]
        y = self.y[index.to(self.y.device)].to(device)
        x, total, values, square = [], 0.0, 0.0, 0.0
        most = max(1, prior.together(self.shape[1] * self.shape[2]) // BOUND)
        for part in torch.arange(len(index)).split(most):
            streams = PerImageGenerator(
                self.seed, part.tolist(), StreamId.VALIDATION, device=device
            )
            x.append(prior.draw(streams, EVALUATIONS))
            numbers, held = index[part].tolist(), y[part.to(device)]
            problem = self.problem.bind(numbers, self.shape).to(device)
            drawn = posterior.sample(held, problem, 1, self.seed, numbers)[0]
            measured = float(problem.measurements(held).sum())
            square += measured * chi2(drawn, held, problem)
            total += measured * evidence_bound(prior, posterior, held, problem, noise)
            values += measured
        full = self.problem.bind(index.tolist(), self.shape).to(device)
        return {
            "measurement_swd": measurement_swd(torch.cat(x), y, full, noise),
            "chi2": square / values,
            "elbo": total / values,
        }


def preferred(figures: dict[str, float], to: dict[str, float]) -> bool:
    """Whether weights with these results of the checks are better than those with others.

    >>> preferred({"elbo": 1.5}, to={"elbo": 1.2})
    True
    """
    return figures["elbo"] > to["elbo"]


def measurement_swd(x: Tensor, y: Tensor, problem: Problem, noise: torch.Generator) -> float:
    """Compute the sliced Wasserstein distance of corrupted images from measurements.

    Args:
        x: Images (B, C, H, W), which are corrupted afresh.
        y: Measurements (B, ...).
        problem: The problem, bound to the images of both.
        noise: Source of the noise.

    Returns:
        The distance, in the unit of images.

    >>> problem = Problem("identity", 0.1).bind(range(64), (1, 4, 4))
    >>> noise = torch.Generator().manual_seed(0)
    >>> x = torch.rand(64, 1, 4, 4, generator=noise)
    >>> y = problem.simulate(x, 0)
    >>> measurement_swd(x, y, problem, noise) < 0.1 < measurement_swd(x + 0.5, y, problem, noise)
    True
    """
    clean = problem.A(x)
    extra = torch.randn(clean.shape, generator=noise, device=noise.device)
    again = problem.operator.apply_mask(clean + problem.sigma * extra)
    if y.ndim != 4 or min(y.shape[-2:]) < PATCH:
        again, y = (v.reshape(len(v), 1, 1, -1) for v in (again, y))
        return sliced_wasserstein(again, y, patch=None)
    return sliced_wasserstein(again, problem.operator.apply_mask(y), patch=PATCH)


def chi2(x: Tensor, y: Tensor, problem: Problem) -> float:
    r"""Compute :math:`\lVert y - A x \rVert^2 / (d_y \sigma_y^2)`, averaged over images.

    Args:
        x: Images (B, C, H, W).
        y: Their measurements (B, ...).
        problem: The problem, bound to these images.

    Returns:
        A number near 1 for posterior samples.

    >>> problem = Problem("identity", noise=0.1).bind(range(2), (1, 4, 4))
    >>> round(chi2(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1), problem), 4)
    1.0
    """
    square = problem.residual(x, y).square().sum()
    return float(square / (problem.sigma**2 * problem.measurements(y).sum()))


@torch.no_grad()
def evidence_bound(
    prior: Prior, posterior: Posterior, y: Tensor, problem: Problem, noise: torch.Generator
) -> float:
    """Estimate a lower bound of the mean log p(y), in nats for each value measured.

    Args:
        prior: The prior; an object with `nelbo`.
        posterior: The posterior.
        y: Measurements (B, ...).
        problem: The problem, bound to these images.
        noise: Source of all draws.

    >>> from types import SimpleNamespace
    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # N(y, 0.1^2) at the start
    >>> flat = SimpleNamespace(nelbo=lambda x, noise, draws: 0.0)  # so q is exact
    >>> problem = Problem("identity", 0.1).bind(range(3), (1, 8, 8))
    >>> noise = torch.Generator().manual_seed(0)
    >>> bound = evidence_bound(flat, posterior, torch.zeros(3, 1, 8, 8), problem, noise)
    >>> abs(bound) < 1e-4  # log p(y) = 0
    True
    """
    context = posterior.context(y, problem)
    z = torch.randn(context.mean.shape, generator=noise, device=noise.device)
    x = posterior.transform(z, context)[0]
    likelihood = problem.log_likelihood(x, y)
    bound = likelihood - prior.nelbo(x, noise, draws=BOUND) - posterior.log_density(x, context)
    return float(bound.sum() / problem.measurements(y).sum())
