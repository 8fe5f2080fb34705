r"""SURE-Score: a denoiser by Stein's unbiased risk estimate, and a score from its outputs.

Aali et al. (2023, arXiv 2305.01166). :math:`y = A x + \sigma_y n` with :math:`d_y` values
measured. For an estimate :math:`h(y)`, Stein's lemma expresses the unknown error by known
quantities,

.. math::

    E\, \lVert A h(y) - A x \rVert^2 = E \bigl[ \lVert A h(y) - y \rVert^2 - d_y \sigma_y^2
        + 2 \sigma_y^2 \operatorname{div}_y A h(y) \bigr] .

The divergence needs one more evaluation,

.. math::

    \operatorname{div}_y A h(y) \approx b^\top\, \frac{A h(y + \epsilon b) - A h(y)}{\epsilon},
    \qquad b \sim \mathcal N(0, I)

(Ramani et al., 2008; :math:`\epsilon = 10^{-3}` as in the authors' code). Where
:math:`A A^\top = g I` this is the generalized SURE of Eldar (2009, arXiv 0804.3010) up to
:math:`g`. Elsewhere that estimate has :math:`A^+`, which multiplies noise.

The denoiser and the score network are trained jointly,

.. math::

    \mathcal L = \frac{\mathrm{SURE}(h)}{\sigma_y^2}
        + w\, E\; \lambda(\sigma)\, \lVert D(h(y) + \sigma n, \sigma) - h(y) \rVert^2,

with :math:`w` growing from 0 to 1 while the prior is trained (the authors' weight grows with the
epoch). For :math:`A = I` they are one network, :math:`h(y) = D(y, \sigma_y)`, as in the paper. For
other :math:`A`, :math:`h` is the mean network :math:`m(y)` of the posterior. The weights
:math:`\lambda(\sigma)` are those of `losses`. Unlike in the authors' code, no gradient reaches
:math:`h` from the second term, which a constant :math:`h` would make 0.

Limits: the images :math:`h(y)` are means, smoother than :math:`x`, and so is the prior. SURE
leaves :math:`h` free where :math:`A` observes nothing, so masks that hide much defeat the method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..devices import network_precision
from ..noise import Gaussian
from ..operators.linalg import batch_dot, squared_norm
from ..problem import Problem
from .losses import denoising, gaussian, levels
from .prior_first import PRIOR_END, PriorFirst
from .schedule import LRPhase

__all__ = ["Sure", "sure"]

EPSILON = 1e-3  # step of the finite difference, in units of intensity


def sure(
    h: Callable[[Tensor], Tensor], y: Tensor, problem: Problem, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Compute Stein's estimate of :math:`\lVert A h(y) - A x \rVert^2 / d_y`.

    Args:
        h: A function from measurements (B, ...) to images (B, C, H, W).
        y: Measurements (B, ...).
        problem: How they were made, bound to these images.
        generator: Source of the probe b.

    Returns:
        The estimates, shape (B,), and the images h(y).

    >>> problem = Problem("identity", 0.1).bind(range(400), (1, 8, 8))
    >>> x, noise = torch.full((400, 1, 8, 8), 0.5), torch.Generator().manual_seed(0)
    >>> y = problem.simulate(x, 0)
    >>> risk, half = sure(lambda y: y / 2, y, problem, noise)  # without x
    >>> round(float(risk.mean()), 3), round(float((half - x).square().mean()), 3)
    (0.065, 0.065)
    """
    probe = problem.operator.apply_mask(gaussian(y, generator))
    x = h(y)
    change = problem.A(h(y + EPSILON * probe)) - problem.A(x)
    divergence = batch_dot(probe, change) / EPSILON
    misfit = squared_norm(problem.residual(x, y))
    variance = problem.sigma**2
    return (misfit + 2 * variance * divergence) / problem.measurements(y) - variance, x


@dataclass(eq=False, kw_only=True)
class Sure(PriorFirst):
    """SURE-Score, for linear operators and Gaussian noise.

    >>> Sure.takes(Problem("blur:gaussian,sigma=1", 0.1))
    True
    >>> Sure.takes(Problem("identity", "poisson,gain=0.01"))
    False
    """

    citation: ClassVar[str] = """@misc{aali2023solving,
  title = {Solving Inverse Problems with Score-Based Generative Priors Learned from Noisy Data},
  author = {Aali, Asad and Arvinte, Marius and Kumar, Sidharth and Tamir, Jonathan I.},
  year = {2023},
  eprint = {2305.01166},
  archivePrefix = {arXiv}
}"""

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the learner can learn from measurements of this kind."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Train the prior first, then the posterior; m from the start where it is the denoiser."""
        phases = super().phases()
        if not self.denoising:
            phases["mean"] = (LRPhase(0.0, PRIOR_END), LRPhase(PRIOR_END))
        return phases

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        first = {"prior": 3.0} if self.denoising else {"mean": 2.0, "prior": 1.0}
        return [first, {"posterior": 1.0, "mean": 1.0}]

    def prior_losses(
        self, y: Tensor, index: Tensor, part: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute SURE of the denoiser, and score matching on its outputs."""
        problem = self.bind(index, y.device)

        def h(y: Tensor) -> Tensor:
            if self.denoising:
                return self.prior.denoise(y, problem.sigma)
            return self.posterior.mean(y, problem)

        with network_precision(None):  # in bf16, h(y + epsilon b) would equal h(y)
            risk, x = sure(h, y, problem, generator)
        score = denoising(self.prior, x.detach(), levels(len(y), generator), generator)
        return {"denoiser": risk.mean() / problem.sigma**2, "prior": part * score}
