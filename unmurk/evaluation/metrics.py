r"""Scores: how close images are to the truth, and how honest posterior samples are about it.

An image is float, (B, C, H, W), with values in [0, 1] that may leave it. What each score sees:

- **Fidelity**, one number per image, of x against the reference r, both clipped to [0, 1] as a
  file writer would: PSNR = -10 log10 mean (x - r)^2 dB, and SSIM (Wang et al., IEEE TIP 2004). An
  image that equals its reference, or differs outside [0, 1] alone, has an infinite PSNR:
  `fidelity` takes the mean over the others and counts these two kinds.
- **Realism**, one number per pair of image sets. The Frechet distance between Gaussians fitted to
  features f of clipped images,

      FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)),

  and a sliced Wasserstein distance between the distributions of small patches,

      SW = E_w int_0^1 |F_a,w^-1(q) - F_b,w^-1(q)| dq,

  with F_a,w the distribution of <w, patch of a>. It needs no network and is measured in units of
  the image. The directions w have length 1 and are spread evenly over spatial frequencies: a
  direction uniform on the sphere is dominated by the low ones, where images have their variance,
  and hardly sees blur or a little noise.
- **Calibration** of S posterior samples. If the truth is exchangeable with them, its rank R among
  the samples is uniform on {0, ..., S}; `coverage` counts the share of [R, R + 1] / (S + 1) that
  lies in the central interval of probability `level`, so its expectation is `level` for every S.
"""

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..rng import StreamId, generator
from .features import (
    DigitClassifier,
    FeatureExtractor,
    absent,
    inception_features,
    load_digit_classifier,
    three_channels,
)

__all__ = [
    "DigitClassifier",
    "FeatureExtractor",
    "coverage",
    "fidelity",
    "frechet",
    "inception_features",
    "load_digit_classifier",
    "lpips",
    "psnr",
    "sliced_wasserstein",
    "spread",
    "ssim",
    "varying_pixels",
]

WINDOW = 11  # side of the window of SSIM
ROUNDING = 1e-12  # of the variances: a Frechet distance below is one of equal sets


