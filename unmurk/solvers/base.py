"""What all solvers share: the counted denoiser, the data term, and the record of a run.

A solver knows the prior as D(x, sigma) = E[clean | x] alone, and the measurement
y = A(x) + sigma_y n through two maps:

    pull(x) = J(x)^T (y - A(x))                    J the Jacobian of A (A itself where linear)
    prox(z) = argmin_x ||y - A(x)||^2 / (2 sigma_y^2) + ||x - z||^2 / (2 rho^2)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator

__all__ = [
    "Callback",
    "Claim",
    "CountingDenoiser",
    "Monitor",
    "StepCallback",
    "Requirement",
    "Solver",
    "prox",
    "likelihood_grad",
    "randn",
]

HALVINGS = 6  # of a step that would go uphill; a step that still does is not taken
TINY = 1e-30

Claim = Literal["posterior", "point", "heuristic"]
Requirement = Literal["linear", "differentiable"]
Callback = Callable[[dict[str, Any]], Any]


class StepCallback(Protocol):
    """What a solver calls after every step; True asks it to stop and return what it has."""

    def __call__(
        self, step: int, steps: int, sigma: float, x: Tensor, denoised: Tensor
    ) -> bool: ...


class CountingDenoiser:
    """The prior's D(x, sigma), counting its evaluations.

    Args:
        prior: An object with `denoise(x, sigma)`, or a function (x, sigma) of that meaning.

    Attributes:
        nfe: Evaluations so far that one row of the batch has cost: as a rule, calls.
        sigma_max: Highest noise level the prior knows; infinity where it does not say.

    Raises:
        InputError: The prior is neither.
    """

    def __init__(self, prior: Any) -> None:
        self._denoise = getattr(prior, "denoise", prior)
        if not callable(self._denoise):
            raise InputError(
                f"prior is {type(prior).__name__}: give an object with denoise(x, sigma)"
                " or a function (x, sigma)"
            )
        self.sigma_max = float(getattr(prior, "sigma_max", float("inf")))
        self.nfe = 0

    @contextmanager
    def counted_as(self, evaluations: int) -> Iterator[None]:
        """Count all calls within as so many: where one call is not of the whole batch."""
        before = self.nfe
        yield
        self.nfe = before + evaluations

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """D(x, sigma), (B, C, H, W) like x."""
        self.nfe += 1
        denoised = self._denoise(x, sigma)
        if denoised.shape != x.shape:
            raise InputError(
                f"prior returned shape {tuple(denoised.shape)} for images {tuple(x.shape)}:"
                " a denoiser keeps the shape"
            )
        return denoised


class Solver(Protocol):
    """One frozen dataclass of options, and how to run it.

    Class attributes:
        name: What `solve(method=...)` calls it.
        claims: "posterior" (its samples are those of p(x | y)), "point" (an estimate, the same
            but for noise in every sample) or "heuristic" (samples of no known distribution).
        requires: "linear" (uses A^T, A^+ or the prox of A) or "differentiable" (any A).
    """

    name: ClassVar[str]
    claims: ClassVar[Claim]
    requires: ClassVar[Requirement]

    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: CountingDenoiser,
        x: Tensor | None,
        noise: PerImageGenerator,
        callback: StepCallback,
    ) -> Tensor:
        """Images (B, C, H, W) from measurements y (B, ...).

        Args:
            y: Measurements, one row for each wanted sample.
            problem: Operator and noise, bound to these rows.
            denoise: The prior.
            x: Where to start (B, C, H, W); None leaves it to the solver.
            noise: One random stream for each row.
            callback: To be called after every step.
        """
        ...


class Monitor:
    """Writes the trace of one batch and passes every step on to the user's callback."""

    def __init__(
        self, y: Tensor, problem: Problem, denoise: CountingDenoiser, callback: Callback | None
    ) -> None:
        self.y, self.problem, self.denoise, self.callback = y, problem, denoise, callback
        self.before = denoise.nfe
        self.steps: list[dict[str, Any]] = []
        self.stopped = False  # by the callback

    def __call__(self, step: int, steps: int, sigma: float, x: Tensor, denoised: Tensor) -> bool:
        nfe = self.denoise.nfe - self.before
        residual = self.misfit(x)  # stays on the device: reading it would stall the queue
        self.steps.append({"step": step, "sigma": sigma, "nfe": nfe, "chi2": residual})
        if self.callback is None:
            return False
        self.stopped = bool(
            self.callback(
                {
                    "step": step,
                    "steps": steps,
                    "sigma": sigma,
                    "x": x,
                    "denoised": denoised,
                    "nfe": nfe,
                    "chi2": float(residual.mean()),
                }
            )
        )
        return self.stopped

    @torch.no_grad()
    def misfit(self, x: Tensor) -> Tensor:
        """(B,): chi-square per measured value, or the root mean square where there is no noise."""
        square = self.problem.residual(x, self.y).square().flatten(1).sum(1)
        mean = square / self.problem.measurements(self.y)
        return mean / self.problem.sigma**2 if self.problem.sigma > 0 else mean.sqrt()


