"""The state of a solver's run: the counted denoiser, the images of a step, and first images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.linalg import squared_norm
from ..problem import Problem
from ..rng import PerImageGenerator

__all__ = ["CountingDenoiser", "State", "denoise_with_grad", "gray", "pseudo_inverse", "randn"]


class CountingDenoiser:
    """The denoiser D(x, sigma) of a prior, with a count of its evaluations.

    Args:
        prior: An object with `denoise(x, sigma)`, or a function (x, sigma) that denoises.

    Attributes:
        nfe: Network function evaluations so far, for one image of the batch: as a rule, calls.
        sigma_max: Highest noise level that the prior knows; infinity where it does not say.

    Raises:
        InputError: The prior is neither.

    >>> denoise = CountingDenoiser(lambda x, sigma: x / (1 + sigma**2))
    >>> denoise(torch.ones(1, 1, 1, 2), 1.0)
    tensor([[[[0.5000, 0.5000]]]])
    >>> denoise.nfe
    1
    """

    def __init__(self, prior: Any) -> None:
        self._denoise = getattr(prior, "denoise", prior)
        if not callable(self._denoise):
            raise InputError(
                f"prior is {type(prior).__name__}: give an object with denoise(x, sigma)"
                " or a function (x, sigma)"
            )
        self.sigma_max = float(getattr(prior, "sigma_max", inf))
        self.nfe = 0

    @contextmanager
    def counted_as(self, evaluations: int) -> Iterator[None]:
        """Count all calls within as `evaluations`, where one call is not of the whole batch."""
        before = self.nfe
        yield
        self.nfe = before + evaluations

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return D(x, sigma), (B, C, H, W) like x."""
        self.nfe += 1
        denoised = self._denoise(x, sigma)
        if denoised.shape != x.shape:
            raise InputError(
                f"prior returned shape {tuple(denoised.shape)} for images {tuple(x.shape)}:"
                " a denoiser keeps the shape"
            )
        return denoised


@dataclass
class State:
    r"""The state of a run: what `Solver.step` reads and writes, and `Solver.iterate` yields.

    Attributes:
        y: Measurements (B, ...), whitened.
        problem: Operator and Gaussian noise, bound to the images of y.
        denoise: The prior's denoiser.
        generator: One random stream for each image; see `randn`.
        sigma_eff: Standard deviation that the noise of y is taken to have: the problem's, at least
            the solver's noise floor.
        levels: Noise levels of all steps, from high to low.
        step: Number of this step, from 1.
        sigma: Noise level :math:`t` of this step.
        sigma_next: Next noise level :math:`s`; 0 in the last step.
        x_t: Noisy image (B, C, H, W): of level `sigma` before the step, `sigma_next` after it.
        x: Restored image after the step, (B, C, H, W): the result, if the run ends here.
        denoised: Denoised image :math:`D(x_t, t)` of the step, (B, C, H, W).
        memory: What a solver carries from step to step beside x_t, by name.
        nfe: Network function evaluations so far, for each image.

    >>> from unmurk.solvers import DiffPir
    >>> y = torch.full((1, 1, 2, 2), 0.5)
    >>> prior = CountingDenoiser(lambda x, sigma: x / (1 + sigma**2))
    >>> states = DiffPir(steps=3).iterate(y, Problem("identity", 0.1), prior)
    >>> [(state.step, state.steps, state.nfe) for state in states]
    [(1, 3, 1), (2, 3, 2), (3, 3, 3)]
    """

    y: Tensor
    problem: Problem
    denoise: CountingDenoiser
    generator: PerImageGenerator
    sigma_eff: float
    levels: list[float] = field(default_factory=list)
    step: int = 0
    sigma: float = inf
    sigma_next: float = inf
    x_t: Tensor = field(default_factory=lambda: torch.empty(0))
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    denoised: Tensor = field(default_factory=lambda: torch.empty(0))
    memory: Any = field(default_factory=SimpleNamespace)
    nfe: int = 0

    @property
    def steps(self) -> int:
        """Number of all steps."""
        return len(self.levels)

    @property
    def chi2(self) -> Tensor:
        r"""Reduced chi-square of `x`, shape (B,), on the device of x.

        .. math:: \chi^2 = \frac{\lVert y - A(x)\rVert^2}{d_y\,\sigma_y^2}

        for :math:`d_y` measured values: near 1 for a good fit. Without noise it is the root mean
        square misfit :math:`\lVert y - A(x)\rVert / \sqrt{d_y}` instead.
        """
        with torch.no_grad():
            square = squared_norm(self.problem.residual(self.x, self.y))
            mean = square / self.problem.measurements(self.y)
            sigma = self.problem.sigma
            return mean / sigma**2 if sigma > 0 else mean.sqrt()

    def randn(self, like: Tensor) -> Tensor:
        """Draw standard normal noise shaped like a batch of images or measurements."""
        return randn(self.generator, like)


