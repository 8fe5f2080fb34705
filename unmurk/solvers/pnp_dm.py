"""PnP-DM: split Gibbs sampling, with the reverse diffusion as the step that knows the prior.

Wu, Sun, Chen, Zhang, Yue and Bouman (2024), arXiv 2405.18782, Algorithm 1. The posterior is split
over two images that are tied together by rho, and sampled by turns while rho falls:

    p(x, z | y)  ~  p(x) exp(-||x - z||^2 / (2 rho^2)) N(y; A z, R)

    likelihood step    z ~ p(z | x, y), a Gaussian
    prior step         x ~ p(x | z), the reverse diffusion from z at noise level rho

At a fixed rho the images x are drawn from p(x) N(y; A x, R + rho^2 A A^T). The paper takes
R = sigma_y^2 I: the posterior under too much noise, unless rho ends far below sigma_y. But of a
direction that y does not see, of prior variance v, a turn forgets only rho^2 / (v + rho^2), so
that a small rho hardly moves. Here rho^2 A A^T is taken out of R as far as it goes, so that x has
the exact posterior at every rho up to sigma_y / ||A||, and the last turns can keep rho that high.
`coupling.py` has the step and its derivation: it is exact for every linear operator, and never
makes an image grow.

The samples are those of the posterior as soon as the turns have forgotten what was true at a
higher rho. That takes v / rho^2 of them where v is the widest variance that y leaves open: a few
where noise is high, hundreds for a hole at noise 0.02. `snips` samples the same law of z by
dynamics that need the square root of that number.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..diffusion.samplers import diffuse
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback
from .coupling import EDGE, Coupling, shared_norm
from .start import begin

__all__ = ["PnpDm"]

DEPTH = 0.03  # last level of a prior step in units of its first


@dataclass(frozen=True)
class PnpDm:
    """Split Gibbs sampling. No gradient goes through the network.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "pnp-dm"
    claims: ClassVar[Claim] = "heuristic"  # until the turns have forgotten where rho fell from
    requires: ClassVar[Requirement] = "linear"

    iterations: int = 75
    """Likelihood and prior steps: rho falls during the first two thirds, and then stays."""
    steps: int = 8
    """Noise levels of each prior step: `iterations` x `steps` network evaluations in all. Fewer
    than 8 change the spread by 5 % and more."""
    rho_max: float = 1.0
    """First rho, no higher than the prior's highest level."""
    coupling: float = EDGE
    """Last rho in units of sigma_y / ||A||. Up to 0.95 the samples are those of the posterior;
    more mixes faster, and adds noise."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    init_sigma: float = 0.3
    """Where `init` is given: the first rho."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.steps < 1:
            raise InputError(
                f"turns is {self.iterations}, steps {self.steps}: both must be at least 1"
            )
        if self.coupling <= 0 or self.noise_floor <= 0:
            raise InputError(
                f"coupling is {self.coupling}, noise_floor {self.noise_floor}: both must be > 0"
            )

    @torch.no_grad()
    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: CountingDenoiser,
        x: Tensor | None,
        noise: PerImageGenerator,
        callback: StepCallback,
    ) -> Tensor:
        """See `Solver.run`."""
        sigma_eff = max(problem.sigma, self.noise_floor)
        still = self.iterations // 3
        last = self.coupling * sigma_eff / shared_norm(problem, y)
        last = min(last, max(self.rho_max, self.coupling * sigma_eff), denoise.sigma_max)
        falling, x = begin(
            y,
            problem,
            denoise,
            x,
            noise,
            self.iterations - still,
            (self.rho_max, last),
            self.init_sigma,
        )
        tie = Coupling(problem, y, sigma_eff, x)
        for turn, rho in enumerate([*falling, *falling[-1:] * still], 1):
            z = tie.draw(x, rho, noise)
            x = diffuse(denoise, z, karras(self.steps, rho, DEPTH * rho).tolist(), noise)
            if callback(turn, self.iterations, rho, x, x):
                break
        return x
