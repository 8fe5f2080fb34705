r"""The mean of the posterior, from the image that RED-diff has fitted to y.

The last step of `red_diff` estimates the mean of the posterior rather than its mode: D is applied
to an image on which y's own noise replaces e. For A = I it is :math:`D(y, \sigma_y)`, with
a check that D removes as much noise as there is. So levels end at the noise of y: `final`. Part of
the measurement noise is re-injected into the final iterate :math:`\mu`:

.. math:: v = \mu + (\sigma/\sigma_y)^2 A^\top (y - A \mu).

Where singular values of A are 1 and :math:`\sigma = \sigma_y`, v has just the noise that D
expects. In the null space of A the pair puts noise on v as before; between the two it puts
:math:`(I - (\sigma/\sigma_y)^2 A^\top A)\,\sigma e`. So levels end at :math:`\sigma_y/\lVert
A\rVert`, with the largest singular value of A (at :math:`\sigma_y` if that is below 1), and the
result is the denoised v.

Where all singular values of A are one :math:`\kappa`, :math:`A^\top A = \kappa^2 I`, as in
denoising, nothing of :math:`\mu` is left in v: with :math:`\sigma = \sigma_y/\kappa`

.. math:: v = A^\top y/\kappa^2 = x + \sigma n,\qquad \mathbb{E}[x \mid y] = D(v, \sigma)

if D is exact. A learned D need not be: trained on noisy images alone it tends to remove too much
where noise is low, and does better with a smaller noise level as its label. y itself can tell. For
:math:`h_\ell = D(v, \ell\sigma)`, with d values of an image,

.. math::
    R_\ell = \lVert v - h_\ell\rVert^2/\sigma^2 - d
        + 2\operatorname{tr}(\partial h_\ell/\partial v)

is Stein's (1981) unbiased estimate of :math:`\lVert x - h_\ell\rVert^2/\sigma^2`, and the result
is the mean

.. math:: \sum_\ell w_\ell h_\ell,\qquad w_\ell \propto q_\ell \exp(-R_\ell/8)

over a few labels :math:`\ell`, with :math:`\sum_\ell w_\ell = 1`. For linear estimates
:math:`h_\ell = B_\ell v` with symmetric :math:`B_\ell` that commute, the expected squared error of
this mean, over :math:`\sigma^2`, is at most that of any :math:`h_\ell` plus
:math:`8\log(1/q_\ell)` (Dalalyan and Salmon, 2012, arXiv 1104.3969). So an exact denoiser
(:math:`q_1` is near 1) loses next to nothing. Images lie in [0, 1], so :math:`h_\ell` is clipped
to it for :math:`R_\ell`. The trace is estimated along one draw of noise (Ramani, Blu and Unser,
2008, "Monte-Carlo SURE"). The pair

.. math::
    h_\ell = \tfrac12 \bigl(D(v + b, \ell\sigma) + D(v - b, \ell\sigma)\bigr),
        \qquad b = 0.1\,\sigma e,

gives its central difference at no further cost.
"""

import math

import torch
from torch import Tensor

from ..operators.linalg import batch_dot, per_image, squared_norm
from ..operators.weighted import Weighted
from ..problem import Problem
from ..rng import generator
from .data_term import likelihood_grad
from .state import CountingDenoiser, gray

__all__ = ["LABELS", "PosteriorMean", "last_level", "risk"]

LABELS = (1.0, 0.85, 0.7, 0.5)
"""Labels: noise levels that D is given, as fractions of the true one."""
BELIEF = (0.91, 0.03, 0.03, 0.03)
"""q: prior weight of each label."""
TEMPERATURE = 8.0
PROBE = 0.1  # length of b in units of sigma
TOLERANCE = 1e-3  # relative, of A^T A = kappa^2 I


