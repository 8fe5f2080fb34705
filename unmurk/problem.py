"""An inverse problem: a forward model and its noise.

    y = A(x) + sigma n,    n ~ N(0, I)

    log p(y | x) = - ||y - A(x)||^2 / (2 sigma^2) - m/2 log(2 pi sigma^2)

with m the number of values that y measures (hidden pixels do not count, and carry no noise); or
with a noise that depends on the brightness, see `unmurk.noise`. All draws come from one stream for
each image, so nothing depends on how images are batched.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import shown
from .devices import filled
from .errors import InputError
from .noise import Gaussian, Noise, as_noise, noise_of
from .operators import Operator, as_operator
from .operators.base import per_image
from .rng import PerImageGenerator, StreamId

__all__ = ["Problem"]


class Problem:
    """A forward model with its noise.

    Args:
        operator: A text form ("blur:gaussian,sigma=1.5"), an `Operator`, an object with `A`
            (a deepinv physics) or a differentiable function of x.
        noise: Standard deviation sigma of Gaussian noise in units of the image range [0, 1], >= 0;
            or a text form ("poisson,gain=0.01") or model of `unmurk.noise`. None takes the noise
            of `operator.noise_model` where the object has one (see `noise.noise_of`), else 0.

    Attributes:
        operator: The `Operator`.
        noise: The noise model.
        index: Numbers of the images it is bound to, or None.

    Raises:
        InputError: noise that cannot be read, is out of range or of a kind that `unmurk.noise`
            lacks; or not an operator.
    """

    def __init__(self, operator: Any, noise: float | str | Noise | None = None) -> None:
        self.operator: Operator = as_operator(operator)
        self.noise: Noise = noise_of(operator) if noise is None else as_noise(noise)
        self.index: list[int] | None = None

    @property
    def sigma(self) -> float:
        """The standard deviation of Gaussian noise. Raises InputError for any other noise."""
        if not isinstance(self.noise, Gaussian):
            raise InputError(
                f"noise '{self.noise.spec}' is not Gaussian: corrupt, solve, and learning from"
                " images that are only noisy take it, all else needs a number"
            )
        return self.noise.sigma

    @property
    def level(self) -> float:
        """The standard deviation of the noise; of one that varies, at mid-grey."""
        return float(self.noise.variance(torch.tensor(0.5, dtype=torch.float64))) ** 0.5

    def deviation(self, y: Tensor) -> float | Tensor:
        """The standard deviation of the noise as the measurements y (B, C, H, W) tell it.

        sigma where it is Gaussian. Else, shape of y, that of the mean of 3 x 3 numbers around,
        the number itself among them: an estimate of the variance with little noise of its own and,
        where the image is smooth, without bias.

        Raises:
            InputError: for noise that is not Gaussian, where A is not the identity.
        """
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
        """The noise as people write it: a number where it is Gaussian, else its text form."""
        return self.noise.sigma if isinstance(self.noise, Gaussian) else self.noise.spec

    # -- text form -------------------------------------------------------------------------------

    @property
    def spec(self) -> dict[str, Any]:
        """The same as `to_dict()`."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """{"operator": text form, "noise": sigma or text form}, fit for JSON; `from_dict` reads
        it back."""
        return {"operator": self.operator.spec, "noise": self._noise_value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Problem":
        """The problem that `to_dict` wrote. Raises InputError if it cannot be read."""
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
        """The problem of the images with these numbers and shape (C, H, W); see
        `Operator.bind`."""
        numbers = [int(i) for i in index]
        return self._with(self.operator.bind(numbers, shape), numbers)

    def index_select(self, rows: Iterable[int] | Tensor) -> "Problem":
        """The problem of some rows of the batch; rows may repeat."""
        picked = [int(row) for row in rows]
        index = None if self.index is None else [self.index[row] for row in picked]
        return self._with(self.operator.index_select(picked), index)

    def to(self, device: str | torch.device) -> "Problem":
        """The problem with its parameters on a device."""
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
        """See `Operator.mask`."""
        return self.operator.mask

    def A(self, x: Tensor) -> Tensor:
        """The noiseless measurement of x (B, C, H, W)."""
        return self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        return self.operator.A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """A^+ y."""
        return self.operator.A_dagger(y)

    def simulate(self, x: Tensor, seed: int = 0, index: Iterable[int] | None = None) -> Tensor:
        """Measurements y of clean images, with their noise.

        Args:
            x: Images (B, C, H, W) in [0, 1].
            seed: Seed of the noise. (Masks come from the operator's own seed.)
            index: Numbers of the images. None takes those the problem is bound to, else 0 .. B-1.
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
            raise InputError(f"{len(x)} images but {len(numbers)} image numbers")
        return operator, numbers

    # -- the noise model -------------------------------------------------------------------------

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """y - A(x); zero where y measures nothing."""
        return self.operator.apply_mask(y - self.operator.A(x))

    def measurements(self, y: Tensor) -> Tensor:
        """How many values each y measures, shape (B,)."""
        return self.operator.count(y)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) in nats with its constant, shape (B,).

        Raises:
            InputError: if the noise is 0 (the density does not exist).
        """
        return self.operator.apply_mask(self.noise.log_likelihood(self.A(x), y)).flatten(1).sum(1)

    def prox(self, z: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        """argmin_x ||y - A x||^2 / (2 sigma^2) + ||x - z||^2 / (2 rho^2), shape of z.

        Without noise it is the limit: the nearest x to z with A x = A A^+ y, which is
        z + A^+ (y - A z).

        Args:
            z: Images (B, C, H, W).
            y: Measurements (B, ...).
            rho: Standard deviation around z, >= 0; a number, or one for each image, shape (B,).

        Raises:
            InputError: if A is not linear.
        """
        rho = filled(rho, z)
        if self.sigma > 0:
            return self.operator.prox_l2(z, y, (rho / self.sigma).square())
        free = per_image(rho, z) > 0
        return torch.where(free, z + self.operator.A_dagger(self.residual(z, y)), z)
