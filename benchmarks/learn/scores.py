"""Scores of a learned prior and posterior: restorations, samples, calibration, other tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.learn.sets import SETS, TEST, Images, SetName, downstream_tasks, measure
from benchmarks.solve.scores import has_lpips
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.distances import kid
from unmurk.evaluation.metrics import (
    coverage,
    frechet,
    inception_features,
    load_digit_classifier,
    lpips,
    psnr,
    sliced_wasserstein,
    spread,
    ssim,
    varying_pixels,
)
from unmurk.flows.posterior import Posterior
from unmurk.rng import generator
from unmurk.solvers import solve
from unmurk.training.validation import chi2, measurement_swd

__all__ = [
    "DRAWS",
    "RESTORATIONS",
    "SHOWN",
    "Scoring",
    "downstream_psnr",
    "evaluate",
    "reference_scores",
]

RESTORATIONS = 32
"""Draws of a posterior mean, in antithetic pairs."""
DRAWS = 39
"""Draws of spread and coverage: the 90 % interval lies between the ranks 2 and 38."""
SHOWN = 6
"""Images of each kind in a picture."""
LEVEL = 0.9  # of the interval whose coverage is scored

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Scoring:
    """Settings of the scores of a row.

    Attributes:
        levels: Noise levels of the prior's sampler.
        tasks: Held-out images restored on each downstream task.
        steps: Noise levels of their solver.
        bf16: Whether the prior samples under autocast; everything else is in fp32.
        seed: Seed of the learning; the scores use other streams.
    """

    levels: int
    tasks: int
    steps: int
    bf16: bool
    seed: int


@torch.no_grad()
def evaluate(
    prior: Prior, posterior: Posterior, name: SetName, images: Images, how: Scoring
) -> tuple[Scores, dict[str, list[float]], dict[str, Tensor]]:
    """The scores of a row (None: not available), some of each image, and images for a picture."""
    problem, draw = SETS[name].problem, how.seed + 1
    device = next(posterior.parameters()).device
    truth, shape = images.held, images.held.shape[1:]
    index = range(TEST, TEST + len(truth))
    others = range(index.stop, index.stop + len(images.others))
    y = measure(problem, truth, how.seed, index.start).to(device)
    y_others = measure(problem, images.others, how.seed, others.start).to(device)
    here, there = (problem.bind(numbers, shape).to(device) for numbers in (index, others))
    mean, std = (
        v.cpu() for v in posterior.mean_std(y, here, RESTORATIONS, draw, index, calibrated=False)
    )
    right = posterior.mean_std(y, here, RESTORATIONS, draw, index)[1].cpu()
    low, high = (v.cpu() for v in posterior.interval(y, here, LEVEL, RESTORATIONS, draw, index))
    draws = posterior.sample(y, here, DRAWS, draw, index).cpu()
    restored = posterior.sample(y_others, there, 1, draw, others)[0]
    with torch.autocast(device.type, torch.bfloat16, enabled=how.bf16):
        new = prior.sample(len(images.others), how.levels, draw)

    where = varying_pixels(truth).expand_as(truth)
    singly = {"posterior_psnr": psnr(mean, truth).tolist(), "ssim": ssim(mean, truth).tolist()}
    scores: Scores = {
        "posterior_psnr": float(psnr(mean, truth).mean()),
        "ssim": float(ssim(mean, truth).mean()),
        "lpips": float(lpips(mean, truth).mean()) if has_lpips() else None,
        "denoiser_psnr": None,
        "spread": spread(draws, where),
        "error": float((mean - truth)[where].square().mean().sqrt()),
        "coverage": coverage(draws, truth, LEVEL, where),
        "calibrated_spread": float(right[where].square().mean().sqrt()),
        "calibrated_coverage": float(((low <= truth) & (truth <= high))[where].double().mean()),
        "chi2": chi2(restored, y_others, there),
        "measurement_swd": measurement_swd(
            new, y_others, there, generator(draw, 0, device=device)
        ),
    }
    if SETS[name].operator == "identity":
        denoised = prior.denoise(y, SETS[name].noise).cpu()
        scores["denoiser_psnr"] = float(psnr(denoised, truth).mean())
        singly["denoiser_psnr"] = psnr(denoised, truth).tolist()
    for of, x in (("prior", new.cpu()), ("posterior", restored.cpu())):
        scores |= {f"{of}_{key}": value for key, value in realism(name, images, x).items()}
    pictures = {"prior": new, "mean": mean, "sample": draws[0], "spread": std}
    shown = {k: v[:SHOWN].cpu().float().contiguous() for k, v in pictures.items()}
    return scores, singly, shown


def realism(name: SetName, images: Images, x: Tensor) -> Scores:
    """Distances of the distribution of images x from that of the clean reference.

    The Frechet distance uses the 128 features of the digit classifier only: with Inception's 2048
    features it needs more images than there are.
    """
    features = features_of(name)
    digits = name == "digits"
    return {
        "frechet": frechet(images.reference, x, features) if digits else None,
        "kid": kid(images.reference, x, features) if features else None,
        "swd": sliced_wasserstein(images.reference, x),
    }


@cache
def features_of(name: SetName) -> Callable[[Tensor], Tensor] | None:
    """The feature network of a set; None if it is not available."""
    if name == "digits":
        return load_digit_classifier().features
    try:
        return inception_features()
    except InputError:
        return None


def downstream_psnr(
    prior: Prior, name: SetName, images: Images, how: Scoring
) -> dict[str, list[float]]:
    """PSNR of each held-out image, restored by `red-diff` with the prior, for each task."""
    truth, found = images.held[: how.tasks], {}
    device = prior.log_levels.device
    for title, problem in downstream_tasks(name).items():
        y = measure(problem, truth, how.seed, 0).to(device)
        x = solve(y, problem, prior, "red-diff", seed=how.seed + 1, steps=how.steps).mean.cpu()
        found[title] = psnr(x, truth).tolist()
    return found


def reference_scores(name: SetName, images: Images, seed: int) -> dict[str, Scores]:
    """Scores of the images themselves; rows like those of `evaluate`.

    "noisy" is the y of the others; "clean" is the others, the best score that samples can expect.
    """
    problem = SETS[name].problem
    held = measure(problem, images.held, seed, TEST)
    others = measure(problem, images.others, seed, TEST + len(held))
    rows: dict[str, Scores] = {}
    for row, x in (("noisy", others), ("clean", images.others)):
        rows[row] = {f"prior_{key}": value for key, value in realism(name, images, x).items()}
    rows["noisy"]["posterior_psnr"] = float(psnr(held, images.held).mean())
    rows["noisy"]["ssim"] = float(ssim(held, images.held).mean())
    return rows
