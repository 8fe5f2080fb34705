r"""Priors whose denoiser and posterior are known in closed form: the reference for every solver.

The Gaussian prior is defined in `exact_gaussian.py`. A mixture of Gaussians is the prior
:math:`x \sim \sum_k w_k N(m_k, S_k)`. Bayes' rule over the components turns each closed form into
a mixture of the Gaussian ones:

.. math::
    \begin{aligned}
    \mathbb E[x \mid x_\sigma] &= \sum_k r_k\, \mathbb E_k[x \mid x_\sigma],
        & r_k &\propto w_k\, p_k(x_\sigma) \\
    p(y) &= \sum_k w_k\, p_k(y) \\
    p(x \mid y) &= \sum_k v_k\, p_k(x \mid y), & v_k &\propto w_k\, p_k(y)
    \end{aligned}

Source: C. Bishop, Pattern Recognition and Machine Learning (2006), section 2.3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import filled
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, generator
from .exact_gaussian import GaussianPosterior, GaussianPrior, operator_matrix

__all__ = [
    "GaussianMixture",
    "GaussianPosterior",
    "GaussianPrior",
    "MixturePosterior",
    "operator_matrix",
]


class GaussianMixture:
    """Mixture of Gaussian priors: several modes, and everything in closed form.

    Args:
        weights: K positive numbers; they are normalized to sum to 1.
        components: K Gaussian priors of one shape.

    Raises:
        InputError: The weights are not K positive numbers, or the components' shapes differ.

    >>> low, high = (GaussianPrior(torch.full((1, 1, 1), m), torch.full((1, 1, 1), 0.01))
    ...              for m in (0.2, 0.8))
    >>> prior = GaussianMixture([1, 1], [low, high])
    >>> prior.denoise(torch.tensor([[[[0.5]]], [[[0.7]]]]), sigma=0.1).flatten()
    tensor([0.5000, 0.7493])
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
        """Stack the means (K, 1, d), variances (K, 1, d) and eigenvectors (K, d, d)."""
        eye = torch.eye(math.prod(self.shape), dtype=torch.float64, device=self.weights.device)
        parts = self.components
        self._means = torch.stack([part.mean.reshape(1, -1) for part in parts])
        self._powers = torch.stack([part.power.reshape(1, -1) for part in parts])
        self._bases = torch.stack([eye if p.modes is None else p.modes for p in parts])

    @classmethod
    def example(
        cls, shape: tuple[int, int, int] = (1, 8, 8), *, components: int = 3, seed: int = 0
    ) -> "GaussianMixture":
        """Build a mixture of waves in different directions, each with its own covariance.

        The mean of component k is 0.5 + 0.25 cos(...), one wave across the image whose direction
        turns by pi / K from one component to the next (the phase is drawn from `seed`). Its
        covariance is 0.1^2 exp(-distance / length) with length 2, 3, 4, ... pixels. The weights
        are proportional to K + 1, K + 2, ..., so that no two components are alike.

        Args:
            shape: Shape (C, H, W) of the images.
            components: Number K of components.
            seed: Seed of the phases.

        >>> GaussianMixture.example((1, 8, 8)).weights
        tensor([0.2667, 0.3333, 0.4000], dtype=torch.float64)
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
        """The weights, shape (K,), float64, which sum to 1."""
        return self._log_weights.exp()

    def to(self, device: str | torch.device) -> "GaussianMixture":
        """Move the prior to another device, in place like a module."""
        self._log_weights = self._log_weights.to(device)
        self.components = [component.to(device) for component in self.components]
        self._stack()
        return self

    def _parts(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return per component: coefficients (K, B, d) of x - m_k, variances, log w_k p_k(x)."""
        coefficients = (x.double().flatten(1) - self._means) @ self._bases
        level = filled(sigma, coefficients).reshape(-1, 1)
        power = (self._powers + level**2).clamp_min(torch.finfo(torch.float64).tiny)
        terms = coefficients**2 / power + torch.log(2 * math.pi * power)
        return coefficients, power, self._log_weights[:, None] - 0.5 * terms.sum(-1)

    def _blend(self, log_joint: Tensor, each: Tensor, like: Tensor) -> Tensor:
        """Average one flat image of each component (K, B, d) by responsibility."""
        blended = (log_joint.softmax(0)[..., None] * each).sum(0)
        return blended.reshape(like.shape).to(like.dtype)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Estimate the clean image, E[image | x].

        Args:
            x: Noisy images, shape (B, C, H, W).
            sigma: Their noise level: a number or (B,).

        Returns:
            Images, shape (B, C, H, W), in the type of x.
        """
        coefficients, power, log_joint = self._parts(x, sigma)
        shrunk = coefficients * (self._powers / power)
        return self._blend(log_joint, self._means + shrunk @ self._bases.mT, x)

    __call__ = denoise

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Compute the gradient of `log_prob(x, sigma)` in x, shape (B, C, H, W)."""
        coefficients, power, log_joint = self._parts(x, sigma)
        return self._blend(log_joint, -(coefficients / power) @ self._bases.mT, x)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """Compute the log density of noisy images, in nats, shape (B,).

        Args:
            x: Images, shape (B, C, H, W).
            sigma: Level of the noise that they hold on top of the prior: a number or (B,).
        """
        return self._parts(x, sigma)[2].logsumexp(0)

    def sample(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n images, shape (n, C, H, W).

        Args:
            n: Number of images.
            seed: Image i depends on (seed, i) only.
            dtype: Type of the images.
        """
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
        return drawn.reshape(n, *self.shape).to(dtype)

    def posterior(self, y: Tensor, problem: Problem) -> "MixturePosterior":
        """Compute p(x | y) of every measurement, for a linear operator and Gaussian noise.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise. It is bound to images 0 to B - 1 unless it is bound.

        Raises:
            InputError: The operator is not linear, or the noise is zero (the weights of the
                components are densities of y, which then may not exist).
        """
        weights = self._log_joint(y, problem).softmax(0).T
        return MixturePosterior(weights, [c.posterior(y, problem) for c in self.components])

    def log_evidence(self, y: Tensor, problem: Problem) -> Tensor:
        """Compute log p(y), in nats, shape (B,); see `GaussianPrior.log_evidence`."""
        return self._log_joint(y, problem).logsumexp(0)

    def _log_joint(self, y: Tensor, problem: Problem) -> Tensor:
        """Compute log w_k p_k(y), shape (K, B)."""
        each = torch.stack([c.log_evidence(y, problem) for c in self.components])
        return self._log_weights[:, None] + each


class MixturePosterior:
    """p(x | y) = sum_k v_k p_k(x | y), one for every measurement of a batch.

    Attributes:
        weights: Probability of every component given y, shape (B, K), float64.
        components: K Gaussian posteriors.
        mean: The MMSE estimate, shape (B, C, H, W).
        exact_mean: The mean in float64, shape (B, d).

    >>> low, high = (GaussianPrior(torch.full((1, 1, 1), m), torch.full((1, 1, 1), 0.01))
    ...              for m in (0.2, 0.8))
    >>> y, problem = torch.full((1, 1, 1, 1), 0.5), Problem("identity", 0.1)
    >>> posterior = GaussianMixture([1, 1], [low, high]).posterior(y, problem)
    >>> posterior.weights, posterior.mean.item()
    (tensor([[0.5000, 0.5000]], dtype=torch.float64), 0.5)
    >>> round(posterior.std.item(), 4)  # (0.005 + 0.15^2)^0.5: within and between the components
    0.1658
    """

    def __init__(self, weights: Tensor, components: Sequence[GaussianPosterior]) -> None:
        self.weights = weights
        self.components = list(components)
        self._means = torch.stack([c.exact_mean.flatten(1) for c in components])  # (K, B, d)
        self.exact_mean = (weights.T[..., None] * self._means).sum(0)
        self.mean = self.exact_mean.reshape_as(components[0].mean).to(components[0].mean.dtype)

    @property
    def covariance(self) -> Tensor:
        """Covariance within the components plus that between their means, (B, d, d), float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        for weight, mean, part in zip(self.weights.T, self._means, self.components, strict=True):
            away = mean - self.exact_mean
            within = part.covariance + away[:, :, None] * away[:, None, :]
            total = total + weight[:, None, None] * within
        return total

    @property
    def std(self) -> Tensor:
        """Standard deviation of every pixel, shape (B, C, H, W)."""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        return variance.sqrt().reshape_as(self.mean).to(self.mean.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n images for every measurement, shape (n, B, C, H, W); one stream for each."""
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
        """Compute the log density, in nats, of one image for every measurement, shape (B,)."""
        each = torch.stack([component.log_prob(x) for component in self.components])
        return (self.weights.log().T + each).logsumexp(0)


def _choose(weights: Tensor, u: Tensor) -> Tensor:
    """Map uniform draws u (B, n) to component numbers (B, n) with probabilities (B, K)."""
    edges = weights.cumsum(1)[:, :-1].contiguous()  # the last edge is 1, without rounding
    return torch.searchsorted(edges, u.contiguous(), right=True)
