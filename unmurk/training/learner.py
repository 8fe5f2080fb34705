"""The base class of all learners: options, networks, EMA weights and schedules.

A learner is a dataclass of its options. As such it is only a description, such as
`FlowDiff(recipe=Recipe(flow=0.9))`. `build` returns a copy with networks for given measurements,
which the trainer then trains. A learner of your own derives from `Learner` and defines `losses`::

    @training.register("mine")
    @dataclass(eq=False, kw_only=True)
    class Mine(training.Learner):
        weight: Annotated[float, Real(0, 10)] = 1.0

        def losses(self, y, index, progress, generator):
            ...

Everything else has a default that it may override: the phases in which each part is trained
(`phases`), further modules (`extra_modules`) and tensors (`make_buffers`), and what happens
between steps (`before`).
"""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..bounds import check_declared, check_fields
from ..devices import host_to
from ..diffusion.networks import preset
from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.posterior import Posterior
from ..gaussian import Wiener, fit
from ..io.datasets import Source
from ..io.scenes import Scenes
from ..problem import Problem
from ..repeats import combined
from ..rng import ShardedGenerator, StreamId, generator, integers
from ..solvers.base import METHODS as SOLVERS
from .papers import MUON
from .replay import is_denoising
from .schedule import LRPhase, ParamGroup
from .start import Start
from .trainer import Trainer

__all__ = ["Learner", "ProblemBinder", "as_dict", "solver_name"]

ONE, ALL = 0.5, 0.25  # shares of the steps with one capture of a scene, and with all of them
HELD = 8  # problems bound ahead at most
LEAST_DRAWS = 32  # images that are drawn at first, also in a short run


