"""Solvers of one's own: objects, subclasses, steps by hand, levels, and registration."""

import dataclasses
import re
from importlib import metadata
from typing import ClassVar

import pytest
import torch

import unmurk
from unmurk.cli.options import solver_options
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator
from unmurk.solvers import (
    METHODS,
    PRESETS,
    AnnealedSolver,
    DiffPir,
    Draws,
    RedDiff,
    Solver,
    base,
    register,
    solve,
)
from unmurk.solvers.coupling import DEPTH

SHAPE = (1, 6, 6)
PRIOR = GaussianPrior.exponential(SHAPE, length=4.0)
MASK = Problem("inpaint:random,keep=0.5,seed=3", 0.1)
FEW = {
    "dps": {"steps": 20},
    "hrdis": {"steps": 20},
    "pnp-dm": {"iterations": 5, "steps": 3},
    "snips": {"steps": 7, "final": 3},
    "tds": {"steps": 5, "particles": 4},
    "red-diff:paper": {"steps": 10, "parallel": 3},
    "ddrm:paper": {"steps": 5},
}
SOLVERS = {**METHODS, **{f"{name}:{preset}": solver for (name, preset), solver in PRESETS.items()}}


def made(name, **options):
    return SOLVERS[name](**{"steps": 6} | FEW.get(name, {}) | options)


def measured(problem=MASK, n=2):
    return problem.simulate(PRIOR.sample(n, seed=1), seed=2)


class Clipped(DiffPir):
    """DiffPIR whose noisy image is clipped after each step."""

    def step(self, state):
        super().step(state)
        state.x = state.x_t = state.x_t.clamp(0, 1)


class Mean(Solver):
    """The denoised image at the first level: a solver with a start and a step of its own."""

    name: ClassVar[str] = "mean"
    claims: ClassVar[str] = "point"

    def schedule(self, state, init):
        return [5.0]

    def step(self, state):
        state.x = state.denoised = state.denoise(state.x_t, state.sigma)


# -- solver objects ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_name_a_class_and_an_object_are_the_same(name):
    y, (method, _, preset) = measured(), name.partition(":")
    options = {"steps": 6} | FEW.get(name, {})
    solver = made(name)
    by_object = solve(y, MASK, PRIOR, solver, seed=3)
    by_class = solve(y, MASK, PRIOR, SOLVERS[name], seed=3, **options)
    by_name = solve(y, MASK, PRIOR, method, seed=3, preset=preset or "default", **options)
    assert torch.equal(by_object.samples, by_name.samples)
    assert torch.equal(by_class.samples, by_name.samples)
    assert by_object.solver is solver and by_object.solver == by_class.solver == by_name.solver
    assert by_object.method == by_name.method == method
    assert by_object.claims == by_name.claims == solver.claims


def test_a_subclass_overrides_the_step():
    y = measured()
    found = unmurk.solve(y, MASK, PRIOR, method=Clipped(steps=8), samples=2)
    assert found.mean.min() >= 0 and found.mean.max() <= 1
    assert (found.method, found.claims, found.nfe) == ("Clipped", "heuristic", 8)
    plain = solve(y, MASK, PRIOR, "diffpir", steps=8, samples=2)
    assert not torch.equal(found.samples, plain.samples)
    assert torch.equal(solve(y, MASK, PRIOR, Clipped, steps=8, samples=2).samples, found.samples)


def test_a_solver_needs_a_step_alone():
    y = measured(n=3)
    found = solve(y, MASK, PRIOR, Mean(), seed=4)
    start = 0.5 + 5.0 * PerImageGenerator(4, range(3), 7003, 0).randn(*SHAPE)
    torch.testing.assert_close(found.mean, PRIOR(start, 5.0))
    assert (found.method, found.claims) == ("mean", "point")


def test_a_claim_is_not_inherited():
    class Other(RedDiff):
        pass

    assert RedDiff.claims == "point" and Other.claims == "heuristic"
    assert Other.name == "Other" and Other.citation == RedDiff.citation


def test_an_object_takes_no_options_beside_it():
    with pytest.raises(InputError, match="^diffpir is given with its options set, and 'steps'"):
        solve(measured(), MASK, PRIOR, DiffPir(), steps=3)
    with pytest.raises(InputError, match="DiffPir has no option 'preset': it takes .*steps"):
        solve(measured(), MASK, PRIOR, DiffPir, preset="paper")
    for wrong in (3, int, None):
        with pytest.raises(InputError, match="give a name, a Solver class or a Solver"):
            solve(measured(), MASK, PRIOR, wrong)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_option_has_bounds_or_words(name):
    """A wrong value is refused in one line that names the option."""
    for option in dataclasses.fields(SOLVERS[name]):
        if option.type is bool:
            continue
        with pytest.raises(InputError, match=f"^{option.name} must be") as caught:
            SOLVERS[name](**{option.name: object()})
        assert "\n" not in str(caught.value)


