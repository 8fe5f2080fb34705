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
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import metadata
from math import inf, isfinite
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..bounds import Choice, Real, Whole, check_fields, shown
from ..devices import network_precision, on_device
from ..diffusion.samplers import karras
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .data_term import prox
from .inputs import prepare

__all__ = [
    "METHODS",
    "PRESETS",
    "AnnealedSolver",
    "Callback",
    "Claim",
    "Count",
    "CountingDenoiser",
    "Draws",
    "Fraction",
    "Level",
    "Momentum",
    "NoiseFloor",
    "PositiveNoiseFloor",
    "PositiveWeight",
    "ProximalSolver",
    "Requirement",
    "Solver",
    "State",
    "Steps",
    "Weight",
    "build",
    "configure",
    "gray",
    "pseudo_inverse",
    "randn",
    "register",
]

GROUP = "unmurk.solvers"
"""Entry point group under which other packages offer solvers."""

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

ROUNDING = 1 + 1e-6  # a level that is the prior's highest up to rounding may be used


# -- the state of a run ---------------------------------------------------------------------------


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

        .. math:: \chi^2 = \frac{\lVert y - A(x)\rVert^2}{m\,\sigma_y^2}

        for :math:`m` measured values: near 1 for a good fit. Without noise it is the root mean
        square misfit :math:`\lVert y - A(x)\rVert / \sqrt m` instead.
        """
        with torch.no_grad():
            square = self.problem.residual(self.x, self.y).square().flatten(1).sum(1)
            mean = square / self.problem.measurements(self.y)
            sigma = self.problem.sigma
            return mean / sigma**2 if sigma > 0 else mean.sqrt()

    def randn(self, like: Tensor) -> Tensor:
        """Draw standard normal noise shaped like a batch of images or measurements."""
        return randn(self.generator, like)


def randn(generator: PerImageGenerator, like: Tensor) -> Tensor:
    """Draw standard normal noise shaped like a batch (B, ...), one stream for each image."""
    return generator.randn(*like.shape[1:]).to(like)


def gray(y: Tensor, problem: Problem) -> Tensor:
    """Return mid-gray images (B, C, H, W) of value 0.5 for measurements y (B, ...)."""
    shape = problem.operator.x_shape(y.shape)[-3:]
    return torch.full((len(y), *shape), 0.5, dtype=y.dtype, device=y.device)


def pseudo_inverse(y: Tensor, problem: Problem, x: Tensor | None) -> Tensor:
    r"""Return where released algorithms start: x if given, else :math:`g + A^+(y - A g)`.

    :math:`g` is mid-gray. In their units, :math:`u = 2x - 1`, this is :math:`A^+` of the
    measurement: what A does not measure is 0, which is mid-gray.

    Raises:
        InputError: x is None and A has no pseudo-inverse.
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


def _advance_work(y: Tensor, *_: Any) -> str:
    """Describe a step, for the message that memory has run out."""
    return f"a step of a solver on measurements {'x'.join(map(str, y.shape))}"


def _iterate_work(solver: Any, y: Tensor, *_: Any, **__: Any) -> str:
    """Describe the start of a run, for the same message."""
    return f"the start of {solver.name} on measurements {'x'.join(map(str, y.shape))}"


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
        InputError: An option is out of its bounds.
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
        raise NotImplementedError(f"{type(self).__name__} has no step")

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
        for state.step in range(1, len(levels)):
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
class ProximalSolver(Solver):
    """A solver that fits images to y by the proximal map of the data term."""

    noise_floor: NoiseFloor = 1e-3
    """Least noise level that y is taken to have; 0 makes noiseless linear data exact."""
    data_steps: Count = 10
    """Steps of the inner data fit where the operator is not linear."""

    def prox(self, state: State, z: Tensor, rho: float, y: Tensor | None = None) -> Tensor:
        """Fit the image z (B, C, H, W), trusted to rho, to y; see `data_term.prox`."""
        goal = state.y if y is None else y
        return prox(state.problem, z, goal, rho, state.sigma_eff, self.data_steps)


# -- solvers by name ------------------------------------------------------------------------------

_METHODS: dict[str, type[Solver]] = {}
_PRESETS: dict[tuple[str, str], type[Solver]] = {}

METHODS: Mapping[str, type[Solver]] = MappingProxyType(_METHODS)
"""Solvers by name; read only, see `register`."""

PRESETS: Mapping[tuple[str, str], type[Solver]] = MappingProxyType(_PRESETS)
"""Solvers by (name, preset), for the option `preset`; read only, see `register`."""

S = TypeVar("S", bound=type[Solver])