@dataclass(eq=False, kw_only=True)
class Learner:
    """The base class of learners; subclasses define `losses` and declare their options as fields.

    Attributes:
        name: The name under which the class is registered.
        citation: BibTeX of the paper.
        further_citations: BibTeX of further papers.
        option_citations: BibTeX of further papers, by an option and its value.
        takes_repeats: Whether it learns from repeated captures of each scene.
        takes_clean: Whether it learns from clean images beside the measurements.

    >>> from unmurk.training import Ambient
    >>> Ambient(delta=0.2).delta, Ambient.takes(Problem("blur:gaussian,sigma=1", 0.1))
    (0.2, False)
    >>> Ambient(delta=2)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: delta must be a number from 0.001 to 0.999, got 2
    """

    name: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    further_citations: ClassVar[tuple[str, ...]] = ()
    option_citations: ClassVar[dict[tuple[str, Any], str]] = {}
    takes_repeats: ClassVar[bool] = False
    takes_clean: ClassVar[bool] = False

    @classmethod
    def papers(cls, options: Mapping[str, Any]) -> list[str]:
        """Return the BibTeX entries of the papers that a run relies on.

        Args:
            options: Options of the learner as `as_dict` returns them; a missing one has its
                default.

        Returns:
            The entry of the learner, "" if it has none; those of its options; that of the solver
            that draws images; that of the optimizer.

        >>> [text.split("{")[1].split(",")[0] for text in Learner.papers({}) if text]
        ['jordan2024muon']
        """
        chosen = cls.option_citations.items()
        of_options = [text for (name, value), text in chosen if options.get(name) == value]
        solver: Any = SOLVERS.get(solver_name(options) or "")
        of_solver = [getattr(solver, "citation", "")]
        return [cls.citation, *cls.further_citations, *of_options, *of_solver, MUON]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        check_declared(cls, "@dataclass(eq=False, kw_only=True)")
        return super().__new__(cls)

    @property
    def default_start(self) -> str:
        """The start of a run that names none: "none", or a model of the package."""
        return "none"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: An option is out of its bounds.
        """
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                choices = ", ".join(get_args(hint))
                raise InputError(
                    f"unknown {name} '{getattr(self, name)}': choose one of {choices}"
                )
        check_fields(self)

    def build(
        self,
        y: Tensor | Source,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        seed: int = 0,
        prior_network: nn.Module | None = None,
        repeats: int = 1,
        clean: Tensor | Source | None = None,
        start: Start | None = None,
    ) -> Self:
        """Return a copy of this learner with networks for given measurements.

        Args:
            y: Measurements (N, ...).
            problem: How they were made.
            shape: Shape (C, H, W) of the images behind them.
            network: Preset of the networks.
            seed: Seed of the initial weights and of the learner's own draws.
            prior_network: A network of your own for the prior, a module that maps (x, t) to a
                tensor like x; it is copied. None takes the preset.
            repeats: Number N of captures of each scene; y holds those of a scene one after
                another. Above 1, the trainer gives `losses` all captures of its scenes, (B, N,
                ...).
            clean: Clean images (M, C, H, W), or None.
            start: Prior and posterior whose networks and weights are copied; None builds new ones.

        Returns:
            A built learner. It has the modules (`prior`, `posterior`), their EMA copies
            (`teacher`, `student`), the parameter groups and the buffers that the trainer works
            with.

        Raises:
            InputError: The options do not fit the problem, or the images do not fit the networks.
        """
        preset(network)
        built = copy.copy(self)
        built.problem, built.shape, built.seed = problem, shape, seed
        built.captures, built.repeats, built.clean = y, repeats, clean
        built.y = y if repeats == 1 else Scenes(y, repeats)
        built.network, built.prior_network = network, copy.deepcopy(prior_network)
        built.start = start
        built._build()
        return built

    def _build(self) -> None:
        """Create modules, EMA copies, buffers and parameter groups."""
        self.y: Tensor | Source
        self.captures: Tensor | Source
        self.repeats: int
        self.clean: Tensor | Source | None
        self.problem: Problem
        self.shape: tuple[int, int, int]
        self.seed: int
        self.network: str
        self.prior_network: nn.Module | None
        self.start: Start | None
        self.binder = ProblemBinder(self.problem, self.shape)
        self.denoising = is_denoising(self.problem)
        self.check_problem()
        wiener = Wiener(self.shape) if self.starts_gaussian() else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, StreamId.INIT).initial_seed() % 2**31)
            self.posterior = self.make_posterior(wiener)
            self.prior = self.make_prior()
            self.modules: dict[str, nn.Module] = {"posterior": self.posterior, "prior": self.prior}
            self.modules |= self.extra_modules()
        self.ema = copy.deepcopy(self.modules)
        self.teacher = cast(Prior, self.ema["prior"])
        self.student = cast(Posterior, self.ema["posterior"])
        self.buffers = self.make_buffers()
        mean, flow = list(self.posterior.mean_net.parameters()), self.posterior.flow_parameters()
        phases = self.phases()
        self.groups = [ParamGroup(mean, phases["mean"]), ParamGroup(flow, phases["flow"])]
        self.groups += [
            ParamGroup(list(module.parameters()), phases[key])
            for key, module in self.modules.items()
            if key != "posterior"
        ]
        self.finish()

    # -- what a subclass may override ------------------------------------------------------------

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the learner can learn from measurements of this kind."""
        return problem.linear

    def check_problem(self) -> None:
        """Check the options against the problem, before any network is made.

        Raises:
            InputError: They do not fit.
        """

    def starts_gaussian(self) -> bool:
        """Whether the mean network starts from the Wiener solution of a fitted Gaussian prior."""
        return False

    def initial_spread(self) -> float:
        """Return the standard deviation of the posterior at the start, in units of intensity."""
        return 0.05

    def make_posterior(self, start: Wiener | None) -> Posterior:
        """Create the posterior of the start of the run, or an untrained one.

        Args:
            start: Gaussian prior whose Wiener solution m(y) starts from; None takes A_dagger(y).
        """
        if self.start is not None and self.start.posterior is not None:
            return self.start.posterior_for(self.shape, start)
        # the noise of the mean of N captures is lower by sqrt(N), which the networks have to see
        several = self.repeats > 1 and self.problem.operator.spec == "identity"
        spread = self.initial_spread()
        return Posterior.create(self.network, self.shape, spread, start, many_levels=several)

    def make_prior(self) -> Prior:
        """Create the prior of the start of the run, or an untrained one.

        Untrained weights of a preset come from torch's global stream.
        """
        if self.start is not None:
            return self.start.prior_for(self.shape)
        own = copy.deepcopy(self.prior_network)
        return Prior.create(self.network if own is None else own, self.shape)

    def extra_modules(self) -> dict[str, nn.Module]:
        """Return modules beside posterior and prior, by name."""
        return {}

    def make_buffers(self) -> dict[str, Tensor]:
        """Return further tensors that a continued run needs, by name."""
        return {}

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Return when "mean" and "flow" of the posterior, and each other module, are trained."""
        return {"mean": (LRPhase(),), "flow": (LRPhase(),), "prior": (LRPhase(),)}

    def finish(self) -> None:
        """Act once modules, EMA copies, buffers and groups exist."""

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        return [{"prior": 1, "posterior": 1}]

    def initialize(self, device: torch.device) -> None:
        """Fit the Gaussian prior that the mean network starts from, if there is one.

        The trainer calls this once, before the first step of a run.
        """
        if self.posterior.start is None:
            return
        model = fit(
            cast(Tensor, self.captures), self.problem, self.shape, self.seed, device=device
        )
        for posterior in (self.posterior, self.student):
            assert posterior.start is not None
            posterior.start.load_state_dict(model.state_dict())

    def lengthen(self, progress: float) -> None:
        """Adapt to a longer run, of whose new length `progress` is done already.

        Parts of the schedule may be taken again. Draws that it makes later are then forgotten.
        """

    def evaluations(self, progress: float, images: float) -> float:
        """Return how many evaluations of the prior draws take in the rest of a run.

        Args:
            progress: Where the rest begins.
            images: Images seen in the whole run.
        """
        return 0.0

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Act between steps, such as filling a replay buffer; progress runs from 0 to 1."""

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step.

        Args:
            y: Measurements (B, ...).
            index: Their numbers (B,), on the CPU.
            progress: Progress of the run, from 0 to 1.
            generator: Source of all random draws of the step.

        Returns:
            Scalars by name, whose sum is minimized.
        """
        raise InputError(
            f"{type(self).__name__} has no losses: define losses(self, y, index, progress,"
            " generator)"
        )

    # -- measurements ----------------------------------------------------------------------------

    def bind(self, index: Tensor, device: torch.device) -> Problem:
        """Return the problem of the measurements with these numbers, on a device."""
        return self.binder.bind(index, device)

    def first_draws(self, most: int, images: float) -> int:
        """Return how many images are drawn before a part of the run that trains on them.

        Args:
            most: How many at most.
            images: Images seen in that part of the run.
        """
        if getattr(self.y, "endless", False):  # else a short run would draw more than it uses
            most = min(most, max(LEAST_DRAWS, int(images)))
        return min(most, len(self.y))

    def measurements(self, number: Tensor, device: torch.device) -> tuple[Tensor, Problem]:
        """Return the measurements of draws with these numbers, and their problem, on a device.

        Draw i is one of measurement i modulo N, so that the draws go through the set in turn. The
        measurement of a scene combines all its captures.
        """
        index = number % len(self.y)
        return self.view(self.y[index.to(self.y.device)].to(device), index)

    def view(
        self, y: Tensor, index: Tensor, picked: Sequence[int] | None = None
    ) -> tuple[Tensor, Problem]:
        """Return measurements as the networks see them, and their problem.

        Args:
            y: Measurements (B, ...), or all captures of scenes (B, N, ...).
            index: Their numbers (B,).
            picked: The captures of each scene that are combined; None: all.

        Returns:
            Measurements (B, ...), one for each scene; see `repeats.combined`.
        """
        if self.repeats == 1:
            return y, self.bind(index, y.device)
        problem = self.binder.on(y.device)
        return combined(y, problem, index.tolist(), self.shape, picked)

    def pick_captures(self, noise: torch.Generator) -> list[int]:
        """Pick a random number of the captures of each scene, the same for the whole batch.

        Single captures and all N together are what is restored most often. So half of the steps
        take one capture, a quarter all N, and a quarter any number from 1 to N.

        Args:
            noise: Generator of the step; its state does not change.
        """
        choose = generator(noise.initial_seed(), StreamId.REPEATS)
        order = torch.randperm(self.repeats, generator=choose).tolist()
        several = 1 + int(torch.randint(self.repeats, (), generator=choose))
        share = float(torch.rand((), generator=choose))
        return order[: 1 if share < ONE else self.repeats if share < ONE + ALL else several]

    def pick_clean(self, count: int, noise: torch.Generator) -> Tensor:
        """Pick clean images at random, (count, C, H, W); none if there are none.

        Args:
            count: Number of images.
            noise: Generator of the step; its state does not change.
        """
        if self.clean is None:
            return torch.zeros(0, *self.shape, device=noise.device)
        numbers = integers(len(self.clean), (count,), choices(noise, StreamId.CLEAN))
        return host_to(self.clean[numbers.to(self.clean.device)], noise.device)

    def prepare(self, index: Tensor, device: torch.device) -> None:
        """Bind the problem of a coming step; the thread that reads its measurements calls this."""
        if self.repeats == 1:
            self.binder.prepare(index, device)


def choices(noise: torch.Generator, purpose: StreamId) -> torch.Generator:
    """Return a generator on the CPU for the choices of a step, for this process's share of them.

    Args:
        noise: Generator of the step; its state does not change.
        purpose: What is chosen.
    """
    choose = generator(noise.initial_seed(), purpose)
    if isinstance(noise, ShardedGenerator):
        return ShardedGenerator.of(choose, noise.rank, noise.ranks)
    return choose


def solver_name(options: Mapping[str, Any]) -> str | None:
    """Return the name of the solver that draws images; None without one.

    Args:
        options: Options of a learner as `as_dict` returns them.

    >>> solver_name({"solver": "mmps,steps=8"})
    'mmps'
    """
    spec = options.get("solver")
    return spec.partition(",")[0] if isinstance(spec, str) else None


def as_dict(learner: Learner) -> dict[str, Any]:
    """Return the options of a learner as config.json keeps them.

    A nested dataclass becomes a dict; a function becomes its `spec`, or "own" if it has none.

    >>> from unmurk.training import Ambient, Em
    >>> as_dict(Ambient(delta=0.2)), as_dict(Em())["rounds"]["rounds"]
    ({'delta': 0.2}, 6)
    """
    return {field.name: _plain(getattr(learner, field.name)) for field in fields(learner)}


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if callable(value):
        return getattr(value, "spec", "own")
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


class ProblemBinder:
    """A problem that is moved to a device once, and bound to images before a step needs it.

    Binding a problem to images may draw a mask for each of them on the CPU, and moving a problem
    drops the decompositions that its operator keeps. So a problem is moved once, and the thread
    that reads the measurements of the next steps also binds the problem to them.

    Args:
        problem: How the measurements were made.
        shape: Shape (C, H, W) of the images behind them.

    >>> binder = ProblemBinder(Problem("inpaint:random,keep=0.5", 0.1), (1, 8, 8))
    >>> bound = binder.bind(torch.tensor([3, 5]), torch.device("cpu"))
    >>> bound.index, bound.mask.shape
    ([3, 5], torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, problem: Problem, shape: tuple[int, int, int]) -> None:
        self.problem, self.shape = problem, shape
        self.moved: dict[torch.device, Problem] = {}
        self.ahead: dict[tuple[torch.device, tuple[int, ...]], Problem] = {}
        self.lock = threading.Lock()

    def prepare(self, index: Tensor, device: torch.device) -> None:
        """Bind the problem to the measurements with these numbers, (B,), for a later `bind`."""
        key = device, tuple(index.tolist())
        bound = self._bind(key)
        with self.lock:
            self.ahead[key] = bound
            while len(self.ahead) > HELD:
                del self.ahead[next(iter(self.ahead))]

    def bind(self, index: Tensor, device: torch.device) -> Problem:
        """Return the problem of the measurements with these numbers, (B,), on a device."""
        key = device, tuple(index.tolist())
        with self.lock:
            bound = self.ahead.pop(key, None)
        return self._bind(key) if bound is None else bound

    def _bind(self, key: tuple[torch.device, tuple[int, ...]]) -> Problem:
        device, numbers = key
        return self.on(device).bind(numbers, self.shape)

    def on(self, device: torch.device) -> Problem:
        """Return the problem on a device, not bound to images."""
        with self.lock:
            if device not in self.moved:
                self.moved[device] = self.problem.to(device)
            return self.moved[device]
