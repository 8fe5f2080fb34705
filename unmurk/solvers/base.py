r"""The base class of all solvers: noise levels, the loop over them, and the registry of names.

A solver restores images :math:`x` from measurements :math:`y = A(x) + \sigma_y n`. It knows the
prior only through the denoiser :math:`D(x, \sigma) = \mathbb{E}[x_0 \mid x_0 + \sigma n = x]`,
and the measurement through the maps of `data_term`. Every solver is the same loop,

.. math::
    & \sigma_1 > \sigma_2 > \dots > \sigma_T,\quad \sigma_{T+1} = 0 \\
    & x_{\sigma_1} \leftarrow \text{start} \\
    & \text{for } t = \sigma_1, \dots, \sigma_T,\; s \text{ the next level:}\quad
      x_s \leftarrow \text{step}(x_t, t, s),

and its file holds only the step of its paper. The state of a run, `State`, is what the steps read
and write.

A solver of one's own overrides `step`:

>>> from unmurk.solvers import DiffPir
>>> class Clipped(DiffPir):
...     '''DiffPIR whose noisy image is clipped after each step.'''
...
...     def step(self, state):
...         super().step(state)
...         state.x = state.x_t = state.x_t.clamp(0, 1)
>>> Clipped(steps=20).steps
20

It is used as `unmurk.solve(y, problem, prior, method=Clipped(steps=20))`, or by name once it is
registered with `register`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..bounds import Choice, Real, Whole, check_declared, check_fields, shown
from ..devices import on_device
from ..diffusion.samplers import Reverse, karras
from ..errors import InputError, size_text
from ..problem import Problem
from ..progress import each
from ..rng import PerImageGenerator
from .data_term import prox
from .inputs import prepare
from .state import CountingDenoiser, State, gray

__all__ = [
    "METHODS",
    "PRESETS",
    "AnnealedSolver",
    "Callback",
    "Claim",
    "Count",
    "Fraction",
    "Level",
    "Momentum",
    "NoiseFloor",
    "NoisySolver",
    "PositiveNoiseFloor",
    "PositiveWeight",
    "ProximalSolver",
    "Requirement",
    "ReverseSolver",
    "Solver",
    "Steps",
    "Tolerance",
    "Weight",
]

Claim = Literal["posterior", "point", "heuristic"]
Requirement = Literal["linear", "differentiable"]
Callback = Callable[[dict[str, Any]], Any]

# the options that several solvers have, with their bounds
Steps = Annotated[int, Whole(1, 100_000)]
Count = Annotated[int, Whole(1, 100_000)]
Level = Annotated[float, Real(1e-6, 1e6)]
Fraction = Annotated[float, Real(0, 1)]
Momentum = Annotated[float, Real(0, 0.999)]
Weight = Annotated[float, Real(0, 1e9)]
PositiveWeight = Annotated[float, Real(1e-9, 1e9)]
NoiseFloor = Annotated[float, Real(1e-9, 1e3, zero=True)]
PositiveNoiseFloor = Annotated[float, Real(1e-9, 1e3)]
Tolerance = Annotated[float, Real(0, 1)]

ROUNDING = 1 + 1e-6  # a level that is the prior's highest up to rounding may be used


# -- solvers by name ------------------------------------------------------------------------------

REGISTERED: dict[str, type["Solver"]] = {}
REGISTERED_PRESETS: dict[tuple[str, str], type["Solver"]] = {}

METHODS: Mapping[str, type["Solver"]] = MappingProxyType(REGISTERED)
"""Solvers by name; read only, see `register`."""

PRESETS: Mapping[tuple[str, str], type["Solver"]] = MappingProxyType(REGISTERED_PRESETS)
"""Solvers by (name, preset), for the option `preset`; read only, see `register`."""


# -- one step, on the device of y -----------------------------------------------------------------


def _advance_work(y: Tensor, *_: Any) -> str:
    """Describe a step, for the message that memory has run out."""
    return f"a step of a solver on measurements {size_text(y.shape)}"


def _iterate_work(solver: Any, y: Tensor, *_: Any, **__: Any) -> str:
    """Describe the start of a run, for the same message."""
    return f"the start of {solver.name} on measurements {size_text(y.shape)}"


@on_device(_advance_work, "give fewer or smaller images")
def _advance(y: Tensor, states: Iterator[State]) -> State | None:
    """Take one step on the device of y; None after the last."""
    return next(states, None)


# -- the base classes -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Base class of solvers: a frozen dataclass of options with a `step`.

    Subclasses define `step`, and `schedule` or `start` where they differ. Options are fields with
    bounds, such as `steps: Steps = 100`, which are checked when a solver is made.

    Attributes:
        name: What `solve(method=...)` calls the solver; the name of the class unless given.
        claims: "posterior" (samples follow p(x | y)), "point" (an estimate, the same in every
            sample up to noise) or "heuristic" (samples of no known distribution). It is
            "heuristic" unless the class itself says otherwise.
        requires: "linear" (uses the adjoint, pseudo-inverse or proximal map of A) or
            "differentiable" (any A).
        citation: BibTeX of the paper.

    Raises:
        InputError: An option is out of its bounds; or a subclass that declares options is no
            dataclass.

    >>> class Denoise(Solver):
    ...     def step(self, state):
    ...         state.denoised = state.denoise(state.x_t, state.sigma)
    ...         state.x = state.x_t = state.denoised
    >>> from unmurk import Prior, Problem
    >>> prior, problem = Prior.create("tiny", (1, 8, 8)), Problem("identity", 0.1)
    >>> solver = Denoise(levels=(0.5, 0.2, 0.1))
    >>> [state.sigma for state in solver.iterate(torch.rand(2, 1, 8, 8), problem, prior)]
    [0.5, 0.2, 0.1]
    """

    name: ClassVar[str] = ""
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"
    citation: ClassVar[str] = ""

    levels: str | Sequence[float] | Tensor | None = None
    """Noise levels in place of the solver's schedule: strictly falling numbers above 0, none above
    the prior's highest level; as text, separated by commas. `steps` and the options of the
    schedule then have no effect, and images given as `init` are noised to the first level."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        if "claims" not in cls.__dict__:
            cls.claims = "heuristic"

    def __new__(cls, *_: Any, **__: Any) -> Self:
        check_declared(cls, "@dataclass(frozen=True, kw_only=True)")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(self, "levels", _read_levels(self.levels))
        check_fields(self)
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                Choice(get_args(hint)).check(name, getattr(self, name))

    # -- what a solver defines ---------------------------------------------------------------

    def step(self, state: State) -> None:
        """Take one step from level `state.sigma` to `state.sigma_next`.

        It reads `state.x_t` and sets `state.x_t`, `state.x` and `state.denoised`. No gradients are
        recorded unless the step enables them.
        """
        raise InputError(f"{type(self).__name__} has no step: define step(self, state)")

    def schedule(self, state: State, init: bool) -> list[float]:
        """Return the noise levels of a run, from high to low.

        Args:
            state: The state, in which the measurement, the problem and the denoiser are set.
            init: Whether starting images are given.
        """
        raise InputError(f"{self.name} has no noise levels of its own: give levels=")

    def start(self, state: State, init: Tensor | None) -> None:
        """Set the levels and the first noisy image of a run.

        The image is mid-gray, or `init` where it is given, with noise of the first level.

        Args:
            state: The state, in which the measurement, the problem and the denoiser are set.
            init: Starting images (B, C, H, W), or None.
        """
        state.levels = self.noise_levels(state, init is not None)
        x = gray(state.y, state.problem) if init is None else init
        state.x = state.x_t = x + state.levels[0] * state.randn(x)

    def noise_levels(self, state: State, init: bool) -> list[float]:
        """Return the option `levels` where it is given, else the solver's `schedule`.

        Raises:
            InputError: The first of the given levels is above the prior's highest level.
        """
        if self.levels is None:
            return self.schedule(state, init)
        given = [float(level) for level in self.levels]
        if given[0] > state.denoise.sigma_max * ROUNDING:
            raise InputError(
                f"levels start at {given[0]:g}, above the prior's highest noise level"
                f" {state.denoise.sigma_max:g}: leave out the levels above it"
            )
        return given

    def check(self, problem: Problem) -> None:
        """Raise InputError where the solver cannot handle the operator of a bound problem."""
        if self.requires == "linear" and not problem.operator.linear:
            able = [name for name, solver in METHODS.items() if solver.requires != "linear"]
            raise InputError(
                f"{self.name} needs a linear operator and '{problem.operator.spec}' is not:"
                f" use {' or '.join(able)}"
            )

    # -- running it --------------------------------------------------------------------------

    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: CountingDenoiser,
        generator: PerImageGenerator,
        init: Tensor | None = None,
    ) -> Iterator[State]:
        """Run the loop over the noise levels and yield the state after every step.

        Args:
            y: Measurements (B, ...) with Gaussian noise of one level.
            problem: Operator and noise, bound to the images of y.
            denoise: The prior's denoiser.
            generator: One random stream for each image.
            init: Starting images (B, C, H, W), or None for the solver's own start.
        """
        before = denoise.nfe
        sigma_eff = max(problem.sigma, getattr(self, "noise_floor", 0.0))
        state = State(y, problem, denoise, generator, sigma_eff)
        with torch.no_grad():
            self.start(state, init)
        if not state.levels:
            raise InputError(f"{self.name} has no noise levels: its schedule is empty")
        levels = [*state.levels, 0.0]
        for state.step in each(range(1, len(levels))):
            state.sigma, state.sigma_next = levels[state.step - 1], levels[state.step]
            with torch.no_grad():
                self.step(state)
            state.nfe = denoise.nfe - before
            yield copy.copy(state)

    def sample(
        self,
        y: Tensor,
        problem: Problem,
        denoise: CountingDenoiser,
        generator: PerImageGenerator,
        init: Tensor | None = None,
    ) -> Tensor:
        """Return the result of a run, images (B, C, H, W); arguments as for `run`."""
        for state in self.run(y, problem, denoise, generator, init):
            x = state.x
        return x.detach()

    @on_device(_iterate_work, "give fewer or smaller images")
    def iterate(
        self,
        y: Tensor,
        problem: Problem,
        prior: Any,
        *,
        samples: int = 1,
        seed: int = 0,
        init: Tensor | Literal["posterior"] | None = None,
        posterior: Any = None,
        nan: Literal["refuse", "mask"] = "refuse",
    ) -> Iterator[State]:
        """Restore images step by step: the steps of `unmurk.solve` with the same arguments.

        Images and samples form one batch: entry k B + b is sample k of image b. The `x` of the
        last state is what `solve` returns, but for the check that it is plausible.

        Args:
            y: Measurements (B, ...), in units of [0, 1] images.
            problem: Operator and noise.
            prior: An object with `denoise(x, sigma)`, or a function (x, sigma) that denoises.
            samples: Samples for each measurement, a whole number from 1 to 100000.
            seed: Sample k of image b depends on (seed, b, k) alone.
            init: Where to start: None for the solver's own start, images (B, C, H, W), or
                "posterior" for draws of `posterior`.
            posterior: An object with `sample(y, problem, n, seed)`.
            nan: "mask" treats pixels of y that are not finite as hidden.

        Returns:
            An iterator of `State`, one after each step, whose images are (samples x B, C, H, W).

        Raises:
            InputError: As `unmurk.solve`.

        >>> from unmurk.evaluation.exact import GaussianPrior
        >>> prior = GaussianPrior(torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 0.04))
        >>> problem = Problem("identity", noise=0.1)
        >>> y = problem.simulate(prior.sample(1))
        >>> for state in METHODS["ddrm"](steps=3).iterate(y, problem, prior):
        ...     print(state.step, round(state.sigma, 3), state.nfe, tuple(state.x.shape))
        1 1.0 1 (1, 1, 2, 2)
        2 0.505 2 (1, 1, 2, 2)
        3 0.01 3 (1, 1, 2, 2)
        """
        inputs = prepare(
            *(y, problem, prior, self.check),
            samples=samples,
            seed=seed,
            init=init,
            posterior=posterior,
            nan=nan,
        )
        entries = range(len(inputs))
        measured, bound, start = inputs.select(entries)
        denoise, generator = CountingDenoiser(prior), inputs.generator(entries)
        states = self.run(measured, bound, denoise, generator, start)

        def follow() -> Iterator[State]:
            while (state := _advance(measured, states)) is not None:
                state.x = inputs.equalize(state.x.detach(), entries)
                yield state

        return follow()


def _read_levels(given: Sequence[float] | Tensor | str) -> tuple[float, ...]:
    """Read noise levels: finite, positive and strictly falling."""
    try:
        parts: Any = given.split(",") if isinstance(given, str) else given
        levels = tuple(float(level) for level in parts)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"levels must be a list of falling numbers, got {shown(given)}"
        ) from error
    if not levels:
        raise InputError("levels is empty: give at least one noise level")
    for place, level in enumerate(levels):
        if not (isfinite(level) and level > 0):
            raise InputError(f"level {place} is {level:g}: noise levels are finite and above 0")
        if place and level >= levels[place - 1]:
            raise InputError(
                f"level {place} is {level:g} after {levels[place - 1]:g}: levels fall strictly"
            )
    return levels


@dataclass(frozen=True, kw_only=True)
class AnnealedSolver(Solver):
    r"""A solver whose levels fall along the grid of Karras et al. (2022, arXiv 2206.00364, eq. 5).

    .. math::
        \sigma_i = \bigl(\sigma_{\max}^{1/7} + \tfrac{i-1}{T-1}
                   (\sigma_{\min}^{1/7} - \sigma_{\max}^{1/7})\bigr)^7

    It starts at mid-gray with noise of the first level, which drowns any image; or at a given
    image with noise of a lower level, about as large as the error of that image.

    >>> class Denoised(AnnealedSolver):
    ...     def step(self, state: State) -> None:
    ...         state.x = state.denoised = state.denoise(state.x_t, state.sigma)
    ...         state.x_t = state.x + state.sigma_next * state.randn(state.x)
    >>> y, zero = torch.ones(1, 1, 2, 2), lambda x, sigma: 0 * x
    >>> states = Denoised(steps=3).iterate(y, Problem("identity", 1.0), zero)
    >>> [round(state.sigma, 3) for state in states]
    [20.0, 1.011, 0.005]
    """

    steps: Steps = 100
    """Noise levels."""
    sigma_max: Level = 20.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: Level = 0.005
    """Last noise level before 0."""
    init_sigma: Level = 0.3
    """First noise level where `init` is given: the level it is noised to."""

    def schedule(self, state: State, init: bool) -> list[float]:
        """See `Solver.schedule`."""
        first = self.init_sigma if init else self.sigma_max
        first = max(min(first, state.denoise.sigma_max), self.sigma_min)
        return karras(self.steps, first, self.sigma_min).tolist()


@dataclass(frozen=True, kw_only=True)
class ReverseSolver(AnnealedSolver):
    """An annealed solver that follows the reverse diffusion with steps of second order.

    `state.memory.reverse` is the `diffusion.samplers.Reverse` of the run. Steps of second order
    need fewer levels, which start lower and end lower than those of `AnnealedSolver`.

    >>> class Unguided(ReverseSolver):
    ...     def step(self, state: State) -> None:
    ...         t, s = state.sigma, state.sigma_next
    ...         state.denoised = state.denoise(state.x_t, t)
    ...         state.x = state.x_t = state.memory.reverse.step(state.x_t, state.denoised, t, s)
    >>> y, zero = torch.ones(1, 1, 1, 1), lambda x, sigma: 0 * x
    >>> [round(s.sigma, 3) for s in Unguided(steps=3).iterate(y, Problem("identity", 1.0), zero)]
    [5.0, 0.283, 0.002]
    """

    sigma_max: Level = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: Level = 0.002
    """Last noise level; well below that of the measurement, or the spread becomes too small."""

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`."""
        super().start(state, init)
        state.memory.reverse = Reverse(state.generator)


