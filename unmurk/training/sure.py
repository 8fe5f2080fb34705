"""SURE-Score: a denoiser by Stein's unbiased risk estimate, a score from what it denoises.

Aali et al. (2023, arXiv 2305.01166). y = A x + sigma_y n. For an estimate h(y) Stein's lemma gives
the error that cannot be seen out of quantities that can (with d_y numbers measured),

    E ||A h(y) - A x||^2 = E [ ||A h(y) - y||^2 - d_y sigma_y^2 + 2 sigma_y^2 div_y A h(y) ],

and the divergence needs one more evaluation: div ~ b . (A h(y + e b) - A h(y)) / e, b ~ N(0, I)
(Ramani et al., 2008; e = 1e-3 as in the authors' code). Where A A^T = g I this is the generalised
SURE of Eldar (2009, arXiv 0804.3010) up to g; elsewhere that one has A^+, which multiplies noise.

The denoiser and the score network are trained jointly,

    L = SURE(h) / sigma_y^2 + w E || D(h(y) + sigma n, sigma) - h(y) ||^2_weighted,

w growing from 0 to 1 over the prior's time (the authors' weight grows with the epoch). For A = I
they are one network, h(y) = D(y, sigma_y), as in the paper; for other A h is the posterior's mean
network m(y). The level weights are ours (`objectives`; theirs is 1 / sigma^2 too). Unlike in the
authors' code no gradient reaches h from the second term, which a constant h would make 0.

Images h(y) are means, smoother than x: so is the prior. What A does not see stays unseen: SURE
leaves h free there, and masks that hide much defeat the method.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..devices import network_precision
from ..noise import Gaussian
from ..problem import Problem
from .amortised import PRIOR, Amortised
from .losses import denoising, gaussian, levels
from .trainer import LRPhase

__all__ = ["Sure", "sure"]

STEP = 1e-3  # of the finite difference, in units of intensity


def sure(
    h: Callable[[Tensor], Tensor], y: Tensor, problem: Problem, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Stein's estimate of ||A h(y) - A x||^2 for each number measured, (B,), and h(y).

    Args:
        h: Images (B, C, H, W) out of measurements (B, ...).
        y: Measurements (B, ...).
        problem: How they were made.
    """
    probe = problem.operator.apply_mask(gaussian(y, generator))
    x = h(y)
    change = problem.A(h(y + STEP * probe)) - problem.A(x)
    divergence = (probe * change).flatten(1).sum(1) / STEP
    misfit = problem.residual(x, y).flatten(1).square().sum(1)
    variance = problem.sigma**2
    return (misfit + 2 * variance * divergence) / problem.measurements(y) - variance, x


class Sure(Amortised):
    """The method, for linear A and Gaussian noise."""

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the method can learn from such measurements."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def spans(self) -> dict[str, tuple[LRPhase, ...]]:
        """The prior first, then the posterior; m from the start where it is the denoiser."""
        spans = super().spans()
        if not self.denoising:
            spans["mean"] = (LRPhase(0.0, PRIOR), LRPhase(PRIOR))
        return spans

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        first = {"prior": 3.0} if self.denoising else {"mean": 2.0, "prior": 1.0}
        return [first, {"posterior": 1.0, "mean": 1.0}]

    def prior_losses(
        self, y: Tensor, rows: Tensor, part: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """SURE of the denoiser, and score matching on what it denoises."""
        problem = self.bind(rows, y)

        def h(y: Tensor) -> Tensor:
            if self.denoising:
                return self.prior.denoise(y, problem.sigma)
            return self.posterior.mean(y, problem)

        with network_precision(None):  # bf16 cannot tell h(y + e b) from h(y)
            risk, x = sure(h, y, problem, generator)
        score = denoising(self.prior, x.detach(), levels(len(y), generator), generator)
        return {"denoiser": risk.mean() / problem.sigma**2, "prior": part * score}
