r"""Distances of two image sets: how real a set of images looks.

**Frechet distance** between Gaussians fitted to features f of images clipped to [0, 1]:

.. math:: \mathrm{FD} = \lVert\mu_1 - \mu_2\rVert^2
    + \operatorname{tr}\bigl(S_1 + S_2 - 2 (S_1 S_2)^{1/2}\bigr)

**Sliced Wasserstein distance** between the distributions of small patches:

.. math:: \mathrm{SW} = \mathbb E_w \int_0^1
    \bigl| F_{a,w}^{-1}(q) - F_{b,w}^{-1}(q) \bigr| \, dq,

where :math:`F_{a,w}` is the distribution of <w, patch of a>. This distance needs no network, and
is measured in units of the image. The directions w have length 1 and are spread evenly over
spatial frequencies. Directions that are uniform on the sphere would be dominated by low
frequencies, where images have their variance, and would hardly detect blur or weak noise.

**Kernel Inception distance** (KID), unbiased for any number of images. With features f of d
numbers, :math:`a_i = f(\text{real image } i)`,
:math:`b_j = f(\text{fake image } j)` and the kernel

.. math:: k(u, v) = (u \cdot v / d + 1)^3,

the squared maximum mean discrepancy of the two distributions is estimated without bias by

.. math::
    \mathrm{KID} = \operatorname*{mean}_{i \ne i'} k(a_i, a_{i'})
        + \operatorname*{mean}_{j \ne j'} k(b_j, b_{j'})
        - 2 \operatorname*{mean}_{i, j} k(a_i, b_j)

(Binkowski, Sutherland, Arbel and Gretton, 2018, arXiv 1801.01401, section 4). Two sets from one
distribution have KID 0 on average at any size, so single values may be negative.

Fake images may come in families of dependent ones, such as several restorations of one image. The
second mean then runs over pairs from different families. Each pair is one of independent images,
and the estimate stays unbiased. torchmetrics has no such families, and averages over random
subsets, hence the code here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..operators.linalg import dct_matrix
from ..rng import StreamId, generator
from .features import FeatureExtractor, check_finite, load_digit_classifier

__all__ = ["frechet", "kid", "sliced_wasserstein"]

ROUNDING = 1e-12  # Frechet distances below this part of the variances are those of equal sets


@torch.no_grad()
def frechet(
    real: Tensor, fake: Tensor, features: FeatureExtractor | None = None, batch: int = 500
) -> float:
    r"""Compute the squared Frechet distance of two image sets.

    The features are computed from float images clipped to [0, 1], without rounding to 8 bits
    (unless `features` rounds: see `inception_features`). Means and covariances are computed in
    float64. Two sets of N images each from one distribution do not have distance 0: if the
    features are Gaussian with variances :math:`l_i`, they have

    .. math:: \mathrm{FD} = \frac1N \Bigl(2 \sum_i l_i
        + \sum_{ij} \frac{l_i l_j (1 + [i = j])}{l_i + l_j}\Bigr)

    on average, to first order in 1/N. So compare distances of equal N only.

    Args:
        real: Images, shape (N, C, H, W), N at least 2, better several times the number of
            features.
        fake: Images, shape (M, C, H, W).
        features: Map of images (B, C, H, W) in [0, 1] to features (B, d); None takes the 128
            features of the packaged digit classifier, for digits (1, 28, 28) or (1, 32, 32).
        batch: Images per call of `features`. It does not change the result.

    Returns:
        The squared distance.

    Raises:
        InputError: A set has fewer than 2 images, or the shapes do not fit the features.

    Source: Heusel et al. (2017), arXiv 1706.08500, eq. 6.

    >>> mean = lambda x: x.mean((2, 3))  # one feature, for the sake of the example
    >>> black, white = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    >>> frechet(black, white, mean)
    1.0
    """
    for name, images in (("real", real), ("fake", fake)):
        if images.ndim != 4 or len(images) < 2:
            raise InputError(
                f"frechet needs at least 2 {name} images (N, C, H, W), got {tuple(images.shape)}"
            )
        check_finite(images, f"frechet, {name} images")
    features = features or load_digit_classifier().to(real.device).features
    (mean, covariance), (other_mean, other) = (
        _moments(features, images, batch, real.device) for images in (real, fake)
    )
    # tr (S_1 S_2)^(1/2) is the sum of the singular values of R_1 R_2, R = S^(1/2). Unlike the
    # eigenvalues of S_1 S_2, they need no square root at the end, which would lose digits.
    shared = torch.linalg.svdvals(_root(covariance) @ _root(other)).sum()
    size = covariance.trace() + other.trace()
    distance = (mean - other_mean).square().sum() + size - 2 * shared
    return float(distance) if distance > ROUNDING * size else 0.0


def _moments(
    features: FeatureExtractor, images: Tensor, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute mean (d,) and covariance (d, d) of the features of images, in float64."""
    shift = total = square = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(images), batch):
        part = images[start : start + batch].to(device).float().clamp(0, 1)
        values = features(part).flatten(1).double()
        if start == 0:
            shift = values.mean(0)  # preserves the digits of features that hardly vary
        values = values - shift
        total, square = total + values.sum(0), square + values.T @ values
    n = len(images)
    covariance = (square - total[:, None] * total / n) / (n - 1)
    return shift + total / n, covariance