def test_solvers_are_values():
    assert DiffPir(steps=3) == DiffPir(steps=3) != DiffPir(steps=4)
    assert DiffPir(levels=[2.0, 1.0]) == DiffPir(levels=torch.tensor([2.0, 1.0]))
    assert len({DiffPir(levels=[2.0, 1.0]), DiffPir(levels="2,1")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffPir().steps = 3


@pytest.mark.parametrize("name", METHODS)
def test_every_solver_has_a_citation(name):
    text = METHODS[name].citation
    assert re.match(r"@(inproceedings|article)\{\w+,\n", text) and text.endswith("\n}")
    for entry in ("title = {", "author = {", "year = {20"):
        assert text.count(f"\n  {entry}") == 1
    assert text.count("{") == text.count("}")


# -- step by step --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("samples", [1, 2])
def test_iterate_takes_the_steps_of_solve(name, samples):
    y, solver, seen = measured(), made(name), []
    result = solve(
        *(y, MASK, PRIOR, solver), samples=samples, seed=5, callback=lambda at: seen.append(at)
    )
    states = list(solver.iterate(y, MASK, PRIOR, samples=samples, seed=5))
    assert torch.equal(states[-1].x.unflatten(0, (samples, len(y))), result.samples)
    assert len(states) == len(seen) and states[-1].nfe == result.nfe
    for state, at in zip(states, seen, strict=True):
        assert torch.equal(state.x, at["x"]) and torch.equal(state.denoised, at["denoised"])
        assert (state.step, state.steps, state.sigma) == (at["step"], at["steps"], at["sigma"])
        assert state.nfe == at["nfe"] and float(state.chi2.mean()) == at["chi2"]


def test_iterate_is_lazy_and_takes_the_arguments_of_solve():
    calls = []

    def prior(x, sigma):
        calls.append(sigma)
        return PRIOR(x, sigma)

    y = measured()
    states = DiffPir(steps=9).iterate(y, MASK, prior)
    assert not calls
    assert next(states).step == 1 and len(calls) == 1
    assert next(states).step == 2 and len(calls) == 2
    options = {"init": y.clone(), "seed": 3, "nan": "mask"}
    y[0, 0, 0, 0] = torch.nan
    *_, last = DiffPir(steps=4).iterate(y, MASK, PRIOR, **options)
    assert torch.equal(last.x, solve(y, MASK, PRIOR, DiffPir(steps=4), **options).mean)


def test_iterate_refuses_at_once_what_solve_refuses():
    y = measured()
    curved = Problem(lambda x: x**2, 0.1)
    with pytest.raises(InputError, match="ddnm needs a linear operator.*use red-diff"):
        METHODS["ddnm"]().iterate(y, curved, PRIOR)
    with pytest.raises(InputError, match="init has shape"):
        DiffPir().iterate(y, MASK, PRIOR, init=y[:1])
    with pytest.raises(InputError, match="samples must be"):
        DiffPir().iterate(y, MASK, PRIOR, samples=0)


def test_equal_channels_stay_equal_in_iterate():
    class Gray:
        channels = 1

        def denoise(self, x, sigma):
            return PRIOR(x.flatten(0, 1)[:, None], sigma).reshape(x.shape)

    y = measured().repeat(1, 3, 1, 1)
    *_, last = DiffPir(steps=4).iterate(y, MASK, Gray(), seed=2)
    assert torch.equal(last.x, solve(y, MASK, Gray(), DiffPir(steps=4), seed=2).mean)
    assert torch.equal(last.x, last.x[:, :1].expand_as(last.x))


def test_chi2_is_that_of_the_result():
    y = measured()
    *_, last = DiffPir(steps=4).iterate(y, MASK, PRIOR)
    bound = MASK.bind(range(2), SHAPE)
    square = bound.residual(last.x, y).square().flatten(1).sum(1)
    torch.testing.assert_close(last.chi2, square / 0.01 / bound.measurements(y))


# -- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_the_default_levels_give_the_default_result(name):
    y, solver = measured(), made(name, **({"parallel": 1} if name == "red-diff:paper" else {}))
    result = solve(y, MASK, PRIOR, solver, seed=3)
    levels = list(dict.fromkeys(at["sigma"] for at in result.trace))
    if name == "snips":  # whose last step is the reverse diffusion
        assert levels.pop() == DEPTH * levels[-1]
    again = solve(y, MASK, PRIOR, dataclasses.replace(solver, levels=levels), seed=3)
    if name == "red-diff:spread":  # whose first level is rounded
        torch.testing.assert_close(again.samples, result.samples, rtol=0, atol=1e-5)
    else:
        assert torch.equal(again.samples, result.samples)
    assert [at["sigma"] for at in again.trace] == [at["sigma"] for at in result.trace]


@pytest.mark.parametrize("given", [[2.0, 0.5, 0.02], (2, 0.5, 0.02), "2,0.5, 0.02"])
def test_levels_are_any_falling_numbers(given):
    y = measured()
    states = list(DiffPir(levels=given).iterate(y, MASK, PRIOR))
    assert [state.sigma for state in states] == [2.0, 0.5, 0.02]
    assert [state.sigma_next for state in states] == [0.5, 0.02, 0.0]
    tensor = torch.tensor([2.0, 0.5, 0.02], dtype=torch.float64)
    assert DiffPir(levels=tensor) == DiffPir(levels=given)
    noisy = next(METHODS["dps"](levels=given).iterate(y, MASK, PRIOR, init=y))
    assert noisy.sigma == 2.0  # where init is noised to


def test_red_diff_ends_given_levels_at_the_noise_of_y():
    """With final="mmse" alone, and but for rounding."""
    y, problem = measured(Problem("identity", 0.1)), Problem("identity", 0.1)
    for given, wanted in (
        ([2.0, 0.5, 0.05, 0.01], [2.0, 0.5, 0.1]),
        ([2.0, 0.5], [2.0, 0.5, 0.1]),
        ([2.0, 0.1000000001, 0.02], [2.0, 0.1]),
    ):
        trace = solve(y, problem, PRIOR, RedDiff(levels=given)).trace
        assert list(dict.fromkeys(at["sigma"] for at in trace)) == pytest.approx(wanted)
        assert len(trace) == len(wanted) + 3  # the labels of the last step
    trace = solve(y, problem, PRIOR, RedDiff(levels=[2.0, 0.5, 0.02], final="mean")).trace
    assert [at["sigma"] for at in trace] == [2.0, 0.5, 0.02]


def test_wrong_levels_are_named():
    class Narrow:
        sigma_max = 0.5

        def denoise(self, x, sigma):
            return PRIOR(x, sigma)

    for given, message in (
        ([], "levels is empty"),
        ([1.0, 2.0], "level 1 is 2 after 1: levels fall strictly"),
        ([1.0, 1.0], "level 1 is 1 after 1"),
        ([1.0, 0.0], "level 1 is 0: noise levels are finite and above 0"),
        ([float("inf"), 1.0], "level 0 is inf"),
        ([float("nan")], "level 0 is nan"),
        ([1.0, -1.0], "level 1 is -1"),
        ("1,x", "levels must be a list of falling numbers, got '1,x'"),
        (3.0, "levels must be a list"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            DiffPir(levels=given)
    with pytest.raises(InputError, match="start at 2, above the prior's highest noise level 0.5"):
        solve(measured(), MASK, Narrow(), "diffpir", levels=[2.0, 0.1])
    assert solve(measured(), MASK, Narrow(), "diffpir", levels=[0.5, 0.1]).nfe == 2


def test_levels_can_be_written_on_the_command_line():
    assert solver_options("ddrm", ["levels=2,0.5,0.1"], None) == {"levels": "2,0.5,0.1"}
    with pytest.raises(InputError, match="levels fall strictly"):
        solver_options("ddrm", ["levels=1,2"], None)


def test_a_solver_without_levels_says_so():
    class Bare(Solver):
        def step(self, state):
            state.x = state.denoised = state.x_t

    with pytest.raises(InputError, match="Bare has no noise levels of its own: give levels="):
        solve(measured(), MASK, PRIOR, Bare)
    assert len(list(Bare(levels=[0.3, 0.2]).iterate(measured(), MASK, PRIOR))) == 2


def test_a_first_level_up_to_rounding_is_no_math_error():
    class Narrow:
        sigma_max = 0.5

        def denoise(self, x, sigma):
            return PRIOR(x, sigma)

    for sigma_max in (0.5, 3.0):
        found = solve(measured(), MASK, Narrow(), preset="spread", steps=5, sigma_max=sigma_max)
        assert found.mean.isfinite().all()


# -- registration --------------------------------------------------------------------------------


def test_the_tables_are_read_only():
    with pytest.raises(TypeError):
        METHODS["mine"] = DiffPir
    with pytest.raises(TypeError):
        del PRESETS["ddrm", "paper"]


@pytest.mark.usefixtures("registries")
def test_a_registered_solver_has_a_name():
    @register("clipped")
    class Mine(Clipped):
        pass

    @register("clipped", preset="short")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Short(Clipped):
        steps: base.Steps = 3

    y = measured()
    assert METHODS["clipped"] is Mine and Mine.name == "clipped"
    assert PRESETS["clipped", "short"] is Short and Short.name == "clipped"
    by_name = solve(y, MASK, PRIOR, "clipped", steps=4)
    assert by_name.method == "clipped" and isinstance(by_name.solver, Mine)
    assert torch.equal(by_name.mean, solve(y, MASK, PRIOR, Clipped(steps=4)).mean)
    assert solve(y, MASK, PRIOR, "clipped", preset="short").nfe == 3
    assert solver_options("clipped", ["zeta=0.5"], 7) == {"steps": 7, "zeta": 0.5}
    with pytest.raises(InputError, match="choose from auto, red-diff, .*fast-dips, clipped"):
        solve(y, MASK, PRIOR, "cliped")
    with pytest.raises(InputError, match="clipped needs a linear"):
        Mine.requires = "linear"
        solve(y, Problem(lambda x: x**2, 0.1), PRIOR, "clipped")


@pytest.mark.usefixtures("registries")
def test_names_are_taken_once():
    for name, preset in (("ddrm", None), ("auto", None), ("ddrm", "paper"), ("ddrm", "default")):
        with pytest.raises(InputError, match="is taken: choose another"):
            register(name, preset=preset)(Clipped)
    with pytest.raises(InputError, match="give a subclass of Solver"):
        register("mine")(lambda y: y)
    for _ in range(2):  # a cell of a notebook that runs again

        @register("mine")
        class Mine(Clipped):
            pass

    assert METHODS["mine"] is Mine


class Undecorated(DiffPir):
    """Declares an option without the decorator."""

    weight: float = 1.0


def test_what_a_class_of_ones_own_lacks_is_one_line():
    y = measured()
    for make in (lambda: Undecorated(weight=2.0), lambda: Undecorated()):
        with pytest.raises(InputError, match="Undecorated declares the option weight but is no"):
            make()
    with pytest.raises(InputError, match="write @dataclass\\(frozen=True, kw_only=True\\) above"):
        solve(y, MASK, PRIOR, Undecorated, weight=2.0)

    class Empty(AnnealedSolver):
        pass

    with pytest.raises(InputError, match="Empty has no step: define step"):
        solve(y, MASK, PRIOR, Empty(steps=2))


class EntryPoint:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, name, found):
        self.name, self.found, self.value, self.loaded = name, found, f"package:{name}", 0

    def load(self):
        self.loaded += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.usefixtures("registries")
def test_entry_points_are_loaded_when_their_name_is_asked_for(monkeypatch):
    points = [
        EntryPoint("outside", Clipped),
        EntryPoint("broken", ImportError("no module\nnamed other")),
        EntryPoint("function", print),
        EntryPoint("ddrm", print),  # a built-in name stays what it is
    ]

    def entry_points(*, group):
        assert group == "unmurk.solvers"
        return points

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    y = measured()
    assert solve(y, MASK, PRIOR, "diffpir", steps=3).nfe == 3
    assert solve(y, MASK, PRIOR, "ddrm", steps=3).nfe == 3
    assert not any(point.loaded for point in points)
    for _ in range(2):
        found = solve(y, MASK, PRIOR, "outside", steps=4)
        assert torch.equal(found.mean, solve(y, MASK, PRIOR, Clipped(steps=4)).mean)
        assert found.method == "outside" and points[0].loaded == 1
    with pytest.raises(InputError, match="'broken' cannot be loaded from package:broken") as said:
        solve(y, MASK, PRIOR, "broken")
    assert "\n" not in str(said.value)
    with pytest.raises(InputError, match="solver 'function' is .*give a subclass of Solver"):
        solve(y, MASK, PRIOR, "function")
    with pytest.raises(InputError, match="choose from auto, .*, outside, broken, function"):
        solve(y, MASK, PRIOR, "outsid")


def test_learners_draw_with_names_classes_and_objects():
    y, bound = measured(), MASK.bind(range(2), SHAPE)
    drawn = [
        Draws(*given, **options)(y, bound, PRIOR, PerImageGenerator(1, range(2)))
        for given, options in (
            (("diffpir",), {"steps": 4}),
            ((DiffPir,), {"steps": 4}),
            ((DiffPir(steps=4),), {}),
        )
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert Draws("diffpir", steps=4).spec == "diffpir,steps=4" == Draws(DiffPir, steps=4).spec
