"""The noise of images that nobody measured: read off the images alone.

White noise has the same power at all spatial frequencies; images have little at high ones, and
next to none where they are flat. Every patch of SIDE x SIDE pixels gives two numbers: its mean m
and the power q of what is left when its slow part, the span of the discrete cosine functions of
frequencies u + v < SLOW, is taken out. Without texture

    q ~ v chi^2_n / n,    v = a m + b,

n = what is left of the pixels' number: a line in m, since Poisson-Gaussian noise has the variance
a (m - o) + sigma^2, and a constant (a = 0) for Gaussian noise. Texture only adds to q, so the line
is the lower edge of the cloud (m, q). It is fitted on one side (the "envelope"): only patches with
q < k v count, whose mean must be that of the truncated law,

    E[q | q < k v] = c v,    c = P(n/2 + 1, k n/2) / P(n/2, k n/2),

P the regularised incomplete gamma function. So a and b solve the weighted least squares

    min sum_{q < k v} n (q / c - a m - b)^2 / v^2,

repeated with the new v until it stands. The start lies above the cloud: the equation has roots
inside the noise of the lowest few patches too, and one flat image of 64 x 64 pixels has only 64.
(From below the fit stopped at one of these, 14 % too low, for up to 150 patches.) With

    k = 1 + sqrt(2/n) min(1, 4/sqrt(P)),    P the number of patches,

the patches that count reach half a standard deviation above v for P = 64, which lowers the
estimate's own deviation from 3.5 to 2.7 %, and end at v where there are many. A patch of which few
pixels are measured (a mask) loses its slow part by least squares on those; its n is smaller.

In colour the patch's mean over the channels is taken out first: edges and texture are mostly the
same in all channels, noise is not (n is then twice that of one channel).

**Whether there is a gain.** The rise of v from dark to bright is that of a gain, or texture that
is found wherever it is bright. It is taken for a gain if

- it exceeds `SURE` standard errors of the fit. With psi = n (q/c - v)/v^2 (m, 1) these are those
  of any root of sum psi = 0: A^-1 B A^-1, A = E of its derivative, B = E psi psi^T;
- it is white. Frequencies u + v < `FINE` and those above share the noise in equal parts, texture
  lies in the lower ones. The difference of the two powers over the bright patches that count, with
  two of its standard errors on top, is at most `TEXTURE` of the rise;
- enough bright patches lie below the line.

A negative b is told as the offset o = -b / a (sigma = 0), a positive one as sigma = sqrt(b): from
the line alone the two cannot be told apart.

Sources. Flat patches and high frequencies: X. Liu, M. Tanaka, M. Okutomi, "Single-image noise
level estimation for blind denoising", IEEE Trans. Image Process. 22, 2013; S. Pyatykh, J. Hesser,
L. Zheng, "Image noise level estimation by principal component analysis", ibid. The line: A. Foi,
M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian noise modeling and fitting
for single-image raw-data", ibid. 17, 2008. docs/benchmark_noise.md compares.
"""

import math
import sys
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .noise import AUTO, Gaussian, PoissonGaussian
from .operators import Operator, as_operator

__all__ = ["Kind", "estimate_noise", "known_noise"]

Kind = Literal["gaussian", "poisson-gaussian"]

SIDE, SLOW, FINE = 8, 6, 8
FREEDOM = 8  # least n of a patch that counts
LEAST, MOST = 30, 100_000  # patches
STEPS = 200
ABOVE = 1.5  # where the fit starts, in units of the mean power
SURE, TEXTURE = 3.0, 0.15
CLIPPED = 1e-3  # share of numbers at an end of the range that noise alone does not put there
BRIGHT = 0.2  # least share of bright patches below the line, to have told the gain
IMAGES = ("identity", "inpaint", "blur", "sr", "colour", "hdr", "quantise", "jpeg")


