r"""Ambient Diffusion: a denoiser from images with holes, or with noise, and no clean image.

**Masks** (Daras et al., 2023, arXiv 2305.19256). :math:`y = A x` with a mask :math:`A` of its own
for each image. A further mask hides some of the pixels that are left, :math:`A' = B A`. The
network sees :math:`A' x_t` and :math:`A'` but is scored on :math:`A`, so it cannot know which
hidden pixels count (their eq. 3.2):

.. math::

    \min_D\; E\, \lVert A\, (D(A' x_t, A', \sigma) - y) \rVert^2
    \quad\text{is attained by}\quad D = E[x \mid A' x_t, A']

if every pixel is observed with some probability whatever :math:`A'` is. Random masks hide each
further pixel with probability :math:`\delta` (their 0.1); other masks are joined by the mask of
another image.

**Noise** (Daras et al., 2024, arXiv 2404.10177, "Ambient Tweedie"; :math:`A = I`). Above
:math:`\sigma_y` noisy images are exact training data (`losses.ambient_matching`). Below it they
say nothing. There D is fitted to the outputs of their truncated sampler,
:math:`\hat x = D(y, \sigma_y)`. The prior is too smooth below :math:`\sigma_y` by the variance
that :math:`E[x \mid y]` lacks, as theirs is without a consistency loss.

**Both** (masks with noise): the formula for noise holds on the pixels shown, and D alone
elsewhere.

Their network has a channel for the mask and is sampled with a fixed mask, but solvers need a
denoiser of whole images. So the channel here is one of hidden pixels, zero where everything is
shown; dropping it then changes nothing. In the second half of the prior's training, half of the
batch are whole images :math:`\hat x = D(A y, A, \sigma_y)`, which is where their sampler with a
fixed mask ends.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from torch import Tensor, nn

from ..bounds import Real
from ..devices import host_to
from ..diffusion.prior import Prior
from ..errors import InputError
from ..noise import Gaussian
from ..operators.base import per_image
from ..operators.inpainting import Inpaint
from ..operators.masks import RandomInpaint
from ..problem import Problem
from ..rng import host_integers, uniform
from .conditional import ConditionalDenoiser, conditioning_stem
from .losses import ambient_matching, gaussian, levels, weighted
from .papers import TWEEDIE
from .prior_first import PRIOR_END, PriorFirst
from .schedule import LRPhase

__all__ = ["Ambient", "MaskedDenoiser", "masked_matching"]

LATE = 0.5  # fraction of the prior's training after which whole images join


class MaskedDenoiser:
    """A prior's network that sees which pixels are hidden.

    Args:
        prior: The prior. Used by itself, it takes every pixel as shown.
        stem: A convolution without bias from the channel of hidden pixels to the network's first
            features.

    >>> prior = Prior.create("tiny", (1, 8, 8)).eval()
    >>> stem = conditioning_stem(prior, 1)
    >>> _ = nn.init.zeros_(stem.weight)  # the network then does not see the mask
    >>> x, sigma, shown = torch.rand(2, 1, 8, 8), torch.full((2,), 0.5), torch.ones(2, 1, 8, 8)
    >>> with torch.no_grad():
    ...     masked = MaskedDenoiser(prior, stem).denoise(x, sigma, shown)
    ...     torch.allclose(masked, prior.denoise(x, sigma))
    True
    """

    def __init__(self, prior: Prior, stem: nn.Module) -> None:
        self.network = ConditionalDenoiser(prior, stem)

    def denoise(self, x: Tensor, sigma: Tensor, shown: Tensor) -> Tensor:
        """Compute D(A' x, A', sigma).

        Args:
            x: Images (B, C, H, W).
            sigma: Noise levels (B,).
            shown: The mask A', shape (B, 1, H, W).

        Returns:
            Images of shape (B, C, H, W).
        """
        return self.network.denoise(torch.where(shown > 0, x, 0.5), sigma, 1 - shown)


def masked_matching(
    network: MaskedDenoiser,
    y: Tensor,
    x: Tensor,
    sigma_y: float,
    sigma: Tensor,
    observed: Tensor,
    shown: Tensor,
    full: Tensor,
    generator: torch.Generator,
) -> Tensor:
    r"""Compute the loss of a network that sees masks.

    With :math:`r = \sigma_y^2 / \sigma^2` and :math:`x_t = y + \sqrt{\sigma^2 - \sigma_y^2}\, n`,

    .. math:: E\; \lambda(\sigma)\, \bigl\lVert A\, \bigl(D + r A' (x_t - D) - y\bigr)
        \bigr\rVert^2, \qquad D = D(A' x_t, A', \sigma) .

    Args:
        network: The network.
        y: Measurements (B, C, H, W), zero where hidden.
        x: Images (B, C, H, W) that take the place of y where `full` holds, and at levels up to
            sigma_y. They are shown and scored as a whole.
        sigma_y: Noise level of y.
        sigma: Noise levels (B,).
        observed: The mask A, shape (B, 1, H, W).
        shown: The mask A', shape (B, 1, H, W), nowhere above A.
        full: Which images of the batch are whole, shape (B,), bool.
        generator: Source of the noise.

    Returns:
        The loss, a scalar.

    >>> from types import SimpleNamespace
    >>> noise, whole = torch.Generator().manual_seed(0), torch.zeros(8, dtype=torch.bool)
    >>> black = SimpleNamespace(denoise=lambda x, sigma, shown: 0 * x)
    >>> seen = (torch.arange(4) > 1).float().expand(8, 1, 4, 4)  # the right half
    >>> y, sigma = 0.5 * (1 - seen), torch.full((8,), 0.5)  # bright on the left alone
    >>> float(masked_matching(black, y, y, 0.0, sigma, seen, seen, whole, noise))
    0.0
    >>> float(masked_matching(black, y, y, 0.0, sigma, 1 + 0 * y, seen, whole, noise)) > 0
    True
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


@dataclass(eq=False, kw_only=True)
class Ambient(PriorFirst):
    """Ambient Diffusion, for masks that differ from image to image or for A = I.

    Attributes:
        delta: Probability that a pixel of a random mask is hidden further, a number from 0.001 to
            0.999.

    Raises:
        InputError: delta is out of range; `build` also refuses one mask for all images.

    >>> Ambient(delta=0.2).delta, Ambient.takes(Problem("inpaint:random,keep=0.5", 0.1))
    (0.2, True)
    >>> Ambient.takes(Problem("blur:gaussian,sigma=1", 0.1))
    False
    """

    citation: ClassVar[str] = """@inproceedings{daras2023ambient,
  title = {Ambient Diffusion: Learning Clean Distributions from Corrupted Data},
  author = {Daras, Giannis and Shah, Kulin and Dagan, Yuval and Gollakota, Aravind and
            Dimakis, Alexandros G. and Klivans, Adam},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2305.19256},
  archivePrefix = {arXiv}
}"""

    further_citations: ClassVar[tuple[str, ...]] = (TWEEDIE,)

    delta: Annotated[float, Real(0.001, 0.999)] = 0.1

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the learner can learn from measurements of this kind."""
        fits = problem.operator.spec == "identity" or isinstance(problem.operator, Inpaint)
        return fits and isinstance(problem.noise, Gaussian)

    def check_problem(self) -> None:
        """Raise InputError if all images have the same mask."""
        if self.denoising:
            return
        if len(cast(Tensor, self.problem.operator.bind(range(2), self.shape).mask)) == 1:
            raise InputError(
                f"{self.problem.operator.spec} hides the same pixels in all images, so no image "
                "shows what is behind: ambient needs masks that differ"
            )

    def extra_modules(self) -> dict[str, nn.Module]:
        """Create the channel of hidden pixels, which has no effect at the start."""
        if self.denoising:
            return {}
        hidden = conditioning_stem(self.prior, 1)
        nn.init.zeros_(hidden.weight)
        return {"stem": hidden}

    def finish(self) -> None:
        """Create the networks that see masks."""
        if self.denoising:
            return
        self.masked_network = MaskedDenoiser(self.prior, self.modules["stem"])
        self.masked_teacher = MaskedDenoiser(self.teacher, self.ema["stem"])

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Train the prior first, then the posterior."""
        return super().phases() | {"stem": (LRPhase(0.0, PRIOR_END),)}

    def prior_losses(
        self, y: Tensor, index: Tensor, part: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute score matching on y where it is exact, and on D(y, sigma_y) where it is not."""
        sigma_y, sigma = self.problem.sigma, levels(len(y), generator)
        level = torch.full_like(sigma, sigma_y)
        if self.denoising:
            with torch.no_grad():
                x = self.teacher.denoise(y, level)
            return {"prior": ambient_matching(self.prior, x, y, sigma_y, sigma, generator)}
        problem = self.bind(index, y.device)
        y, observed = problem.A_dagger(y), cast(Tensor, problem.mask)
        with torch.no_grad():
            x = self.masked_teacher.denoise(y, level, observed)
        shown = observed * self.further_mask(observed, generator)
        coin = uniform((len(y),), generator)
        full = (coin < 0.5) & (part >= LATE)
        network = self.masked_network
        loss = masked_matching(network, y, x, sigma_y, sigma, observed, shown, full, generator)
        return {"prior": loss}

    def further_mask(self, observed: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the further masks B.

        Args:
            observed: The masks A, shape (B, 1, H, W).
            generator: Source of the draws.

        Returns:
            Masks of shape (B, 1, H, W).
        """
        operator = self.problem.operator
        if isinstance(getattr(operator, "base", operator), RandomInpaint):  # also where more hides
            draw = uniform(observed.shape, generator)
            return (draw >= self.delta).to(observed)
        numbers = host_integers(len(self.y), (len(observed),), generator)
        other = self.problem.operator.bind(numbers.tolist(), self.shape)
        return host_to(cast(Tensor, other.mask), observed.device).to(observed)
