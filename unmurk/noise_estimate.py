"""The noise of images that nobody measured: read off the images alone.

White noise has the same power at all spatial frequencies; images have little at high ones, and
next to none where they are flat. Every patch of SIDE x SIDE pixels gives two numbers: its mean m
and the power q of what is left when its slow part, the span of the discrete cosine functions of
frequencies u + v < SLOW, is taken out. Without texture

    q ~ v chi^2_n / n,    v = a m + b,

n = what is left of the pixels' number: a line in m, since Poisson-Gaussian noise has the variance
a (m - o) + sigma^2, and a constant (a = 0) for Gaussian noise. Texture only adds to q, so the line
is the lower edge of the cloud (m, q). It is fitted on one side (the "envelope"): only patches with
q < v count, whose mean must be that of the truncated law,

    E[q | q < v] = c v,    c = P(n/2 + 1, n/2) / P(n/2, n/2),

P the regularised incomplete gamma function. So a and b solve the weighted least squares

    min sum_{q < v} n (q / c - a m - b)^2 / v^2,

repeated with the new v until it stands, from a lower start. A patch of which few pixels are
measured (a mask) loses its slow part by least squares on those; its n is smaller.

In colour the patch's mean over the channels is taken out first: edges and texture are mostly the
same in all channels, noise is not (n is then twice that of one channel).

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
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .noise import AUTO, Gaussian, PoissonGaussian
from .operators import Operator, as_operator

__all__ = ["Kind", "estimate_noise", "known_noise"]

Kind = Literal["gaussian", "poisson-gaussian"]

SIDE, SLOW = 8, 6
FREEDOM = 8  # least n of a patch that counts
LEAST, MOST = 30, 100_000  # patches
STEPS = 60
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
    bound = operator.at(range(len(y)), operator.x_shape(tuple(y.shape[1:])))
    seen = bound.seen(torch.ones_like(y)).cpu() > 0
    mean, power, freedom = textures(y.double().cpu(), seen, counts=kind != "gaussian")
    if len(power) < LEAST:
        raise InputError(
            f"noise cannot be estimated from {len(power)} patches of {SIDE}x{SIDE} pixels that are"
            " seen and not clipped: give more images, values that are not clipped, or a number"
        )
    if kind == "gaussian":
        (variance,) = envelope(power, freedom, torch.ones_like(mean)[:, None]).tolist()
        return Gaussian(_digits(math.sqrt(variance)))
    terms = torch.stack([mean, torch.ones_like(mean)], 1)
    line = envelope(power, freedom, terms)
    gain, rest = line.tolist()
    low, high = mean.quantile(torch.tensor([0.02, 0.98], dtype=mean.dtype)).tolist()
    bright = mean > (low + high) / 2
    if gain <= 0 or (power < terms @ line)[bright].double().mean() < BRIGHT:
        raise InputError(
            "the gain cannot be estimated: no bright part of the images is flat; give --noise auto"
            " (one Gaussian noise) or poisson-gaussian with numbers"
        )
    if rest >= 0:
        return PoissonGaussian(_digits(gain), _digits(math.sqrt(rest)))
    return PoissonGaussian(_digits(gain), 0.0, _digits(-rest / gain))


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


def textures(y: Tensor, seen: Tensor, counts: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mean m, power q and degrees of freedom n of the patches that can be used, (P,) each.

    Args:
        y: Images (N, C, H, W).
        seen: Which numbers of them are measured, same shape.
        counts: Whether many numbers may be the lowest without being clipped: no count fell there.
    """
    ends = [y[seen].max()] if counts else [y[seen].max(), y[seen].min()]
    clipped = torch.zeros_like(y)
    for end in ends:
        if (y[seen] == end).double().mean() > CLIPPED:
            clipped[seen & (y == end)] = 1
    if y.shape[1] < 3:  # channels that have nothing to do with each other
        y, seen, clipped = (part.flatten(0, 1)[:, None] for part in (y, seen, clipped))
    values, inside = _patches(y), _patches(seen.to(y)) > 0
    free = (_patches(clipped) == 0).flatten(1).all(1)
    inside = inside.all(1)
    free &= inside.sum(1) >= FREEDOM
    stride = max(1, math.ceil(int(free.sum()) / MOST))
    values, inside = values[free][::stride], inside[free][::stride].to(y)
    mean = (values * inside[:, None]).sum((1, 2)) / (values.shape[1] * inside.sum(1))
    fast, freedom = _fast(values * inside[:, None], inside)
    if values.shape[1] > 1:
        fast = fast - fast.mean(1, keepdim=True)
        power = fast.square().sum((1, 2)) / ((fast.shape[1] - 1) * freedom.clamp_min(1))
    else:
        power = fast.square().sum((1, 2)) / freedom.clamp_min(1)
    good = freedom >= FREEDOM
    return mean[good], power[good], (freedom * max(1, values.shape[1] - 1))[good]


