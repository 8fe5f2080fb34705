r"""Losses of the learners, each computed per image and averaged over the batch.

Notation: measurements :math:`y = A(x) + \sigma_y n` with :math:`n \sim \mathcal N(0, I)`, denoiser
:math:`D(x_t, \sigma)`, posterior mean network :math:`m(y)`, conditional flow :math:`q(x \mid y)`,
and :math:`d = C H W` values of an image. Losses are divided by :math:`d`, which does not move
their minimum, so that one learning rate serves images of any size.

Denoising score matching weights the error of a denoiser at level :math:`\sigma`, with
:math:`s = 2 \sigma`, by

.. math::

    \lambda(\sigma) = \frac{4 (1 + s^2)}{s^2 d}, \qquad \log s \sim \mathcal N(0, 1.2^2)

(Karras et al., 2022, arXiv 2206.00364, section 5, for :math:`\sigma_\text{data} = 1`). Their mean
of :math:`\log s` is -0.5; a mean of 0 gave better samples in our experiments.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.losses import gaussian, levels, score_matching, weighted
from ..diffusion.prior import Prior
from ..flows.posterior import Posterior
from ..noise import Gaussian, PerChannel, PoissonGaussian
from ..operators import Operator, Weighted
from ..operators.base import per_image
from ..operators.inpainting import Inpaint
from ..operators.linalg import squared_norm
from ..problem import Problem
from ..rng import poisson, uniform

__all__ = [
    "ambient_matching",
    "corrupted",
    "denoising",
    "distilled",
    "elbo_loss",
    "forward_kl",
    "gaussian",
    "levels",
    "masked_ambient_matching",
    "noise2noise",
    "recorrupted",
    "recorrupted_matching",
    "supervised",
    "weighted",
    "with_hidden",
]


def corrupted(clean: Tensor, problem: Problem, generator: torch.Generator) -> Tensor:
    """Add fresh noise to noiseless measurements, all of it from one generator.

    Args:
        clean: Noiseless measurements A(x), shape (B, ...).
        problem: The noise model.
        generator: Source of the noise.

    Returns:
        Measurements of the same shape.

    >>> noise = torch.Generator().manual_seed(0)
    >>> clean = torch.full((100, 1, 8, 8), 0.5)
    >>> y = corrupted(clean, Problem("identity", 0.1), noise)
    >>> round(float((y - clean).std()), 2)
    0.1
    """
    noise = problem.noise
    if isinstance(noise, PerChannel):
        models = [Problem("identity", model) for model in noise.models]
        channels = zip(clean.split(1, 1), models, strict=True)
        return torch.cat([corrupted(c, model, generator) for c, model in channels], 1)
    if not isinstance(noise, PoissonGaussian):
        return clean + problem.sigma * gaussian(clean, generator)
    counts = poisson(noise.rate(clean.detach()), generator)
    y = (noise.offset + noise.gain * counts).to(clean)
    return y + noise.sigma * gaussian(clean, generator)


def denoising(prior: Prior, x: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    r"""Compute the denoising score matching loss of a prior.

    .. math:: \mathcal L = E_{x, \sigma, n}\; \lambda(\sigma)\,
        \lVert D(x + \sigma n, \sigma) - x \rVert^2

    Its minimizer is :math:`D(x_t, \sigma) = E[x \mid x_t]` (Vincent, 2011, Neural Computation 23).

    Args:
        prior: The prior; an object with `denoise(x, sigma)`.
        x: Images (B, C, H, W).
        sigma: Noise levels (B,).
        generator: Source of the noise.

    Returns:
        The loss, a scalar.

    >>> from types import SimpleNamespace
    >>> noise, sigma = torch.Generator().manual_seed(0), torch.full((100,), 0.5)
    >>> identity = SimpleNamespace(denoise=lambda x, sigma: x)  # leaves all noise
    >>> loss = denoising(identity, torch.rand(100, 1, 8, 8, generator=noise), sigma, noise)
    >>> round(float(loss), 1)  # 1 + 4 sigma^2
    2.0
    """
    return score_matching(prior.denoise, x, sigma, generator)


def ambient_matching(
    prior: Prior,
    x: Tensor,
    y: Tensor,
    sigma_y: float,
    sigma: Tensor,
    generator: torch.Generator,
    mean: Tensor | None = None,
) -> Tensor:
    r"""Compute score matching against noisy images at the levels above their noise (A = I).

    At :math:`\sigma > \sigma_y` the image :math:`x_t = y + \sqrt{\sigma^2 - \sigma_y^2}\, n` has
    noise of level :math:`\sigma` exactly, and

    .. math:: E[y \mid x_t] = r x_t + (1 - r)\, E[x \mid x_t], \qquad
        r = \sigma_y^2 / \sigma^2

    ("Ambient Tweedie", Daras et al., 2024, arXiv 2404.10177, Theorem 3.1). The loss

    .. math:: E\; \lambda(\sigma)\,
        \lVert r x_t + (1 - r)\, D(x_t, \sigma) - y \rVert^2

    therefore trains D without bias and without a clean image. At :math:`\sigma \le \sigma_y` the
    images `x`, drawn from the current posterior, take the place of y and the loss is that of
    `denoising`.

    With `mean`, :math:`D(x_t, \sigma)` is matched to :math:`m(y)` instead. Because
    :math:`x - y - x_t` is a Markov chain, :math:`E[x \mid x_t] = E[E[x \mid y] \mid x_t]`. So the
    minimizer is the same if :math:`m(y) = E[x \mid y]`, and the target is free of the noise of y
    (Rao and Blackwell). D inherits those errors of m that :math:`x_t` determines.

    Args:
        prior: The prior; an object with `denoise(x, sigma)`.
        x: Images (B, C, H, W) for the levels up to sigma_y.
        y: Noisy images (B, C, H, W).
        sigma_y: Noise level of y.
        sigma: Noise levels (B,).
        generator: Source of the noise.
        mean: Posterior means m(y), shape (B, C, H, W); None matches to y.

    Returns:
        The loss, a scalar.

    >>> from types import SimpleNamespace
    >>> noise, sigma = torch.Generator().manual_seed(0), torch.full((400,), 0.5)
    >>> y = 0.1 * torch.randn(400, 1, 8, 8, generator=noise)  # all images are black
    >>> black = SimpleNamespace(denoise=lambda x, sigma: 0 * x)  # the exact denoiser
    >>> loss = ambient_matching(black, y, y, 0.1, sigma, noise)
    >>> round(float(loss), 3), round(8 * 0.1**2 * (1 - 0.1**2 / 0.5**2), 3)  # lambda d = 8
    (0.077, 0.077)
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


