r"""FAST-DIPS: the image nearest to the denoised one that fits y within its noise.

Kim, Shin and Lim (2026), arXiv 2603.01591, in its pixel form. From each falling level t to the
next level s,

.. math::
    x_0 &= D(x_t, t) \\
    w   &= \arg\min_x \frac{\lVert x - x_0\rVert^2}{2t^2}
           \quad\text{subject to}\quad \lVert y - A(x)\rVert \le \varepsilon \\
    x_s &= w + s\,n,\qquad n \sim \mathcal{N}(0, I).

Some iterations of ADMM approximate the constrained fit. They hold :math:`v = A(w)` in the ball B
of radius :math:`\varepsilon` around y, with the scaled multiplier u:

.. math::
    w &\leftarrow \arg\min_x \frac{\lVert x - x_0\rVert^2}{2t^2} + \frac{\rho}{2}
         \lVert A(x) - (v - u)\rVert^2 \\
    v &\leftarrow \text{the projection of } A(w) + u \text{ on } B \\
    u &\leftarrow u + A(w) - v.

Differences from the released code:

- w is clipped to [0, 1] in every iteration.
- The fit of w is exact where A is linear. Elsewhere it is a few conjugate gradients with the
  Gauss-Newton length, which is halved until the energy does not increase (`data_term.prox`). The
  release takes one to five such steps along the gradient for every A.
- The first v is the projection of :math:`A(x_0)` on B, with :math:`u = 0`. The release starts at
  :math:`v = A(x_0)`, which leaves :math:`w = x_0` in its first iteration.
- :math:`\varepsilon = \text{radius}\;\sigma_y \sqrt{d_y}` for :math:`d_y` measured values, so
  radius = 1 fits y as well as the truth does. The release has :math:`\varepsilon = 0.05` for any
  noise and size, which is next to nothing: radius 0.
- Units: images of the release lie in [-1, 1]. There the first term is the same, as the level
  doubles too, and the second is four times as large: its :math:`\rho` of 200 is 800 here.
- The result is the last w; the release returns the last :math:`x_0`, which lacks the last
  correction by y.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..operators.base import per_image
from ..problem import Problem
from .base import AnnealedSolver, Count, Level, PositiveWeight, Steps, Weight
from .data_term import prox
from .state import State

__all__ = ["FastDips"]


@dataclass(frozen=True, kw_only=True)
class FastDips(AnnealedSolver):
    """FAST-DIPS, for any A. A step takes one network evaluation and no gradient.

    Raises:
        InputError: An option is out of its bounds.

    >>> FastDips(radius=1.0).iterations
    3
    """

    name: ClassVar[str] = "fast-dips"
    citation: ClassVar[str] = """@inproceedings{kim2026fastdips,
  title = {FAST-DIPS: Adjoint-Free Analytic Steps and Hard-Constrained Likelihood Correction for
           Diffusion-Prior Inverse Problems},
  author = {Kim, Minwoo and Shin, Seunghyeok and Lim, Hongki},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  eprint = {2603.01591},
  archiveprefix = {arXiv}
}"""

    steps: Steps = 75
    """Noise levels. Released: 75, for blur 50, for nonlinear operators 150."""
    rho: PositiveWeight = 200.0
    """Weight of A(x) = v, for images in [0, 1]. Released: 200 for images in [-1, 1], which is 800
    here, and 5 (20 here) for clipped intensities."""
    radius: Weight = 0.0
    """eps in units of the misfit of the truth."""
    iterations: Count = 3
    """Iterations of ADMM at each level. Released: 2 or 3."""
    data_steps: Count = 5
    """Steps of the fit in each iteration where the operator is not linear. Released: 1 to 5."""
    sigma_min: Level = 0.05
    """Last noise level. Released: 0.05, and 50 as the first."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        state.denoised = state.denoise(state.x_t, state.sigma)
        state.x = self._fit(state.problem, state.denoised, state.y, state.sigma)
        state.x_t = state.x + state.sigma_next * state.randn(state.x)

    def _fit(self, problem: Problem, x0: Tensor, y: Tensor, t: float) -> Tensor:
        """Compute w, (B, C, H, W)."""
        eps = self.radius * problem.sigma * problem.measurements(y).sqrt()
        v, u = _project(problem, problem.A(x0), y, eps), torch.zeros_like(y)
        for _ in range(self.iterations):  # of ADMM: w, v, u
            w = prox(problem, x0, v - u, t, self.rho**-0.5, self.data_steps).clamp(0, 1)
            observed = problem.A(w)
            v = _project(problem, observed + u, y, eps)
            u = problem.operator.apply_mask(u + observed - v)
        return w


def _project(problem: Problem, v: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    """Project v on the ball of radius eps (B,) around y; shape of y."""
    away = problem.operator.apply_mask(v - y)
    scale = (eps / away.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)
    return y + per_image(scale, y) * away