def envelope(power: Tensor, freedom: Tensor, terms: Tensor) -> Tensor:
    """Coefficients (K,) of v = terms @ coefficients, the lower edge of the powers (P,).

    Args:
        power: q, (P,).
        freedom: n, (P,).
        terms: What v is a sum of, (P, K): the mean and 1, or 1 alone.
    """
    half = freedom / 2
    share = torch.special.gammainc(half + 1, half) / torch.special.gammainc(half, half)
    found = _start(power, freedom, terms)
    for _ in range(STEPS):
        v = terms @ found
        v = v.clamp_min(float(v[v > 0].quantile(0.02)) if (v > 0).any() else 1e-12)
        below = power < v
        if below.sum() < LEAST // 2:
            break
        found = _fit(power[below] / share[below], (freedom.sqrt() / v)[below], terms[below])
    return found


def _start(power: Tensor, freedom: Tensor, terms: Tensor) -> Tensor:
    """A fit of the lowest tenth of the powers at every brightness."""
    parts = terms[:, 0].argsort().tensor_split(12 if terms.shape[1] > 1 else 1)
    low = torch.stack([power[part].quantile(0.1) for part in parts])
    middle = torch.stack([terms[part].mean(0) for part in parts])
    return _fit(low, 1 / low.clamp_min(float(low.median()) / 20 + 1e-12), middle)


def _fit(values: Tensor, weights: Tensor, terms: Tensor) -> Tensor:
    """Least squares of values (P,) by terms (P, K), each row times its weight."""
    weighted = weights[:, None] * terms
    return torch.linalg.solve(weighted.T @ weighted, weighted.T @ (weights * values))


def _patches(y: Tensor) -> Tensor:
    """The patches side by side of images (N, C, H, W), (P, C, SIDE^2)."""
    n, c, h, w = y.shape
    if h < SIDE or w < SIDE:
        return y.new_zeros(0, c, SIDE**2)
    cut = y[..., : h // SIDE * SIDE, : w // SIDE * SIDE]
    blocks = F.unfold(cut, SIDE, stride=SIDE).reshape(n, c, SIDE**2, -1)
    return blocks.permute(0, 3, 1, 2).flatten(0, 1)


def _slow() -> Tensor:
    """The cosine functions of frequencies u + v < SLOW on a patch, (K, SIDE^2), orthonormal."""
    number = torch.arange(SIDE, dtype=torch.float64)
    cosine = (math.pi * (number + 0.5) * number[:, None] / SIDE).cos() * math.sqrt(2 / SIDE)
    cosine[0] /= math.sqrt(2)
    both = torch.einsum("ui,vj->uvij", cosine, cosine).flatten(2)
    return both[number[:, None] + number < SLOW]


def _fast(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (P, C, SIDE^2) without their slow part, and each one's degrees of freedom (P,)."""
    slow = _slow()
    whole = inside.sum(1) == SIDE**2
    fast = values - values @ slow.T @ slow
    freedom = torch.full((len(values),), float(SIDE**2 - len(slow)), dtype=values.dtype)
    if whole.all():
        return fast, freedom
    part, seen = values[~whole], inside[~whole]
    size, axes = torch.linalg.eigh(torch.einsum("kp,np,lp->nkl", slow, seen, slow))
    kept = size > 1e-9
    scale = torch.where(kept, size, 1).rsqrt() * kept
    span = torch.einsum("nkr,kp,np->nrp", axes * scale[:, None], slow, seen)  # orthonormal rows
    fast[~whole] = part - torch.einsum("ncp,nrp,nrq->ncq", part, span, span)
    freedom[~whole] = seen.sum(1) - kept.sum(1)
    return fast, freedom


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
