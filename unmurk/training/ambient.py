"""Ambient Diffusion: a denoiser from images with holes, or with noise, and no clean image.

Masks (Daras et al., 2023, arXiv 2305.19256). y = A x with a mask A of its own for each image. A
further mask hides some of the pixels that are left, A' = B A; the network sees A' x_t and A',
and is scored on A, so that it cannot know which hidden pixels count (their eq. 3.2):

    min E || A (D(A' x_t, A', sigma) - y) ||^2       is attained by   D = E[x | A' x_t, A']

if every pixel is seen with some probability whatever A' is. Random pixels are hidden with
probability `delta` (their delta, 0.1); other masks by the mask of another image.

Noise (Daras et al., 2024, arXiv 2404.10177, "Ambient Tweedie"; A = I). Above sigma_y the noisy
image x_t = y + sqrt(sigma^2 - sigma_y^2) n is exact training data: E[y | x_t] = r x_t + (1 - r) D
with r = sigma_y^2 / sigma^2 (their Theorem 3.1; `objectives.anchored`). Below sigma_y it says
nothing. There D is fitted to their truncated sampler's outputs, x^ = D(y, sigma_y): the prior is
too smooth below sigma_y by what E[x | y] lacks in spread, as theirs is without consistency.

Both at once (masks with noise): the formula with r holds on the pixels shown, D alone elsewhere.

Their network has a channel for the mask and is sampled with a mask held fixed. Solvers need a D of
whole images. So here the channel is one of hidden pixels, zero where all is shown (dropping it
then changes nothing), and from the share WHOLE of the prior's time on half of the rows are whole
images x^ = D(A y, A, sigma_y), which is where their fixed-mask sampler ends.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ..devices import host_to
from ..diffusion.prior import Prior
from ..errors import InputError
from ..noise import Gaussian
from ..operators.base import per_image
from ..operators.masks import Inpaint, RandomInpaint
from ..problem import Problem
from ..rng import host_integers, uniform
from .amortised import PRIOR, Amortised
from .conditional import Conditional, stem
from .losses import anchored, gaussian, levels, weighted
from .trainer import LRPhase

__all__ = ["Ambient", "Masked", "masked"]

WHOLE = 0.5


class Masked:
    """A prior's network that sees which pixels are hidden.

    Args:
        prior: The prior; used by itself, it takes every pixel as shown.
        stem: What the first convolution adds for the channel of hidden pixels, without a bias.
    """

    def __init__(self, prior: Prior, stem: nn.Module) -> None:
        self.network = Conditional(prior, stem)

    def denoise(self, x: Tensor, sigma: Tensor, shown: Tensor) -> Tensor:
        """D(A' x, A', sigma), (B, C, H, W), with the mask `shown` = A', (B, 1, H, W)."""
        return self.network.denoise(torch.where(shown > 0, x, 0.5), sigma, 1 - shown)


def masked(
    network: Masked,
    y: Tensor,
    x: Tensor,
    sigma_y: float,
    sigma: Tensor,
    observed: Tensor,
    shown: Tensor,
    full: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The loss of a network that sees masks.

    Args:
        y: Measurements (B, C, H, W), zero where hidden.
        x: Images (B, C, H, W) for the rows that are whole, or at a level not above sigma_y.
        sigma_y: Noise in y.
        sigma: Level of each row, (B,).
        seen: A, (B, 1, H, W).
        shown: A', (B, 1, H, W), nowhere above A.
        whole: (B,), bool: rows to be taken from x, all of it shown and scored.
    """
    full = per_image(full | (sigma <= sigma_y), y) > 0
    level = per_image(sigma, y)
    shown, observed = torch.where(full, 1.0, shown), torch.where(full, 1.0, observed)
    base = torch.where(full, x, y)
    extra = torch.where(full, level, (level**2 - sigma_y**2).clamp_min(0).sqrt())
    ratio = torch.where(full, 0.0, sigma_y**2 / level**2)
    noisy = base + extra * gaussian(base, generator)
    clean = network.denoise(noisy, sigma, shown)
    expected = clean + ratio * shown * (noisy - clean)
    return weighted(observed * (expected - base), sigma)


class Ambient(Amortised):
    """The method, for masks that differ from image to image or for A = I.

    Args:
        y: Measurements (N, ...); never anything else.
        problem: How they were made.
        shape: Shape (C, H, W) of the images behind them.
        network: Preset of the networks.
        seed: Seed of initial weights and draws.
        further: Probability that a random mask's pixel is hidden further, in (0, 1).

    Raises:
        InputError: one mask for all images, or `delta` out of range.
    """

    def __init__(
        self,
        y: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        seed: int = 0,
        delta: float = 0.1,
    ) -> None:
        if not 0 < delta < 1:
            raise InputError(f"further is {delta}: give a probability between 0 and 1")
        self.delta = delta
        super().__init__(y, problem, shape, network, seed)
        if self.denoising:
            return
        if len(cast(Tensor, problem.operator.bind(range(2), shape).mask)) == 1:
            raise InputError(
                f"{problem.operator.spec} hides the same pixels in all images, so no image shows "
                "what is behind: ambient needs masks that differ"
            )
        self.network = Masked(self.prior, self.modules["stem"])
        self.masked_teacher = Masked(self.teacher, self.ema["stem"])

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the method can learn from such measurements."""
        fits = problem.operator.spec == "identity" or isinstance(problem.operator, Inpaint)
        return fits and isinstance(problem.noise, Gaussian)

    def others(self, network: str) -> dict[str, nn.Module]:
        """The channel of hidden pixels; it has no say at the start."""
        if self.denoising:
            return {}
        hidden = stem(self.prior, 1)
        nn.init.zeros_(hidden.weight)
        return {"stem": hidden}

    def spans(self) -> dict[str, tuple[LRPhase, ...]]:
        """The prior first, then the posterior."""
        return super().spans() | {"stem": (LRPhase(0.0, PRIOR),)}

    def prior_losses(
        self, y: Tensor, rows: Tensor, part: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Denoising score matching where y is exact, and on x^ where it is not."""
        sigma_y, sigma = self.problem.sigma, levels(len(y), generator)
        level = torch.full_like(sigma, sigma_y)
        if self.denoising:
            with torch.no_grad():
                x = self.teacher.denoise(y, level)
            return {"prior": anchored(self.prior, x, y, sigma_y, sigma, generator)}
        problem = self.bind(rows, y)
        y, observed = problem.A_dagger(y), cast(Tensor, problem.mask)
        with torch.no_grad():
            x = self.masked_teacher.denoise(y, level, observed)
        shown = observed * self.mask(observed, generator)
        coin = uniform((len(y),), generator)
        full = (coin < 0.5) & (part >= WHOLE)
        loss = masked(self.network, y, x, sigma_y, sigma, observed, shown, full, generator)
        return {"prior": loss}

    def mask(self, observed: Tensor, generator: torch.Generator) -> Tensor:
        """The further masks B, (B, 1, H, W)."""
        if isinstance(self.problem.operator, RandomInpaint):
            draw = uniform(observed.shape, generator)
            return (draw >= self.delta).to(observed)
        numbers = host_integers(len(self.y), (len(observed),), generator)
        other = self.problem.operator.bind(numbers.tolist(), self.shape)
        return host_to(cast(Tensor, other.mask), observed.device).to(observed)
