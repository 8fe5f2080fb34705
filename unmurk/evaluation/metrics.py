r"""Metrics: how close images are to the truth, how real they look, and how well samples calibrate.

An image is float, (B, C, H, W), with values in [0, 1] that may leave it.

- **Fidelity** is one number per image x and reference r, both clipped to [0, 1] as a file writer
  would: the peak signal-to-noise ratio

  .. math:: \mathrm{PSNR} = -10 \log_{10} \operatorname{mean}\,(x - r)^2 \;\mathrm{dB},

  and SSIM (Wang et al., 2004, IEEE TIP 13). An image that equals its reference, or differs only
  outside [0, 1], has an infinite PSNR: `fidelity` averages over the others and counts these two
  kinds.
- **Realism** is one number per pair of image sets: `frechet`, `kid` and `sliced_wasserstein` from
  `distances.py`.
- **Calibration** of S posterior samples. If the truth is exchangeable with the samples, its rank R
  among them is uniform on {0, ..., S}. `coverage` counts the share of [R, R + 1] / (S + 1) that
  lies in the central interval of probability `level`, so its expectation is `level` for every S.
"""

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, size_text
from .distances import frechet, kid, sliced_wasserstein
from .features import (
    DigitClassifier,
    FeatureExtractor,
    check_finite,
    inception_features,
    load_digit_classifier,
    three_channels,
    unavailable,
)

__all__ = [
    "DigitClassifier",
    "FeatureExtractor",
    "coverage",
    "fidelity",
    "frechet",
    "inception_features",
    "kid",
    "load_digit_classifier",
    "lpips",
    "psnr",
    "share_inside",
    "sliced_wasserstein",
    "spread",
    "ssim",
    "varying_pixels",
]

WINDOW = 11  # side of SSIM's window, in pixels


