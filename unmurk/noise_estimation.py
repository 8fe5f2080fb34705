r"""Blind noise estimation: the noise model of measurements, from the measurements alone.

White noise has the same power at all spatial frequencies. Images have little at high frequencies,
and almost none where they are flat. Every patch of SIDE x SIDE pixels gives two numbers: its mean
m and the power q that is left when its slow part is removed, the span of the discrete cosine
functions of frequencies u + v < SLOW. Without texture

.. math:: q \sim v\, \chi^2_n / n, \qquad v = a m + b,

where n is the number of pixels minus that of the removed functions. The variance v is linear in m
for Poisson-Gaussian noise, :math:`a (m - o) + \sigma^2`, and constant (a = 0) for Gaussian noise.
Texture only adds to q, so the line is the lower edge (the "envelope") of the cloud (m, q). It is
fitted on one side: only patches with q < k v count, whose mean must be that of the truncated
distribution,

.. math:: \mathbb E[q \mid q < k v] = c v, \qquad
    c = G(n/2 + 1, k n/2) / G(n/2, k n/2),

with the regularized lower incomplete gamma function G. So a and b solve the weighted least squares

.. math:: \min_{a, b} \sum_{q < k v} n\, (q / c - a m - b)^2 / v^2,

which is repeated with the new v until it converges. The iteration starts above the cloud: the
equation also has roots inside the noise of the lowest few patches, and one flat image of 64 x 64
pixels has only 64 patches. (From below, the fit stopped at such a root, 14 % too low, for up to
150 patches.) With

.. math:: k = 1 + \sqrt{2 / n}\, \min(1, 4 / \sqrt P), \qquad P \text{ the number of patches},

the patches that count reach half a standard deviation of q above v for P = 64, and end at v for
many patches. This lowers the standard deviation of the estimate from 3.5 to 2.7 % at P = 64. A
patch with few measured pixels (a mask) loses its slow part by least squares on those pixels; its n
is smaller.

In color, the mean of the patch over the channels is removed first: edges and texture are mostly
the same in all channels, noise is not (n is then twice that of one channel).

**Whether there is a gain.** The rise of v from dark to bright is caused by a gain, or by texture
in bright places. It is taken for a gain if

- it exceeds `SURE` standard errors of the fit. With :math:`\psi = n (q/c - v)/v^2\, (m, 1)` their
  squares are those of any root of :math:`\sum \psi = 0`, the diagonal of :math:`K^{-1} B K^{-1}`,
  where the matrices K and B sum, over the patches, the expected derivative of :math:`\psi` in
  (a, b) and :math:`\mathbb E\, \psi \psi^T`;
- it is white. Noise has equal power in the frequencies u + v < `FINE` and in those above; texture
  lies in the lower ones. The difference of the two powers over the bright patches that count, plus
  two of its standard errors, is at most `TEXTURE` of the rise;
- enough bright patches lie below the line.

A negative b is reported as the offset o = -b / a (sigma = 0), a positive one as sigma = sqrt(b):
the line alone does not determine both.

Sources. Flat patches and high frequencies: X. Liu, M. Tanaka, M. Okutomi, "Single-image noise
level estimation for blind denoising", IEEE Trans. Image Process. 22, 2013; S. Pyatykh, J. Hesser,
L. Zheng, "Image noise level estimation by principal component analysis", ibid. The line: A. Foi,
M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian noise modeling and fitting
for single-image raw-data", ibid. 17, 2008. The benchmark of noise estimation compares them.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import InputError, remark, size_text
from .noise import AUTO, Gaussian, Noise, PerChannel, PoissonGaussian
from .operators import Operator, as_operator
from .patches import SIDE, blocks, cut_patches, fast_part
from .rng import generator

__all__ = [
    "Kind",
    "Line",
    "ModelChoice",
    "bootstrap",
    "choose_noise",
    "estimate_noise",
    "finite_values",
    "known_noise",
    "temporal_line",
]

Kind = Literal["gaussian", "poisson-gaussian"]

SLOW, FINE = 6, 8
FREEDOM = 8  # least degrees of freedom n of a patch
LEAST, MOST = 30, 100_000  # bounds of the number of patches
STEPS = 200  # most iterations of the fit
ABOVE = 1.5  # where the fit starts, in units of the mean power
SURE, TEXTURE = 3.0, 0.15
CLIPPED = 1e-3  # share of values at an end of the range above which they count as clipped
ALIKE, APART = 0.1, 4.0  # channels differ if their noise does by 10 % and 4 standard errors
RISE = 0.1  # least rise of the variance, over its value at black, of a gain worth a model
REDRAWN = 4000  # most patches of a bootstrap sample
BRIGHT = 0.2  # least share of bright patches below the line for a valid gain
IMAGES = ("identity", "inpaint", "blur", "sr", "colour", "hdr", "quantise", "jpeg")


def estimate_noise(
    y: Tensor, operator: Operator, kind: Kind = "gaussian"
) -> Gaussian | PoissonGaussian:
    """Estimate the noise of measurements by the one-sided fit above, to four digits.

    Args:
        y: Measurements, shape (N, C, H, W), not clipped, all with the same noise.
        operator: The operator of the measurements. Hidden pixels are not used. After a blur, a
            reduction or any other operator whose measurements are images, y is itself an image
            with white noise.
        kind: "gaussian" or "poisson-gaussian".

    Returns:
        The noise model.

    Raises:
        InputError: The measurements are not images, too few patches are free of clipping, or no
            patch is both bright and flat ("poisson-gaussian").

    >>> y = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0)).mul(0.1)
    >>> found = estimate_noise(y, as_operator("identity"))  # a flat image
    >>> abs(found.sigma - 0.1) < 0.005
    True
    """
    patches = _patches_of(y, operator, counts=kind != "gaussian")
    if kind == "gaussian":
        ones = torch.ones_like(patches.mean)[:, None]
        (variance,) = envelope(patches.power, patches.freedom, ones).tolist()
        return Gaussian(_digits(math.sqrt(variance)))
    gain, rest = _gain(patches)
    if rest >= 0:
        return PoissonGaussian(_digits(gain), _digits(math.sqrt(rest)))
    return PoissonGaussian(_digits(gain), 0.0, _digits(-rest / gain))


def gives_images(operator: Operator) -> bool:
    """Return whether measurements by an operator are images, whose noise can be estimated.

    >>> from unmurk.operators import as_operator
    >>> forms = ("blur:gaussian,sigma=1|sr:average,factor=2", "phase:fourier")
    >>> [gives_images(as_operator(form)) for form in forms]
    [True, False]
    """
    forms = {link.partition(":")[0].partition(",")[0] for link in operator.spec.split("|")}
    return forms <= set(IMAGES)


def _patches_of(y: Tensor, operator: Operator, counts: bool) -> "Patches":
    """Return the usable patches of measurements. Raises InputError as `estimate_noise` does."""
    if not gives_images(operator) or y.ndim != 4:
        raise InputError(
            f"noise cannot be estimated from measurements by '{operator.spec}', which are no"
            " images: give --noise a number"
        )
    bound = operator.bind(range(len(y)), operator.x_shape(tuple(y.shape[1:])))
    observed = bound.apply_mask(torch.ones_like(y)).cpu() > 0
    y = torch.where(observed, y.cpu(), 0.0)
    broken = ~y.isfinite().flatten(1).all(1)
    if broken.any():
        raise InputError(
            f"noise cannot be estimated: image number {int(broken.int().argmax())} has values that"
            " are not finite: leave it out, or replace them"
        )
    patches = powers(y, observed, counts)
    if len(patches.power) < LEAST:
        raise InputError(
            f"noise cannot be estimated from {len(patches.power)} patches of"
            f" {size_text((SIDE, SIDE))} pixels"
            " that are measured and not clipped: give more images, values that are not clipped, or"
            " --noise a number"
        )
    return patches


class ModelChoice(NamedTuple):
    """A noise model and the reasons for it.

    Attributes:
        noise: The model; `PerChannel` if the channels differ.
        reasons: One sentence for each model.

    >>> y = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0)).mul(0.1)
    >>> choice = choose_noise(y, as_operator("identity"))
    >>> choice.noise, choice.reasons[0].partition(",")[0]
    (Gaussian(sigma=0.09969), 'Gaussian')
    """

    noise: Noise
    reasons: tuple[str, ...]


def choose_noise(y: Tensor, operator: Operator) -> ModelChoice:
    """Choose between Gaussian and Poisson-Gaussian noise, for each channel, and estimate it.

    A channel has a gain if `estimate_noise` finds one, and the variance rises by more than a tenth
    from dark to bright. The channels get one model unless the standard deviations of their noise
    differ by more than 10 % and 4 standard errors.

    Args:
        y: Measurements, shape (N, C, H, W).
        operator: Their operator; see `estimate_noise`.

    Raises:
        InputError: See `estimate_noise`.

    >>> y = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> y = 0.5 + y * torch.tensor([0.1, 0.2]).view(2, 1, 1)
    >>> choose_noise(y, as_operator("identity")).noise.spec
    'per-channel:gaussian,sigma=0.09895:gaussian,sigma=0.2011'
    """
    if y.ndim != 4 or y.shape[1] < 2:
        return _choose(y, operator)
    single = [y[:, i : i + 1] for i in range(y.shape[1])]
    try:
        sigmas = torch.tensor([_level(part, operator) for part in single])
    except InputError:  # one of them is clipped or empty: all of them together
        return _choose(y, operator)
    middle = sigmas[:, 0].mean()
    away = (sigmas[:, 0] - middle).abs()
    if not bool(((away > ALIKE * middle) & (away > APART * sigmas[:, 1])).any()):
        return _choose(y, operator)
    choices = [_choose(part, operator) for part in single]
    reasons = [f"channel {i}: {c.reasons[0]}" for i, c in enumerate(choices)]
    models = tuple(choice.noise for choice in choices)
    return ModelChoice(PerChannel(models), tuple(reasons))  # type: ignore[arg-type]


def _level(y: Tensor, operator: Operator) -> tuple[float, float]:
    """Return the standard deviation of Gaussian noise, and its standard error."""
    patches = _patches_of(y, operator, counts=False)
    ones = torch.ones_like(patches.mean)[:, None]
    line = envelope(patches.power, patches.freedom, ones)
    error = float(uncertainty(patches.power, patches.freedom, ones, line)[0, 0]) ** 0.5
    sigma = float(line[0].clamp_min(1e-20)) ** 0.5
    return sigma, error / (2 * sigma)


def _choose(y: Tensor, operator: Operator) -> ModelChoice:
    """Choose one model for all channels."""
    try:
        found = estimate_noise(y, operator, "poisson-gaussian")
    except InputError as error:
        why = str(error).removeprefix("the gain cannot be estimated: ").partition(": give")[0]
        return ModelChoice(estimate_noise(y, operator), (f"Gaussian, as {why}",))
    assert isinstance(found, PoissonGaussian)
    low, high = (
        finite_values(y)[:: max(1, y.numel() // 100_000)]
        .double()
        .quantile(torch.tensor([0.02, 0.98], dtype=torch.float64))
    )
    dark, bright = (float(found.variance(end)) for end in (low, high))
    if bright < (1 + RISE) * dark:
        rise = bright / dark - 1
        why = f"the variance rises by {rise:.0%} only from dark to bright"
        return ModelChoice(estimate_noise(y, operator), (f"Gaussian, as {why}",))
    why = f"the variance rises from {dark:.3g} at {low:.3g} to {bright:.3g} at {high:.3g}"
    return ModelChoice(found, (f"Poisson-Gaussian, as {why}",))


def _gain(patches: "Patches") -> tuple[float, float]:
    """Fit the line a, b of Poisson-Gaussian noise. Raises InputError if there is no clear gain."""
    terms = torch.stack([patches.mean, torch.ones_like(patches.mean)], 1)
    line = envelope(patches.power, patches.freedom, terms)
    gain, rest = line.tolist()
    ends = torch.tensor([0.02, 0.98], dtype=patches.mean.dtype)
    low, high = patches.mean.quantile(ends).tolist()
    bright = patches.mean > (low + high) / 2
    below = patches.power < terms @ line
    hint = "give --noise auto (one Gaussian noise) or poisson-gaussian with numbers"
    if not below[bright].double().mean() >= BRIGHT:
        raise InputError(
            f"the gain cannot be estimated: no bright part of the images is flat: {hint}"
        )
    error = float(uncertainty(patches.power, patches.freedom, terms, line)[0, 0]) ** 0.5
    if not gain > SURE * error:
        raise InputError(
            f"the gain cannot be estimated: a gain of {gain:.2g} +- {error:.2g} may be 0, as for"
            f" noise that does not depend on the brightness: {hint}"
        )
    rise = gain * (float(patches.mean[bright & below].mean()) - low)
    if not _texture(patches, bright & below) < TEXTURE * rise:
        raise InputError(
            "the gain cannot be estimated: no bright part of the images is flat, and the"
            f" variation there may be texture: {hint}"
        )
    return gain, rest


def _texture(patches: "Patches", chosen: Tensor) -> float:
    """Compute an upper bound of the power of texture in patches with noise of one power v.

    Without texture, both parts of the frequencies have the mean power of all of them.
    """
    chosen = chosen & (patches.finest > 0) & (patches.finest < patches.freedom)
    power, freedom, fine, finest = (part[chosen] for part in patches[1:])
    coarse = (freedom * power - finest * fine) / (freedom - finest)
    texture = (coarse - fine) * (freedom - finest) / freedom
    if len(texture) < 2:
        return math.inf
    return float(texture.mean() + 2 * texture.std() / len(texture) ** 0.5)


def known_noise(text: str, y: Tensor, operator: str | Operator, what: str = "") -> str:
    """Replace "auto" in the text form of a noise by an estimate, which is printed on stderr.

    Args:
        text: A text form of `unmurk.noise`, or "auto" (see `choose_noise`), "gaussian,auto" or
            "poisson-gaussian,auto".
        y: The measurements, shape (N, C, H, W).
        operator: The operator, or its text form.
        what: The images in words, for the message; by default their number.

    Returns:
        A text form with numbers; `text` itself if it has them.

    Raises:
        InputError: See `estimate_noise`.

    >>> known_noise("0.1", torch.rand(1, 1, 8, 8), "identity")
    '0.1'
    """
    text = text.replace(" ", "")
    if text not in AUTO:
        return text
    kind = AUTO[text]
    if kind == "auto":
        choice = choose_noise(y, as_operator(operator))
        found, why = choice.noise.spec, f" ({'; '.join(choice.reasons)})"
    else:
        found, why = estimate_noise(y, as_operator(operator), kind).spec, ""
    what = what or ("1 image" if len(y) == 1 else f"{len(y)} images")
    remark(f"noise estimated from {what}: {found}{why}")
    return found


class Line(NamedTuple):
    """The variance of the noise as a line in the mean, v = gain m + rest, with its uncertainty.

    Attributes:
        gain: Slope a.
        rest: Variance b at mean 0.
        covariance: Covariance of (a, b), (2, 2).
        means: Mean of each class of brightness, ascending.
        variances: Variance of the noise in each class.
        errors: Standard error of each.

    >>> scene = torch.linspace(0.2, 0.8, 64).expand(1, 16, 64, 64)
    >>> counts = torch.poisson(scene / 0.01, generator=torch.Generator().manual_seed(0))
    >>> line = temporal_line(0.01 * counts)
    >>> round(line.gain, 3), abs(line.gain - 0.01) < 4 * float(line.covariance[0, 0]) ** 0.5
    (0.01, True)
    """

    gain: float
    rest: float
    covariance: Tensor
    means: Tensor
    variances: Tensor
    errors: Tensor


def bootstrap(
    y: Tensor, operator: Operator, kind: Kind, draws: int = 40, seed: int = 0
) -> tuple[Line, "Patches"]:
    r"""Estimate the variance of the noise and its uncertainty, by redrawing the patches.

    Each draw takes P' of the P patches with replacement and fits again; the covariance of the fits
    is scaled by P'/P. The standard errors contain the chance of the noise, not the error that
    texture makes.

    Args:
        y: Measurements, shape (N, C, H, W).
        operator: Their operator; see `estimate_noise`.
        kind: "gaussian" or "poisson-gaussian".
        draws: Number of draws.
        seed: Seed of the draws.

    Returns:
        The fit, with the lower edge of the patches in classes of brightness; and the patches.

    Raises:
        InputError: See `estimate_noise`.

    >>> y = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0)).mul(0.1)
    >>> line, patches = bootstrap(y, as_operator("identity"), "gaussian", draws=20)
    >>> abs(line.rest - 0.01) < 4 * float(line.covariance[1, 1]) ** 0.5 < 0.002
    True
    """
    patches = _patches_of(y, operator, counts=kind != "gaussian")
    number = len(patches.power)
    terms = torch.stack([patches.mean, torch.ones_like(patches.mean)], 1)
    terms = terms[:, 1:] if kind == "gaussian" else terms
    line = envelope(patches.power, patches.freedom, terms)
    size, found = min(number, REDRAWN), []
    for draw in range(draws):
        stream = generator(seed, draw)
        chosen = torch.randint(number, (size,), generator=stream)
        found.append(envelope(patches.power[chosen], patches.freedom[chosen], terms[chosen]))
    spread = torch.stack(found).T.cov().reshape(terms.shape[1], -1) * size / number
    covariance = torch.zeros(2, 2, dtype=spread.dtype)
    covariance[2 - len(line) :, 2 - len(line) :] = spread
    gain, rest = (0.0, float(line[0])) if kind == "gaussian" else line.tolist()
    return Line(gain, rest, covariance, *_classes(patches, terms @ line)), patches


def _classes(patches: "Patches", fit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance of the noise and its standard error in classes of brightness.

    The variance of a class is that of the line, `fit` at every patch, times the level at which the
    powers of the class lie in units of it.
    """
    found = []
    v = raised(fit)
    for part in _bands(patches.mean, 2 * LEAST):
        power, freedom = patches.power[part] / v[part], patches.freedom[part]
        ones = torch.ones_like(power)[:, None]
        level = envelope(power, freedom, ones)
        error = uncertainty(power, freedom, ones, level)[0, 0].sqrt()
        scale = v[part].mean()
        found.append(torch.stack([patches.mean[part].mean(), level[0] * scale, error * scale]))
    mean, variance, error = torch.stack(found).T
    return mean, variance, error


