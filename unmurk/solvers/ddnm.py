r"""DDNM: the range of A from the measurement, its null space from the prior.

Wang, Yu and Zhang (2022), arXiv 2212.00490. At every level t the denoised image
:math:`x_0 = D(x_t, t)` is corrected, and noised to the next level s (eqs. 17 and 18):

.. math::
    \hat x &= x_0 + \Sigma A^+ (y - A x_0), \\
    x_s &= \hat x + s\sqrt{1-\eta^2}\,e + \text{fresh noise of covariance } \Phi,
    \qquad e = (x_t - x_0)/t.

Images are variance-exploding here: the paper's divided by :math:`\sqrt{\bar\alpha}`. Its sampler
in the experiments is DDIM with this eta; in its eq. 19 that makes the weight :math:`a_t` of
:math:`\hat x` 1, and the standard deviation :math:`\sigma_t` of the noise :math:`c = \eta s`.

`null_space` has :math:`\Sigma` and :math:`\Phi`: without noise in y they are :math:`I` and
:math:`c^2 I` (DDNM), and with noise those of DDNM+, by proximal maps in place of an SVD.

In the last step c = 0: with noise in y the result is the last denoised image itself.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import Fraction, Requirement
from .null_space import NullSpaceSolver, ddnm_correction
from .state import State

__all__ = ["Ddnm"]


@dataclass(frozen=True, kw_only=True)
class Ddnm(NullSpaceSolver):
    """DDNM, and with noise DDNM+. A step takes one network evaluation and no gradient.

    Raises:
        InputError: An option is out of its bounds.

    >>> Ddnm(steps=50).eta
    1.0
    """

    name: ClassVar[str] = "ddnm"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{wang2023ddnm,
  title = {Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model},
  author = {Wang, Yinhuai and Yu, Jiwen and Zhang, Jian},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  eprint = {2212.00490},
  archiveprefix = {arXiv}
}"""

    eta: Fraction = 1.0
    """Fraction of fresh noise, 0 to 1. Released: 0.85. Less than 1 keeps noise from level to
    level, and with it the noise of y, which is then counted more than once: with noise in y leave
    it at 1."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s = state.sigma, state.sigma_next
        x0 = state.denoised = state.denoise(state.x_t, t)
        n, norm = state.randn(x0), state.memory.norm
        # eq. 17, then eq. 18
        x_hat, fresh = ddnm_correction(state.problem, x0, state.y, n, self.eta * s, norm)
        e = s * math.sqrt(1 - self.eta**2) * (state.x_t - x0) / t
        state.x = state.x_t = x_hat + e + fresh