@dataclass(frozen=True, kw_only=True)
class NoisySolver(Solver):
    """A solver that takes every y to have noise, at least a little.

    >>> class Denoised(NoisySolver):
    ...     def step(self, state: State) -> None:
    ...         state.x = state.x_t = state.denoised = state.denoise(state.x_t, state.sigma)
    >>> y, zero = torch.ones(1, 1, 1, 1), lambda x, sigma: 0 * x
    >>> (state,) = Denoised(levels=[1.0]).iterate(y, Problem("identity", 0.0), zero)
    >>> state.sigma_eff
    0.001
    """

    noise_floor: PositiveNoiseFloor = 1e-3
    """Least noise level that y is taken to have."""


@dataclass(frozen=True, kw_only=True)
class ProximalSolver(Solver):
    """A solver that fits images to y by the proximal map of the data term.

    >>> class Fitted(ProximalSolver):
    ...     def step(self, state: State) -> None:
    ...         state.denoised = state.denoise(state.x_t, state.sigma)
    ...         state.x = state.x_t = self.prox(state, state.denoised, rho=0.1)
    >>> y, zero = torch.ones(1, 1, 1, 1), lambda x, sigma: 0 * x
    >>> (state,) = Fitted(levels=[1.0]).iterate(y, Problem("identity", 0.1), zero)
    >>> state.x  # half of the way from 0 to y: the two deviations are the same
    tensor([[[[0.5000]]]])
    """

    noise_floor: NoiseFloor = 1e-3
    """Least noise level that y is taken to have; 0 makes noiseless linear data exact."""
    data_steps: Count = 10
    """Steps of the inner data fit where the operator is not linear."""

    def prox(self, state: State, z: Tensor, rho: float, y: Tensor | None = None) -> Tensor:
        """Fit the image z (B, C, H, W), trusted to rho, to y; see `data_term.prox`."""
        goal = state.y if y is None else y
        return prox(state.problem, z, goal, rho, state.sigma_eff, self.data_steps)