def estimate_noise(
    y: Tensor, operator: Operator, kind: Kind = "gaussian"
) -> Gaussian | PoissonGaussian:
    """The noise of measurements, by the one-sided fit above; numbers of four digits.

    Args:
        y: Measurements (N, C, H, W), not clipped; all of the same noise.
        operator: What made them. Hidden pixels are not read. After a blur, a reduction or any
            other operator whose measurements are images, y is itself an image with white noise.
        kind: "gaussian" or "poisson-gaussian".

    Raises:
        InputError: measurements that are no images, too few patches that are not clipped, or no
            patch that is both bright and flat (poisson-gaussian).
    """
    forms = {link.partition(":")[0].partition(",")[0] for link in operator.spec.split("|")}
    if not forms <= set(IMAGES) or y.ndim != 4:
        raise InputError(
            f"noise cannot be estimated from measurements by '{operator.spec}', which are no"
            " images: give --noise a number"
        )
    bound = operator.bind(range(len(y)), operator.x_shape(tuple(y.shape[1:])))
    observed = bound.apply_mask(torch.ones_like(y)).cpu() > 0
    y = torch.where(observed, y.double().cpu(), 0.0)
    broken = ~y.isfinite().flatten(1).all(1)
    if broken.any():
        raise InputError(
            f"noise cannot be estimated: image number {int(broken.int().argmax())} has values that"
            " are not finite; leave it out, or mend it"
        )
    patches = powers(y, observed, counts=kind != "gaussian")
    if len(patches.power) < LEAST:
        raise InputError(
            f"noise cannot be estimated from {len(patches.power)} patches of {SIDE}x{SIDE} pixels"
            " that are seen and not clipped: give more images, values that are not clipped, or a"
            " number"
        )
    if kind == "gaussian":
        ones = torch.ones_like(patches.mean)[:, None]
        (variance,) = envelope(patches.power, patches.freedom, ones).tolist()
        return Gaussian(_digits(math.sqrt(variance)))
    gain, rest = _gain(patches)
    if rest >= 0:
        return PoissonGaussian(_digits(gain), _digits(math.sqrt(rest)))
    return PoissonGaussian(_digits(gain), 0.0, _digits(-rest / gain))


def _gain(patches: "Patches") -> tuple[float, float]:
    """The line a, b of Poisson-Gaussian noise; InputError where no gain can be told."""
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
            f"the gain cannot be estimated: no bright part of the images is flat; {hint}"
        )
    error = float(uncertainty(patches.power, patches.freedom, terms, line)[0, 0]) ** 0.5
    if not gain > SURE * error:
        raise InputError(
            f"the gain cannot be estimated: {gain:.2g} +- {error:.2g} may be 0, as for noise that"
            f" does not depend on the brightness; {hint}"
        )
    rise = gain * (float(patches.mean[bright & below].mean()) - low)
    if not _texture(patches, bright & below) < TEXTURE * rise:
        raise InputError(
            "the gain cannot be estimated: no bright part of the images is flat, as what varies"
            f" there may be texture as well as noise; {hint}"
        )
    return gain, rest


def _texture(patches: "Patches", chosen: Tensor) -> float:
    """Upper bound of the power of texture in patches with noise of the same power v.

    Without texture both parts of the frequencies have the mean power of the whole.
    """
    chosen = chosen & (patches.finest > 0) & (patches.finest < patches.freedom)
    power, freedom, fine, finest = (part[chosen] for part in patches[1:])
    coarse = (freedom * power - finest * fine) / (freedom - finest)
    texture = (coarse - fine) * (freedom - finest) / freedom
    if len(texture) < 2:
        return math.inf
    return float(texture.mean() + 2 * texture.std() / len(texture) ** 0.5)


def known_noise(text: str, y: Tensor, operator: str) -> str:
    """A noise's text form as it is, or the one estimated in the place of "auto", which is told on
    stderr.

    Args:
        text: A text form of `unmurk.noise`, "auto" or "poisson-gaussian,auto".
        y: The measurements.
        operator: The operator's text form.
    """
    text = text.replace(" ", "")
    if text not in AUTO:
        return text
    found = estimate_noise(y, as_operator(operator), AUTO[text]).spec
    print(f"noise estimated from {len(y)} images: {found}", file=sys.stderr)
    return found


