r"""The Gaussian prior and its posteriors in closed form.

The prior is x ~ N(m, S). With :math:`x_\sigma = x + \sigma n`, n ~ N(0, I), and
:math:`y = A x + \sigma_y n`:

.. math::
    \begin{aligned}
    \mathbb E[x \mid x_\sigma] &= m + S (S + \sigma^2 I)^{-1} (x_\sigma - m)
        && \text{(denoiser)} \\
    p(x_\sigma) &= N(m,\; S + \sigma^2 I) && \text{(diffused density)} \\
    p(y) &= N(A m,\; A S A^T + \sigma_y^2 I) && \text{(evidence)} \\
    p(x \mid y) &= N(m + K (y - A m),\; S - K A S), &
    K &= S A^T (A S A^T + \sigma_y^2 I)^{-1}.
    \end{aligned}

The posterior mean is the MMSE estimate. As the posterior is Gaussian, it is the MAP estimate too.
With :math:`\sigma_y = 0` the inverse is a pseudo-inverse, the limit of small noise.

Everything is stored and computed in float64. Results are returned in the type of the input. The
operator enters as a dense matrix, so images of more than about 2,000 numbers are out of reach.

Source: C. Bishop, Pattern Recognition and Machine Learning (2006), section 2.3.
"""

import math

import torch
from torch import Tensor

from ..devices import filled
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId

__all__ = ["GaussianPosterior", "GaussianPrior", "operator_matrix"]