def denoise_with_grad(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigma: float, name: str
) -> tuple[Tensor, Tensor]:
    """Denoise images such that gradients of the result by the images can be taken.

    Args:
        denoise: The denoiser D(x, sigma).
        x: Noisy images (B, C, H, W).
        sigma: Noise level of x.
        name: The solver that needs the gradient, for the message.

    Returns:
        x as the variable of the gradient, and D(x, sigma), both (B, C, H, W).

    Raises:
        InputError: No gradient passes through the prior.

    >>> x, x0 = denoise_with_grad(lambda x, sigma: x / (1 + sigma**2), torch.ones(1), 1.0, "dps")
    >>> torch.autograd.grad(x0, x)
    (tensor([0.5000]),)
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
    if not x0.requires_grad:
        raise InputError(
            f"{name} needs a prior that autograd can differentiate: use red-diff or daps"
        )
    return x, x0


def randn(generator: PerImageGenerator, like: Tensor) -> Tensor:
    """Draw standard normal noise shaped like a batch (B, ...), one stream for each image.

    >>> same = torch.zeros(2, 1, 2, 2)
    >>> draws = [randn(PerImageGenerator(0, [5, i]), same)[0] for i in (1, 2)]
    >>> torch.equal(*draws)  # image 5 does not depend on the other one
    True
    """
    return generator.randn(*like.shape[1:]).to(like)


def gray(y: Tensor, problem: Problem) -> Tensor:
    """Return mid-gray images (B, C, H, W) of value 0.5 for measurements y (B, ...).

    >>> gray(torch.zeros(2, 1, 2, 2), Problem("sr:average,factor=2", 0.1)).shape
    torch.Size([2, 1, 4, 4])
    """
    shape = problem.operator.x_shape(y.shape)[-3:]
    return torch.full((len(y), *shape), 0.5, dtype=y.dtype, device=y.device)


def pseudo_inverse(y: Tensor, problem: Problem, x: Tensor | None) -> Tensor:
    r"""Return where released algorithms start: x if given, else :math:`g + A^+(y - A g)`.

    :math:`g` is mid-gray. In their units, :math:`u = 2x - 1`, this is :math:`A^+` of the
    measurement: what A does not measure is 0, which is mid-gray.

    Raises:
        InputError: x is None and A has no pseudo-inverse.

    >>> y = torch.tensor([[[[1.0]]]])
    >>> pseudo_inverse(y, Problem("sr:average,factor=2", 0.1), None)
    tensor([[[[1., 1.],
              [1., 1.]]]])
    """
    if x is not None:
        return x
    if not problem.operator.linear:
        raise InputError(
            f"operator '{problem.operator.spec}' is not linear and has no pseudo-inverse to"
            " start from: give init, or take red-diff without preset='paper'"
        )
    middle = gray(y, problem)
    return middle + problem.A_dagger(problem.residual(middle, y))
