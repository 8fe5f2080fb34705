r"""PnP-DM: split Gibbs sampling, with the reverse diffusion as the prior's step.

Wu, Sun, Chen, Zhang, Yue and Bouman (2024), arXiv 2405.18782, Algorithm 1. The posterior is split
over two images that :math:`\rho` couples. They are sampled in turn while :math:`\rho` falls:

.. math::
    p(x, z \mid y) &\propto p(x)\,\exp\!\bigl(-\lVert x-z\rVert^2/(2\rho^2)\bigr)\,
        \mathcal{N}(y; A z, R) \\
    \text{likelihood step:}\quad z &\sim p(z \mid x, y), \text{ a Gaussian} \\
    \text{prior step:}\quad x &\sim p(x \mid z),
        \text{ the reverse diffusion from } z \text{ at noise level } \rho

At a fixed :math:`\rho` the images x follow :math:`p(x)\,\mathcal{N}(y; A x, R + \rho^2 A A^\top)`.
The paper takes :math:`R = \sigma_y^2 I`: the posterior under too much noise, unless :math:`\rho`
ends far below :math:`\sigma_y`. But in a direction that y does not measure, of prior variance v,
an iteration forgets only :math:`\rho^2/(v + \rho^2)`, so that a small :math:`\rho` hardly moves.
Here :math:`\rho^2 A A^\top` is subtracted from R as far as possible, so that x has the exact
posterior at every :math:`\rho` up to :math:`0.95\,\sigma_y/\lVert A\rVert`, and the last
iterations can keep :math:`\rho` that high. `coupling` has the step and its derivation: it is exact
for every linear operator, and never amplifies an image.

The samples follow the posterior as soon as the iterations have forgotten their state at a higher
:math:`\rho`. That takes :math:`v/\rho^2` of them, where v is the largest variance that y leaves
open: a few where noise is high, hundreds for a hole at noise 0.02. `snips` samples the same law of
z by dynamics that need the square root of that number.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..diffusion.samplers import diffuse, karras
from .base import Count, Level, Requirement, Steps
from .coupling import DEPTH, CoupledSolver
from .state import State

__all__ = ["PnpDm"]


@dataclass(frozen=True, kw_only=True)
class PnpDm(CoupledSolver):
    """Split Gibbs sampling. No gradient passes through the network.

    It claims no posterior, since that takes enough iterations to forget the start.

    Raises:
        InputError: An option is out of its bounds.

    >>> PnpDm(iterations=100).coupling
    0.95
    """

    name: ClassVar[str] = "pnp-dm"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{wu2024pnpdm,
  title = {Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors},
  author = {Wu, Zihui and Sun, Yu and Chen, Yifan and Zhang, Bingliang and Yue, Yisong and
            Bouman, Katherine},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2405.18782},
  archiveprefix = {arXiv}
}"""

    iterations: Count = 75
    """Likelihood and prior steps: rho falls during the first two thirds, and then stays."""
    steps: Steps = 8
    """Noise levels of each prior step: `iterations` x `steps` network evaluations in all. Fewer
    than 8 change the spread by 5 % and more."""
    rho_max: Level = 1.0
    """First rho, no higher than the prior's highest level."""

    def annealing(self) -> tuple[float, int]:
        """See `CoupledSolver.annealing`."""
        return self.rho_max, self.iterations

    def step(self, state: State) -> None:
        """See the equations of this module."""
        rho, generator = state.sigma, state.generator
        z = state.memory.coupling.draw(state.x_t, rho, generator)  # likelihood step
        levels = karras(self.steps, rho, DEPTH * rho).tolist()
        state.x = state.x_t = state.denoised = diffuse(state.denoise, z, levels, generator)
