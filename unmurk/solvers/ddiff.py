r"""DDiff: dual ascent diffusion, DiffPIR with the multiplier of ADMM.

Kim, Levy and Wetzstein (2025), "Dual Ascent Diffusion for Inverse Problems", arXiv 2505.17353,
eqs. 6 and 10 to 12. ADMM on :math:`\min -\log p(y \mid x) - \log p(z)` subject to :math:`x = z`,
with the denoiser in place of the step in z, and the scaled multiplier u. From each level t to the
next level s,

.. math::
    z   &= D(x_t, t), \text{ clipped to } [0, 1] \\
    v   &= \arg\min_x \frac{\lVert y - A(x)\rVert^2}{2\sigma_y^2}
           + \frac{\lVert x - (z - u)\rVert^2}{2 r^2},\qquad r^2 = t^2/\lambda \\
    e   &= (x_t - v)/t \\
    x_s &= v + u + s\,(\sqrt{1-\zeta}\,e + \sqrt\zeta\,n),\qquad n \sim \mathcal{N}(0, I) \\
    u   &\leftarrow (s/t)^{\text{rescale}}\,(u + v - z).

With u = 0 it is DiffPIR. In ADMM z would be the denoised v + u; here v + u first receives the
noise of level s, so that the network is evaluated on images like those of its training. The result
is the last v.

Differences from the released code:

- v is the exact minimum where A is linear, and the noise of y sets its weight. The release takes
  one gradient step from z - u, of a length given for each task (2.5 to 50 in the norm of a whole
  image of 256 x 256 x 3, times 3.3, and a thirtieth of that at the last 9 % of levels).
- u is the scaled multiplier, :math:`u = r^2 \mu` with the multiplier :math:`\mu` itself, and r
  falls from level to level: rescale = 2 keeps :math:`\mu`, 0 keeps u. The release uses 0, with
  which the exact v lets u grow: while r is far above :math:`\sigma_y`, every level adds y - z to u
  where y measures the image.
- zeta = 1 is released for inpainting and super-resolution. For other linear tasks the fraction of
  fresh noise is :math:`1 - (s/t)^2`, and 0 at the last 5 to 8 % of 1000 levels.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..bounds import Real
from .base import AnnealedSolver, Fraction, PositiveWeight, ProximalSolver
from .state import State

__all__ = ["Ddiff"]


@dataclass(frozen=True, kw_only=True)
class Ddiff(ProximalSolver, AnnealedSolver):
    """Dual ascent diffusion, for any A. A step takes one network evaluation and no gradient.

    It was released with 1000 levels.

    Raises:
        InputError: An option is out of its bounds.

    >>> Ddiff(steps=50, rescale=0.0).zeta
    1.0
    """

    name: ClassVar[str] = "ddiff"
    citation: ClassVar[str] = """@inproceedings{kim2026ddiff,
  title = {Dual Ascent Diffusion for Inverse Problems},
  author = {Kim, Minseo and Levy, Axel and Wetzstein, Gordon},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2026},
  eprint = {2505.17353},
  archiveprefix = {arXiv}
}"""

    lam: PositiveWeight = 1.0
    """lambda, the weight of the denoised image against y, as for `diffpir`: a higher one fits y
    less. 1 takes the error of the denoised image to be t."""
    zeta: Fraction = 1.0
    """Fraction of fresh noise in the variance, 0 to 1."""
    rescale: Annotated[float, Real(0, 2)] = 1.0
    """Exponent of u as r falls: 0 keeps u (released), 2 keeps the multiplier (ADMM). Of the values
    between them 1 did best with a learned prior."""

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`."""
        super().start(state, init)
        state.memory.u = torch.zeros_like(state.x_t)

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s, u = state.sigma, state.sigma_next, state.memory.u
        z = state.denoised = state.denoise(state.x_t, t).clamp(0, 1)  # ADMM's step in z
        v = state.x = self.prox(state, z - u, t / math.sqrt(self.lam))  # its step in x
        e, n = (state.x_t - v) / t, state.randn(v)
        state.x_t = v + u + s * (math.sqrt(1 - self.zeta) * e + math.sqrt(self.zeta) * n)
        state.memory.u = (s / t) ** self.rescale * (u + v - z)