def _bands(mean: Tensor, least: int, most: int = 12) -> list[Tensor]:
    """Return the members of classes of equal width in brightness, with `least` members or more."""
    low, high = mean.min(), mean.max()
    number = ((mean - low) / (high - low).clamp_min(1e-12) * most).long().clamp_max(most - 1)
    found = [torch.nonzero(number == k)[:, 0] for k in range(most)]
    found = [part for part in found if len(part) >= least]
    return found or [torch.arange(len(mean))]


def temporal_line(captures: Tensor) -> Line:
    r"""Measure the line of the noise from repeated captures of the same scenes, without a model.

    The photon-transfer method (J. R. Janesick, 2007, "Photon Transfer", SPIE): in every pixel the
    N captures give a mean and an unbiased variance, whatever the scene holds. Both are averaged
    over blocks of 8 x 8 pixels, where v = a m + b still holds exactly, and a and b come from
    weighted least squares. Scenes that move, or light that flickers, count as noise.

    Args:
        captures: (scenes, N, H, W) of one channel, N >= 2. Blocks with a pixel that is not finite
            do not count.

    Raises:
        InputError: There is one capture only, or there are too few blocks of 8 x 8 pixels.

    >>> draw = torch.Generator().manual_seed(0)
    >>> scene = torch.rand(64, 64, generator=draw)  # texture does no harm
    >>> line = temporal_line(scene + 0.1 * torch.randn(1, 16, 64, 64, generator=draw))
    >>> round(line.rest + 0.5 * line.gain, 3)  # the variance at the mean 0.5
    0.01
    """
    if captures.ndim != 4 or captures.shape[1] < 2:
        raise InputError("the noise over time needs 2 or more captures of one scene")
    y = captures.double()
    mean = cut_patches(y.mean(1)[:, None]).mean((1, 2))
    variance = cut_patches(y.var(1)[:, None]).mean((1, 2))
    measured = mean.isfinite() & variance.isfinite()
    mean, variance = mean[measured], variance[measured]
    if len(mean) < LEAST:
        raise InputError(
            f"the noise over time needs {LEAST} blocks of 8x8 pixels, and there are {len(mean)}:"
            " give larger or more images"
        )
    bands = _bands(mean, SIDE)
    means, values = (torch.stack([v[part].mean() for part in bands]) for v in (mean, variance))
    errors = torch.stack([variance[part].std() / len(part) ** 0.5 for part in bands])
    # weights 1 / v^2 from the variances of the classes, never from a line that may reach 0
    order = means.argsort()
    place = torch.bucketize(mean, (means[order][1:] + means[order][:-1]) / 2)
    spread = values[order].clamp_min(1e-3 * float(values.max()))[place]
    terms = torch.stack([mean, torch.ones_like(mean)], 1)
    weights = spread.square().reciprocal()
    line = _fit(variance, weights, terms)
    inverse = torch.linalg.pinv((weights[:, None] * terms).T @ terms, hermitian=True)
    residual = (variance - terms @ line) / spread
    freedom = (captures.shape[1] - 1) * SIDE**2
    scale = max(2 / freedom, float(residual.square().mean()))
    gain, rest = line.tolist()
    return Line(gain, rest, scale * inverse, means, values, errors)