def masked_ambient_matching(
    prior: Prior,
    posterior: Posterior,
    y: Tensor,
    problem: Problem,
    sigma: Tensor,
    generator: torch.Generator,
    hide: float,
    above: float,
) -> Tensor:
    r"""Compute score matching against the observed pixels of masked images.

    This is the loss of Ambient Diffusion (Daras et al., 2023, arXiv 2305.19256, section 3) for a
    network that knows no masks. A part `hide` of the observed pixels is withheld, and m fills in
    everything that is hidden or withheld. At :math:`\sigma >` `above`,

    .. math::

        x_t = \begin{cases}
            y + \sqrt{\sigma^2 - \sigma_y^2}\, n & \text{on the pixels given,} \\
            m + \sigma n & \text{elsewhere,}
        \end{cases}

    and :math:`D(x_t, \sigma)` is matched to y on all pixels that y observes, those given with the
    ratio of `ambient_matching`. This :math:`x_t` is an image that D will meet only where the error
    of m is small beside :math:`\sigma`. At lower levels it is not, and D is matched to m(y)
    itself.

    Args:
        prior: The prior; an object with `denoise(x, sigma)`.
        posterior: The posterior that m belongs to.
        y: Measurements (B, C, H, W), zero where hidden.
        problem: How they were made, bound to these images; its operator is a mask.
        sigma: Noise levels (B,).
        generator: Source of the noise and of the pixels withheld.
        hide: Fraction of the observed pixels that is withheld.
        above: Lowest level at which y is the target.

    Returns:
        The loss, a scalar.

    >>> from types import SimpleNamespace
    >>> noise, shape = torch.Generator().manual_seed(0), (1, 8, 8)
    >>> problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(8), shape)
    >>> y = problem.A(torch.zeros(8, *shape))  # black images without noise
    >>> black = SimpleNamespace(
    ...     denoise=lambda x, sigma: 0 * x, mean=lambda y, problem: torch.zeros(8, *shape)
    ... )
    >>> sigma = torch.full((8,), 0.05)  # below `above`, where D is matched to m(y)
    >>> float(masked_ambient_matching(black, black, y, problem, sigma, noise, 0.1, 0.2))
    0.0
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


def with_hidden(problem: Problem, fraction: float, generator: torch.Generator) -> Problem:
    """Hide a further fraction of the pixels that masks observe.

    Args:
        problem: A problem, bound to images.
        fraction: Probability that an observed pixel is hidden.
        generator: Source of the choice.

    Returns:
        The problem with the further pixels hidden; the same problem if it has no mask.

    Raises:
        InputError: The problem is not bound to images.

    >>> problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(100), (1, 8, 8))
    >>> less = with_hidden(problem, 0.2, torch.Generator().manual_seed(0))
    >>> round(float(less.mask.mean() / problem.mask.mean()), 1)
    0.8
    """
    operator = problem.operator
    inner = operator.operator if isinstance(operator, Weighted) else operator
    if not isinstance(inner, Inpaint) or inner.mask is None:
        return problem
    mask = inner.mask
    numbers = problem.index or range(len(mask))
    draws = uniform((len(numbers), *mask.shape[1:]), generator)
    less: Operator = inner.hiding((draws < fraction).to(mask))
    if isinstance(operator, Weighted):
        less = operator._with(operator=less)
    hidden = Problem(less, problem.noise)
    hidden.index = problem.index
    return hidden


def recorrupted(
    posterior: Posterior,
    y: Tensor,
    problem: Problem,
    alpha: float,
    generator: torch.Generator,
    hide: float = 0.0,
) -> Tensor:
    r"""Compute the loss of the mean network without clean images (Recorrupted-to-Recorrupted).

    With :math:`n \sim \mathcal N(0, I)`, the errors of the pair

    .. math:: \hat y = y + \alpha \sigma_y n, \qquad \tilde y = y - \sigma_y n / \alpha

    are independent (Pang et al., 2021, CVPR, "Recorrupted-to-Recorrupted", where alpha scales the
    noise added in the same way). So the minimizer of

    .. math:: \mathcal L = E\, \lVert A\, m(\hat y) - \tilde y \rVert^2 / d

    is :math:`A\, m(\hat y) = A\, E[x \mid \hat y]`. Photons are split instead: each goes to
    :math:`\hat y` with probability :math:`1 / (1 + \alpha^2)`, otherwise to :math:`\tilde y`
    (`PoissonGaussian.split`; Monroy, Bacca and Tachella, 2024, arXiv 2412.04648). The variances
    are the same as above.

    **Antithetic pairs.** Noise enters as n and as -n for every image, and photons are split by the
    quantiles of u and of 1 - u for a uniform u (Hammersley and Morton, 1956, Proc. Cambridge
    Philos. Soc. 52), so m is evaluated on 2 B images. The mean of the loss is the same. What the
    noise of the targets adds to the gradient, proportional to :math:`1 / \alpha`, cancels as far
    as m is the same for both, which permits a smaller alpha.

    **Masks.** A hidden pixel has no target. With a fraction `hide` of the observed pixels withheld
    from m, these have one: y itself, whose noise m has not seen (Batson and Royer, 2019, arXiv
    1901.11365). There m learns the expectation given all other pixels, and withheld pixels
    resemble hidden ones if masks are random.

    **Regularization.** Where no :math:`A` observes anything, the correction :math:`\delta = m - w`
    to the Wiener solution :math:`w` would be free. The term
    :math:`\sigma_y^2\, \delta^\top S^{-1} \delta / d` is added, with :math:`S` the covariance of
    the Gaussian prior, and makes it zero there. For :math:`A \ne I` and a Gaussian start the
    minimizer is therefore not :math:`E[x \mid \hat y]` but, with :math:`e = E[x \mid \hat y] - w`,

    .. math:: \delta = (A^\top A + \sigma_y^2 S^{-1})^{-1} A^\top A\, e .

    Where A has the singular value :math:`\kappa` and the prior the power :math:`P`, the fraction
    :math:`\sigma_y^2 / (\sigma_y^2 + \kappa^2 P)` of :math:`e` is left out: little where y says
    much more than the prior, and half of it where noise and prior are equal. The second fit of m,
    by `forward_kl`, has no such term.

    Args:
        posterior: The posterior that m belongs to.
        y: Measurements (B, ...).
        problem: How they were made, bound to these images.
        alpha: Noise added, in units of sigma_y.
        generator: Source of the noise and of the pixels withheld, which differ within a pair.
        hide: Fraction of the observed pixels that is withheld, for masks.

    Returns:
        The loss, a scalar.

    >>> noise, shape = torch.Generator().manual_seed(0), (1, 8, 8)
    >>> posterior = Posterior.create("tiny", shape, 0.1)  # m(y) = y at the start
    >>> problem = Problem("identity", 0.1).bind(range(100), shape)
    >>> y = torch.rand(100, *shape, generator=noise)
    >>> loss = recorrupted(posterior, y, problem, 1.0, noise)
    >>> round(loss.item(), 2)  # sigma^2 (alpha + 1 / alpha)^2
    0.04
    """
    noisier, target = problem.split(y, 1 / (1 + alpha**2), generator, pairs=True)
    y = torch.cat([y, y])
    problem = problem.index_select([*range(len(y) // 2)] * 2)
    given = with_hidden(problem, hide, generator) if hide else problem
    start, correction = posterior.parts(given.operator.apply_mask(noisier), given)
    mean = start + correction
    if given is not problem:
        target = torch.where(given.operator.apply_mask(torch.ones_like(y)) > 0, target, y)
    # The loss is per value of the image, as y may have fewer, and zero where nothing is measured.
    loss = problem.residual(mean, target).square().sum() / mean.numel()
    if posterior.start is None:
        return loss
    return loss + problem.sigma**2 * posterior.start.energy(correction).mean() / mean[0].numel()


def recorrupted_matching(
    prior: Prior, y: Tensor, problem: Problem, alpha: Tensor, generator: torch.Generator
) -> Tensor:
    r"""Compute the loss of the denoiser itself by Recorrupted-to-Recorrupted (A = I).

    The pair of `recorrupted` has the noise level :math:`\sigma_y \sqrt{1 + \alpha^2}` in its first
    image, which D is told:

    .. math:: \mathcal L = E\; \lambda(\sigma)\, \lVert D(\hat y, \sigma) - \tilde y \rVert^2,
        \qquad \sigma = \sigma_y \sqrt{1 + \alpha^2}

    The minimizer is :math:`D(\hat y, \sigma) = E[x \mid \hat y]`. Noise enters in antithetic
    pairs, so D is evaluated on 2 B images.

    Args:
        prior: The prior; an object with `denoise(x, sigma)`.
        y: Noisy images (B, C, H, W).
        problem: How they were made: A = I and Gaussian noise.
        alpha: Noise added to each image, in units of sigma_y, shape (B,).
        generator: Source of the noise.

    Returns:
        The loss, a scalar.

    >>> from types import SimpleNamespace
    >>> noise, alpha = torch.Generator().manual_seed(0), torch.full((400,), 0.5)
    >>> problem = Problem("identity", 0.1)
    >>> y = 0.1 * torch.randn(400, 1, 8, 8, generator=noise)  # all images are black
    >>> black = SimpleNamespace(denoise=lambda x, sigma: 0 * x)  # the exact denoiser
    >>> loss = recorrupted_matching(black, y, problem, alpha, noise)
    >>> sigma2 = 0.1**2 * (1 + 0.5**2)
    >>> round(loss.item(), 1), round((1 / sigma2 + 4) * 0.1**2 * (1 + 1 / 0.5**2), 1)
    (4.2, 4.2)
    """
    assert isinstance(problem.noise, Gaussian)
    noisier, target = problem.noise.recorrupted(y, per_image(alpha, y), generator, pairs=True)
    sigma = (problem.sigma * (1 + alpha**2).sqrt()).repeat(2)
    return weighted(prior.denoise(noisier, sigma) - target, sigma)


def noise2noise(
    posterior: Posterior, y: Tensor, problem: Problem, target: Tensor, other: Problem
) -> Tensor:
    r"""Compute the loss of the mean network with one capture of a scene as the target of another.

    The noises of the captures :math:`y` and :math:`y'` are independent. So the minimizer of

    .. math:: \mathcal L = E\, \lVert A'\, m(y) - y' \rVert^2 / d

    is :math:`A' m(y) = A' E[x \mid y]` (Noise2Noise: Lehtinen et al., 2018, arXiv 1803.04189).
    Unlike in `recorrupted`, no noise is added to y, and pixels that y hides have a target wherever
    :math:`y'` shows them. The term on the correction to a Wiener start is that of `recorrupted`.

    Args:
        posterior: The posterior that m belongs to.
        y: Measurements (B, ...).
        problem: How they were made, bound to these scenes.
        target: Other measurements of the same scenes.
        other: How those were made, bound to the scenes.

    Returns:
        The loss, a scalar.

    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # m(y) = y at the start
    >>> problem = Problem("identity", 0.1).bind(range(2), (1, 8, 8))
    >>> y = torch.zeros(2, 1, 8, 8)
    >>> round(noise2noise(posterior, y, problem, y + 0.2, problem).item(), 4)  # 0.2^2
    0.04
    """
    start, correction = posterior.parts(problem.operator.apply_mask(y), problem)
    mean = start + correction
    loss = other.residual(mean, target).square().sum() / mean.numel()
    if posterior.start is None:
        return loss
    return loss + problem.sigma**2 * posterior.start.energy(correction).mean() / mean[0].numel()


def supervised(
    posterior: Posterior, x: Tensor, problem: Problem, generator: torch.Generator
) -> Tensor:
    r"""Compute the loss of the mean network on clean images and fresh corruptions of them.

    .. math:: \mathcal L = E\, \lVert m(A(x) + \sigma_y n) - x \rVert^2 / d

    Args:
        posterior: The posterior that m belongs to.
        x: Clean images (B, C, H, W).
        problem: The problem, bound to as many images.
        generator: Source of the noise.

    Returns:
        The loss, a scalar.

    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # m(y) = y at the start
    >>> problem = Problem("identity", 0.1).bind(range(100), (1, 8, 8))
    >>> x, noise = torch.zeros(100, 1, 8, 8), torch.Generator().manual_seed(0)
    >>> round(supervised(posterior, x, problem, noise).item(), 3)  # sigma^2
    0.01
    """
    y = corrupted(problem.A(x), problem, generator)
    return (posterior.mean(y, problem) - x).square().mean()


def forward_kl(
    posterior: Posterior, x: Tensor, problem: Problem, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Compute the maximum likelihood loss of the flow on images and fresh corruptions of them.

    With :math:`y' = A(x) + \sigma_y n`,

    .. math::

        \mathcal L_q = -\frac1d E \log q(x \mid y'), \qquad
        \mathcal L_m = \frac{E\, \lVert m(y') - x \rVert^2}{d\, \sigma_y^2} .

    The mean network is held fixed in the first and trained by the second. Together they are the
    wake-sleep step (Hinton et al., 1995, Science 268), whose fixed point is Bayes' rule for any
    operator and any noise.

    Args:
        posterior: The posterior that is trained.
        x: Images (B, C, H, W).
        problem: The problem, bound to as many images.
        generator: Source of the noise.

    Returns:
        The losses of the flow and of the mean network, two scalars. The second divides by
        max(sigma_y, 0.01)^2.

    >>> import math
    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # N(y, 0.1^2) at the start
    >>> problem = Problem("identity", 0.1).bind(range(400), (1, 8, 8))
    >>> x, noise = torch.zeros(400, 1, 8, 8), torch.Generator().manual_seed(0)
    >>> flow, mean = forward_kl(posterior, x, problem, noise)
    >>> round(flow.item(), 2), round(math.log(2 * math.pi * math.e * 0.1**2) / 2, 2)
    (-0.88, -0.88)
    >>> round(mean.item(), 2)
    1.0
    """
    clean = problem.A(x)
    y = corrupted(clean, problem, generator)
    context = posterior.context(y, problem)
    held = replace(context, mean=context.mean.detach())
    nats = -posterior.log_density(x, held).mean() / x[0].numel()
    error = (context.mean - x).square().mean() / max(problem.level, 0.01) ** 2
    return nats, error