def _root(covariance: Tensor) -> Tensor:
    """Compute the symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@torch.no_grad()
def kid(
    real: Tensor,
    fake: Tensor,
    features: FeatureExtractor | None = None,
    families: Tensor | None = None,
    batch: int = 500,
) -> float:
    """Compute the unbiased kernel distance of two image sets; see the head of this module.

    Args:
        real: Images, shape (N, C, H, W), N at least 2, independent of each other and of `fake`.
        fake: Images, shape (M, C, H, W).
        features: Map of images (B, C, H, W) in [0, 1] to features (B, d); None takes the 128
            features of the packaged digit classifier. `inception_features()` gives the published
            KID (which averages over subsets of 1,000 images; here all pairs count).
        families: Equal numbers for fake images that depend on each other, shape (M,); None for
            independent images.
        batch: Images per call of `features`. It does not change the result.

    Returns:
        The squared distance.

    Raises:
        InputError: Fewer than 2 images or families, or shapes that do not fit.

    >>> mean = lambda x: x.mean((2, 3))  # one feature, for the sake of the example
    >>> black, white = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    >>> kid(black, white, mean)
    7.0
    """
    for name, images in (("real", real), ("fake", fake)):
        if images.ndim != 4 or len(images) < 2:
            raise InputError(
                f"kid needs at least 2 {name} images (N, C, H, W), got {tuple(images.shape)}"
            )
        check_finite(images, f"kid, {name} images")
    if families is None:
        families = torch.arange(len(fake))
    if families.shape != (len(fake),) or len(families.unique()) < 2:
        raise InputError(
            f"kid needs a family for each of the {len(fake)} fake images, and at least 2 families,"
            f" got {tuple(families.shape)}"
        )
    features = features or load_digit_classifier().to(real.device).features
    a, b = (
        torch.cat([features(x.float().clamp(0, 1)).flatten(1).double() for x in part.split(batch)])
        for part in (real, fake.to(real.device))
    )
    families = families.to(real.device)
    apart = families[:, None] != families
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    within = _kernel(a, a)[others].mean() + _kernel(b, b)[apart].mean()
    return float(within - 2 * _kernel(a, b).mean())


def _kernel(u: Tensor, v: Tensor) -> Tensor:
    """Compute k(u_i, v_j), shape (N, M)."""
    return (u @ v.T / u.shape[1] + 1) ** 3


@torch.no_grad()
def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    patch: int | None = 7,
    projections: int = 128,
    seed: int = 0,
    patches: int = 20_000,
) -> float:
    """Compute the sliced Wasserstein-1 distance between the patches of two image sets.

    Images are not clipped: noise around a black background counts in full. Patches are cut at
    random places, spread evenly over the images. Sets of equal shapes are cut at the same places,
    so a set has distance 0 from itself. The directions have length 1. They cycle through the bands
    of a 2-D cosine transform of the patch, where band k holds the frequencies (u, v) with
    max(u, v) = k, and through one band that holds them all.

    Args:
        a: Images, shape (N, C, H, W).
        b: Images, shape (M, C, H, W). The size may differ unless `patch` is None.
        patch: Side of the patches in pixels; None compares whole images, each taken once.
        projections: Number of directions.
        seed: Seed of places and directions.
        patches: Number of patches cut from each set.

    Returns:
        The distance in units of the image. For added Gaussian noise of standard deviation s it is
        about 0.8 s times the share of flat patches; for two samples of one distribution it is near
        0.

    Raises:
        InputError: A set is empty, the channels differ, or the images are smaller than the patch.

    Source: Rabin et al. (2011), SSVM; the bands replace the Laplacian pyramid of Karras et al.
    (2017), arXiv 1710.10196, section 5.

    >>> a = torch.rand(4, 1, 16, 16)
    >>> sliced_wasserstein(a, a, patches=100)
    0.0
    """
    _check_patch_sets(a, b, patch)
    b = b.to(a.device)
    size = (patch, patch) if patch else (a.shape[2], a.shape[3])
    directions = _band_directions(a.shape[1], size, projections, seed).to(a)
    quantiles = []
    for images in (a, b):
        cut = _cut_patches(images, size, patches if patch else len(images), seed)
        quantiles.append((directions @ cut.flatten(1).T).sort(dim=1).values)
    return float(_wasserstein(*quantiles))


def _cut_patches(images: Tensor, size: tuple[int, int], count: int, seed: int) -> Tensor:
    """Cut patches (count, C, *size) at random places, spread evenly over the images."""
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
    """Draw unit vectors (count, C h w); vector j lies in band j modulo (number of bands + 1)."""
    height, width = size
    draw = torch.randn(
        count, channels, height, width, generator=generator(seed, StreamId.DIRECTIONS)
    )
    band = torch.maximum(torch.arange(height)[:, None], torch.arange(width)[None, :])
    mine = torch.arange(count) % (max(size) + 1)
    inside = (band == mine[:, None, None]) | (mine == max(size))[:, None, None]
    waves = (draw * inside[:, None]).double()
    vectors = torch.einsum("uh,ncuv,vw->nchw", dct_matrix(height), waves, dct_matrix(width))
    return F.normalize(vectors.flatten(1), dim=1)


def _wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """Average the 1-D Wasserstein-1 distance between sorted rows over the rows."""
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return (a - b).abs().mean()
    # both quantile functions are steps, constant between the joint levels i / n and j / m
    level = torch.cat([torch.arange(1, k + 1, dtype=torch.float64) / k for k in (n, m)])
    level = level.sort().values.to(a.device)
    width = level.diff(prepend=level.new_zeros(1))
    middle = level - width / 2
    at_a, at_b = (v[:, (middle * k).long().clamp(max=k - 1)] for v, k in ((a, n), (b, m)))
    return ((at_a - at_b).abs().mean(dim=0) * width).sum()


def _check_patch_sets(a: Tensor, b: Tensor, patch: int | None) -> None:
    """Raise InputError unless both sets can be cut into patches of one size."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim != 4 or b.ndim != 4 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise InputError(
            f"sliced_wasserstein needs two image sets (N, C, H, W) of equal C, got {shapes}"
        )
    for images, which in ((a, "first"), (b, "second")):
        check_finite(images, f"sliced_wasserstein, {which} set")
    if patch is None and a.shape[1:] != b.shape[1:]:
        raise InputError(f"sliced_wasserstein of whole images needs one size, got {shapes}")
    if patch is not None and not 1 <= patch <= min(*a.shape[2:], *b.shape[2:]):
        raise InputError(f"sliced_wasserstein: patch {patch} does not fit into images {shapes}")