def psnr(x: Tensor, ref: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image, in dB for a peak of 1.

    Args:
        x: Images, shape (B, C, H, W).
        ref: Their references, same shape. Both are clipped to [0, 1] first, as in published
            figures: 1.5 and 1 count as equal.

    Returns:
        Shape (B,); infinite where image and reference are equal after clipping.

    Raises:
        InputError: The shapes differ, there is no image, or a number is not finite.

    >>> psnr(torch.full((1, 1, 4, 4), 0.6), torch.full((1, 1, 4, 4), 0.5))
    tensor([20.0000])
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, ref = _pair(x, ref, "psnr")
    return peak_signal_noise_ratio(x, ref, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(x: Tensor, ref: Tensor) -> Tensor:
    """Compute the structural similarity of each image (Wang et al., 2004, IEEE TIP 13, eq. 13).

    The published convention applies: a Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01,
    K2 = 0.03, range 1, and the mean over all channels and all pixels around which the window fits,
    that is, without a border of five pixels. The result equals that of
    `skimage.metrics.structural_similarity` with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1.

    Args:
        x: Images, shape (B, C, H, W), H and W at least 11.
        ref: Their references, same shape. Both are clipped to [0, 1] first.

    Returns:
        Shape (B,).

    Raises:
        InputError: The shapes differ, the images are smaller than the window, or a number is not
            finite.

    >>> x = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
    >>> ssim(x, x)
    tensor([1.])
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, ref = _pair(x, ref, "ssim")
    kind, x, ref = x.dtype, x.double(), ref.double()
    if min(x.shape[-2:]) < WINDOW:
        raise InputError(
            f"ssim needs images of at least 11x11 pixels, got {size_text(x.shape[-2:])}: "
            "use psnr for smaller ones"
        )
    _, full = structural_similarity_index_measure(
        x, ref, data_range=1.0, reduction="none", return_full_image=True
    )
    border = WINDOW // 2
    return full[..., border:-border, border:-border].mean((1, 2, 3)).to(kind)


def fidelity(x: Tensor, ref: Tensor) -> dict[str, float | int | None]:
    """Average PSNR and SSIM over a set of images, and count those with an infinite PSNR.

    Args:
        x: Images, shape (B, C, H, W).
        ref: Their references, same shape. PSNR and SSIM clip both to [0, 1] first.

    Returns:
        A dict. psnr: mean over the images whose PSNR is finite, in dB; infinite if none is.
        exact: number of images that equal their reference without clipping. beyond: number of
        images that differ from it only outside [0, 1], so that their PSNR is infinite. ssim: mean
        over all images; None if they are smaller than 11 x 11 pixels.

    Raises:
        InputError: The shapes differ, there is no image, or a number is not finite.

    >>> x = torch.full((2, 1, 4, 4), 0.5)
    >>> fidelity(x, x)
    {'psnr': inf, 'exact': 2, 'beyond': 0, 'ssim': None}
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
    """Compute the learned perceptual distance of each image.

    It needs the extra `inception`; torchvision downloads the weights once. Gray images are
    repeated to three channels.

    Args:
        x: Images, shape (B, 1 or 3, H, W), H and W at least 32.
        ref: Their references, same shape. Both are clipped to [0, 1] first.
        net: "alex", "vgg" or "squeeze".

    Returns:
        Shape (B,); 0 for equal images.

    Raises:
        InputError: The package or its weights are missing, or the shapes do not fit.

    Source: Zhang et al. (2018), arXiv 1801.03924.
    """
    x, ref = (images.float() for images in _pair(x, ref, "lpips"))
    if min(x.shape[-2:]) < 32:
        raise InputError(
            f"lpips needs images of at least 32x32 pixels, got {size_text(x.shape[-2:])}: "
            "enlarge or zero-pad them"
        )
    model = _lpips_model(net).to(x.device)
    x, ref = three_channels(x, "lpips"), three_channels(ref, "lpips")
    return model(x, ref, normalize=True).flatten()


def coverage(
    samples: Tensor, truth: Tensor, level: float = 0.9, where: Tensor | None = None
) -> float:
    """Compute the fraction of true values in the samples' central interval of a probability.

    The interval lies between the order statistics of ranks (1 -+ level) / 2 * (S + 1). A
    fractional rank lies between two samples, or beyond the last one. A true value there counts
    with the share of the probability 1 / (S + 1) of that place which the interval needs. Ties are
    shared in the same way. So the expectation is exactly `level`, for any S, if the truth is one
    more draw from the distribution of the samples. Few samples cannot show how far off a true
    value is: one beyond all samples still counts max(0, 1 - (S + 1) (1 - level) / 2). At level 0.9
    this is 0.55 for S = 8, and 0 from S = 19 on.

    Args:
        samples: Posterior samples, shape (S, B, C, H, W).
        truth: True images, shape (B, C, H, W).
        level: Nominal probability, between 0 and 1.
        where: Mask of the pixels that count, which broadcasts to the shape of `truth` (see
            `varying_pixels`).

    Returns:
        The fraction, from 0 to 1.

    Raises:
        InputError: Shapes or level do not fit, or the mask is empty.

    >>> samples = torch.linspace(0, 1, 99).view(-1, 1, 1, 1, 1)
    >>> coverage(samples, torch.full((1, 1, 1, 1), 0.5)), coverage(samples, torch.ones(1, 1, 1, 1))
    (1.0, 0.0)
    """
    _check_samples(samples, truth.shape, "coverage")
    check_finite(truth, "coverage, truth")
    if not 0 < level < 1:
        raise InputError(f"coverage: level is {level:g}: give a number between 0 and 1")
    slots = len(samples) + 1
    below = torch.zeros_like(truth, dtype=torch.float64)
    tied = torch.zeros_like(below)
    for sample in samples:
        below += sample < truth
        tied += sample == truth
    start, stop = below / slots, (below + tied + 1) / slots
    return float(_pick(share_inside(start, stop, level), where).mean())


def share_inside(start: Tensor, stop: Tensor, level: float) -> Tensor:
    """Compute the share of intervals of probability that lies in the central one; see `coverage`.

    Args:
        start: Lower ends, numbers from 0 to 1.
        stop: Upper ends, above `start`, of the same shape.
        level: Probability of the central interval.

    Returns:
        Shares from 0 to 1, of the same shape.

    >>> share_inside(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.75]), level=0.5)
    tensor([0.5000, 1.0000])
    """
    overlap = stop.clamp(max=(1 + level) / 2) - start.clamp(min=(1 - level) / 2)
    return overlap.clamp(min=0) / (stop - start)


def spread(samples: Tensor, where: Tensor | None = None) -> float:
    """Compute the root of the mean pixel variance of posterior samples.

    The variance is unbiased. For samples of the exact posterior the result equals the root mean
    square error of the exact posterior mean, and 1 / sqrt(2) of that of a single sample.

    Args:
        samples: Posterior samples, shape (S, B, C, H, W), S at least 2.
        where: Mask that broadcasts to (B, C, H, W), as in `coverage`.

    Returns:
        The root mean variance, in units of the image.

    Raises:
        InputError: There are fewer than 2 samples, the shape does not fit, or the mask is empty.

    >>> round(spread(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)), 4)
    0.7071
    """
    _check_samples(samples, samples.shape[1:], "spread")
    if len(samples) < 2:
        raise InputError("spread needs at least 2 samples of every image, got 1: draw more")
    return float(_pick(samples.double().var(dim=0), where).mean().sqrt())


def varying_pixels(images: Tensor, least: float = 0.02) -> Tensor:
    """Mark the pixels that vary over an image set.

    The others are constant background. An interval contains or misses the truth there by rounding
    only, and coverage means nothing.

    Args:
        images: Held-out images, shape (N, C, H, W), N at least 2.
        least: Standard deviation over the set that a pixel must exceed, in units of the image.

    Returns:
        Boolean mask, shape (C, H, W), for the argument `where` of other metrics.

    Raises:
        InputError: There are fewer than 2 images.

    >>> varying_pixels(torch.tensor([[[[0.0, 0.0]]], [[[0.0, 1.0]]]]))
    tensor([[[False,  True]]])
    """
    if images.ndim != 4 or len(images) < 2:
        raise InputError(
            f"varying_pixels needs at least 2 images (N, C, H, W), got {tuple(images.shape)}"
        )
    check_finite(images, "varying_pixels")
    return images.std(dim=0) > least


def _pair(x: Tensor, ref: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Check images and references, and clip both to [0, 1], in float32 or float64."""
    if x.ndim != 4 or x.shape != ref.shape:
        raise InputError(
            f"{name} needs image and reference of one shape (B, C, H, W), got {tuple(x.shape)} "
            f"and {tuple(ref.shape)}"
        )
    if not x.numel():
        raise InputError(f"{name} needs at least one image, got shape {tuple(x.shape)}")
    for images, which in ((x, "images"), (ref, "references")):
        check_finite(images, f"{name}, {which}")
    kind = torch.promote_types(x.dtype, torch.float32)  # half precision is lifted
    return x.to(kind).clamp(0, 1), ref.to(x.device, kind).clamp(0, 1)


def _check_samples(samples: Tensor, shape: torch.Size, name: str) -> None:
    """Raise InputError unless these are samples (S, B, C, H, W) of images of a shape."""
    if samples.ndim != 5 or samples.shape[1:] != shape or not samples.numel():
        raise InputError(
            f"{name} needs samples (S, B, C, H, W) of truth (B, C, H, W), got "
            f"{tuple(samples.shape)} and {tuple(shape)}"
        )
    check_finite(samples, f"{name}, samples")


def _pick(values: Tensor, where: Tensor | None) -> Tensor:
    """Return the values that a mask selects."""
    if where is None:
        return values
    try:
        mask = where.to(values.device).bool().expand_as(values)
    except RuntimeError as error:
        raise InputError(
            f"mask {tuple(where.shape)} does not broadcast to images {tuple(values.shape)}"
        ) from error
    if not mask.any():
        raise InputError("the mask selects no pixel: pass another `where`")
    return values[mask]


@lru_cache(maxsize=3)
def _lpips_model(net: str) -> Any:
    """Load the network of LPIPS."""
    if net not in ("alex", "vgg", "squeeze"):
        raise InputError(f"lpips: net '{net}' is unknown: choose alex, vgg or squeeze")
    try:
        from lpips import LPIPS

        with warnings.catch_warnings():
            # lpips loads the weights of torchvision in a way that torchvision deprecates
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            return LPIPS(net=net, verbose=False).requires_grad_(False)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # RuntimeError: torchvision was built for another torch
        raise unavailable("lpips", error) from error
