r"""Inverse problems: a forward model and its noise.

.. math::

    y &= A(x) + \sigma n, \qquad n \sim N(0, I) \\
    \log p(y \mid x) &= - \frac{\|y - A(x)\|^2}{2 \sigma^2} - \frac{d_y}{2} \log(2 \pi \sigma^2),

where d_y is the number of values that y measures: hidden pixels do not count, and carry no noise.
The noise may depend on the brightness instead; see `unmurk.noise`. Every image has its own random
stream, so no result depends on how images are batched.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import shown
from .devices import filled
from .errors import InputError
from .noise import FORMS, Gaussian, Noise, PerChannel, PoissonGaussian, as_noise
from .operators import Operator, Weighted, as_operator
from .operators.linalg import per_image
from .rng import PerImageGenerator, StreamId

__all__ = ["Problem", "noise_of"]


class Problem:
    """An inverse problem: a forward model A with its noise.

    Args:
        operator: A text form ("blur:gaussian,sigma=1.5"), an `Operator`, a matrix (m, d), a scipy
            `LinearOperator`, an object with `A` (a deepinv physics), or a differentiable function
            of x. See `operators.as_operator`.
        noise: Standard deviation sigma of Gaussian noise in units of the image range [0, 1], >= 0;
            or a text form ("poisson,gain=0.01") or a model of `unmurk.noise`. None takes the noise
            of `operator.noise_model` where the object has one (see `noise_of`), else 0.
        shape: Shape (C, H, W) of the images, for matrices, functions and objects whose
            measurements do not determine it.

    Attributes:
        operator: The `Operator`.
        noise: The noise model.
        index: Numbers of the images that the problem is bound to, or None.

    Raises:
        InputError: The operator or the noise cannot be read, is out of its bounds, or is of a kind
            that unmurk does not have.

    >>> import torch
    >>> import unmurk
    >>> problem = unmurk.Problem("sr:average,factor=2", noise=0.1)
    >>> problem
    Problem('sr:average,factor=2', noise=0.1)
    >>> y = problem.simulate(torch.full((1, 1, 4, 4), 0.5), seed=0)
    >>> y.shape, problem.A_adjoint(y).shape
    (torch.Size([1, 1, 2, 2]), torch.Size([1, 1, 4, 4]))
    >>> unmurk.Problem(torch.eye(4)[:2], noise=0.1, shape=(1, 2, 2)).A(torch.ones(1, 1, 2, 2))
    tensor([[1., 1.]])
    """

    def __init__(
        self,
        operator: Any,
        noise: float | str | Noise | None = None,
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.operator: Operator = as_operator(operator, shape)
        self.noise: Noise = noise_of(operator) if noise is None else as_noise(noise)
        self.index: list[int] | None = None

    @property
    def sigma(self) -> float:
        """The standard deviation of Gaussian noise. Raises InputError for any other noise."""
        if not isinstance(self.noise, Gaussian):
            raise InputError(
                f"noise '{self.noise.spec}' is not Gaussian: give a number as noise here (corrupt,"
                " learn and solve take other noises)"
            )
        return self.noise.sigma

    @property
    def level(self) -> float:
        """The standard deviation of the noise; at mid-gray where it depends on the brightness."""
        return float(self.noise.variance(torch.tensor(0.5, dtype=torch.float64))) ** 0.5

    def deviation(self, y: Tensor) -> float | Tensor:
        r"""Estimate the standard deviation of the noise of each measured number from y.

        For Gaussian noise this is sigma, and sigma / w where w weighs the measurements, so that
        the result is in units of the image. Otherwise it is
        :math:`\sqrt{\operatorname{var}(y \mid c = \bar y)}` with the mean :math:`\bar y` of y over
        3 x 3 pixels. This estimate of the variance has little noise of its own, and no bias where
        the image is smooth.

        Args:
            y: Measurements (B, C, H, W).

        Returns:
            A number, or a tensor of the shape of y.

        Raises:
            InputError: The noise is not Gaussian and A is not the identity.
        """
        if isinstance(self.operator, Weighted):
            return self.sigma / self.operator.weights
        if isinstance(self.noise, Gaussian) or self.operator.spec != "identity":
            return self.sigma
        mean = F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False)
        return self.noise.variance(mean).sqrt()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Problem)
            and self.operator == other.operator
            and self.noise == other.noise
        )

    def __hash__(self) -> int:
        return hash((self.operator, self.noise))

    def __repr__(self) -> str:
        return f"Problem({self.operator.spec!r}, noise={self._noise_value!r})"

    @property
    def _noise_value(self) -> float | str:
        """The noise as a number where it is Gaussian, else its text form."""
        return self.noise.sigma if isinstance(self.noise, Gaussian) else self.noise.spec

    # -- text form -------------------------------------------------------------------------------

    @property
    def spec(self) -> dict[str, Any]:
        """The same as `to_dict()`."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return {"operator": text form, "noise": sigma or text form} for JSON.

        `from_dict` reads it back.

        >>> from unmurk import Problem
        >>> Problem("identity", 0.3).to_dict()
        {'operator': 'identity', 'noise': 0.3}
        """
        return {"operator": self.operator.spec, "noise": self._noise_value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Problem":
        """Return the problem that `to_dict` wrote. Raises InputError if it cannot be read."""
        if not isinstance(values, dict) or set(values) != {"operator", "noise"}:
            raise InputError(f"a problem is written as operator and noise, not {shown(values)}")
        operator, noise = values["operator"], values["noise"]
        if not isinstance(operator, str) or not isinstance(noise, str | int | float):
            raise InputError(
                "a problem is written as the text of an operator and the number or text of a"
                f" noise, not {shown(values)}"
            )
        return cls(operator, noise)

    # -- binding to images -----------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> "Problem":
        """Return the problem of the images with these numbers.

        Args:
            index: Numbers of the images, >= 0, one for each image of the batch.
            shape: Shape (C, H, W) of the images. See `Operator.bind`.

        Raises:
            InputError: The operator does not fit images of this shape.
        """
        numbers = [int(i) for i in index]
        return self._with(self.operator.bind(numbers, shape), numbers)

    def index_select(self, positions: Iterable[int] | Tensor) -> "Problem":
        """Return the problem of some images of the batch.

        Args:
            positions: Positions in the batch; they may repeat.
        """
        picked = [int(i) for i in positions]
        index = None if self.index is None else [self.index[i] for i in picked]
        return self._with(self.operator.index_select(picked), index)

    def to(self, device: str | torch.device) -> "Problem":
        """Return the problem with its parameters on a device."""
        return self._with(self.operator.to(device), self.index)

    def _with(self, operator: Operator, index: list[int] | None) -> "Problem":
        other = Problem(operator, self.noise)
        other.index = index
        return other

    # -- the forward model -----------------------------------------------------------------------

    @property
    def linear(self) -> bool:
        """Whether A is linear."""
        return self.operator.linear

    @property
    def mask(self) -> Tensor | None:
        """1 where a pixel is measured and 0 where it is hidden, or None; see `Operator.mask`."""
        return self.operator.mask

    def A(self, x: Tensor) -> Tensor:
        """Compute the noiseless measurements (B, ...) of images x (B, C, H, W)."""
        return self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply :math:`A^T` to y (B, ...). Raises InputError if A is not linear."""
        return self.operator.A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """Apply :math:`A^+` to y (B, ...). Raises InputError if A is not linear."""
        return self.operator.A_dagger(y)

    def simulate(self, x: Tensor, seed: int = 0, index: Iterable[int] | None = None) -> Tensor:
        """Simulate measurements of clean images, with noise.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            seed: Seed of the noise. (Masks come from the operator's own seed.)
            index: Numbers of the images. None takes those that the problem is bound to, else
                0, ..., B - 1.

        Returns:
            Measurements y (B, ...) in the type of x.

        Raises:
            InputError: The images do not fit the operator or the numbers.
        """
        operator, numbers = self._numbered(x, index)
        # drawn on the CPU: the same noise on every device
        return operator.apply_mask(
            self.noise.draw(operator.A(x), PerImageGenerator(seed, numbers, StreamId.NOISE))
        )

    def _numbered(self, x: Tensor, index: Iterable[int] | None) -> tuple[Operator, list[int]]:
        """The operator bound to the images x, on their device, and the images' numbers."""
        operator = self.operator.to(x.device)
        if index is None and self.index is not None:
            numbers = self.index
        else:
            numbers = [int(i) for i in (range(len(x)) if index is None else index)]
            operator = operator.bind(numbers, x.shape[-3:])
        if len(numbers) != len(x):
            raise InputError(
                f"{len(x)} images but {len(numbers)} image numbers: give one number for each"
            )
        return operator, numbers

    # -- the noise model -------------------------------------------------------------------------

    def split(
        self, y: Tensor, fraction: float, generator: torch.Generator, pairs: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Split measurements into two of the same images, with independent noises.

        Args:
            y: Measurements (B, ...).
            fraction: The noises have the variance of y's over p = `fraction` and over 1 - p.
            generator: Source of the draws.
            pairs: Whether every measurement is split twice, with opposite surpluses.

        Returns:
            Two tensors in shape and type of y; of (2 B, ...) with pairs. See `Gaussian.split`
            and `PoissonGaussian.split`, which give the equations.

        Raises:
            InputError: The noise model has no `split`.

        >>> y, noise = torch.zeros(1, 1, 1, 2), torch.Generator().manual_seed(0)
        >>> one, other = Problem("identity", 0.1).split(y, 0.5, noise)
        >>> torch.equal(one, -other)
        True
        """
        if not isinstance(self.noise, Gaussian | PoissonGaussian | PerChannel):
            raise InputError(
                f"noise '{self.noise.spec}' is none of Gaussian, Poisson-Gaussian and one of these"
                " for each channel, whose measurements can be split"
            )
        return self.noise.split(y, fraction, generator, pairs)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y - A(x), shape of y; zero where y measures nothing."""
        return self.operator.apply_mask(y - self.operator.A(x))

    def measurements(self, y: Tensor) -> Tensor:
        """Count the values that each y measures, shape (B,)."""
        return self.operator.count(y)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Compute :math:`\log p(y \mid x)` in nats, with its constant, shape (B,).

        Args:
            x: Images (B, C, H, W).
            y: Measurements (B, ...).

        Raises:
            InputError: The noise is 0, so there is no density.
        """
        return self.operator.apply_mask(self.noise.log_likelihood(self.A(x), y)).flatten(1).sum(1)

    def prox(self, z: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        r"""Compute the posterior mode under a Gaussian prior around z.

        .. math:: \arg\min_x \frac{\|y - A x\|^2}{2 \sigma^2} + \frac{\|x - z\|^2}{2 \rho^2}

        Without noise this is the limit: the x nearest to z with :math:`A x = A A^+ y`, which is
        :math:`z + A^+ (y - A z)`.

        Args:
            z: Images (B, C, H, W).
            y: Measurements (B, ...).
            rho: Standard deviation around z, >= 0; a number, or one for each image, shape (B,).

        Returns:
            x, shape of z.

        Raises:
            InputError: A is not linear and has no prox in closed form; or the noise is not
                Gaussian.
        """
        rho = filled(rho, z)
        if self.sigma > 0:
            return self.operator.prox_l2(z, y, (rho / self.sigma).square())
        free = per_image(rho, z) > 0
        return torch.where(free, z + self.operator.A_dagger(self.residual(z, y)), z)


# -- operators of other libraries -----------------------------------------------------------------

KINDS: dict[str, tuple[str, ...]] = {
    "ZeroNoise": (),
    "GaussianNoise": ("sigma",),
    "PoissonNoise": ("gain",),
    "PoissonGaussianNoise": ("gain", "sigma"),
}
"""Noise models of deepinv that this package has too, by class name, and their numbers."""

ASIDE = {"normalize", "clip_positive", "rng", "initial_random_state", "noise_model", "training"}
"""Attributes of a noise model that do not change the distribution of y, or that `noise_of` checks
separately."""


def noise_of(operator: Any) -> Noise:
    """Read the noise of an operator from another library, its attribute `noise_model`.

    The noise must be one of `KINDS`, or an object with the numbers `sigma` and `gain` that cannot
    be called. Any other noise would be ignored silently, so it raises an error.

    Args:
        operator: A physics of deepinv, or any object. Without a `noise_model` the noise is 0.

    Raises:
        InputError: The noise is of another kind, varies from image to image, or counts photons.

    >>> from types import SimpleNamespace
    >>> noise_of(SimpleNamespace(noise_model=SimpleNamespace(sigma=0.1)))
    Gaussian(sigma=0.1)
    """
    model = getattr(operator, "noise_model", None)
    if model is None or isinstance(operator, str):
        return Gaussian(0.0)
    if isinstance(model, Noise):
        return model
    name = type(model).__name__
    kind = next((k.__name__ for k in type(model).__mro__ if k.__name__ in KINDS), None)
    held = {key for key in _attributes(model) if key not in ASIDE}
    if kind is None and not callable(model) and held and held <= {"gain", "sigma"}:
        wanted: tuple[str, ...] = tuple(held)
    elif kind is not None and held <= set(KINDS[kind]):
        wanted = KINDS[kind]
    else:
        what = f" ({', '.join(sorted(held))})" if held else ""
        raise InputError(
            f"the operator has the noise {name}{what}, which unmurk does not support: give"
            f" noise= as a number, or as one of {', '.join(sorted({f for f, *_ in FORMS}))}"
        )
    gain, sigma = (
        _one(key, getattr(model, key, 0.0)) if key in wanted else 0.0 for key in ("gain", "sigma")
    )
    if not gain:
        return Gaussian(sigma)
    if not getattr(model, "normalize", True):
        raise InputError(
            "the operator's noise_model is in units of photons: give it normalize=True"
        )
    return PoissonGaussian(gain, sigma)


def _attributes(model: Any) -> set[str]:
    """Return the names of an object's public values, without those of every torch module."""
    names = {key for key in dir(model) if not key.startswith("_")} - set(dir(torch.nn.Module))
    return {key for key in names if not callable(getattr(model, key, None))}


def _one(name: str, value: Any) -> Any:
    """Return the number that all entries of a tensor share."""
    if isinstance(value, Tensor) and value.unique().numel() != 1:
        raise InputError(
            f"the operator's noise_model.{name} varies: give one noise for all images"
        )
    return float(value.flatten()[0]) if isinstance(value, Tensor) else value
