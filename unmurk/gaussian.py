r"""A Gaussian prior over images, fitted to corrupted images, and its exact posteriors.

**The prior.** The images follow

.. math:: x \sim \mathcal N(m, S), \qquad S = T^{-1} \operatorname{diag}(P)\, T,

with a mean image :math:`m` and powers :math:`P` in an orthogonal basis :math:`T`: the orthonormal
two-dimensional DCT-II of channels that one rotation makes nearly uncorrelated (brightness and two
colors). Images of one kind are nearly stationary, and cosines nearly diagonalize the covariance of
a stationary image. Unlike the Fourier basis, they do not tie opposite borders together (Ahmed,
Natarajan and Rao, 1974, IEEE Trans. Computers C-23).

**Its posteriors.** With :math:`y = A x + \sigma_y n` and linear :math:`A` the posterior is
Gaussian. In the coordinates :math:`c = T (x - m)` its mean, the Wiener solution, solves

.. math::

    \Lambda c = b, \qquad
    \Lambda = \frac{T A^\top A\, T^{-1}}{\sigma_y^2} + \operatorname{diag}(P)^{-1},
    \qquad b = \frac{T A^\top (y - A m)}{\sigma_y^2} .

A right-hand side with covariance :math:`\Lambda`,

.. math:: b + T A^\top n' / \sigma_y + \operatorname{diag}(P)^{-1/2} n'', \qquad
    n', n'' \sim \mathcal N(0, I),

gives a draw from the posterior instead, because then :math:`c` has covariance :math:`\Lambda^{-1}`
(Papandreou and Yuille, 2010, NIPS, "Gaussian sampling by local perturbations"). Conjugate
gradients solve the system for each image separately. They work on :math:`w \Lambda w` with
:math:`w = (P^{-1} + g / \sigma_y^2)^{-1/2}`, where :math:`g` is the diagonal of
:math:`T A^\top A\, T^{-1}`, averaged over bands of frequencies.

**The fit** (`fit`). Each round of expectation maximization draws :math:`x \sim p(x \mid y; m, S)`
exactly for some of the measurements, then sets :math:`m` and :math:`S` to the mean and the
covariances of the draws. Draws in place of posterior covariances make it stochastic EM (Celeux and
Diebolt, 1985). The second half of the rounds is averaged with weights 1, 1/2, 1/3, ..., which is
stochastic approximation EM (Delyon, Lavielle and Moulines, 1999, Annals of Statistics 27) and
tends to a maximum of the likelihood of :math:`y`. Rozet et al. (2024, arXiv 2405.13712) also begin
with a Gaussian that 16 rounds of EM have fitted; theirs has low rank.

Where :math:`A` sees nothing the likelihood is flat, and the first guess stays: one constant for
each channel (least squares), and a power that falls with the cube of the frequency, scaled so that

.. math::

    \text{power} = \frac{E \|y - A m\|^2 - \sigma_y^2 d_y}{E \|A x_0\|^2},

where :math:`x_0` has the power law of size 1 and :math:`d_y` counts the numbers of :math:`y`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .devices import filled, host_to, physics_outside_autocast, single_or_double
from .operators.base import conjugate_gradient, per_image
from .operators.linalg import dct_matrix
from .problem import Problem
from .rng import PerImageGenerator, StreamId, generator

__all__ = ["Wiener", "fit", "images_per_round", "power_law"]

MIN_POWER = 1e-7  # a standard deviation of 0.0003 for each coefficient
MIN_NOISE = 1e-3  # the least noise that a measurement is assumed to have
BANDS = 8
TOLERANCE = 3e-4  # relative residual at which conjugate gradients stop in float32
START_STEPS, DRAW_STEPS = 24, 60  # steps of conjugate gradients, for a start and for draws

ROUNDS = 16
VALUES = 2**19  # pixel values drawn in a round: 170 color images of 32 x 32
MAX_IMAGES = 2048  # images drawn in a round
CHUNK = 32  # images drawn together, so that their coefficients stay in the cache


def power_law(shape: Sequence[int]) -> Tensor:
    """Compute powers that fall with the third power of the frequency.

    Most images have more power at high frequencies. A first guess should be too smooth rather than
    too rough, because a few rounds of expectation maximization hardly remove roughness.

    Args:
        shape: Shape (C, H, W) of the images.

    Returns:
        Powers of shape (C, H, W).

    >>> power_law((1, 1, 2)).shape
    torch.Size([1, 1, 2])
    >>> power = power_law((1, 8, 8))
    >>> bool(power[0, 0, 0] > 50 * power[0, 7, 7])
    True
    """
    c, h, w = shape
    vertical, horizontal = (torch.arange(n).double() / n for n in (h, w))
    square = vertical[:, None].square() + horizontal.square() + 1 / max(h, w) ** 2
    return square.pow(-1.5).float().expand(c, h, w).clone()


class Wiener(nn.Module):
    r"""The Gaussian prior :math:`\mathcal N(m, S)` over images of one shape; see the module.

    A new object has a gray mean and the power law; `fit` returns a fitted one.

    Args:
        shape: Shape (C, H, W) of the images.

    Attributes:
        mean: The mean image m, shape (C, H, W).
        basis: The rotation of the channels, shape (C, C).
        power: The powers P, shape (C, H, W).

    >>> prior = Wiener((1, 4, 4))
    >>> x = prior.sample(2, seed=0)
    >>> tuple(x.shape)
    (2, 1, 4, 4)
    >>> problem = Problem("identity", noise=0.1).bind(range(2), (1, 4, 4))
    >>> tuple(prior.restore(x, problem).shape)
    (2, 1, 4, 4)
    """

    mean: Tensor
    basis: Tensor
    power: Tensor
    down: Tensor
    across: Tensor
    sigma_min = 0.0
    sigma_max = math.inf

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        c, h, w = shape
        self.register_buffer("mean", torch.full(shape, 0.5))
        self.register_buffer("basis", torch.eye(c))
        self.register_buffer("power", power_law(shape))
        self.register_buffer("down", dct_matrix(h).float(), persistent=False)
        self.register_buffer("across", dct_matrix(w).float(), persistent=False)

    # -- coordinates -----------------------------------------------------------------------------

    def dct(self, x: Tensor) -> Tensor:
        """Transform images (B, C, H, W) to cosine coefficients of the same shape."""
        vertical, horizontal = self._cosines(x)
        return ((x @ horizontal.mT).mT @ vertical.mT).mT

    def _cosines(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines along columns and rows, orthonormal in the precision of `like`."""
        if like.dtype == torch.float64:
            height, width = self.shape[1:]
            return dct_matrix(height).to(like), dct_matrix(width).to(like)
        return self.down.to(like), self.across.to(like)

    def to_coefficients(self, x: Tensor) -> Tensor:
        """Compute T x for images x of shape (B, C, H, W)."""
        return _rotate(self.basis.mT, self.dct(x))

    def to_images(self, c: Tensor) -> Tensor:
        r"""Compute :math:`T^{-1} c = T^\top c` for coefficients c of shape (B, C, H, W)."""
        vertical, horizontal = self._cosines(c)
        return ((_rotate(self.basis, c) @ horizontal).mT @ vertical).mT

    def set_moments(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the mean and the covariances; powers and rotation follow from the latter.

        Args:
            mean: The mean image, shape (C, H, W).
            covariance: Covariances of the channels at each cosine, shape (H, W, C, C).
        """
        covariance = covariance.double()
        size = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        basis = torch.linalg.eigh((covariance / size).mean((0, 1))).eigenvectors
        power = (basis.mT @ covariance @ basis).diagonal(dim1=-2, dim2=-1)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.power.copy_(power.permute(2, 0, 1).clamp_min(MIN_POWER))

    def covariance(self) -> Tensor:
        """Return the covariances of the channels at each cosine, shape (H, W, C, C)."""
        power = torch.diag_embed(self.power.permute(1, 2, 0))
        return self.basis @ power @ self.basis.mT

    def resized(self, shape: Sequence[int]) -> "Wiener":
        r"""Return the Gaussian for images of another size: the same power at each frequency.

        The cosine k of N has the frequency k / N. The logarithm of the power is interpolated
        linearly between frequencies. The mean becomes its average over the pixels.

        Args:
            shape: Shape (C, H, W). A Gaussian of one channel serves several independent ones.

        >>> Wiener((1, 4, 4)).resized((1, 8, 6)).power.shape
        torch.Size([1, 8, 6])
        """
        if tuple(shape) == self.shape:
            return self
        other = Wiener((shape[0], shape[1], shape[2])).to(self.mean)
        if tuple(shape[1:]) == self.shape[1:]:
            mean, power = self.mean, self.power
        else:
            down, across = (
                _interpolation(old, new).to(self.power)
                for old, new in zip(self.shape[1:], shape[1:], strict=True)
            )
            mean, power = self.mean.mean((1, 2), True), (down @ self.power.log() @ across.mT).exp()
        other.mean.copy_(mean.expand(tuple(shape)))
        other.power.copy_(power.expand(tuple(shape)))
        if shape[0] == self.shape[0]:
            other.basis.copy_(self.basis)
        return other

    # -- the prior -------------------------------------------------------------------------------

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Compute the denoiser :math:`E[\text{image} \mid x]`.

        Args:
            x: Images with noise, shape (B, C, H, W).
            sigma: Standard deviation of the noise: one number, or one for each image (B,).

        Returns:
            Images of shape (B, C, H, W).
        """
        noise = per_image(filled(sigma, x).expand(len(x)), x).square()
        power = self.power.to(x)
        c = power / (power + noise) * self.to_coefficients(x - self.mean.to(x))
        return self.mean.to(x) + self.to_images(c)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n new images, shape (n, C, H, W). Image i depends on (seed, i) only."""
        z = PerImageGenerator(
            seed, range(n), StreamId.GAUSSIAN_PRIOR, device=self.mean.device
        ).randn(*self.shape)
        return self.mean + self.to_images(self.power.sqrt() * z)

    def energy(self, d: Tensor) -> Tensor:
        r"""Compute :math:`d^\top S^{-1} d` of differences of images d (B, C, H, W), shape (B,)."""
        return (self.to_coefficients(single_or_double(d)).square() / self.power).flatten(1).sum(1)

    # -- the posterior ---------------------------------------------------------------------------

    def restore(self, y: Tensor, problem: Problem, iterations: int = START_STEPS) -> Tensor:
        r"""Compute the Wiener solution :math:`E[x \mid y]` for a linear operator.

        With 24 steps of conjugate gradients the remaining error is about a quarter of the
        posterior's standard deviation for masks, and a hundredth of it for blurs.

        Args:
            y: Measurements (B, ...).
            problem: How they were made, bound to these images; its operator is linear.
            iterations: Steps of conjugate gradients. They end early at a relative residual of
                3e-4 in float32 and of 1e-12 in float64.

        Returns:
            Images of shape (B, C, H, W), in float64 for y in float64.
        """
        with physics_outside_autocast(y.device):
            return self._solve(y, problem, None, iterations)

    def draw(
        self, y: Tensor, problem: Problem, noise: PerImageGenerator, iterations: int = DRAW_STEPS
    ) -> Tensor:
        r"""Draw one image from :math:`p(x \mid y)` for each measurement.

        Args:
            y: Measurements (B, ...).
            problem: How they were made, bound to these images; its operator is linear.
            noise: One random stream for each measurement.
            iterations: Steps of conjugate gradients.

        Returns:
            Images of shape (B, C, H, W).
        """
        with physics_outside_autocast(y.device):
            return self._solve(y, problem, noise, iterations)

    def _solve(
        self, y: Tensor, problem: Problem, noise: PerImageGenerator | None, iterations: int
    ) -> Tensor:
        """Compute the mean of p(x | y), or a draw from it if random streams are given."""
        operator, sigma = problem.operator, max(problem.sigma, MIN_NOISE)
        y = single_or_double(y)
        power, mean = self.power.to(y), self.mean.to(y).expand(len(y), *self.shape)
        data = operator.apply_mask(y - operator.A(mean)) / sigma
        inner = torch.zeros_like(mean)
        if noise is not None:
            data = data + operator.apply_mask(noise.randn(*y.shape[1:]).to(y))
            inner = noise.randn(*self.shape).to(y) / power.sqrt()
        b = self.to_coefficients(operator.A_adjoint(data)) / sigma + inner
        w = (1 / power + self._gain(problem, len(y)).to(y) / sigma**2).rsqrt()

        def system(e: Tensor) -> Tensor:
            c = w * e
            normal = self.to_coefficients(operator.normal(self.to_images(c))) / sigma**2
            return w * (normal + c / power)

        tolerance = None if y.dtype == torch.float64 else TOLERANCE
        c = w * conjugate_gradient(system, w * b, iterations, tolerance)
        return mean + self.to_images(c)

    def _gain(self, problem: Problem, batch: int) -> Tensor:
        r"""Estimate the diagonal of :math:`T A^\top A\, T^{-1}`, averaged over frequency bands.

        One probe of random signs, the same for every image, gives the estimate: the entries off
        the diagonal average out.

        Returns:
            Gains of shape (B, 1, H, W).
        """
        c, h, w = self.shape
        draw = torch.rand(self.shape, generator=generator(0, StreamId.GAUSSIAN_PROBE)).to(
            self.mean
        )
        signs = (2 * (draw < 0.5) - 1.0)[None]
        probe = self.to_images(signs).expand(batch, c, h, w)
        observed = problem.operator.normal(probe)
        square = (signs * self.to_coefficients(observed)).mean(1).flatten(1)
        place = torch.maximum(torch.arange(h)[:, None] / h, torch.arange(w) / w)
        band = (BANDS * place).long().flatten().to(self.mean.device)
        inside = nn.functional.one_hot(band, BANDS).to(square)
        means = square @ (inside / inside.sum(0).clamp_min(1))
        means = torch.maximum(means, 1e-4 * means.amax(1, keepdim=True)).clamp_min(1e-8)
        return (means @ inside.T).view(batch, 1, h, w)


def _interpolation(old: int, new: int) -> Tensor:
    """Return the matrix (new, old) that interpolates values at k / old linearly at k / new."""
    place = (torch.arange(new).double() * old / new).clamp_max(old - 1)
    return (1 - (place[:, None] - torch.arange(old)).abs()).clamp_min(0)


def _rotate(rotation: Tensor, c: Tensor) -> Tensor:
    """Rotate the channels of coefficients (B, C, H, W) by a matrix (C, C)."""
    return c if len(rotation) == 1 else (rotation.to(c) @ c.flatten(2)).view_as(c)


# -- the fit -------------------------------------------------------------------------------------


@torch.no_grad()
def fit(
    y: Tensor,
    problem: Problem,
    shape: tuple[int, int, int],
    seed: int = 0,
    rounds: int = ROUNDS,
    values: int = VALUES,
    device: torch.device | None = None,
) -> Wiener:
    """Fit the Gaussian prior of the images behind measurements by expectation maximization.

    Args:
        y: Measurements (N, ...).
        problem: How they were made; image i has number i.
        shape: Shape (C, H, W) of the images.
        seed: In each round, image i draws from the stream of (seed, i, round).
        rounds: Rounds of expectation maximization.
        values: Pixel values drawn in a round.
        device: Device of the computation. Only the measurements of one round are moved there. None
            takes the device of y.

    Returns:
        The fitted prior.

    Raises:
        InputError: The operator is not linear.

    >>> problem = Problem("inpaint:random,keep=0.5", noise=0.05)
    >>> y = problem.simulate(torch.full((64, 1, 8, 8), 0.3))
    >>> prior = fit(y, problem, (1, 8, 8), rounds=4)
    >>> round(float(prior.mean.mean()), 2)  # although half of the pixels are hidden
    0.3
    """
    count = images_per_round(len(y), shape, values)
    device = y.device if device is None else device
    model, problem = Wiener(shape).to(device), problem.to(device)
    chosen = _subset(len(y), count, seed, 0)
    first = host_to(y[chosen.to(y.device)], device)
    _first_guess(model, first, problem.bind(chosen.tolist(), shape), seed)
    for step in range(1, rounds + 1):
        chosen = _subset(len(y), count, seed, step)
        x = torch.cat(
            [_draw(model, y, problem, numbers, (seed, step)) for numbers in chosen.split(CHUNK)]
        )
        mean = x.mean(0)
        c = model.dct(x - mean)
        covariance = torch.einsum("nihw,njhw->hwij", c, c) / max(len(x) - 1, 1)
        weight = 1 / max(1, step - rounds // 2)
        model.set_moments(
            torch.lerp(model.mean, mean, weight),
            torch.lerp(model.covariance(), covariance, weight),
        )
    return model


def images_per_round(total: int, shape: Sequence[int], values: int = VALUES) -> int:
    """Return how many of `total` images (C, H, W) `fit` draws in a round.

    >>> images_per_round(60_000, (1, 28, 28))
    668
    """
    return min(total, MAX_IMAGES, max(64, values // math.prod(shape)))


def _subset(total: int, count: int, seed: int, step: int) -> Tensor:
    """Choose the numbers of the images of a round, shape (count,)."""
    return torch.randperm(total, generator=generator(seed, StreamId.GAUSSIAN_SUBSET, step))[:count]


def _draw(
    model: Wiener, y: Tensor, problem: Problem, chosen: Tensor, path: tuple[int, int]
) -> Tensor:
    """Draw an image for each of the chosen measurements; the path is (seed, round)."""
    seed, step = path
    device, numbers = model.mean.device, chosen.tolist()
    streams = PerImageGenerator(seed, numbers, StreamId.GAUSSIAN_POSTERIOR, step, device=device)
    bound = problem.bind(numbers, model.shape)
    return model.draw(host_to(y[chosen.to(y.device)], device), bound, streams)


def _first_guess(model: Wiener, y: Tensor, problem: Problem, seed: int) -> None:
    """Set the mean to one constant for each channel, and the power to a scaled power law."""
    c, h, w = model.shape
    constants = [
        problem.A(level.view(1, c, 1, 1).expand(len(y), c, h, w)).flatten()
        for level in torch.eye(c, device=y.device)
    ]
    observed = problem.operator.apply_mask(y).flatten()
    # This runs on the CPU, whose driver also takes matrices without full rank, such as those of an
    # operator that sees one channel only. The normal equations move C x C numbers and no image.
    design = torch.stack(constants, 1).double()
    gram, right = (design.mT @ design).cpu(), (design.mT @ observed.double()).cpu()
    level = torch.linalg.lstsq(gram, right[:, None], rcond=1e-9, driver="gelsd").solution
    model.mean.copy_(level.view(c, 1, 1).expand(model.shape))
    excess = problem.residual(model.mean.expand(len(y), -1, -1, -1), y).square().sum()
    excess = excess - problem.sigma**2 * problem.measurements(y).sum()
    z = torch.randn(len(y), c, h, w, generator=generator(seed, StreamId.GAUSSIAN_START)).to(y)
    law = power_law(model.shape).to(y)
    size = problem.A(model.to_images(law.sqrt() * z)).square().sum()
    model.power.copy_(law * (excess / size).clamp_min(1e-8))
