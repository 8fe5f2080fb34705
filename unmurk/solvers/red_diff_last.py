"""The last step of RED-diff: from the image fitted to y on to the mean of the posterior.

A part of the noise of y can be left on the image mu that the levels have led to:

    v = mu + (sg / sigma_y)^2 A^T (y - A mu)

has, where singular values of A are 1 and sg is sigma_y, just the noise that D expects. Where A
sees nothing the pair puts noise on v as before; between the two it puts
(I - (sg / sigma_y)^2 A^T A) e. So levels end at sigma_y / S for the largest singular value S of A
(at sigma_y for S < 1), and returned is what D makes of v.

Where A^T A = S^2 I, as in denoising, nothing of mu is left in v: with sg = sigma_y / S

    v = A^T y / S^2 = x + sg n,     E[x | y] = D(v, sg)

if D is what it should be. One that is learnt need not be: from noisy images alone it learns to
take too much off where noise is low, and does better when told of less noise than there is. That
can be seen in y itself. For h_c = D(v, c sg), with d pixels,

    R_c = ||v - h_c||^2 / sg^2 - d + 2 tr(dh_c / dv)

is Stein's (1981) unbiased estimate of ||x - h_c||^2 / sg^2, and what is returned is the mean

    sum_c w_c h_c,     w_c proportional to q_c exp(-R_c / 8)

over a few labels c. For estimates h_c = S_c v with symmetric S_c that commute, the expectation of
its ||x - h||^2 / sg^2 is at most that of any h_c and 8 log(1 / q_c) more (Dalalyan and Salmon,
2012, arXiv 1104.3969), so that a denoiser which is right (q_1 is near 1) loses next to nothing.
Images lie in [0, 1], so h_c is clipped to it for R_c. The trace is that along one draw of noise
(Ramani, Blu and Unser, 2008, "Monte-Carlo SURE"), the pair

    h_c = (D(v + b, c sg) + D(v - b, c sg)) / 2,     b = 0.1 e,

giving its central difference at no further cost.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.base import per_image
from ..operators.weighted import Weighted
from ..problem import Problem
from ..rng import generator
from .base import CountingDenoiser, likelihood_grad
from .start import grey

__all__ = ["LABELS", "last_level", "posterior_mean", "risk"]

LABELS = (1.0, 0.85, 0.7, 0.5)
"""c: what share of its noise D may be told of."""
BELIEF = (0.91, 0.03, 0.03, 0.03)
"""q_c: what each is believed before y is seen."""
TEMPERATURE = 8.0
PROBE = 0.1  # length of b in units of sg
TOLERANCE = 1e-3  # relative, of A^T A = S^2 I


def last_level(problem: Problem, y: Tensor) -> tuple[float, bool]:
    """The level of y's own noise on an image, and whether A^T A = S^2 I.

    0 where there is none: without noise, for an A that is not linear, and for weighted data,
    whose weights are those of single images. Image 0 speaks for all, as levels are shared and
    must not depend on what else is in a batch.
    """
    operator = problem.operator
    if problem.sigma == 0 or not operator.linear or isinstance(operator, Weighted):
        return 0.0, False
    like = grey(y[:1], problem)
    first = operator.bind([0], like.shape[1:])
    x = torch.randn(like.shape[1:], generator=generator(0)).to(like)[None]
    observed = first.A_adjoint(first.A(x))
    square = float((x * observed).sum() / x.square().sum())
    if square > 0 and (observed - square * x).norm() <= TOLERANCE * observed.norm():
        return problem.sigma / square**0.5, True
    for _ in range(20):  # power iterations
        x = first.A_adjoint(first.A(x / x.norm()))
    return problem.sigma / max(1.0, float(x.norm().sqrt())), False


def posterior_mean(
    mu: Tensor,
    y: Tensor,
    problem: Problem,
    denoise: CountingDenoiser,
    sg: float,
    e: Tensor,
    labels: tuple[float, ...],
    signs: tuple[int, ...],
    report: Callable[[int, Tensor, Tensor], bool],
) -> Tensor:
    """What D makes of v, (B, C, H, W).

    Args:
        mu: The image fitted to y, (B, C, H, W).
        y: Measurements (B, ...).
        sg: The level that `last_level` found.
        e: Noise of that level, shaped like mu.
        labels: The first of `LABELS`. None but 1 counts where A^T A is not S^2 I.
        signs: Of e: (1, -1) for pairs, which more than one label takes.
        report: Called with the number of each label from 0, the mean so far, and h.
    """
    weight = (sg / problem.sigma) ** 2
    v = mu + weight * likelihood_grad(problem, mu, y)
    b = e - weight * problem.A_adjoint(problem.A(e))
    full = b.flatten(1).norm(dim=1) <= TOLERANCE * e.flatten(1).norm(dim=1)
    if len(labels) > 1:
        b = torch.where(per_image(full, e) > 0, PROBE * e, b)
    found: list[Tensor] = []
    logits: list[Tensor] = []
    for k, label in enumerate(labels):
        estimates = torch.stack([denoise(v + sign * b, label * sg) for sign in signs])
        found.append(estimates.mean(0))
        logit = torch.full_like(full, math.log(BELIEF[k]), dtype=v.dtype)
        if len(labels) > 1:
            logit = logit - risk(v, estimates.clamp(0, 1), b, sg) / TEMPERATURE
        logits.append(logit if k == 0 else torch.where(full, logit, -torch.inf))
        weights = torch.stack(logits).softmax(0)
        parts = [per_image(w, v) * h for w, h in zip(weights, found, strict=True)]
        mean = torch.stack(parts).sum(0)
        if report(k, mean, found[k]):
            break
    return mean


def risk(v: Tensor, pair: Tensor, b: Tensor, sg: float) -> Tensor:
    """R, (B,): an estimate of ||x - h||^2 / sg^2, where v = x + sg n and h is the pair's mean.

    Args:
        v: Noisy images (B, C, H, W).
        pair: The estimates at v + b and at v - b, (2, B, C, H, W).
        b: A short step in a random direction, noise of level `PROBE` sg.
        sg: Noise level of v.
    """
    misfit = (v - pair.mean(0)).square().flatten(1).sum(1) / sg**2
    slope = (b * (pair[0] - pair[1]) / 2).flatten(1).sum(1) / (PROBE * sg) ** 2
    return misfit - v[0].numel() + 2 * slope