def distilled(posterior: Posterior, y: Tensor, problem: Problem, target: Tensor) -> Tensor:
    r"""Compute the squared distance of the mean network from a denoiser (A = I).

    .. math:: \mathcal L = \frac{E\, \lVert m(y) - D(y, \sigma_y) \rVert^2}{d\, \sigma_y^2}

    By Tweedie's formula :math:`D(y, \sigma_y) = E[x \mid y]` under the prior of D, a target
    without noise.

    Args:
        posterior: The posterior whose mean network is trained.
        y: Noisy images (B, C, H, W).
        problem: The problem, bound to these images.
        target: The denoised images D(y, sigma_y), without a gradient.

    Returns:
        The loss, a scalar.

    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # m(y) = y at the start
    >>> problem = Problem("identity", 0.1).bind(range(2), (1, 8, 8))
    >>> y = torch.full((2, 1, 8, 8), 0.2)
    >>> round(distilled(posterior, y, problem, y / 2).item(), 4)  # (0.2 - 0.1)^2 / 0.1^2
    1.0
    """
    return (posterior.mean(y, problem) - target).square().mean() / problem.sigma**2


def elbo_loss(
    posterior: Posterior,
    teacher: Prior,
    y: Tensor,
    problem: Problem,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    r"""Compute FlowDiff's objective for the flow (arXiv 2407.11162), per value of the image.

    With :math:`x = x(z, y)` drawn by the flow,

    .. math::

        \mathcal L = \frac1d E_{z \sim \mathcal N(0, I)} \Bigl[
            \frac{\lVert y - A x \rVert^2}{2 \sigma_y^2} - b(x)
            - \log \Bigl\lvert \det \frac{\partial x}{\partial z} \Bigr\rvert \Bigr] .

    Here :math:`-b` is the negative evidence bound of the teacher, whose weights must be frozen.
    Its gradient reaches the flow through the input of the denoiser, Jacobian included. Additive
    constants are dropped.

    Args:
        posterior: The posterior that is trained.
        teacher: The prior that gives the evidence bound.
        y: Measurements (B, ...).
        problem: The problem, bound to these images.
        generator: Source of the draws.

    Returns:
        The loss, a scalar, and the images drawn (B, C, H, W) without gradients.

    >>> import math
    >>> from types import SimpleNamespace
    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1)  # N(y, 0.1^2) at the start
    >>> problem = Problem("identity", 0.1).bind(range(400), (1, 8, 8))
    >>> flat = SimpleNamespace(nelbo=lambda x, noise, constants: 0.0)
    >>> y, noise = torch.zeros(400, 1, 8, 8), torch.Generator().manual_seed(0)
    >>> loss, x = elbo_loss(posterior, flat, y, problem, noise)
    >>> round(loss.item(), 2), round(0.5 - math.log(0.1), 2)
    (2.8, 2.8)
    """
    context = posterior.context(y, problem)
    x, log_det = posterior.transform(gaussian(context.mean, generator), context)
    misfit = squared_norm(problem.residual(x, y)) / (2 * problem.sigma**2)
    bound = teacher.nelbo(x, generator, constants=False)
    return (misfit + bound - log_det).mean() / x[0].numel(), x.detach()
