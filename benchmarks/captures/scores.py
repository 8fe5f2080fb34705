"""The scores of restored fields, and of error bars beside a truth that has noise of its own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.captures.sets import LEVELS, Split
from unmurk.evaluation.metrics import psnr, ssim
from unmurk.noise import PoissonGaussian

__all__ = ["Bars", "bright_part", "decibels", "scores", "truth_variance"]

SMOOTH = 5  # pixels to a side of the mean that says whether a pixel is bright


class Bars(NamedTuple):
    """The error bars of a restored field.

    Attributes:
        std: Calibrated standard deviations (H, W).
        half: Half-widths (H, W) of the intervals of probability 0.9.
    """

    std: Tensor
    half: Tensor


def decibels(x: Tensor, truth: Tensor) -> float:
    """PSNR in dB of an image (H, W) for a peak of 1."""
    return float(psnr(x[None, None], truth[None, None]))


def bright_part(truth: Tensor) -> Tensor:
    """Where the local mean of the truth (H, W) is above its median.

    The truth itself would select the pixels at which its own noise is positive.
    """
    side = SMOOTH // 2
    padded = F.pad(truth[None, None].double(), (side, side, side, side), mode="reflect")
    local = F.avg_pool2d(padded, SMOOTH, 1)[0, 0]
    return local > local.median()


def truth_variance(split: Split, number: int, noise: PoissonGaussian) -> Tensor:
    """The variance (H, W) of the noise that the truth of a held-out field has itself.

    The mean of N captures has 1/N of the variance of their noise; rounded to the steps of its
    file, it has a variance of 1/12 of a squared step more. The gain and the offset that give it
    the brightness of the capture scale both.
    """
    truth, published = split.truth[number], split.published[number]
    if split.averaged is None:
        return torch.zeros_like(truth)
    rounding = LEVELS**-2 / 12
    capture = noise.gain * (published - noise.offset).clamp_min(0) + noise.sigma**2 + rounding
    slope = truth.std() / published.std()
    return slope**2 * (capture / split.averaged + rounding)


def scores(
    found: list[Tensor], split: Split, noise: PoissonGaussian, bars: list[Bars]
) -> dict[str, list[float]]:
    """PSNR and SSIM of every restored field (H, W), and PSNR and error bars of its bright part.

    PSNR is in dB for a peak of 1, "published" that from the truth as published. "spread" is the
    root mean square of the standard deviations in the bright part over that of the errors,
    "coverage" the part of its pixels that the intervals of probability 0.9 hold. Both are for the
    difference from the truth as it is: the variance of its own noise is added to that of the
    error bars.

    Args:
        found: The restored fields.
        split: The fold.
        noise: The noise of a capture.
        bars: The error bars of every field, or none.
    """
    results: dict[str, list[float]] = {"psnr": [], "published": [], "bright": [], "ssim": []}
    results |= {"spread": [], "coverage": []} if bars else {}
    for i, (x, t) in enumerate(zip(found, split.truth, strict=True)):
        bright, square = bright_part(t), (x.clamp(0, 1) - t).square().double()
        results["psnr"].append(decibels(x, t))
        results["published"].append(decibels(x, split.published[i]))
        results["bright"].append(float(-10 * square[bright].mean().log10()))
        results["ssim"].append(float(ssim(x[None, None], t[None, None])))
        if bars:
            std, half = (held.double() for held in bars[i])
            total = (std.square() + truth_variance(split, i, noise)).sqrt()
            error = (x - t).double()
            ratio = total[bright].square().mean() / error[bright].square().mean()
            results["spread"].append(float(ratio.sqrt()))
            within = error.abs() <= half * total / std
            results["coverage"].append(float(within[bright].double().mean()))
    return results