def register(name: str, *, preset: str | None = None) -> Callable[[S], S]:
    """Decorate a solver class so that `solve` and the command line know it by name.

    A package offers a solver without being imported by an entry point of the group
    `unmurk.solvers`: `[project.entry-points."unmurk.solvers"]` with `my-solver =
    "my_package:MySolver"` in its pyproject.toml.

    Args:
        name: Name of the solver, or of the solver that it is a preset of.
        preset: Name of the preset, or None.

    Raises:
        InputError: The name is taken, or what is decorated is not a subclass of `Solver`.

    .. code-block:: python

        @unmurk.solvers.register("my-solver")
        class MySolver(unmurk.solvers.DiffPir):
            def step(self, state): ...

    >>> register("ddrm")(int)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: solver 'ddrm' is <class 'int'>: give a subclass of Solver
    """

    def decorate(solver: S) -> S:
        label = name if preset is None else f"{name}:{preset}"
        if not (isinstance(solver, type) and issubclass(solver, Solver)):
            raise InputError(f"solver '{label}' is {shown(solver)}: give a subclass of Solver")
        known = _METHODS.get(name) if preset is None else _PRESETS.get((name, preset))
        place = (solver.__module__, solver.__qualname__)
        again = known is not None and (known.__module__, known.__qualname__) == place
        if name == "auto" or preset == "default" or (known is not None and not again):
            raise InputError(f"the name '{label}' of a solver is taken: choose another")
        if preset is None:
            _METHODS[name] = solver
        else:
            _PRESETS[name, preset] = solver
        if solver.name == solver.__name__:
            solver.name = name
        return solver

    return decorate


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def _find(method: str) -> type[Solver]:
    """Return the solver of a name, which an entry point may load.

    Raises:
        InputError: The name is unknown, or its entry point cannot be loaded.
    """
    if method in _METHODS:
        return _METHODS[method]
    points = _entry_points()
    if method not in points:
        known = ", ".join(["auto", *_METHODS, *points])
        raise InputError(f"method '{method}' is unknown: choose from {known}")
    point = points[method]
    try:
        solver = point.load()
    except Exception as error:  # whatever a package of others raises
        raise InputError(
            f"method '{method}' cannot be loaded from '{point.value}'"
            f" ({type(error).__name__}: {error}): repair or remove the package that offers it"
        ) from error
    return register(method)(solver)


def configure(method: str, options: Mapping[str, Any]) -> Solver:
    """Return the solver of a name with its options set.

    Args:
        method: A name in `METHODS`, or of an entry point of the group `unmurk.solvers`.
        options: The solver's options by name, and `preset`.

    Raises:
        InputError: Unknown method, preset or option (the message lists those there are).

    >>> configure("diffpir", {"steps": 20}).steps
    20
    """
    chosen = dict(options)
    solver = _find(method)
    preset = chosen.pop("preset", "default")
    if preset != "default":
        known = [p for name, p in _PRESETS if name == method]
        if preset not in known:
            raise InputError(
                f"preset '{preset}' is unknown: {method} has {', '.join(['default', *known])}"
            )
        solver = _PRESETS[method, preset]
    return build(solver, chosen, method if preset == "default" else f"{method} (preset {preset})")


def build(solver: type[Solver], options: Mapping[str, Any], label: str) -> Solver:
    """Make a solver of a class with options by name; `label` is its name in messages.

    Raises:
        InputError: An option is unknown or out of its bounds.
    """
    known = sorted((option.name for option in fields(solver)), key="levels".__eq__)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"{label} has no option '{unknown[0]}': it takes {', '.join(known)}")
    return solver(**options)


class Draws:
    """A solver as a function (y, problem, prior, generator), which learners draw images with.

    Args:
        method: Name of the solver, a solver class, or a solver.
        options: Its options by name.

    Attributes:
        spec: Method and options as text, for the record of a run.

    Raises:
        InputError: Unknown method or option.

    >>> Draws("mmps", steps=12).spec
    'mmps,steps=12'
    """

    def __init__(self, method: "str | type[Solver] | Solver" = "diffpir", **options: Any) -> None:
        self.solver = resolve(method, options)
        name = method if isinstance(method, str) else self.solver.name
        self.spec = ",".join([name, *(f"{k}={v}" for k, v in sorted(options.items()))])

    def __call__(
        self, y: Tensor, problem: Problem, prior: Any, generator: PerImageGenerator
    ) -> Tensor:
        """Draw images (B, C, H, W) for measurements y (B, ...) of a problem bound to them."""
        with network_precision(None):
            return self.solver.sample(y, problem, CountingDenoiser(prior), generator)


def resolve(method: "str | type[Solver] | Solver", options: Mapping[str, Any]) -> Solver:
    """Return the solver that a name, a class or a solver stands for.

    Raises:
        InputError: Unknown method or option, or options beside a solver.
    """
    if isinstance(method, Solver):
        if options:
            raise InputError(
                f"{method.name} is given with its options set, and '{next(iter(options))}' beside"
                " it: set the options of the solver itself"
            )
        return method
    if isinstance(method, type) and issubclass(method, Solver):
        return build(method, options, method.__name__)
    if isinstance(method, str):
        return configure(method, options)
    raise InputError(f"method is {shown(method)}: give a name, a Solver class or a Solver")
