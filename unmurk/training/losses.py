"""The losses that ways to learn are made of, each per image and averaged over the batch.

Notation: y = A(x) + sigma_y n, denoiser D, conditional flow q(x | y), d = C H W. Losses are
divided by d (a common factor, the optimum does not move), so that one learning rate serves images
of any size.

Denoising score matching draws log s ~ N(0, 1.2^2) for s = 2 sigma and weights the error by
(1 + s^2) / s^2 (Karras et al., 2022, arXiv 2206.00364, section 5, for sigma_data = 1; their mean
there is -0.5, and 0 gave better samples: docs/experiments.md).
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.losses import gaussian, levels, score_matching, weighted
from ..diffusion.prior import Prior
from ..flows.posterior import Posterior
from ..noise import PoissonGaussian
from ..operators.base import per_image
from ..operators.masks import Inpaint
from ..problem import Problem
from ..rng import poisson, uniform

__all__ = [
    "anchored",
    "anchored_masked",
    "denoising",
    "distilled",
    "elbo_loss",
    "forward_kl",
    "gaussian",
    "levels",
    "recorrupted",
    "weighted",
    "with_hidden",
]


def corrupted(clean: Tensor, problem: Problem, generator: torch.Generator) -> Tensor:
    """Fresh measurements of noiseless ones, all from one generator."""
    noise = problem.noise
    if not isinstance(noise, PoissonGaussian):
        return clean + problem.sigma * gaussian(clean, generator)
    counts = poisson(noise.rate(clean.detach()), generator)
    y = (noise.offset + noise.gain * counts).to(clean)
    return y + noise.sigma * gaussian(clean, generator)


def denoising(prior: Prior, x: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Denoising score matching of the prior on images x at levels sigma, (B,)."""
    return score_matching(prior.denoise, x, sigma, generator)


def anchored(
    prior: Prior,
    x: Tensor,
    y: Tensor,
    sigma_y: float,
    sigma: Tensor,
    generator: torch.Generator,
    mean: Tensor | None = None,
) -> Tensor:
    """Denoising score matching that takes noisy images as the truth wherever they are (A = I).

    At sigma > sigma_y the image x_t = y + sqrt(sigma^2 - sigma_y^2) n has level sigma exactly, and
    E[y | x_t] = r x_t + (1 - r) D(x_t, sigma) with r = sigma_y^2 / sigma^2 (Daras et al., 2024,
    arXiv 2404.10177, "Ambient Tweedie"): matching it to y trains D without bias and without a
    clean image. Below sigma_y the images x, drawn from the current posterior, stand in.

    With `mean` = m(y), D is matched to m(y) instead. x - y - x_t is a Markov chain, so
    D(x_t) = E[x | x_t] = E[E[x | y] | x_t]: the same minimiser where m(y) = E[x | y], and a target
    without the noise of y (Rao and Blackwell). The errors of m that x_t can tell are taken over.
    """
    above = per_image(sigma > sigma_y, x) > 0
    extra = per_image((sigma**2 - sigma_y**2).clamp_min(0).sqrt(), x)
    noise = gaussian(x, generator)
    noisy = torch.where(above, y + extra * noise, x + per_image(sigma, x) * noise)
    expected = prior.denoise(noisy, sigma)
    if mean is not None:
        return weighted(expected - torch.where(above, mean, x), sigma)
    ratio = torch.where(above, sigma_y**2 / per_image(sigma, x) ** 2, 0.0)
    expected = ratio * noisy + (1 - ratio) * expected
    return weighted(expected - torch.where(above, y, x), sigma)


def with_hidden(problem: Problem, share: float, generator: torch.Generator) -> Problem:
    """The problem with a share of what its masks show hidden too; itself where there is no mask.

    Raises:
        InputError: the problem is not bound to images.
    """
    operator = problem.operator
    if not isinstance(operator, Inpaint) or operator.mask is None:
        return problem
    mask = operator.mask
    numbers = problem.index or range(len(mask))
    more = uniform((len(numbers), *mask.shape[1:]), generator)
    hidden = Problem(operator.hiding((more < share).to(mask)), problem.noise)
    hidden.index = problem.index
    return hidden


