r"""The correction of DDNM+: the range of A from the measurement, its null space from the prior.

Wang, Yu and Zhang (2022), arXiv 2212.00490. A denoised image :math:`x_0` is corrected by y, and
fresh noise brings what y carries to a total of standard deviation c:

.. math::
    \hat x = x_0 + \Sigma A^+ (y - A x_0),\qquad
    x = \hat x + \text{fresh noise of covariance } \Phi.

Without noise in y, :math:`\Sigma = I` and :math:`\Phi = c^2 I`: DDNM. With noise, y carries
:math:`\Sigma A^+ \sigma_y n` into :math:`x`. DDNM+ requires that this and the fresh noise add up
to :math:`c^2` in every direction, and that :math:`\Sigma` is as near to I as possible. On the
right singular vectors of A, with singular values :math:`s_i` (the paper's appendix on DDNM+;
:math:`s_i = 0` has :math:`\Phi_i = c^2`),

.. math::
    \Sigma_i = \min(1, r_i),\qquad \Phi_i = c^2 - (\Sigma_i \sigma_y/s_i)^2,
    \qquad r_i = c\,s_i/\sigma_y.

This needs the SVD of A. Here it is replaced by what any linear A has, the proximal map

.. math::
    P(z, y) &= \arg\min_x \gamma\lVert A x - y\rVert^2 + \lVert x - z\rVert^2,
        \qquad u_i = 1/(1 + \gamma s_i^2), \\
    \hat x &= x_0 + w\,(P(x_0, y) - x_0) \quad\text{that is}\quad \Sigma_i = w (1 - u_i), \\
    \text{fresh} &= c\,(2 P(n, 0) - n) \quad\text{that is}\quad \Phi_i = c^2 (1 - 2 u_i)^2.

The first requirement, :math:`(\Sigma_i \sigma_y/s_i)^2 + \Phi_i = c^2`, holds for every i exactly
when :math:`w\sqrt\gamma = 2c/\sigma_y`, as :math:`(1-u)^2/s^2 = \gamma u (1-u)`. One parameter
remains. The largest singular value, S, sets it: with :math:`r = c S/\sigma_y`,

.. math:: \rho = \max(1, r + \sqrt{r^2-1}),\qquad \gamma = (\rho/S)^2,\qquad w = 2r/\rho.

Then :math:`\Sigma = \min(1, r)` at :math:`s_i = S`. So where all nonzero :math:`s_i` are equal
(:math:`A A^\top = S^2 I` on the range: masks, block averages, the identity) this is DDNM+ itself.
Elsewhere :math:`\Sigma_i = w\gamma s_i^2/(1 + \gamma s_i^2)` rises with :math:`s_i` and
:math:`\sqrt\gamma s_i/(1 + \gamma s_i^2)` is at most 1/2, so :math:`\Sigma_i \le \min(1, r_i)`:
the total noise is exactly that of DDNM+, and :math:`\Sigma` is a smooth filter below its sharp
one. As :math:`\sigma_y` falls to 0 it becomes DDNM.

`ddnm` and `projdiff` take their steps with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.linalg import per_image
from ..problem import Problem
from .base import AnnealedSolver
from .state import State

__all__ = ["NullSpaceSolver", "ddnm_correction"]


@dataclass(frozen=True, kw_only=True)
class NullSpaceSolver(AnnealedSolver):
    """An annealed solver that corrects images by `ddnm_correction`.

    `state.memory.norm` holds the largest singular value of A, (B,).

    >>> class Denoised(NullSpaceSolver):
    ...     def step(self, state: State) -> None:
    ...         state.x = state.x_t = state.denoised = state.denoise(state.x_t, state.sigma)
    >>> y, zero = torch.ones(1, 1, 1, 1), lambda x, sigma: 0 * x
    >>> (state,) = Denoised(levels=[1.0]).iterate(y, Problem("identity", 0.1), zero)
    >>> state.memory.norm
    tensor([1.])
    """

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`."""
        super().start(state, init)
        state.memory.norm = state.problem.operator.norm(state.x_t)


def ddnm_correction(
    problem: Problem, x0: Tensor, y: Tensor, n: Tensor, c: float, operator_norm: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\hat x` and the fresh noise of this module's equations.

    Args:
        problem: Operator and noise, bound to the images.
        x0: Denoised images (B, C, H, W).
        y: Measurements (B, ...).
        n: Standard normal noise (B, C, H, W).
        c: Standard deviation of the noise of y and the fresh noise together.
        operator_norm: Largest singular value of A, shape (B,).

    Returns:
        Corrected images and noise, both (B, C, H, W).

    >>> zero, one = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> problem = Problem("identity", 0.1).bind([0], (1, 1, 2))
    >>> ddnm_correction(problem, zero, one, one, 0.05, torch.ones(1))  # Sigma = r = 1/2, Phi = 0
    (tensor([[[[0.5000, 0.5000]]]]), tensor([[[[0., 0.]]]]))
    """
    if problem.sigma == 0:
        return x0 + problem.A_dagger(problem.residual(x0, y)), c * n
    r = c * operator_norm / problem.sigma
    rho = (r + (r.square() - 1).clamp_min(0).sqrt()).clamp_min(1)
    gamma, weight = (rho / operator_norm).square(), per_image(2 * r / rho, x0)
    x_hat = x0 + weight * (problem.operator.prox_l2(x0, y, gamma) - x0)
    fresh = 2 * problem.operator.prox_l2(n, torch.zeros_like(y), gamma) - n
    return x_hat, c * fresh