def randn(noise: PerImageGenerator, like: Tensor) -> Tensor:
    """Standard normal noise shaped like a batch of images, one stream for each row."""
    return noise.randn(*like.shape[1:]).to(like)


def likelihood_grad(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    """J(x)^T (y - A(x)), (B, C, H, W): minus the gradient of ||y - A(x)||^2 / 2."""
    if problem.operator.linear:
        return problem.operator.A_adjoint(problem.residual(x, y))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        half = problem.residual(x, y).square().sum() / 2
        return -torch.autograd.grad(half, x)[0]


def prox(
    problem: Problem, z: Tensor, y: Tensor, rho: float, sigma: float, steps: int = 10
) -> Tensor:
    """The image that trades distance to z against misfit to y, (B, C, H, W).

    argmin_x ||y - A(x)||^2 / (2 sigma^2) + ||x - z||^2 / (2 rho^2): exact for a linear A (and
    with sigma = 0 its limit, the projection) and for operators that bring their own prox; for any
    other `steps` steps of nonlinear conjugate gradients from z, whose length is that of Gauss and
    Newton, halved for an image as often as it takes not to go uphill.

    Raises:
        InputError: sigma is 0 and A is not linear.
    """
    if sigma == 0:
        if problem.operator.linear:
            return problem.prox(z, y, rho)
        raise InputError("a nonlinear operator without noise has no prox: give noise_floor > 0")
    if problem.operator.proximal:
        return problem.operator.prox_l2(z, y, (rho / sigma) ** 2)
    return _descend(problem, z, y, rho, sigma, steps)


def _descend(
    problem: Problem, z: Tensor, y: Tensor, rho: float, sigma: float, steps: int
) -> Tensor:
    """The search of `prox`: conjugate gradients, each image for itself.

    Directions are those of E. Polak and G. Ribiere (1969), with a new start where their factor
    is negative. Along a direction d the length is that of Gauss and Newton,

        <down, d> / (||J d||^2 / sigma^2 + ||d||^2 / rho^2)

    which for a linear A makes these the conjugate gradients of Hestenes and Stiefel.
    """

    def energy(x: Tensor) -> Tensor:
        misfit = problem.residual(x, y).square().flatten(1).sum(1) / sigma**2
        return misfit + (x - z).square().flatten(1).sum(1) / rho**2

    x, value = z, energy(z)
    active = torch.ones_like(value, dtype=torch.bool)
    along, before = torch.zeros_like(z), torch.zeros_like(z)
    for _ in range(steps):
        pulled, push = _linearised(problem, x, y)
        down = pulled / sigma**2 - (x - z) / rho**2
        square = _dot(before, before)  # 0 at the first step
        turn = _dot(down, down - before) / torch.where(square > 0, square, torch.inf)
        along = down + per_image(turn.clamp_min(0), x) * along
        # an old direction that no longer leads downhill is forgotten
        along = torch.where(per_image(_dot(down, along), x) > 0, along, down)
        pushed = push(along).flatten(1).square().sum(1)
        curved = pushed / sigma**2 + _dot(along, along) / rho**2
        length = _dot(down, along) / curved.clamp_min(TINY)
        for _ in range(HALVINGS):
            trial = x + per_image(length, x) * along
            reached = energy(trial)
            uphill = active & ~(reached <= value)
            if not bool(uphill.any()):
                break
            length = torch.where(uphill, length / 2, length)
        # an image that finds no way down has arrived: it must not wait for its neighbours
        active = active & (reached <= value)
        if not bool(active.any()):
            break
        x = torch.where(per_image(active, x) > 0, trial, x)
        value, before = torch.where(active, reached, value), down
    return x


def _linearised(
    problem: Problem, x: Tensor, y: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`likelihood_grad`(x), and the map d -> J(x) d (without its sign), d (B, C, H, W).

    J^T w is linear in w, so its gradient in w along d is J d. That is the derivative that autograd
    knows: for operators that round, finite differences would find another.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        residual = problem.residual(x, y)
        w = residual.detach().requires_grad_()
        down = -torch.autograd.grad(residual, x, w, create_graph=True)[0]

    def push(d: Tensor) -> Tensor:
        return torch.autograd.grad(down, w, d)[0]

    return down.detach(), push


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
