r"""DPS: diffusion posterior sampling, the reverse diffusion guided by the gradient of the misfit.

Chung, Kim, Mccann, Klasky and Ye (2023), arXiv 2209.14687, Algorithm 1 (Gaussian noise), for
images u in [-1, 1] under the variance-preserving process :math:`u_t = a_t u + b_t n`:

.. math::
    u_0 &= D(u_t), \text{ clipped to } [-1, 1] \\
    u_{t-1} &= \text{(ancestral step from } u_t \text{ given } u_0)
               \;-\; \zeta\,\nabla_{u_t} \lVert y_u - A(u_0)\rVert,

with the norm, not its square, of each image alone. Here :math:`x_t = (u_t/a_t + 1)/2` is the
variance-exploding image, at the level :math:`\sigma_t = b_t/(2 a_t)`. In x the ancestral step from
level t to level s < t is

.. math:: x_s = x_0 + (s/t)^2 (x_t - x_0) + s\sqrt{1 - (s/t)^2}\,z,\qquad z \sim \mathcal{N}(0, I),

and the chain rule, with :math:`y_u - A(u_0) = 2 (y - A(x_0))`, turns the guidance into

.. math::
    -\,\frac{\zeta}{2\,a_t a_s}\,\nabla_{x_t} \lVert y - A(x_0)\rVert,
    \qquad a = (1 + 4\sigma^2)^{-1/2}.

The gradient passes through the network. The samples follow no known distribution: zeta is a step
length found by trial, and it does not depend on the noise level of y.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.schedules import linear_beta
from ..problem import Problem
from .base import Level, Solver, Steps, Weight
from .state import CountingDenoiser, State, denoise_with_grad, gray

__all__ = ["Dps", "norm_gradient"]


@dataclass(frozen=True, kw_only=True)
class Dps(Solver):
    """Diffusion posterior sampling in its ancestral form.

    A step takes one network evaluation and its gradient.

    Raises:
        InputError: An option is out of its bounds, or the prior cannot be differentiated.

    >>> Dps(zeta=0.5).steps
    1000
    """

    name: ClassVar[str] = "dps"
    citation: ClassVar[str] = """@inproceedings{chung2023dps,
  title = {Diffusion Posterior Sampling for General Noisy Inverse Problems},
  author = {Chung, Hyungjin and Kim, Jeongsol and Mccann, Michael T. and Klasky, Marc L. and
            Ye, Jong Chul},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  eprint = {2209.14687},
  archiveprefix = {arXiv}
}"""

    steps: Steps = 1000
    """Levels of the linear-beta grid, a divisor of 1000."""
    zeta: Weight = 0.3
    """Length of the guidance. Released: 0.3 for super-resolution and blur, 0.5 for inpainting, 1
    for phase retrieval, all with 256 x 256 x 3 images. It acts on the norm of the whole image."""
    clip: bool = True
    """Whether the denoised image is clipped to [0, 1], as released."""
    init_sigma: Level = 0.3
    """First noise level where `init` is given: the level it is noised to."""

    def schedule(self, state: State, init: bool) -> list[float]:
        """See `Solver.schedule`."""
        levels = linear_beta(self.steps).tolist()
        most = self.init_sigma if init else math.inf
        return [level for level in levels if level <= most] or levels[-1:]

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`; without `init` the image u is standard normal, as released."""
        if init is not None:
            return super().start(state, init)
        state.levels = self.noise_levels(state, init=False)
        middle = gray(state.y, state.problem)
        scale = math.sqrt(0.25 + state.levels[0] ** 2)
        state.x = state.x_t = middle + scale * state.randn(middle)

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s, x = state.sigma, state.sigma_next, state.x_t
        gradient, x0 = norm_gradient(state.problem, state.denoise, x, state.y, t, self.clip)
        ratio = (s / t) ** 2
        ahead = x0 + ratio * (x - x0)  # the ancestral step
        if s > 0:
            ahead = ahead + s * math.sqrt(1 - ratio) * state.randn(x)
        scale = math.sqrt((1 + 4 * t**2) * (1 + 4 * s**2))  # 1 / (a_t a_s)
        state.denoised = x0
        state.x = state.x_t = ahead - self.zeta / 2 * scale * gradient  # the guidance


def norm_gradient(
    problem: Problem,
    denoise: CountingDenoiser,
    x: Tensor,
    y: Tensor,
    sigma: float,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\nabla_x \lVert y - A(x_0)\rVert`, image by image.

    Args:
        problem: Operator and noise, bound to the images.
        denoise: The prior's denoiser.
        x: Noisy images (B, C, H, W) at level sigma.
        y: Measurements (B, ...).
        sigma: Noise level of x.
        clip: Whether :math:`x_0 = D(x, \sigma)` is clipped to [0, 1].

    Returns:
        The gradient and :math:`x_0`, both (B, C, H, W).

    Raises:
        InputError: No gradient passes through the prior.

    >>> denoise = CountingDenoiser(lambda x, sigma: x / (1 + sigma**2))  # halves x at sigma = 1
    >>> x, y = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.3, 0.4]]]])
    >>> norm_gradient(Problem("identity", 0.1), denoise, x, y, sigma=1.0, clip=False)[0]
    tensor([[[[-0.3000, -0.4000]]]])
    """
    x, x0 = denoise_with_grad(denoise, x, sigma, Dps.name)
    with torch.enable_grad():
        x0 = x0.clamp(0, 1) if clip else x0
        norms = problem.residual(x0, y).flatten(1).norm(dim=1)
        gradient = torch.autograd.grad(norms.sum(), x)[0]
    return gradient, x0.detach()
