"""Priors whose denoiser and posterior are known in closed form: the yardstick of every solver.

Gaussian prior x ~ N(m, S). With x_sigma = x + sigma n, n ~ N(0, I), and y = A x + sigma_y n:

    E[x | x_sigma] = m + S (S + sigma^2 I)^-1 (x_sigma - m)             the denoiser
    p(x_sigma)     = N(m, S + sigma^2 I)                                 the diffused density
    p(y)           = N(A m, A S A^T + sigma_y^2 I)                       the evidence
    p(x | y)       = N(m + K (y - A m), S - K A S),  K = S A^T (A S A^T + sigma_y^2 I)^-1

The posterior mean is the MMSE estimate and, the posterior being Gaussian, the MAP estimate too.
With sigma_y = 0 the inverse is a pseudo-inverse: the limit of small noise.

Everything is kept and computed in float64; results come back in the type of the input. The
operator enters as a dense matrix, so images of more than some 2,000 numbers are out of reach.

Mixture prior x ~ sum_k w_k N(m_k, S_k). Bayes' rule over the components turns each of these into
a mixture of the Gaussian ones:

    E[x | x_sigma] = sum_k r_k E_k[x | x_sigma],    r_k proportional to w_k p_k(x_sigma)
    p(y)           = sum_k w_k p_k(y)
    p(x | y)       = sum_k v_k p_k(x | y),          v_k proportional to w_k p_k(y)
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..devices import filled
from ..errors import InputError
from ..rng import PerImageGenerator, StreamId, generator

if TYPE_CHECKING:
    from ..problem import Problem

__all__ = [
    "GaussianMixture",
    "GaussianPosterior",
    "GaussianPrior",
    "MixturePosterior",
    "operator_matrix",
]

# keep the random streams of this module apart from all others, and from each other


def operator_matrix(problem: "Problem", shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The linear operator of a problem as dense matrices.

    Args:
        problem: The problem; bound here to images 0..B-1 unless it is bound already.
        shape: Shape (C, H, W) of an image.
        like: Measurements (B, ...); their type is what the operator is fed with.

    Returns:
        (B, m, d) float64 with d = C H W, or (1, m, d) when all images share one operator.

    Raises:
        InputError: The operator is not linear.
    """
    if problem.index is None:
        problem = problem.bind(range(len(like)), shape)
    if not problem.operator.linear:
        raise InputError(
            f"operator '{problem.operator.spec}' is not linear, so it has no matrix;"
            " closed forms need a linear operator"
        )
    return problem.operator.matrix(shape, like)