def recorrupted(
    posterior: Posterior,
    y: Tensor,
    problem: Problem,
    a: float,
    generator: torch.Generator,
    hide: float = 0.0,
) -> Tensor:
    """The mean network's loss without clean images (Recorrupted-to-Recorrupted).

    With n ~ N(0, I), the errors of y + a sigma_y n and of y - sigma_y n / a are independent (Pang
    et al., 2021, CVPR, "Recorrupted-to-Recorrupted"), so the minimiser of the squared distance
    between A m(y + a sigma_y n) and y - sigma_y n / a is A E[x | y + a sigma_y n].

    Photons are split instead: each goes to m with probability 1 / (1 + a^2), else to the target
    (`PoissonGaussian.split`; B. Monroy, J. Bacca, J. Tachella, 2024, arXiv 2412.04648). The
    variances of the two are those above.

    What a mask hides has no target. With a share `hide` of the seen pixels withheld from m, these
    have: y itself, whose noise m has not met (Batson and Royer, 2019, arXiv 1901.11365). So m
    learns E[x | all but the withheld] there, at places that are like the hidden ones if masks are
    random.

    What no A shows would leave the correction to the Wiener solution w free to be anything. With
    sigma_y^2 d^T S^-1 d added, d the correction and S the covariance of the Gaussian prior, it is
    zero there. So for A != I and a Gaussian start the minimiser is not E[x | y'] but, with
    e = E[x | y'] - w and both terms divided by the numbers of an image,

        d = (A^T A + sigma_y^2 S^-1)^-1 A^T A e:

    where A has the gain s and the prior the power P, the share sigma_y^2 / (sigma_y^2 + s^2 P) of
    e is left out. That is little where y tells much more than the prior, and half of it where
    noise and prior are equal; the second fit of m, `forward_kl`, has no such term.
    """
    if isinstance(problem.noise, PoissonGaussian):
        noisier, target = problem.noise.split(y, 1 / (1 + a**2), generator)
    else:
        noise = problem.sigma * gaussian(y, generator)
        noisier, target = y + a * noise, y - noise / a
    given = with_hidden(problem, hide, generator) if hide else problem
    start, correction = posterior.parts(given.operator.apply_mask(noisier), given)
    mean = start + correction
    if given is not problem:
        target = torch.where(given.operator.apply_mask(torch.ones_like(y)) > 0, target, y)
    # per number of the image, as y may have fewer; zero where nothing is measured
    loss = problem.residual(mean, target).square().sum() / mean.numel()
    if posterior.start is None:
        return loss
    return loss + problem.sigma**2 * posterior.start.energy(correction).mean() / mean[0].numel()


def anchored_masked(
    prior: Prior,
    posterior: Posterior,
    y: Tensor,
    problem: Problem,
    sigma: Tensor,
    generator: torch.Generator,
    hide: float,
    above: float,
) -> Tensor:
    """Score matching with the seen pixels of masked images as the truth, some of them withheld.

    The loss of Ambient Diffusion (Daras et al., 2023, arXiv 2305.19256, section 3) for a network
    that knows no masks: what is hidden or withheld is filled with m. At sigma > above,

        x_t = y + sqrt(sigma^2 - sigma_y^2) n on what is given,   m + sigma n elsewhere,

    and on all that y shows D(x_t) is matched to y (given pixels: as in `anchored`). That x_t is
    one of the images that D will meet is true only as far as the error of m is small beside sigma;
    at sigma <= above it is not, and m(y) stands in for x.
    """
    with torch.no_grad():
        given = with_hidden(problem, hide, generator)
        observed, kept = (p.operator.apply_mask(torch.ones_like(y)) for p in (problem, given))
        mean = posterior.mean(y, problem)
        filled = posterior.mean(given.operator.apply_mask(y), given)
    high = per_image(sigma, y) > max(above, problem.sigma)
    noise, level = gaussian(y, generator), per_image(sigma, y)
    extra = (level**2 - problem.sigma**2).clamp_min(0).sqrt()
    image = torch.where(kept > 0, y + extra * noise, filled + level * noise)
    noisy = torch.where(high, image, mean + level * noise)
    ratio = torch.where(high & (kept > 0), problem.sigma**2 / level**2, 0.0)
    expected = ratio * noisy + (1 - ratio) * prior.denoise(noisy, sigma)
    error = torch.where(high, observed * (expected - y), expected - mean)
    return weighted(error, sigma)


def forward_kl(
    posterior: Posterior, x: Tensor, problem: Problem, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The flow's maximum-likelihood loss on images x and fresh corruptions y' of them.

    Returns -log q(x | y') / d with the mean network held still, and the mean network's own squared
    error in units of the noise variance: together they are the wake-sleep step (Hinton et al.,
    1995, Science 268), whose fixed point is Bayes' rule for any A and any noise.
    """
    clean = problem.A(x)
    y = corrupted(clean, problem, generator)
    context = posterior.context(y, problem)
    held = replace(context, mean=context.mean.detach())
    nats = -posterior.log_density(x, held).mean() / x[0].numel()
    error = (context.mean - x).square().mean() / max(problem.level, 0.01) ** 2
    return nats, error


def distilled(posterior: Posterior, teacher: Prior, y: Tensor, problem: Problem) -> Tensor:
    """The mean network's squared distance from D(y, sigma_y), in units of the noise variance.

    For A = I that is E[x | y] under the teacher (Tweedie's formula): a target without noise.
    """
    with torch.no_grad():
        target = teacher.denoise(y, torch.full((len(y),), problem.sigma, device=y.device))
    return (posterior.mean(y, problem) - target).square().mean() / problem.sigma**2


def elbo_loss(
    posterior: Posterior,
    teacher: Prior,
    y: Tensor,
    problem: Problem,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """FlowDiff's objective for the flow (arXiv 2407.11162), per dimension, and the images drawn.

        E_z [ ||y - A x||^2 / (2 sigma_y^2) - b(x) - log |det dx/dz| ],   x = x(z, y),

    with -b the negative evidence bound of the teacher, whose weights must be frozen: its gradient
    reaches the flow through the denoiser's input, Jacobian included. Additive constants are
    dropped.
    """
    context = posterior.context(y, problem)
    x, log_det = posterior.transform(gaussian(context.mean, generator), context)
    misfit = problem.residual(x, y).flatten(1).square().sum(1) / (2 * problem.sigma**2)
    bound = teacher.nelbo(x, generator, constants=False)
    return (misfit + bound - log_det).mean() / x[0].numel(), x.detach()
