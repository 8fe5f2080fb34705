r"""DiffPIR: denoise, fit to y, add noise.

Zhu, Zhang, Liang, Cao, Wen, Timofte and Van Gool (2023), arXiv 2305.08995, Algorithm 1. In
variance-exploding form, from each level t to the next level s,

.. math::
    x_0    &= D(x_t, t) \\
    \hat x &= \arg\min_x \lVert y - A(x)\rVert^2 + \rho_t \lVert x - x_0\rVert^2,
              \qquad \rho_t = \lambda \sigma_y^2/t^2 \\
    e      &= (x_t - \hat x)/t \\
    x_s    &= \hat x + s\,(\sqrt{1-\zeta}\,e + \sqrt\zeta\,z),\qquad z \sim \mathcal{N}(0, I).

The second line, the data step of half-quadratic splitting, is Bayes' rule for a Gaussian: divided
by :math:`2\sigma_y^2` it is the proximal map of the data term around :math:`x_0` with standard
deviation :math:`t/\sqrt\lambda`. So :math:`\lambda = 1` takes the error of :math:`x_0` to be t.
The fourth line mixes the noise that :math:`\hat x` predicts with fresh noise.

Units: the ratio :math:`\rho_t` has no unit if :math:`\sigma_y` and t refer to the same images. The
released code divides a :math:`\sigma_y` of [0, 1] images by a t of [-1, 1] images, which is twice
as large: its lambda is 4 times the lambda here.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import AnnealedSolver, Fraction, PositiveWeight, ProximalSolver
from .state import State

__all__ = ["DiffPir"]


@dataclass(frozen=True, kw_only=True)
class DiffPir(ProximalSolver, AnnealedSolver):
    """DiffPIR, for any A. A step takes one network evaluation and no gradient.

    It was released with 20 to 100 levels and a noise floor of 0.001.

    Raises:
        InputError: An option is out of its bounds.

    >>> DiffPir(steps=20).lam
    1.75
    """

    name: ClassVar[str] = "diffpir"
    citation: ClassVar[str] = """@inproceedings{zhu2023diffpir,
  title = {Denoising Diffusion Models for Plug-and-Play Image Restoration},
  author = {Zhu, Yuanzhi and Zhang, Kai and Liang, Jingyun and Cao, Jiezhang and Wen, Bihan and
            Timofte, Radu and Van Gool, Luc},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year = {2023},
  eprint = {2305.08995},
  archiveprefix = {arXiv}
}"""

    lam: PositiveWeight = 1.75
    """lambda, the weight of the denoised image against y: a higher one fits y less. Released: 7,
    here 7 / 4."""
    zeta: Fraction = 0.3
    """Fraction of fresh noise in the variance, 0 to 1. Released: 0.1 for blur, 0.25 for
    super-resolution, 1 for inpainting."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s = state.sigma, state.sigma_next
        state.denoised = state.denoise(state.x_t, t)
        x_hat = self.prox(state, state.denoised, t / math.sqrt(self.lam))  # fit to y
        e, z = (state.x_t - x_hat) / t, state.randn(x_hat)
        x_s = x_hat + s * (math.sqrt(1 - self.zeta) * e + math.sqrt(self.zeta) * z)
        state.x = state.x_t = x_s