class GaussianPrior:
    """Images drawn from a Gaussian: a prior like any other, with everything about it known.

    Args:
        mean: (C, H, W).
        covariance: Variances (C, H, W) of independent pixels, or the full matrix (d, d) with
            d = C H W.

    Raises:
        InputError: The covariance has another shape, is not symmetric, or not positive
            semi-definite.
    """

    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.shape = tuple(mean.shape)
        self.mean = mean.detach().double()
        size = self.mean.numel()
        given = covariance.detach().double()
        self._modes: Tensor | None = None
        if given.shape == self.mean.shape:
            self._power = given.flatten()
        elif given.shape == (size, size) and torch.allclose(given, given.T, atol=1e-10):
            self._power, self._modes = torch.linalg.eigh(given)
        else:
            raise InputError(
                f"covariance has shape {tuple(given.shape)}: give variances of shape"
                f" {self.shape} or a symmetric matrix of shape {(size, size)}"
            )
        if self._power.min() < -1e-10 * self._power.max().abs():
            raise InputError(
                "covariance has a negative eigenvalue: it must be positive semi-definite"
            )
        self._power = self._power.clamp_min(0)

    @classmethod
    def exponential(
        cls,
        shape: tuple[int, int, int],
        *,
        length: float = 4.0,
        std: float = 0.2,
        mean: float = 0.5,
    ) -> "GaussianPrior":
        """A stationary prior with covariance std^2 exp(-distance / length) in every channel.

        Its spectrum falls like |frequency|^-3, as that of photographs does; channels are
        independent. `length` is in pixels.
        """
        channels, height, width = shape
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
        plane = std**2 * torch.exp(-torch.cdist(grid, grid) / length)
        full = torch.block_diag(*[plane] * channels)
        return cls(torch.full(shape, mean, dtype=torch.float64), full)

    @property
    def covariance(self) -> Tensor:
        """The full covariance matrix (d, d)."""
        if self._modes is None:
            return torch.diag(self._power)
        return (self._modes * self._power) @ self._modes.T

    def to(self, device: str | torch.device) -> "GaussianPrior":
        """The same prior on another device (in place, like a module)."""
        self.mean, self._power = self.mean.to(device), self._power.to(device)
        self._modes = None if self._modes is None else self._modes.to(device)
        return self

    def _into(self, x: Tensor) -> Tensor:
        """Coefficients (B, d) of x - m on the covariance's eigenvectors."""
        flat = (x.double() - self.mean).flatten(1)
        return flat if self._modes is None else flat @ self._modes

    def _out(self, coefficients: Tensor) -> Tensor:
        """Images (B, C, H, W), without the mean, from coefficients."""
        flat = coefficients if self._modes is None else coefficients @ self._modes.T
        return flat.reshape(-1, *self.shape)

    def _variance(self, sigma: float | Tensor) -> Tensor:
        """Squared noise level as (B, 1) or (1, 1)."""
        level = filled(sigma, self.mean)
        return level.reshape(-1, 1) ** 2

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """E[clean image | x], where x (B, C, H, W) holds noise of level sigma (float or (B,))."""
        noisy = (self._power + self._variance(sigma)).clamp_min(torch.finfo(torch.float64).tiny)
        return (self.mean + self._out(self._into(x) * self._power / noisy)).to(x.dtype)

    __call__ = denoise

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Gradient of `log_prob(x, sigma)` in x, (B, C, H, W)."""
        return -self._out(self._into(x) / (self._power + self._variance(sigma))).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log density (B,), nats, of images that hold noise of level sigma on top of the prior."""
        power = self._power + self._variance(sigma)
        terms = self._into(x) ** 2 / power + torch.log(2 * math.pi * power)
        return -0.5 * terms.sum(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n images (n, C, H, W), float32; image i depends on (seed, i) alone."""
        z = PerImageGenerator(seed, range(n), StreamId.PRIOR, device=self.mean.device).randn(
            self.mean.numel()
        )
        return (self.mean + self._out(z.double() * self._power.sqrt())).float()

    def _measured(self, y: Tensor, problem: "Problem") -> tuple[Tensor, Tensor, Tensor]:
        """Matrix A (1 or B, m, d), its product A S, and the innovation y - A m (B, m)."""
        matrix = operator_matrix(problem, self.shape, y)
        innovation = y.double().flatten(1) - (matrix @ self.mean.flatten()[:, None])[..., 0]
        return matrix, matrix @ self.covariance, innovation

    def posterior(self, y: Tensor, problem: "Problem") -> "GaussianPosterior":
        """p(x | y) of every measurement, for a linear operator and Gaussian noise.

        Args:
            y: Measurements (B, ...).
            problem: Operator and noise; bound here to images 0..B-1 unless it is bound already.

        Raises:
            InputError: The operator is not linear.
        """
        matrix, spread, innovation = self._measured(y, problem)
        gram = spread @ matrix.mT
        noise = problem.sigma**2 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        if problem.sigma > 0:
            gain = torch.linalg.solve(gram + noise, spread).mT
        else:
            gain = spread.mT @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
        mean = self.mean.flatten() + (gain @ innovation[..., None])[..., 0]
        covariance = self.covariance - gain @ spread
        shape = (len(y), *self.shape)
        return GaussianPosterior(mean.reshape(shape), (covariance + covariance.mT) / 2, y.dtype)

    def map(self, y: Tensor, problem: "Problem") -> Tensor:
        """The most probable image (B, C, H, W) given y: here the posterior mean."""
        return self.posterior(y, problem).mean

    def log_evidence(self, y: Tensor, problem: "Problem") -> Tensor:
        """log p(y) (B,), nats, over the numbers of y that the operator lets through.

        Raises:
            InputError: The noise is zero (the density may not exist) or the operator not linear.
        """
        if problem.sigma <= 0:
            raise InputError("log_evidence needs noise > 0: without noise y may have no density")
        matrix, spread, innovation = self._measured(y, problem)
        gram = spread @ matrix.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(problem.sigma**2)
        observed = matrix.abs().amax(-1) > 0
        unseen = (
            (~observed).double().sum(1)
        )  # their rows of gram are sigma^2 times those of I: taken out below
        innovation = torch.where(observed, innovation, 0)
        factor = torch.linalg.cholesky(gram)
        white = torch.linalg.solve_triangular(factor, innovation[..., None], upper=False)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(1)
        log_det = log_det - 2 * unseen * math.log(problem.sigma)
        return -0.5 * (
            (white**2).sum(1) + log_det + observed.double().sum(1) * math.log(2 * math.pi)
        )


class GaussianPosterior:
    """p(x | y) = N(mean, covariance), one for every measurement of a batch.

    Attributes:
        mean: (B, C, H, W), the MMSE and MAP estimate.
        covariance: (B, d, d), or (1, d, d) where all measurements share it; float64.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, dtype: torch.dtype) -> None:
        self.mean = mean.to(dtype)
        self.covariance = covariance
        self._exact_mean = mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of every pixel, (B, C, H, W)."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        flat = variance.expand(len(self.mean), -1)
        return flat.sqrt().reshape(self.mean.shape).to(self.mean.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n draws for every measurement, (n, B, C, H, W); one random stream per measurement."""
        batch, size = len(self.mean), self.mean[0].numel()
        power, modes = torch.linalg.eigh(self.covariance)
        root = modes * power.clamp_min(0).sqrt()[:, None]
        streams = PerImageGenerator(seed, range(batch), StreamId.POSTERIOR, device=root.device)
        z = streams.randn(n, size).double()
        flat = self._exact_mean.flatten(1)[:, None] + z @ root.mT
        return flat.transpose(0, 1).reshape(n, *self.mean.shape).to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """log density (B,) in nats; -inf or nan where the posterior is singular (no noise)."""
        away = (x.double() - self._exact_mean).flatten(1)
        power, modes = torch.linalg.eigh(self.covariance)
        coefficients = (away[:, None] @ modes)[:, 0]
        terms = coefficients**2 / power + torch.log(2 * math.pi * power)
        return -0.5 * terms.sum(1)


class GaussianMixture:
    """Images drawn from one of several Gaussians: a prior with modes, known in closed form.

    Args:
        weights: (K,), positive; scaled here to sum to 1.
        components: K Gaussian priors of one shape.

    Raises:
        InputError: The weights are not K positive numbers, or the components' shapes differ.
    """

    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(
        self, weights: Tensor | Sequence[float], components: Sequence[GaussianPrior]
    ) -> None:
        given = torch.as_tensor(weights, dtype=torch.float64).detach()
        if not components or given.shape != (len(components),) or not (given > 0).all():
            raise InputError(
                f"weights {given.tolist()} do not fit {len(components)} components:"
                " give one positive number for each"
            )
        if len({component.shape for component in components}) > 1:
            raise InputError(
                f"components have shapes {[component.shape for component in components]}:"
                " give Gaussians of one shape"
            )
        self.shape = components[0].shape
        self.components = list(components)
        self._log_weights = (given / given.sum()).log().to(components[0].mean.device)
        self._stack()

    def _stack(self) -> None:
        """The components' means (K, 1, d), variances (K, 1, d) and eigenvectors (K, d, d)."""
        eye = torch.eye(math.prod(self.shape), dtype=torch.float64, device=self.weights.device)
        parts = self.components
        self._means = torch.stack([part.mean.reshape(1, -1) for part in parts])
        self._powers = torch.stack([part._power.reshape(1, -1) for part in parts])
        self._bases = torch.stack([eye if p._modes is None else p._modes for p in parts])

    @classmethod
    def example(
        cls, shape: tuple[int, int, int] = (1, 8, 8), *, components: int = 3, seed: int = 0
    ) -> "GaussianMixture":
        """Waves of different directions, each with correlated variations of its own scale.

        Component k has the mean 0.5 + 0.25 cos(...), one wave across the image whose direction
        turns by pi / K from one component to the next (the phase is drawn from `seed`); the
        covariance 0.1^2 exp(-distance / length) with length 2, 3, 4, ... pixels; and a weight
        proportional to K + 1, K + 2, ..., so that none is like another.
        """
        phases = (
            2
            * math.pi
            * torch.rand(components, generator=generator(seed, StreamId.EXAMPLE)).double()
        )
        channels, height, width = shape
        rows = torch.arange(height).double()[:, None] / height
        columns = torch.arange(width).double() / width
        parts = []
        for k in range(components):
            angle = math.pi * k / components
            along = math.cos(angle) * columns + math.sin(angle) * rows
            wave = 0.5 + 0.25 * torch.cos(2 * math.pi * along + phases[k])
            around = GaussianPrior.exponential(shape, length=2.0 + k, std=0.1)
            parts.append(GaussianPrior(wave.expand(shape), around.covariance))
        return cls([float(components + 1 + k) for k in range(components)], parts)

    @property
    def weights(self) -> Tensor:
        """(K,) float64, summing to 1."""
        return self._log_weights.exp()

    def to(self, device: str | torch.device) -> "GaussianMixture":
        """The same prior on another device (in place, like a module)."""
        self._log_weights = self._log_weights.to(device)
        self.components = [component.to(device) for component in self.components]
        self._stack()
        return self

    def _parts(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per component: coefficients (K, B, d) of x - m_k, their variances, log w_k p_k(x)."""
        coefficients = (x.double().flatten(1) - self._means) @ self._bases
        level = filled(sigma, coefficients).reshape(-1, 1)
        power = (self._powers + level**2).clamp_min(torch.finfo(torch.float64).tiny)
        terms = coefficients**2 / power + torch.log(2 * math.pi * power)
        return coefficients, power, self._log_weights[:, None] - 0.5 * terms.sum(-1)

    def _blend(self, log_joint: Tensor, each: Tensor, like: Tensor) -> Tensor:
        """Images from one flat image of each component (K, B, d), weighted by responsibility."""
        blended = (log_joint.softmax(0)[..., None] * each).sum(0)
        return blended.reshape(like.shape).to(like.dtype)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """E[clean image | x], where x (B, C, H, W) holds noise of level sigma (float or (B,))."""
        coefficients, power, log_joint = self._parts(x, sigma)
        shrunk = coefficients * (self._powers / power)
        return self._blend(log_joint, self._means + shrunk @ self._bases.mT, x)

    __call__ = denoise

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Gradient of `log_prob(x, sigma)` in x, (B, C, H, W)."""
        coefficients, power, log_joint = self._parts(x, sigma)
        return self._blend(log_joint, -(coefficients / power) @ self._bases.mT, x)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log density (B,), nats, of images that hold noise of level sigma on top of the prior."""
        return self._parts(x, sigma)[2].logsumexp(0)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n images (n, C, H, W), float32; image i depends on (seed, i) alone."""
        u = (
            PerImageGenerator(seed, range(n), StreamId.COMPONENT, device=self.weights.device)
            .rand(1)
            .double()
        )
        chosen = _choose(self.weights.expand(n, -1), u)[:, 0]
        z = PerImageGenerator(seed, range(n), StreamId.PRIOR, device=chosen.device).randn(
            self._means.shape[-1]
        )
        drawn = torch.zeros_like(z, dtype=torch.float64)
        for k, (mean, power, basis) in enumerate(
            zip(self._means, self._powers, self._bases, strict=True)
        ):
            own = z[chosen == k].double() * power.sqrt()
            drawn[chosen == k] = mean + own @ basis.T
        return drawn.reshape(n, *self.shape).float()

    def posterior(self, y: Tensor, problem: "Problem") -> "MixturePosterior":
        """p(x | y) of every measurement, for a linear operator and Gaussian noise.

        Args:
            y: Measurements (B, ...).
            problem: Operator and noise; bound here to images 0..B-1 unless it is bound already.

        Raises:
            InputError: The operator is not linear, or the noise is zero (the weights of the
                components are densities of y, which then may not exist).
        """
        weights = self._log_joint(y, problem).softmax(0).T
        return MixturePosterior(weights, [c.posterior(y, problem) for c in self.components])

    def log_evidence(self, y: Tensor, problem: "Problem") -> Tensor:
        """log p(y) (B,), nats; see `GaussianPrior.log_evidence`."""
        return self._log_joint(y, problem).logsumexp(0)

    def _log_joint(self, y: Tensor, problem: "Problem") -> Tensor:
        """log w_k p_k(y), (K, B)."""
        each = torch.stack([c.log_evidence(y, problem) for c in self.components])
        return self._log_weights[:, None] + each


class MixturePosterior:
    """p(x | y) = sum_k v_k p_k(x | y), one for every measurement of a batch.

    Attributes:
        weights: (B, K), the probability of every component given y; float64.
        components: K Gaussian posteriors.
        mean: (B, C, H, W), the MMSE estimate.
    """

    def __init__(self, weights: Tensor, components: Sequence[GaussianPosterior]) -> None:
        self.weights = weights
        self.components = list(components)
        self._means = torch.stack([c._exact_mean.flatten(1) for c in components])  # (K, B, d)
        self._exact_mean = (weights.T[..., None] * self._means).sum(0)
        self.mean = self._exact_mean.reshape_as(components[0].mean).to(components[0].mean.dtype)

    @property
    def covariance(self) -> Tensor:
        """(B, d, d) float64: that within the components and that between their means."""
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        for weight, mean, part in zip(self.weights.T, self._means, self.components, strict=True):
            away = mean - self._exact_mean
            within = part.covariance + away[:, :, None] * away[:, None, :]
            total = total + weight[:, None, None] * within
        return total

    @property
    def std(self) -> Tensor:
        """Standard deviation of every pixel, (B, C, H, W)."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        return variance.sqrt().reshape_as(self.mean).to(self.mean.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n draws for every measurement, (n, B, C, H, W); one random stream per measurement."""
        batch, device = len(self.mean), self.weights.device
        u = (
            PerImageGenerator(seed, range(batch), StreamId.POSTERIOR_COMPONENT, device=device)
            .rand(n)
            .double()
        )
        chosen = _choose(self.weights, u).T  # (n, B)
        drawn = torch.zeros(n, *self.mean.shape, dtype=self.mean.dtype, device=device)
        for k, component in enumerate(self.components):
            drawn[chosen == k] = component.sample(n, seed)[chosen == k]
        return drawn

    def log_prob(self, x: Tensor) -> Tensor:
        """log density (B,) in nats of one image for every measurement."""
        each = torch.stack([component.log_prob(x) for component in self.components])
        return (self.weights.log().T + each).logsumexp(0)


def _choose(weights: Tensor, u: Tensor) -> Tensor:
    """Component numbers (B, n) of uniform draws u (B, n) under probabilities (B, K)."""
    edges = weights.cumsum(1)[:, :-1].contiguous()  # the last edge is 1, whatever rounding says
    return torch.searchsorted(edges, u.contiguous(), right=True)
