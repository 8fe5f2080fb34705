r"""DAPS: decoupled annealing posterior sampling.

Zhang, Chu, Berner, Meng, Anandkumar and Song (2024), arXiv 2407.01521, Algorithm 1. At each of the
falling noise levels t, with s the next one,

.. math::
    \hat x_0 &\leftarrow \text{the probability flow from } x_t \text{ to zero noise} \\
    x_0 &\sim \mathcal{N}(x_0;\, \hat x_0, r^2 I)\;\mathcal{N}(y;\, A(x_0), \sigma_y^2 I),
        \qquad r = \text{spread}\cdot t \\
    x_s &= x_0 + s\,n,\qquad n \sim \mathcal{N}(0, I).

Thus :math:`x_t` and :math:`x_s` share no noise, and errors of early levels can be undone. A
Gaussian around :math:`\hat x_0` approximates :math:`p(x_0 \mid x_t)`; its width does not depend on
the prior. With a flow of one step, :math:`\hat x_0 = D(x_t, t)`, a pixel that y does not measure
moves by :math:`x_s = x_t + t^2\,\text{score} + (t^2 + s^2)^{1/2} n`, which is Langevin dynamics on
the diffused prior: the spread of Gaussian posteriors is nearly right. With longer flows the spread
is too wide, by up to a half where the prior is narrow.

:math:`x_0` is drawn by perturbing and optimizing, :math:`x_0 = \operatorname{prox}(\hat x_0 + r n,
\; y + \sigma_y n')`. For a linear A this is exact. For any other A it is the
randomize-then-optimize of Bardsley, Solonen, Haario and Laine (2014), without its correcting
weights. The paper runs Langevin dynamics instead, which calls A as often and needs a step size for
each task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..diffusion.samplers import karras
from .base import AnnealedSolver, Count, Level, NoisySolver, PositiveWeight, ProximalSolver
from .state import State

__all__ = ["Daps", "flow"]


@dataclass(frozen=True, kw_only=True)
class Daps(NoisySolver, ProximalSolver, AnnealedSolver):
    """Decoupled annealing posterior sampling. No gradient passes through the network.

    Raises:
        InputError: An option is out of its bounds.

    >>> Daps(steps=200, flow_steps=5).spread
    1.0
    """

    name: ClassVar[str] = "daps"
    citation: ClassVar[str] = """@inproceedings{zhang2025daps,
  title = {Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing},
  author = {Zhang, Bingliang and Chu, Wenda and Berner, Julius and Meng, Chenlin and
            Anandkumar, Anima and Song, Yang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2025},
  eprint = {2407.01521},
  archiveprefix = {arXiv}
}"""

    flow_steps: Count = 1
    """Network evaluations of each probability flow; 1 takes the denoised image. (Paper: 5.)"""
    data_steps: Count = 20
    """Steps of the inner data fit where the operator is not linear."""
    spread: PositiveWeight = 1.0
    """r in units of the noise level: the standard deviation around the denoised image."""
    sigma_max: Level = 5.0
    """First noise level, no higher than the prior's highest. (Paper: 200 levels from 100 for
    images in [-1, 1], which is 50 here.)"""
    sigma_min: Level = 0.01
    """Last noise level."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s = state.sigma, state.sigma_next
        r = self.spread * t
        state.denoised = flow(state.denoise, state.x_t, t, self.flow_steps)
        # the draw of x_0: perturb the image and the data, and fit
        perturbed = state.denoised + r * state.randn(state.x_t)
        y = state.y + state.sigma_eff * state.randn(state.y)
        state.x = self.prox(state, perturbed, r, y)
        state.x_t = state.x + s * state.randn(state.x) if s > 0 else state.x


def flow(denoise: Callable[[Tensor, float], Tensor], x: Tensor, t: float, steps: int) -> Tensor:
    r"""Follow the probability flow from level t to zero by Euler steps in the level.

    .. math:: \frac{dx}{dt} = \frac{x - D(x, t)}{t}

    (Karras et al. 2022, arXiv 2206.00364, eqs. 1 and 3).

    Args:
        denoise: The denoiser D(x, sigma).
        x: Noisy images (B, C, H, W) at level t.
        t: Noise level.
        steps: Network evaluations.

    Returns:
        Images (B, C, H, W).

    >>> import torch
    >>> flow(lambda x, sigma: x / (1 + sigma**2), torch.ones(1, 1, 1, 1), t=1.0, steps=1)
    tensor([[[[0.5000]]]])
    """
    levels = karras(steps, t, t / 10).tolist()
    for high, low in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (low - high) / high * (x - denoise(x, high))
    return x