def operator_matrix(problem: Problem, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the linear operator of a problem as dense matrices.

    Args:
        problem: The problem. It is bound to images 0 to B - 1 unless it is bound.
        shape: Shape (C, H, W) of an image.
        like: Measurements, shape (B, ...). The operator is evaluated in their type.

    Returns:
        Matrices (B, m, d), float64, with d = C H W; or (1, m, d) if all images share one operator.

    Raises:
        InputError: The operator is not linear.

    >>> y = torch.rand(2, 1, 2, 2)
    >>> operator_matrix(Problem("sr:average,factor=2", 0.1), (1, 2, 2), y[..., :1, :1])
    tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]], dtype=torch.float64)
    """
    if problem.index is None:
        problem = problem.bind(range(len(like)), shape)
    if not problem.operator.linear:
        raise InputError(
            f"operator '{problem.operator.spec}' is not linear and has no matrix: closed forms"
            " need a linear operator"
        )
    return problem.operator.matrix(shape, like)


class GaussianPrior:
    """Gaussian prior N(m, S), with denoiser, score, density and posterior in closed form.

    Args:
        mean: Mean image, shape (C, H, W).
        covariance: Variances (C, H, W) of independent pixels, or the full matrix (d, d) with
            d = C H W.

    Attributes:
        power: Eigenvalues of the covariance, shape (d,), float64.
        modes: Its eigenvectors, shape (d, d); None if the pixels are independent.

    Raises:
        InputError: The covariance has another shape, is not symmetric, or not positive
            semi-definite.

    >>> prior = GaussianPrior(torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    >>> x = torch.tensor([[[[1.0, 2.0]]]])
    >>> prior.denoise(x, sigma=1.0)  # x / (1 + sigma^2)
    tensor([[[[0.5000, 1.0000]]]])
    >>> prior.posterior(x, Problem("identity", 0.5)).std
    tensor([[[[0.4472, 0.4472]]]])
    """

    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.shape = tuple(mean.shape)
        self.mean = mean.detach().double()
        size = self.mean.numel()
        given = covariance.detach().double()
        self.modes: Tensor | None = None
        if given.shape == self.mean.shape:
            self.power = given.flatten()
        elif given.shape == (size, size) and torch.allclose(given, given.T, atol=1e-10):
            self.power, self.modes = torch.linalg.eigh(given)
        else:
            raise InputError(
                f"covariance has shape {tuple(given.shape)}: give variances of shape"
                f" {self.shape} or a symmetric matrix of shape {(size, size)}"
            )
        if self.power.min() < -1e-10 * self.power.max().abs():
            raise InputError(
                "covariance has a negative eigenvalue: it must be positive semi-definite"
            )
        self.power = self.power.clamp_min(0)

    @classmethod
    def exponential(
        cls,
        shape: tuple[int, int, int],
        *,
        length: float = 4.0,
        std: float = 0.2,
        mean: float = 0.5,
    ) -> "GaussianPrior":
        r"""Build a stationary prior with an exponential covariance in every channel.

        .. math:: S_{ij} = \mathrm{std}^2 \exp(-\lVert p_i - p_j \rVert / \mathrm{length})

        The spectrum falls with the third power of the frequency, as that of photographs does. The
        channels are independent.

        Args:
            shape: Shape (C, H, W) of the images.
            length: Correlation length in pixels.
            std: Standard deviation of every pixel.
            mean: Value of the mean image.

        >>> GaussianPrior.exponential((1, 8, 8)).sample(3).shape
        torch.Size([3, 1, 8, 8])
        """
        channels, height, width = shape
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
        plane = std**2 * torch.exp(-torch.cdist(grid, grid) / length)
        full = torch.block_diag(*[plane] * channels)
        return cls(torch.full(shape, mean, dtype=torch.float64), full)

    @property
    def covariance(self) -> Tensor:
        """The full covariance matrix, shape (d, d), float64."""
        if self.modes is None:
            return torch.diag(self.power)
        return (self.modes * self.power) @ self.modes.T

    def to(self, device: str | torch.device) -> "GaussianPrior":
        """Move the prior to another device, in place like a module."""
        self.mean, self.power = self.mean.to(device), self.power.to(device)
        self.modes = None if self.modes is None else self.modes.to(device)
        return self

    def _into(self, x: Tensor) -> Tensor:
        """Return the coefficients (B, d) of x - m on the eigenvectors of the covariance."""
        flat = (x.double() - self.mean).flatten(1)
        return flat if self.modes is None else flat @ self.modes

    def _out(self, coefficients: Tensor) -> Tensor:
        """Return images (B, C, H, W), without the mean, from coefficients."""
        flat = coefficients if self.modes is None else coefficients @ self.modes.T
        return flat.reshape(-1, *self.shape)

    def _variance(self, sigma: float | Tensor) -> Tensor:
        """Return the squared noise level as (B, 1) or (1, 1)."""
        level = filled(sigma, self.mean)
        return level.reshape(-1, 1) ** 2

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Estimate the clean image, E[image | x].

        Args:
            x: Noisy images, shape (B, C, H, W).
            sigma: Their noise level: a number or (B,).

        Returns:
            Images, shape (B, C, H, W), in the type of x.
        """
        noisy = (self.power + self._variance(sigma)).clamp_min(torch.finfo(torch.float64).tiny)
        return (self.mean + self._out(self._into(x) * self.power / noisy)).to(x.dtype)

    __call__ = denoise

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Compute the gradient of `log_prob(x, sigma)` in x, shape (B, C, H, W)."""
        return -self._out(self._into(x) / (self.power + self._variance(sigma))).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """Compute the log density of noisy images, in nats, shape (B,).

        Args:
            x: Images, shape (B, C, H, W).
            sigma: Level of the noise that they hold on top of the prior: a number or (B,).
        """
        power = self.power + self._variance(sigma)
        terms = self._into(x) ** 2 / power + torch.log(2 * math.pi * power)
        return -0.5 * terms.sum(1)

    def sample(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n images, shape (n, C, H, W).

        Args:
            n: Number of images.
            seed: Image i depends on (seed, i) only.
            dtype: Type of the images.
        """
        z = PerImageGenerator(seed, range(n), StreamId.PRIOR, device=self.mean.device).randn(
            self.mean.numel()
        )
        return (self.mean + self._out(z.double() * self.power.sqrt())).to(dtype)

    def _measured(self, y: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (1 or B, m, d), its product A S, and the innovation y - A m (B, m)."""
        matrix = operator_matrix(problem, self.shape, y)
        innovation = y.double().flatten(1) - (matrix @ self.mean.flatten()[:, None])[..., 0]
        return matrix, matrix @ self.covariance, innovation

    def posterior(self, y: Tensor, problem: Problem) -> "GaussianPosterior":
        """Compute p(x | y) of every measurement, for a linear operator and Gaussian noise.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise. It is bound to images 0 to B - 1 unless it is bound.

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

    def map(self, y: Tensor, problem: Problem) -> Tensor:
        """Compute the MAP estimate (B, C, H, W), which is the posterior mean here."""
        return self.posterior(y, problem).mean

    def log_evidence(self, y: Tensor, problem: Problem) -> Tensor:
        """Compute log p(y), in nats, over the values of y that depend on x; shape (B,).

        Raises:
            InputError: The noise is zero (the density may not exist) or the operator not linear.
        """
        if problem.sigma <= 0:
            raise InputError("log_evidence needs noise > 0: without noise y may have no density")
        matrix, spread, innovation = self._measured(y, problem)
        gram = spread @ matrix.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(problem.sigma**2)
        observed = matrix.abs().amax(-1) > 0
        unseen = (~observed).double().sum(1)  # gram is sigma^2 I there, which is removed below
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
        mean: The MMSE and MAP estimate, shape (B, C, H, W).
        covariance: Shape (B, d, d), or (1, d, d) if all measurements share it; float64.
        exact_mean: The mean in float64.

    >>> prior = GaussianPrior(torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    >>> posterior = prior.posterior(torch.ones(1, 1, 1, 2), Problem("identity", 0.5))
    >>> posterior.mean, posterior.std  # 1 / 1.25 and (0.25 / 1.25)^0.5
    (tensor([[[[0.8000, 0.8000]]]]), tensor([[[[0.4472, 0.4472]]]]))
    """

    def __init__(self, mean: Tensor, covariance: Tensor, dtype: torch.dtype) -> None:
        self.mean = mean.to(dtype)
        self.covariance = covariance
        self.exact_mean = mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of every pixel, shape (B, C, H, W)."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        flat = variance.expand(len(self.mean), -1)
        return flat.sqrt().reshape(self.mean.shape).to(self.mean.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n images for every measurement, shape (n, B, C, H, W); one stream for each."""
        batch, size = len(self.mean), self.mean[0].numel()
        power, modes = torch.linalg.eigh(self.covariance)
        root = modes * power.clamp_min(0).sqrt()[:, None]
        streams = PerImageGenerator(seed, range(batch), StreamId.POSTERIOR, device=root.device)
        z = streams.randn(n, size).double()
        flat = self.exact_mean.flatten(1)[:, None] + z @ root.mT
        return flat.transpose(0, 1).reshape(n, *self.mean.shape).to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log density in nats, shape (B,).

        It is -inf or nan for a singular posterior (no noise).
        """
        away = (x.double() - self.exact_mean).flatten(1)
        power, modes = torch.linalg.eigh(self.covariance)
        coefficients = (away[:, None] @ modes)[:, 0]
        terms = coefficients**2 / power + torch.log(2 * math.pi * power)
        return -0.5 * terms.sum(1)
