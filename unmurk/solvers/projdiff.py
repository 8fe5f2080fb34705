r"""ProjDiff: RED-diff's descent with a projection, and y as an image of its own noise level.

Zhang, Zhuang, Jin, Li and Gu (2024), "Unleashing the Denoising Capability of Diffusion Prior for
Solving Inverse Problems", arXiv 2406.06959. A clean image :math:`x_0` moves toward its denoised
version along the falling levels t,

.. math:: x_0 \leftarrow x_0 + \text{rate}\,(D(x_t, t) - x_0),\qquad x_t = x_0 + t\,n,

which is RED-diff's gradient with its linear weight. After each move it is projected on A x = y.

With noise in y the paper adds a second image, :math:`x_a`, that holds noise: along the right
singular vectors of A it is :math:`x_0` plus noise of level :math:`r_i = \sigma_y/s_i` (0 where
:math:`s_i = 0`). In the range of A, y determines :math:`x_a`: its coefficients are those of
:math:`A^+ y`. As :math:`x_a` is a noisy image already, :math:`x_t` is made from it by adding the
missing noise or, at lower levels, by going back from :math:`x_a` to :math:`x_0`:

.. math::
    t \ge r_i:\quad & x_t = x_a + \sqrt{t^2 - r_i^2}\,n &&\text{(all noise of y is used)} \\
    t < r_i:\quad & x_t = x_0 + (t/r_i)(x_a - x_0) &&\text{(a part of it, and no other noise)}

Both are one formula. With :math:`w_i = \min(1, t/r_i)`, in the range of A,

.. math:: x_t = x_0 + w_i (A^+ y - x_0) + \sqrt{t^2 - w_i^2 r_i^2}\,n,

which is what DDNM+ makes of :math:`x_0` at total noise t (`ddnm_correction` of
`null_space`, :math:`\Sigma_i = w_i`), so that no SVD is needed: exactly this where all nonzero
:math:`s_i` are equal, else with a smooth filter below :math:`w_i`. In the null space of A,
:math:`x_t = x_0 + t n`. There one of two forms of the released code keeps one n for all levels t <
r, and the other draws it anew; here it is drawn anew.

The rate: while t >= r, :math:`x_t` does not depend on :math:`x_0` in the range of A, and
:math:`D(x_t)` replaces :math:`x_0`, as released (rate = 1). Below r, and at all levels where y has
no noise, the option counts. Here :math:`r = \sigma_y/\lVert A\rVert` for all directions; the
release with an SVD decides for each singular value. With rate = 1 the whole is DDNM+ with eta = 1.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..bounds import Real
from ..operators.base import per_image
from .base import Requirement
from .null_space import NullSpaceSolver, ddnm_correction
from .state import State

__all__ = ["ProjDiff"]


@dataclass(frozen=True, kw_only=True)
class ProjDiff(NullSpaceSolver):
    """ProjDiff, with or without noise in y. A step takes one network evaluation and no gradient.

    Raises:
        InputError: An option is out of its bounds.

    >>> ProjDiff(rate=1.0).steps
    100
    """

    name: ClassVar[str] = "projdiff"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{zhang2024projdiff,
  title = {Unleashing the Denoising Capability of Diffusion Prior for Solving Inverse Problems},
  author = {Zhang, Jiawei and Zhuang, Jiaxin and Jin, Cheng and Li, Gen and Gu, Yuantao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2406.06959},
  archiveprefix = {arXiv}
}"""

    rate: Annotated[float, Real(1e-3, 1.999)] = 0.5
    """Length of a move toward the denoised image; it is stable between 0 and 2. Released, with
    noise: 1 for inpainting, 0.5 for super-resolution, 0.1 for blur; without: 1.1, 1.7 and 0.9."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        problem, y, t = state.problem, state.y, state.sigma
        x0, norm, first = state.x, state.memory.norm, state.step == 1
        if not first:
            state.x_t = self._add_noise(state, x0, state.randn(x0))
        state.denoised = state.denoise(state.x_t, t)
        replaced = (t * norm >= problem.sigma) & (problem.sigma > 0)
        rate = torch.ones_like(norm) if first else torch.where(replaced, 1.0, self.rate)
        x0 = x0 + per_image(rate, x0) * (state.denoised - x0)
        if problem.sigma == 0:
            x0 = x0 + problem.A_dagger(problem.residual(x0, y))
        state.x = x0

    def _add_noise(self, state: State, x0: Tensor, n: Tensor) -> Tensor:
        """Compute x_t (B, C, H, W) from x0 and standard normal noise n."""
        problem, t = state.problem, state.sigma
        if problem.sigma == 0:
            return x0 + t * n
        x_hat, fresh = ddnm_correction(problem, x0, state.y, n, t, state.memory.norm)
        return x_hat + fresh
