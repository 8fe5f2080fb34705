r"""Posterior samples of a Gaussian scale mixture under a linear operator, by Gibbs sampling.

The model is :math:`y = A (m + W c) + \sigma n` with :math:`c_i \mid v_i \sim N(0, v_i)` and
Student-t marginals (`scale_mixture.py`). Given the variances v the posterior is Gaussian; given
the coefficients c the variances are independent. With H = A W, each sweep draws from both
conditional distributions exactly:

.. math::
    c \mid v, y &\sim N(\mu, L^{-1}), \qquad L = H^T H / \sigma^2 + \mathrm{diag}(1 / v), \qquad
        \mu = L^{-1} H^T (y - A m) / \sigma^2 \\
    1 / v_i \mid c_i &\sim \mathrm{Gamma}\bigl((\nu + 1) / 2,\; (\nu s_i^2 + c_i^2) / 2\bigr).

Where y does not depend on c, :math:`c^2` has the autocorrelation :math:`1 / (\nu - 1)` from one
sweep to the next, since :math:`\mathbb E[v \mid c] = (\nu s^2 + c^2) / (\nu - 1)`: the chains mix
within a few sweeps.

The mean is that of :math:`\mu` (Rao-Blackwell), the covariance that of the draws. The chains start
from variances spread over two decades around :math:`s^2`. They run until the split R-hat of every
:math:`c_i` and :math:`\log v_i` is at most 1.01 and the scatter of the chains' means is small
enough.

Sources: D. Andrews, C. Mallows, "Scale mixtures of normal distributions" (1974); A. Gelman et al.,
Bayesian Data Analysis (3rd ed., 2013), chapter 11, for R-hat and the effective sample size.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from ..rng import StreamId, generator
from .exact_gaussian import operator_matrix

__all__ = [
    "CoefficientPrior",
    "GibbsPosterior",
    "GibbsSampler",
    "effective_size",
    "sample_posterior",
    "split_rhat",
]


CHAINS = 32  # for each measurement
BURN_IN, SWEEPS = 50, 250  # of each chain; SWEEPS more if the chains have not converged ...
MOST = 4000  # ... up to this many
RHAT = 1.01  # largest split R-hat of a coefficient or log variance
PRECISE = 2e-4  # squared standard error of the mean, in posterior variances (sum over pixels)


class CoefficientPrior(Protocol):
    """What the sampler needs of a prior: Student-t coefficients in an orthonormal basis.

    Attributes:
        shape: Shape (C, H, W) of the images.
        mean: Mean image m, shape (C, H, W), float64.
        basis: Orthonormal basis W, shape (d, d), float64.
        scales: Scales s_i, shape (d,), float64.
        nu: Degrees of freedom.

    >>> from unmurk.evaluation.scale_mixture import ScaleMixture
    >>> prior: CoefficientPrior = ScaleMixture.example((1, 4, 4))
    >>> prior.basis.shape, prior.scales.shape, prior.nu
    (torch.Size([16, 16]), torch.Size([16]), 5)
    """

    shape: tuple[int, ...]
    mean: Tensor
    basis: Tensor
    scales: Tensor
    nu: int


class GibbsSampler:
    """The two conditional draws for a batch of measurements, several chains each.

    Args:
        prior: The scale mixture.
        matrix: The operator A, shape (B, m, d) or (1, m, d), float64.
        sigma: Standard deviation of the noise, above 0.
        chains: Number K of chains for each measurement.
        random: Source of all draws.

    >>> from unmurk.evaluation.scale_mixture import ScaleMixture
    >>> prior, one = ScaleMixture.example((1, 2, 2)), torch.ones(1, 1, 4, dtype=torch.float64)
    >>> sampler = GibbsSampler(prior, torch.eye(4).double()[None], 0.1, 1, generator(0))
    >>> _, mean = sampler.coefficients(0.01 * one, sampler.data(one))  # v = sigma^2
    >>> mean[0, 0] @ prior.basis.T  # half of y - m
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    def __init__(
        self,
        prior: CoefficientPrior,
        matrix: Tensor,
        sigma: float,
        chains: int,
        random: torch.Generator,
    ) -> None:
        self.prior, self.chains, self.random = prior, chains, random
        self.matrix = matrix @ prior.basis / sigma  # H / sigma
        self.offset = matrix @ prior.mean.flatten()
        self.sigma = sigma
        self.gram = (self.matrix.mT @ self.matrix)[:, None]

    def start(self, batch: int) -> Tensor:
        """Draw first variances (B, K, d), spread over two decades around s^2."""
        shape = (batch, self.chains, len(self.prior.scales))
        u = torch.rand(shape, generator=self.random, dtype=torch.float64)
        return self.prior.scales.square() * 10 ** (2 * u - 1)

    def data(self, y: Tensor) -> Tensor:
        """Compute H^T (y - A m) / sigma^2 of measurements (B, K, m) or (B, 1, m)."""
        return ((y - self.offset[:, None]) / self.sigma) @ self.matrix

    def coefficients(self, v: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """Draw c | v, y, shape (B, K, d); also returns its conditional mean mu."""
        factor = torch.linalg.cholesky(self.gram + torch.diag_embed(1 / v))
        data = data.expand_as(v)[..., None]
        mean = torch.cholesky_solve(data, factor)
        z = torch.randn(mean.shape, generator=self.random, dtype=mean.dtype)
        away = torch.linalg.solve_triangular(factor.mT, z, upper=True)
        return (mean + away)[..., 0], mean[..., 0]

    def variances(self, c: Tensor) -> Tensor:
        """Draw v | c, shape (B, K, d)."""
        nu = self.prior.nu  # Gamma((nu + 1) / 2, r / 2) is chi^2 of nu + 1 degrees over r
        z = torch.randn((nu + 1, *c.shape), generator=self.random, dtype=c.dtype)
        return (nu * self.prior.scales.square() + c.square()) / z.square().sum(0)


class GibbsPosterior:
    """p(x | y) of every measurement of a batch, as the draws of several Markov chains.

    Attributes:
        mean: The MMSE estimate, shape (B, C, H, W).
        covariance: Shape (B, d, d), float64.
        chains: Draws of x, shape (T, B, K, d): T sweeps of K chains.
        mean_variance: Squared standard error of the mean of every pixel, shape (B, d), from the
            scatter of the chains' means.
        exact_mean: The mean in float64.
        rhat: Largest split R-hat of all coefficients and log variances.
        ess: Smallest effective sample size of all coefficients and log variances.

    >>> chains = torch.randn(1000, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    >>> posterior = GibbsPosterior(chains, chains, torch.zeros(1), (1, 1, 2))
    >>> bool((posterior.std - 1).abs().max() < 0.05), posterior.sample(3).shape
    (True, torch.Size([3, 1, 1, 1, 2]))
    """

    def __init__(
        self, chains: Tensor, means: Tensor, like: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.chains = chains
        each = means.mean(0)  # (B, K, d)
        self.exact_mean = each.mean(1).reshape(-1, *shape)
        self.mean_variance = each.var(1) / each.shape[1]
        self.mean = self.exact_mean.to(like.dtype)
        pooled = chains.permute(1, 0, 2, 3).flatten(1, 2)  # (B, N, d)
        away = pooled - self.exact_mean.flatten(1)[:, None]
        self.covariance = away.mT @ away / away.shape[1]
        self.rhat, self.ess = math.nan, math.nan

    @property
    def std(self) -> Tensor:
        """Standard deviation of every pixel, shape (B, C, H, W)."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1)
        return variance.sqrt().reshape_as(self.mean).to(self.mean.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Pick n of the chains' draws for every measurement, shape (n, B, C, H, W).

        No draw is repeated unless there are fewer than n.
        """
        sweeps, batch, chains, size = self.chains.shape
        pooled = self.chains.permute(0, 2, 1, 3).reshape(sweeps * chains, batch, size)
        pick = torch.randperm(len(pooled), generator=generator(seed, StreamId.GIBBS_SUBSET))
        chosen = pick[torch.arange(n) % len(pooled)]
        return pooled[chosen].reshape(n, *self.mean.shape).to(self.mean.dtype)


def sample_posterior(
    prior: CoefficientPrior, y: Tensor, problem: Problem, seed: int = 0
) -> GibbsPosterior:
    """Sample p(x | y) of every measurement y (B, ...); see `ScaleMixture.posterior`.

    >>> from unmurk.evaluation.scale_mixture import ScaleMixture
    >>> prior, problem = ScaleMixture.example((1, 1, 2)), Problem("identity", 0.2)
    >>> y = torch.tensor([[[[0.3, 0.9]]]])
    >>> posterior = sample_posterior(prior, y, problem)
    >>> bool((posterior.mean - prior.denoise(y, 0.2)).abs().max() < 0.005)  # both are E[x | y]
    True
    """
    if problem.sigma <= 0:
        raise InputError("the Gibbs sampler needs noise > 0: give the problem a noise level")
    matrix = operator_matrix(problem, prior.shape, y)
    sampler = GibbsSampler(prior, matrix, problem.sigma, CHAINS, generator(seed, StreamId.GIBBS))
    data = sampler.data(y.double().flatten(1)[:, None])
    v = sampler.start(len(y))
    history: list[list[Tensor]] = [[], [], []]
    for sweep in range(1, BURN_IN + MOST + 1):
        c, mu = sampler.coefficients(v, data)
        v = sampler.variances(c)
        if sweep > BURN_IN:
            for parts, part in zip(history, (c, mu, v.log()), strict=True):
                parts.append(part)
        if sweep > BURN_IN and (sweep - BURN_IN) % SWEEPS == 0:
            found = _posterior(prior, y, history)
            error = found.mean_variance.sum() / found.covariance.diagonal(dim1=1, dim2=2).sum()
            if found.rhat <= RHAT and error <= PRECISE:
                return found
    raise InputError(
        f"the Gibbs sampler has not converged in {MOST} sweeps (R-hat {found.rhat:.3f}, squared"
        f" error of the mean {float(error):.1e}): use more noise, or another operator"
    )


def _posterior(prior: CoefficientPrior, y: Tensor, history: list[list[Tensor]]) -> GibbsPosterior:
    """Summarize the draws so far: c, mu and log v of every sweep, shape (B, K, d) each."""
    c, mu, log_v = (torch.stack(parts) for parts in history)
    x, means = (part @ prior.basis.T + prior.mean.flatten() for part in (c, mu))
    found = GibbsPosterior(x, means, y, prior.shape)
    found.rhat = max(float(split_rhat(part).max()) for part in (c, log_v))
    found.ess = min(float(effective_size(part).min()) for part in (c, log_v))
    return found


# -- diagnostics ----------------------------------------------------------------------------------


def split_rhat(chains: Tensor) -> Tensor:
    """Compute the split R-hat: sqrt of the variance over all half chains over that within them.

    Args:
        chains: T draws of K chains, shape (T, B, K, d).

    Returns:
        Shape (B, d); near 1 where all half chains agree.

    >>> chains = torch.randn(500, 1, 4, 3, generator=torch.Generator().manual_seed(0))
    >>> bool((split_rhat(chains) - 1).abs().max() < 0.02)
    True
    """
    between, within, length = _variances(_split(chains))
    return (((length - 1) / length * within + between) / within).sqrt()


def effective_size(chains: Tensor) -> Tensor:
    """Compute the effective sample size from the autocorrelations of the chains.

    It is the number of independent draws whose mean has the same standard error. The
    autocorrelations are summed in pairs of lags as long as the pairs are positive (Geyer's
    initial positive sequence).

    Args:
        chains: T draws of K chains, shape (T, B, K, d).

    Returns:
        Shape (B, d).

    >>> chains = torch.randn(500, 1, 4, 3, generator=torch.Generator().manual_seed(0))
    >>> bool(((effective_size(chains) / 2000 - 1).abs() < 0.3).all())  # independent draws
    True
    """
    halves = _split(chains)
    between, within, length = _variances(halves)
    total = (length - 1) / length * within + between
    away = halves - halves.mean(0)
    spectrum = torch.fft.rfft(away, n=2 * length, dim=0).abs().square()
    covariances = torch.fft.irfft(spectrum, n=2 * length, dim=0)[:length].mean(2) / length
    rho = 1 - (within - covariances * length / (length - 1)) / total  # (T / 2, B, d)
    pairs = rho[: length // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    tau = 2 * (pairs * positive).sum(0) - 1
    return length * halves.shape[2] / tau.clamp_min(1 / math.log10(length * halves.shape[2]))


def _split(chains: Tensor) -> Tensor:
    """Return both halves of every chain as separate chains, shape (T / 2, B, 2 K, d)."""
    half = len(chains) // 2
    return torch.cat([chains[:half], chains[-half:]], dim=2)


def _variances(chains: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the variance of the chains' means, the mean of their variances, (B, d), and T."""
    return chains.mean(0).var(1), chains.var(0).mean(1), len(chains)