def last_level(problem: Problem, y: Tensor) -> tuple[float, bool]:
    r"""Return the level of y's own noise on an image, and whether :math:`A^\top A = \kappa^2 I`.

    The level is 0 where there is none: without noise, for a nonlinear A, and for weighted data,
    whose weights differ from image to image. It is that of image 0, as levels are shared and must
    not depend on the other images of a batch.

    >>> level, full = last_level(Problem("identity", 0.1), torch.zeros(1, 1, 4, 4))
    >>> round(level, 4), full
    (0.1, True)
    """
    operator = problem.operator
    if problem.sigma == 0 or not operator.linear or isinstance(operator, Weighted):
        return 0.0, False
    like = gray(y[:1], problem)
    first = operator.bind([0], like.shape[1:])
    x = torch.randn(like.shape[1:], generator=generator(0)).to(like)[None]
    observed = first.A_adjoint(first.A(x))
    square = float((x * observed).sum() / x.square().sum())
    if square > 0 and (observed - square * x).norm() <= TOLERANCE * observed.norm():
        return problem.sigma / square**0.5, True
    for _ in range(20):  # power iterations
        x = first.A_adjoint(first.A(x / x.norm()))
    return problem.sigma / max(1.0, float(x.norm().sqrt())), False


class PosteriorMean:
    """The denoised v, averaged over labels that are added one by one.

    Args:
        mu: The image fitted to y, (B, C, H, W).
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images.
        sigma: The level that `last_level` found.
        e: Noise of that level, shaped like mu.
        labels: The first of `LABELS`. Labels other than 1 are used where A^T A = kappa^2 I only.

    >>> mu, y, e = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> estimate = PosteriorMean(mu, y, Problem("identity", 0.5), 0.5, e, labels=(1.0,))
    >>> estimate.add(CountingDenoiser(lambda x, sigma: x / (1 + sigma**2)), 0, (1, -1))[0]
    tensor([[[[0.8000, 0.8000]]]])
    """

    def __init__(
        self,
        mu: Tensor,
        y: Tensor,
        problem: Problem,
        sigma: float,
        e: Tensor,
        labels: tuple[float, ...],
    ) -> None:
        self.sigma, self.labels = sigma, labels
        weight = (sigma / problem.sigma) ** 2
        self.v = mu + weight * likelihood_grad(problem, mu, y)
        b = e - weight * problem.A_adjoint(problem.A(e))
        self.full = b.flatten(1).norm(dim=1) <= TOLERANCE * e.flatten(1).norm(dim=1)
        several = len(labels) > 1
        self.b = torch.where(per_image(self.full, e) > 0, PROBE * e, b) if several else b
        self.found: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(
        self, denoise: CountingDenoiser, k: int, signs: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Add label k.

        Args:
            denoise: The prior's denoiser.
            k: Number of the label, in order from 0.
            signs: Signs of b: (1, -1) for pairs, which several labels need.

        Returns:
            The mean over all labels so far and the estimate h of this one, both (B, C, H, W).
        """
        v, label = self.v, self.labels[k]
        estimates = [denoise(v + sign * self.b, label * self.sigma) for sign in signs]
        mean = sum(estimates[1:], estimates[0])
        self.found.append(mean if len(estimates) == 1 else mean.div_(len(estimates)))
        logit = torch.full_like(self.full, math.log(BELIEF[k]), dtype=v.dtype)
        if len(self.labels) > 1:
            pair = torch.stack(estimates).clamp(0, 1)
            logit = logit - risk(v, pair, self.b, self.sigma) / TEMPERATURE
        self.logits.append(logit if k == 0 else torch.where(self.full, logit, -torch.inf))
        weights = torch.stack(self.logits).softmax(0)
        if k == 0:  # its weight is 1
            return self.found[0], self.found[0]
        parts = [per_image(w, v) * h for w, h in zip(weights, self.found, strict=True)]
        return torch.stack(parts).sum(0), self.found[k]


def risk(v: Tensor, pair: Tensor, b: Tensor, sigma: float) -> Tensor:
    r"""Estimate :math:`\lVert x - h\rVert^2/\sigma^2` where :math:`v = x + \sigma n`, shape (B,).

    Args:
        v: Noisy images (B, C, H, W).
        pair: The estimates at v + b and at v - b, (2, B, C, H, W); h is their mean.
        b: A short step in a random direction, noise of level `PROBE` sigma.
        sigma: Noise level of v.

    >>> v, b = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.1 * PROBE)
    >>> shrunk = torch.stack([(v + b) / 2, (v - b) / 2])  # h(v) = v / 2: a trace of 4 / 2
    >>> risk(v, shrunk, b, sigma=0.1)  # 4 (0.25 / 0.1)^2 - 4 + 2 x 2
    tensor([25.0000])
    """
    misfit = squared_norm(v - pair.mean(0)) / sigma**2
    slope = batch_dot(b, (pair[0] - pair[1]) / 2) / (PROBE * sigma) ** 2
    return misfit - v[0].numel() + 2 * slope