class Patches(NamedTuple):
    """What is told of each patch, (P,) each.

    Attributes:
        mean: Mean m.
        power: Power q of all but the slow part.
        freedom: Its degrees of freedom n.
        fine: Power of the upper part of those frequencies; of all of them for Gaussian noise.
        finest: Its degrees of freedom.
    """

    mean: Tensor
    power: Tensor
    freedom: Tensor
    fine: Tensor
    finest: Tensor


def textures(y: Tensor, observed: Tensor, counts: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mean m, power q and degrees of freedom n of the patches that can be used, (P,) each.

    Args:
        y: Images (N, C, H, W).
        seen: Which numbers of them are measured, same shape.
        counts: Whether many numbers may be the lowest without being clipped: no count fell there.
    """
    return powers(y, observed, counts)[:3]


def powers(y: Tensor, observed: Tensor, counts: bool = False) -> Patches:
    """The patches that can be used; arguments as of `textures`."""
    ends = [y[observed].max()] if counts else [y[observed].max(), y[observed].min()]
    clipped = torch.zeros_like(y)
    for end in ends:
        if (y[observed] == end).double().mean() > CLIPPED:
            clipped[observed & (y == end)] = 1
    if y.shape[1] < 3:  # channels that have nothing to do with each other
        y, observed, clipped = (part.flatten(0, 1)[:, None] for part in (y, observed, clipped))
    values, inside = _patches(y), _patches(observed.to(y)) > 0
    free = (_patches(clipped) == 0).flatten(1).all(1)
    inside = inside.all(1)
    free &= inside.sum(1) >= FREEDOM
    stride = max(1, math.ceil(int(free.sum()) / MOST))
    values, inside = values[free][::stride], inside[free][::stride].to(y)
    mean = (values * inside[:, None]).sum((1, 2)) / (values.shape[1] * inside.sum(1))
    power, freedom = _power(values, inside, SLOW)
    fine, finest = _power(values, inside, FINE) if counts else (power, freedom)
    good = freedom >= FREEDOM * max(1, values.shape[1] - 1)
    return Patches(*(part[good] for part in (mean, power, freedom, fine, finest)))


def _power(values: Tensor, inside: Tensor, slow: int) -> tuple[Tensor, Tensor]:
    """Power and degrees of freedom of patches (P, C, SIDE^2) without their slow part, (P,)."""
    fast, freedom = _fast(values * inside[:, None], inside, slow)
    channels = values.shape[1]
    if channels > 1:
        fast, freedom = fast - fast.mean(1, keepdim=True), (channels - 1) * freedom
    return fast.square().sum((1, 2)) / freedom.clamp_min(1), freedom


def envelope(power: Tensor, freedom: Tensor, terms: Tensor) -> Tensor:
    """Coefficients (K,) of v = terms @ coefficients, the lower edge of the powers (P,).

    Args:
        power: q, (P,).
        freedom: n, (P,).
        terms: What v is a sum of, (P, K): the mean and 1, or 1 alone.
    """
    reach = _reach(freedom)
    half = freedom / 2
    share = _gamma(half + 1, half * reach) / _gamma(half, half * reach)
    found = _start(power, terms)
    for _ in range(STEPS):
        v = _positive(terms @ found)
        below = power < reach * v
        if below.sum() < LEAST // 2:
            break
        before = found
        found = _fit(power[below] / share[below], (freedom.sqrt() / v)[below], terms[below])
        if torch.allclose(found, before, rtol=1e-9, atol=0):
            break
    return found


def uncertainty(power: Tensor, freedom: Tensor, terms: Tensor, line: Tensor) -> Tensor:
    """Covariance (K, K) of the coefficients found by `envelope`; infinite where they are free."""
    reach, half = _reach(freedom), freedom / 2
    top = half * reach
    inside, first, second = (_gamma(half + k, top) for k in (0, 1, 2))
    share = first / inside
    edge = reach * (half.log() * half + (half - 1) * reach.log() - top - torch.lgamma(half)).exp()
    slope = inside - (reach / share - 1) * edge  # of minus E psi, in units of v
    spread = second * (1 + 1 / half) / share**2 - 2 * first / share + inside
    v = _positive(terms @ line)
    below = power < reach * v  # as many as there are flat ones, times `inside`
    each = terms / v[:, None]
    a = (each * (freedom * slope / inside)[:, None])[below].T @ each[below]
    b = (each * (freedom**2 * spread / inside)[:, None])[below].T @ each[below]
    if torch.linalg.cond(a) > 1e12:
        return torch.full_like(a, math.inf)
    inverse = torch.linalg.inv(a)
    return inverse @ b @ inverse.T


def _reach(freedom: Tensor) -> Tensor:
    """k, (P,): powers below k v count."""
    return 1 + (2 / freedom).sqrt() * min(1.0, 4 / len(freedom) ** 0.5)


def _positive(v: Tensor) -> Tensor:
    """Variances (P,) without those that a line would have at or below 0."""
    return v.clamp_min(float(v[v > 0].quantile(0.02)) if (v > 0).any() else 1e-12)


def _gamma(shape: Tensor, x: Tensor) -> Tensor:
    """P, the regularised lower incomplete gamma function."""
    return torch.special.gammainc(shape, x)


def _start(power: Tensor, terms: Tensor) -> Tensor:
    """A line above most powers: their mean at every brightness, times `ABOVE`."""
    parts = terms[:, 0].argsort().tensor_split(12 if terms.shape[1] > 1 else 1)
    high = ABOVE * torch.stack([power[part].mean() for part in parts])
    middle = torch.stack([terms[part].mean(0) for part in parts])
    return _fit(high, 1 / high.clamp_min(1e-12), middle)


def _fit(values: Tensor, weights: Tensor, terms: Tensor) -> Tensor:
    """Least squares of values (P,) by terms (P, K), each row times its weight."""
    weighted = weights[:, None] * terms
    inverse = torch.linalg.pinv(weighted.T @ weighted, rtol=1e-12, hermitian=True)
    return inverse @ weighted.T @ (weights * values)


def _patches(y: Tensor) -> Tensor:
    """The patches side by side of images (N, C, H, W), (P, C, SIDE^2)."""
    n, c, h, w = y.shape
    if h < SIDE or w < SIDE:
        return y.new_zeros(0, c, SIDE**2)
    cut = y[..., : h // SIDE * SIDE, : w // SIDE * SIDE]
    blocks = F.unfold(cut, SIDE, stride=SIDE).reshape(n, c, SIDE**2, -1)
    return blocks.permute(0, 3, 1, 2).flatten(0, 1)


def _slow(slow: int) -> Tensor:
    """The cosine functions of frequencies u + v < slow on a patch, (K, SIDE^2), orthonormal."""
    number = torch.arange(SIDE, dtype=torch.float64)
    cosine = (math.pi * (number + 0.5) * number[:, None] / SIDE).cos() * math.sqrt(2 / SIDE)
    cosine[0] /= math.sqrt(2)
    both = torch.einsum("ui,vj->uvij", cosine, cosine).flatten(2)
    return both[number[:, None] + number < slow]


def _fast(values: Tensor, inside: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """Patches (P, C, SIDE^2) without their slow part, and each one's degrees of freedom (P,)."""
    slow = _slow(below)
    full = inside.sum(1) == SIDE**2
    fast = values - values @ slow.T @ slow
    freedom = torch.full((len(values),), float(SIDE**2 - len(slow)), dtype=values.dtype)
    if full.all():
        return fast, freedom
    part, observed = values[~full], inside[~full]
    size, axes = torch.linalg.eigh(torch.einsum("kp,np,lp->nkl", slow, observed, slow))
    kept = size > 1e-9
    scale = torch.where(kept, size, 1).rsqrt() * kept
    span = torch.einsum(
        "nkr,kp,np->nrp", axes * scale[:, None], slow, observed
    )  # orthonormal rows
    fast[~full] = part - torch.einsum("ncp,nrp,nrq->ncq", part, span, span)
    freedom[~full] = observed.sum(1) - kept.sum(1)
    return fast, freedom


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