class Patches(NamedTuple):
    """Statistics of the patches, shape (P,) each.

    Attributes:
        mean: Mean m.
        power: Power q of all but the slow part.
        freedom: Degrees of freedom n of q.
        fine: Power of the upper part of those frequencies; of all of them for Gaussian noise.
        finest: Degrees of freedom of `fine`.
    """

    mean: Tensor
    power: Tensor
    freedom: Tensor
    fine: Tensor
    finest: Tensor


def textures(y: Tensor, observed: Tensor, counts: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean m, power q and degrees of freedom n of the usable patches, (P,) each.

    Args:
        y: Images, shape (N, C, H, W).
        observed: Which of their values are measured, same shape.
        counts: Whether many values may equal the lowest one without being clipped, as in images
            of counts with many zeros.
    """
    return powers(y, observed, counts)[:3]


def powers(y: Tensor, observed: Tensor, counts: bool = False) -> Patches:
    """Compute the statistics of the usable patches; the arguments are those of `textures`."""
    values, inside = usable(y, observed, counts)[:2]
    mean = (values * inside[:, None]).sum((1, 2)) / (values.shape[1] * inside.sum(1))
    power, freedom = _power(values, inside, SLOW)
    fine, finest = _power(values, inside, FINE) if counts else (power, freedom)
    good = freedom >= FREEDOM * max(1, values.shape[1] - 1)
    return Patches(*(part[good] for part in (mean, power, freedom, fine, finest)))


def usable(
    y: Tensor, observed: Tensor, counts: bool = False, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the patches of which enough pixels are measured and none is clipped, at most `MOST`.

    Args:
        y, observed, counts: See `textures`.
        beside: Further numbers of the pixels, of the shape of y; None: y.

    Returns:
        Patches (P, C, SIDE^2), 1 where a pixel is measured (P, SIDE^2), and the patches of
        `beside`, in double precision. Two channels count as separate images.

    >>> y = torch.rand(1, 1, 64, 64)
    >>> [part.shape for part in usable(y, torch.ones_like(y) > 0)[:2]]
    [torch.Size([64, 1, 64]), torch.Size([64, 64])]
    """
    if not bool(observed.any()):
        raise InputError(
            "noise cannot be estimated, as no pixel is measured: give images of which some pixels "
            "are finite and not hidden, or --noise a number"
        )
    held = y if bool(observed.all()) else y[observed]
    clipped = torch.zeros_like(observed)
    for end in [held.max()] if counts else [held.max(), held.min()]:
        tied = observed & (y == end)
        if int(tied.sum()) / held.numel() > CLIPPED:
            clipped |= tied
    parts = [y, observed, clipped, y if beside is None else beside]
    if y.shape[1] < 3:  # two channels are unrelated: separate images
        parts = [part.flatten(0, 1)[:, None] for part in parts]
    y, observed, clipped, beside = parts
    measured = blocks(observed.all(1, keepdim=True))
    free = measured.sum((3, 4, 5)) >= FREEDOM
    free &= ~blocks(clipped.any(1, keepdim=True)).flatten(3).any(3)
    place = free.nonzero()
    chosen = place[:: max(1, math.ceil(len(place) / MOST))].unbind(1)
    values, more = (blocks(part)[chosen].flatten(2).double() for part in (y, beside))
    return values, measured[chosen].flatten(1).double(), more


def _power(values: Tensor, inside: Tensor, slow: int) -> tuple[Tensor, Tensor]:
    """Compute power and degrees of freedom (P,) of patches (P, C, SIDE^2) without slow part."""
    fast, freedom = fast_part(values * inside[:, None], inside, slow)
    channels = values.shape[1]
    if channels > 1:
        fast, freedom = fast - fast.mean(1, keepdim=True), (channels - 1) * freedom
    return fast.square().sum((1, 2)) / freedom.clamp_min(1), freedom


def envelope(power: Tensor, freedom: Tensor, terms: Tensor) -> Tensor:
    """Fit v = terms @ coefficients to the lower edge of the powers.

    Args:
        power: Powers q, shape (P,).
        freedom: Degrees of freedom n, shape (P,).
        terms: Regressors of v, shape (P, K): the mean and 1, or 1 alone.

    Returns:
        Coefficients, shape (K,).
    """
    reach, ratio = reach_of(freedom), _by_freedom(_mean_below, freedom)
    found = _start(power, terms)
    for _ in range(STEPS):
        v = raised(terms @ found)
        below = power < reach * v
        if below.sum() < LEAST // 2:
            break
        before = found
        found = _fit(power[below] / ratio[below], (freedom.sqrt() / v)[below], terms[below])
        if torch.allclose(found, before, rtol=1e-9, atol=0):
            break
    return found


def uncertainty(power: Tensor, freedom: Tensor, terms: Tensor, line: Tensor) -> Tensor:
    """Compute the covariance (K, K) of the coefficients that `envelope` found.

    It is infinite if the patches do not determine them.
    """
    reach = reach_of(freedom)
    inside, slope, spread = _by_freedom(_moments_below, freedom)
    v = raised(terms @ line)
    below = power < reach * v  # the number of flat patches, times `inside`
    each = terms / v[:, None]
    a = (each * (freedom * slope / inside)[:, None])[below].T @ each[below]
    b = (each * (freedom**2 * spread / inside)[:, None])[below].T @ each[below]
    if torch.linalg.cond(a) > 1e12:
        return torch.full_like(a, math.inf)
    inverse = torch.linalg.inv(a)
    return inverse @ b @ inverse.T


def reach_of(freedom: Tensor, count: int | None = None) -> Tensor:
    """Return k, shape (P,): powers below k v count.

    Args:
        freedom: Degrees of freedom n, shape (P,).
        count: Number of patches; None: P.
    """
    count = len(freedom) if count is None else count
    return 1 + (2 / freedom).sqrt() * min(1.0, 4 / count**0.5)


def _by_freedom(function: Callable[[Tensor, Tensor], Tensor], freedom: Tensor) -> Tensor:
    """Compute a function of n and k once for every value of n, as it has special functions.

    Args:
        function: Takes n and k, both (M,), and returns (..., M).
        freedom: Degrees of freedom n, shape (P,).

    Returns:
        Shape (..., P).
    """
    values, place = freedom.unique(return_inverse=True)
    return function(values, reach_of(values, len(freedom)))[..., place]


def _mean_below(n: Tensor, k: Tensor) -> Tensor:
    """Return c, the mean of the powers below k v in units of v."""
    return _gamma(n / 2 + 1, k * n / 2) / _gamma(n / 2, k * n / 2)


def _moments_below(n: Tensor, k: Tensor) -> Tensor:
    """Return what `uncertainty` needs of the powers below k v, in units of v, (3, M).

    These are the probability of such a power, -E of the derivative of psi, and E psi^2, both
    without their factors of n.
    """
    half, limit = n / 2, k * n / 2
    inside, first, second = (_gamma(half + i, limit) for i in (0, 1, 2))
    ratio = first / inside
    edge = k * (half.log() * half + (half - 1) * k.log() - limit - torch.lgamma(half)).exp()
    slope = inside - (k / ratio - 1) * edge
    spread = second * (1 + 1 / half) / ratio**2 - 2 * first / ratio + inside
    return torch.stack([inside, slope, spread])


def raised(v: Tensor) -> Tensor:
    """Raise variances v (P,) that a line puts at or below 0."""
    return v.clamp_min(float(v[v > 0].quantile(0.02)) if (v > 0).any() else 1e-12)


def _gamma(shape: Tensor, x: Tensor) -> Tensor:
    """The regularized lower incomplete gamma function G."""
    return torch.special.gammainc(shape, x)


def _start(power: Tensor, terms: Tensor) -> Tensor:
    """Fit a line above most powers: their mean at every brightness, times `ABOVE`."""
    parts = terms[:, 0].argsort().tensor_split(12 if terms.shape[1] > 1 else 1)
    high = ABOVE * torch.stack([power[part].mean() for part in parts])
    middle = torch.stack([terms[part].mean(0) for part in parts])
    return _fit(high, 1 / high.clamp_min(1e-12), middle)


def _fit(values: Tensor, weights: Tensor, terms: Tensor) -> Tensor:
    """Solve weighted least squares of values (P,) by terms (P, K)."""
    weighted = weights[:, None] * terms
    inverse = torch.linalg.pinv(weighted.T @ weighted, rtol=1e-12, hermitian=True)
    return inverse @ weighted.T @ (weights * values)


def finite_values(y: Tensor) -> Tensor:
    """Return the values that are finite, in one row; a view of y if all are.

    >>> finite_values(torch.tensor([[1.0, math.nan], [2.0, math.inf]]))
    tensor([1., 2.])
    """
    finite = y.isfinite()
    return y.flatten() if bool(finite.all()) else y[finite]


def _digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")