def psnr(x: Tensor, ref: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB for a peak of 1.

    Args:
        x: Images (B, C, H, W).
        ref: Their references, same shape. Both are clipped to [0, 1] first, as in published
            figures, so what lies outside is not seen: 1.5 and 1 are alike.

    Returns:
        (B,); infinite where image and reference are equal once clipped. Other shapes raise
        InputError.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, ref = _pair(x, ref, "psnr")
    return peak_signal_noise_ratio(x, ref, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(x: Tensor, ref: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., IEEE TIP 2004, eq. 13).

    The published convention: a Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 =
    0.03, range 1, and the mean over all channels and all pixels around which the window fits, that
    is without a border of five pixels. It equals `skimage.metrics.structural_similarity` with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.

    Args:
        x: Images (B, C, H, W), H and W at least 11.
        ref: Their references, same shape. Both are clipped to [0, 1] first.

    Returns:
        (B,).

    Raises:
        InputError: Other shapes, images smaller than the window, or numbers that are not finite.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, ref = (images.double() for images in _pair(x, ref, "ssim"))
    if min(x.shape[-2:]) < WINDOW:
        raise InputError(
            f"ssim needs images of at least 11 x 11 pixels, got {x.shape[-2]} x {x.shape[-1]}; "
            "use psnr for smaller ones"
        )
    _, full = structural_similarity_index_measure(
        x, ref, data_range=1.0, reduction="none", return_full_image=True
    )
    border = WINDOW // 2
    return full[..., border:-border, border:-border].mean((1, 2, 3)).float()


def fidelity(x: Tensor, ref: Tensor) -> dict[str, float | int | None]:
    """What a set of images scores against its references, with those of an infinite PSNR counted.

    Args:
        x: Images (B, C, H, W).
        ref: Their references, same shape. PSNR and SSIM clip both to [0, 1] first.

    Returns:
        psnr: The mean over the images whose PSNR is finite, in dB; infinite if none is.
        exact: How many equal their reference, without clipping.
        beyond: How many differ from it outside [0, 1] alone, so that their PSNR is infinite.
        ssim: The mean over all images; None if they are smaller than 11 x 11 pixels.

    Raises:
        InputError: Other shapes, no image, or numbers that are not finite.
    """
    each = psnr(x, ref)
    differ = each.isfinite()
    exact = (x == ref.to(x.device)).flatten(1).all(1)
    small = min(x.shape[-2:]) < WINDOW
    return {
        "psnr": float(each[differ].mean()) if differ.any() else math.inf,
        "exact": int(exact.sum()),
        "beyond": int((~differ & ~exact).sum()),
        "ssim": None if small else float(ssim(x, ref).mean()),
    }


@torch.no_grad()
def lpips(x: Tensor, ref: Tensor, net: str = "alex") -> Tensor:
    """Learned perceptual distance of each image (Zhang et al. 2018, arXiv 1801.03924).

    Needs the extra `inception`; its weights are downloaded once by torchvision. Grey images are
    repeated to three channels.

    Args:
        x: Images (B, 1 or 3, H, W), H and W at least 32.
        ref: Their references, same shape. Both are clipped to [0, 1] first.
        net: "alex", "vgg" or "squeeze".

    Returns:
        (B,), 0 for equal images.

    Raises:
        InputError: The package or its weights are absent, or the shapes do not fit.
    """
    x, ref = _pair(x, ref, "lpips")
    if min(x.shape[-2:]) < 32:
        raise InputError(
            f"lpips needs images of at least 32 x 32 pixels, got {x.shape[-2]} x {x.shape[-1]}; "
            "enlarge or zero-pad them"
        )
    model = _lpips_model(net).to(x.device)
    x, ref = three_channels(x, "lpips"), three_channels(ref, "lpips")
    return model(x, ref, normalize=True).flatten()


@torch.no_grad()
def frechet(
    real: Tensor, fake: Tensor, features: FeatureExtractor | None = None, batch: int = 500
) -> float:
    """Frechet distance of two image sets (Heusel et al. 2017, arXiv 1706.08500, eq. 6), squared.

    The features are computed from float images clipped to [0, 1], never rounded to 8 bits (unless
    `features` does it: see `inception_features`); means and covariances are kept in float64.
    Two sets of N images each from one distribution do not score 0 but, for features that are
    Gaussian with variances l_i,

        FD = (2 sum_i l_i + sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j)) / N

    on average, to first order in 1/N: compare distances of equal N only.

    Args:
        real: Images (N, C, H, W), N at least 2 and better some times the number of features.
        fake: Images (M, C, H, W).
        features: Map of (B, C, H, W) in [0, 1] to (B, d); None means the 128 features of the
            shipped digit classifier, for digits (1, 28, 28) or (1, 32, 32).
        batch: Images per call of `features`; does not change the result.

    Raises:
        InputError: A set has fewer than 2 images, or the shapes do not fit the features.
    """
    for name, images in (("real", real), ("fake", fake)):
        if images.ndim != 4 or len(images) < 2:
            raise InputError(
                f"frechet needs at least 2 {name} images (N, C, H, W), got {tuple(images.shape)}"
            )
        _check_finite(images, f"frechet, {name} images")
    features = features or load_digit_classifier().to(real.device).features
    (mean, covariance), (other_mean, other) = (
        _moments(features, images, batch, real.device) for images in (real, fake)
    )
    # tr (S_1 S_2)^(1/2) is the sum of the singular values of R_1 R_2, R = S^(1/2): unlike the
    # eigenvalues of S_1 S_2 these lose no digits to a square root at the end
    shared = torch.linalg.svdvals(_root(covariance) @ _root(other)).sum()
    size = covariance.trace() + other.trace()
    distance = (mean - other_mean).square().sum() + size - 2 * shared
    return float(distance) if distance > ROUNDING * size else 0.0


def _moments(
    features: FeatureExtractor, images: Tensor, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the features of images, in float64."""
    shift = total = square = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(images), batch):
        part = images[start : start + batch].to(device).float().clamp(0, 1)
        values = features(part).flatten(1).double()
        if start == 0:
            shift = values.mean(0)  # keeps the digits of features that hardly vary
        values = values - shift
        total, square = total + values.sum(0), square + values.T @ values
    n = len(images)
    covariance = (square - total[:, None] * total / n) / (n - 1)
    return shift + total / n, covariance


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@torch.no_grad()
def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    patch: int | None = 7,
    projections: int = 128,
    seed: int = 0,
    patches: int = 20_000,
) -> float:
    """Sliced Wasserstein-1 distance between the patch distributions of two image sets.

    Images are taken as they are, not clipped: noise around a black background counts in full.
    Patches are cut at random places, spread evenly over the images, at the same places of both
    sets when these have equal shapes (a set has distance 0 from itself). The directions have
    length 1 and cycle through the bands of a 2-D cosine transform of the patch, band k holding the
    frequencies (u, v) with max(u, v) = k, and through one that holds them all. After Rabin et al.
    (2011); the bands play the part of the Laplacian pyramid in Karras et al. (2017), arXiv
    1710.10196, section 5.

    Args:
        a: Images (N, C, H, W).
        b: Images (M, C, H, W); another size is fine unless `patch` is None.
        patch: Side of the patches in pixels; None compares whole images, each taken once.
        projections: Number of directions.
        seed: Seed of places and directions.
        patches: Number of patches cut from each set.

    Returns:
        The distance in units of the image: about 0.8 s times the share of flat patches for added
        Gaussian noise of standard deviation s; two samples of one distribution score near 0.

    Raises:
        InputError: Empty sets, different channels, or images smaller than the patch.
    """
    _check_patch_sets(a, b, patch)
    b = b.to(a.device)
    size = (patch, patch) if patch else (a.shape[2], a.shape[3])
    directions = _band_directions(a.shape[1], size, projections, seed).to(a)
    quantiles = []
    for images in (a, b):
        cut = _cut_patches(images, size, patches if patch else len(images), seed)
        quantiles.append((directions @ cut.flatten(1).T).sort(dim=1).values)
    return float(_mean_gap(*quantiles))


def _cut_patches(images: Tensor, size: tuple[int, int], count: int, seed: int) -> Tensor:
    """(count, C, *size): patches at random places, spread evenly over the images."""
    number = torch.arange(count, device=images.device) * len(images) // count
    offsets = []
    for axis, length in enumerate(size):
        room = images.shape[2 + axis] - length + 1
        start = (
            torch.rand(
                count, generator=generator(seed, StreamId.PATCHES, axis), dtype=torch.float64
            )
            * room
        )
        offsets.append(start.long()[:, None] + torch.arange(length))
    rows, columns = (o.to(images.device) for o in offsets)
    cut = images[number[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.movedim(-1, 1)


def _band_directions(channels: int, size: tuple[int, int], count: int, seed: int) -> Tensor:
    """(count, C * h * w): unit vectors; row j lies in band j modulo (number of bands + 1)."""
    height, width = size
    draw = torch.randn(
        count, channels, height, width, generator=generator(seed, StreamId.DIRECTIONS)
    )
    band = torch.maximum(torch.arange(height)[:, None], torch.arange(width)[None, :])
    mine = torch.arange(count) % (max(size) + 1)
    inside = (band == mine[:, None, None]) | (mine == max(size))[:, None, None]
    waves = (draw * inside[:, None]).double()
    vectors = torch.einsum("uh,ncuv,vw->nchw", _cosines(height), waves, _cosines(width))
    return F.normalize(vectors.flatten(1), dim=1)


def _cosines(n: int) -> Tensor:
    """(n, n): the orthonormal cosine transform (DCT-II), a row for each frequency."""
    k = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(torch.pi / n * k[:, None] * (k[None, :] + 0.5)) * (2 / n) ** 0.5
    waves[0] /= 2**0.5
    return waves


def _mean_gap(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of the 1-D Wasserstein-1 distance between sorted rows."""
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return (a - b).abs().mean()
    # Both quantile functions are steps, constant between the joint levels i / n and j / m.
    level = torch.cat([torch.arange(1, k + 1, dtype=torch.float64) / k for k in (n, m)])
    level = level.sort().values.to(a.device)
    width = level.diff(prepend=level.new_zeros(1))
    middle = level - width / 2
    at_a, at_b = (v[:, (middle * k).long().clamp(max=k - 1)] for v, k in ((a, n), (b, m)))
    return ((at_a - at_b).abs().mean(dim=0) * width).sum()


def coverage(
    samples: Tensor, truth: Tensor, level: float = 0.9, where: Tensor | None = None
) -> float:
    """Fraction of true values inside the samples' central interval of probability `level`.

    The interval lies between the order statistics of ranks (1 -+ level) / 2 * (S + 1). A rank that
    is not whole falls into a gap between two samples (or beyond the last one); a truth in that gap
    counts by the share of the gap's probability 1 / (S + 1) that the interval needs. Ties are
    shared in the same way. Hence the expectation is exactly `level`, for any S, when the truth is
    one more draw from what the samples are drawn from. Few samples cannot show how far off a truth
    is: one beyond them all still counts max(0, 1 - (S + 1) (1 - level) / 2), which at level 0.9 is
    0.55 for S = 8 and 0 from S = 19 on.

    Args:
        samples: (S, B, C, H, W).
        truth: (B, C, H, W).
        level: Nominal probability, in (0, 1).
        where: Mask that broadcasts to truth's shape: what counts (see `varying_pixels`).

    Raises:
        InputError: Shapes or level do not fit, or the mask is empty.
    """
    _check_samples(samples, truth.shape, "coverage")
    _check_finite(truth, "coverage, truth")
    if not 0 < level < 1:
        raise InputError(f"coverage: level must lie between 0 and 1, got {level:g}")
    slots = len(samples) + 1
    below = torch.zeros_like(truth, dtype=torch.float64)
    tied = torch.zeros_like(below)
    for sample in samples:
        below += sample < truth
        tied += sample == truth
    start, stop = below / slots, (below + tied + 1) / slots
    overlap = stop.clamp(max=(1 + level) / 2) - start.clamp(min=(1 - level) / 2)
    return float(_pick(overlap.clamp(min=0) / (stop - start), where).mean())


def spread(samples: Tensor, where: Tensor | None = None) -> float:
    """Root of the mean pixel variance of posterior samples, unbiased in the variance.

    For samples of the exact posterior it equals the root mean square error of the exact posterior
    mean, and 1 / sqrt(2) of that of a single sample.

    Args:
        samples: (S, B, C, H, W), S at least 2, in units of the image.
        where: Mask that broadcasts to (B, C, H, W), as in `coverage`.

    Raises:
        InputError: Fewer than 2 samples, wrong shape, or an empty mask.
    """
    _check_samples(samples, samples.shape[1:], "spread")
    if len(samples) < 2:
        raise InputError("spread needs at least 2 samples of every image, got 1")
    return float(_pick(samples.double().var(dim=0), where).mean().sqrt())


def varying_pixels(images: Tensor, least: float = 0.02) -> Tensor:
    """Which pixels vary over an image set: True where the standard deviation exceeds `least`.

    The others are constant background, where an interval either holds the truth by a hair or
    misses it by one, and coverage says nothing.

    Args:
        images: Held-out images (N, C, H, W), N at least 2.
        least: Standard deviation over the set, in units of the image.

    Returns:
        Boolean mask (C, H, W), to be passed as `where`. Fewer than 2 images raise InputError.
    """
    if images.ndim != 4 or len(images) < 2:
        raise InputError(
            f"varying_pixels needs at least 2 images (N, C, H, W), got {tuple(images.shape)}"
        )
    _check_finite(images, "varying_pixels")
    return images.std(dim=0) > least


def _pair(x: Tensor, ref: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or x.shape != ref.shape:
        raise InputError(
            f"{name} needs image and reference of one shape (B, C, H, W), got {tuple(x.shape)} "
            f"and {tuple(ref.shape)}"
        )
    if not x.numel():
        raise InputError(f"{name} needs at least one image, got {tuple(x.shape)}")
    for images, which in ((x, "images"), (ref, "references")):
        _check_finite(images, f"{name}, {which}")
    return x.float().clamp(0, 1), ref.to(x.device).float().clamp(0, 1)


def _check_finite(images: Tensor, what: str) -> None:
    """Raises InputError for the first image (the rows) with a number that is not finite."""
    fine = images.isfinite().flatten(1).all(1)
    if not fine.all():
        raise InputError(
            f"{what}: number {int(fine.int().argmin())} has values that are not finite: leave it "
            "out, or mend it"
        )


def _check_patch_sets(a: Tensor, b: Tensor, patch: int | None) -> None:
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim != 4 or b.ndim != 4 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise InputError(
            f"sliced_wasserstein needs two image sets (N, C, H, W) of equal C, got {shapes}"
        )
    for images, which in ((a, "first"), (b, "second")):
        _check_finite(images, f"sliced_wasserstein, {which} set")
    if patch is None and a.shape[1:] != b.shape[1:]:
        raise InputError(f"sliced_wasserstein of whole images needs one size, got {shapes}")
    if patch is not None and not 1 <= patch <= min(*a.shape[2:], *b.shape[2:]):
        raise InputError(f"sliced_wasserstein: patch {patch} does not fit into images {shapes}")


def _check_samples(samples: Tensor, shape: torch.Size, name: str) -> None:
    if samples.ndim != 5 or samples.shape[1:] != shape or not samples.numel():
        raise InputError(
            f"{name} needs samples (S, B, C, H, W) of truth (B, C, H, W), got "
            f"{tuple(samples.shape)} and {tuple(shape)}"
        )
    _check_finite(samples, f"{name}, samples")


def _pick(values: Tensor, where: Tensor | None) -> Tensor:
    if where is None:
        return values
    try:
        mask = where.to(values.device).bool().expand_as(values)
    except RuntimeError as error:
        raise InputError(
            f"mask {tuple(where.shape)} does not broadcast to images {tuple(values.shape)}"
        ) from error
    if not mask.any():
        raise InputError("the mask leaves no pixel to score; pass another `where`")
    return values[mask]


@lru_cache(maxsize=3)
def _lpips_model(net: str) -> Any:
    if net not in ("alex", "vgg", "squeeze"):
        raise InputError(f"lpips: unknown net '{net}'; choose alex, vgg or squeeze")
    try:
        from lpips import LPIPS

        with warnings.catch_warnings():
            # lpips asks torchvision for its weights in a way that torchvision calls deprecated.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            return LPIPS(net=net, verbose=False).requires_grad_(False)
    except (ImportError, RuntimeError, OSError) as error:  # Runtime: torchvision of another torch
        raise absent("lpips", error) from error
