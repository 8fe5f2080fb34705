r"""PiGDM: pseudoinverse-guided diffusion, the reverse diffusion guided by a Gaussian belief about
x.

Song, Vahdat, Mardani and Kautz (2023), "Pseudoinverse-Guided Diffusion Models for Inverse
Problems", ICLR, openreview 9_gsMA8MRKQ, Algorithm 1. With :math:`p(x \mid x_t) = \mathcal{N}(x_0,
r_t^2 I)` and :math:`x_0 = D(x_t, t)`,

.. math::
    \nabla_{x_t} \log p(y \mid x_t) = J^\top A^\top (r_t^2 A A^\top + \sigma_y^2 I)^{-1} (y - A
    x_0), \qquad J = \partial D/\partial x_t.

Scaled by :math:`r_t^2` (the paper's adaptive weight) it is the guidance g, which is added to a
DDIM step from level t to level s:

.. math::
    x_s &= x_0 + c_2\,e + c_1\,z + g,\qquad e = (x_t - x_0)/t,\qquad z \sim \mathcal{N}(0, I), \\
    c_1 &= \eta\,s\sqrt{1 - s^2/t^2},\qquad c_2 = \sqrt{s^2 - c_1^2}.

Images are variance-exploding here. In the paper :math:`u_t = a_t x_t`, and in the released code
:math:`u_s` gains :math:`a_s a_t g_u` with :math:`g_u` the same product with :math:`\partial x_0 /
\partial u_t = J/a_t`: divided by :math:`a_s`, this is g.

The linear system need not be solved separately. The minimizer of :math:`\lVert y - A x\rVert^2 /
(2\sigma_y^2) + \lVert x - x_0\rVert^2/(2 r^2)` is :math:`x = x_0 + d` with, for :math:`k =
\sigma_y^2/r^2`, :math:`(A^\top A + k I)\,d = A^\top (y - A x_0)`. As :math:`(A^\top A + k I)^{-1}
A^\top = A^\top (A A^\top + k I)^{-1}`,

.. math::
    \operatorname{prox}(x_0) - x_0 &= r^2 A^\top (r^2 A A^\top + \sigma_y^2 I)^{-1} (y - A x_0), \\
    g &= J^\top (\operatorname{prox}(x_0) - x_0),

in closed form where the operator has one. Without noise it is :math:`J^\top A^+ (y - A x_0)`.

:math:`r_t`: for images of variance 1, :math:`\mathbb{E}\operatorname{var}(x \mid x_t) = \tau^2/(1
+ \tau^2)` at level :math:`\tau`, the paper's choice for its images in [-1, 1]. These are 2 x - 1,
so :math:`\tau = 2t` and their r is :math:`2 r_t`:

.. math:: r_t^2 = \tfrac14 \frac{(2t)^2}{1 + (2t)^2} = \frac{t^2}{1 + 4t^2}.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..problem import Problem
from .base import AnnealedSolver, Fraction, Requirement
from .data_term import prox
from .state import CountingDenoiser, State, denoise_with_grad

__all__ = ["Pigdm", "pseudoinverse_guidance"]


@dataclass(frozen=True, kw_only=True)
class Pigdm(AnnealedSolver):
    """Pseudoinverse-guided diffusion. A step takes one network evaluation and its gradient.

    Raises:
        InputError: An option is out of its bounds, or the prior cannot be differentiated.

    >>> Pigdm(eta=0.2).steps
    100
    """

    name: ClassVar[str] = "pigdm"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{song2023pigdm,
  title = {Pseudoinverse-Guided Diffusion Models for Inverse Problems},
  author = {Song, Jiaming and Vahdat, Arash and Mardani, Morteza and Kautz, Jan},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  url = {https://openreview.net/forum?id=9_gsMA8MRKQ}
}"""

    eta: Fraction = 1.0
    """Fresh noise: 1, as released, is the ancestral step; 0 has none (DDIM)."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s, x = state.sigma, state.sigma_next, state.x_t
        g, x0 = pseudoinverse_guidance(state.problem, state.denoise, x, state.y, t)
        c1 = self.eta * s * math.sqrt(1 - (s / t) ** 2)
        c2 = math.sqrt(s**2 - c1**2)
        state.denoised = x0
        state.x = state.x_t = x0 + c2 * (x - x0) / t + c1 * state.randn(x) + g


def pseudoinverse_guidance(
    problem: Problem, denoise: CountingDenoiser, x: Tensor, y: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    r"""Compute the guidance :math:`g = J^\top (\operatorname{prox}(x_0) - x_0)`.

    Args:
        problem: A linear operator and Gaussian noise, bound to the images.
        denoise: The prior's denoiser.
        x: Noisy images (B, C, H, W) at level sigma.
        y: Measurements (B, ...).
        sigma: Noise level of x.

    Returns:
        The guidance and :math:`x_0 = D(x, \sigma)`, both (B, C, H, W).

    Raises:
        InputError: No gradient passes through the prior.

    >>> denoise = CountingDenoiser(lambda x, sigma: x / (1 + sigma**2))  # J = 1/2 at sigma = 1
    >>> x, y = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> problem = Problem("identity", 0.2**0.5)  # r^2 = 0.2, so the prox goes half of the way
    >>> pseudoinverse_guidance(problem, denoise, x, y, sigma=1.0)[0]
    tensor([[[[0.2500, 0.2500]]]])
    """
    x, x0 = denoise_with_grad(denoise, x, sigma, Pigdm.name)
    r = sigma / math.sqrt(1 + 4 * sigma**2)
    with torch.no_grad():
        toward = prox(problem, x0, y, r, problem.sigma) - x0
    return torch.autograd.grad(x0, x, toward)[0], x0.detach()
