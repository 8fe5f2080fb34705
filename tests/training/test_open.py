"""Learners of one's own, options from text, networks of one's own, and the format of a run."""

import inspect
import json
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import unmurk
from tests.device_cases import SMALLEST
from tests.training.test_learn import TINY, blobs, equal, weights
from unmurk import training
from unmurk.bounds import Real
from unmurk.diffusion import networks
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.source import Source
from unmurk.problem import Problem
from unmurk.solvers import Draws
from unmurk.training import Em, FlowDiff, Recipe, Rounds, learn, registry
from unmurk.training.losses import denoising, forward_kl, levels

PROBLEM = Problem("identity", 0.2)
SHORT = {"settings": TINY, "kimg": 0.04, "quiet": True}  # five steps
FOLDER = Path(__file__).parents[1] / "data" / "run-format-1"


@pytest.fixture
def y():
    return PROBLEM.simulate(blobs())


@dataclass(eq=False, kw_only=True)
class Weighted(training.Learner):
    """Learns from y as if it were clean, with a weight for the prior."""

    weight: Annotated[float, Real(0, 10)] = 1.0

    def losses(self, y, index, progress, generator):
        problem = self.bind(index, y.device)
        flow, mean = forward_kl(self.posterior, y, problem, generator)
        prior = denoising(self.prior, y, levels(len(y), generator), generator)
        return {"prior": self.weight * prior, "flow": flow, "mean": mean}


@pytest.fixture
def registered(registries):
    """The class of these tests forgets its name too."""
    yield
    Weighted.name = ""


# -- learners ------------------------------------------------------------------------------------


def test_a_name_a_class_and_an_instance_learn_the_same(y, tmp_path, monkeypatch):
    monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
    recipe = Recipe(r2r=0.2, e_step=0.4, flow=0.6)
    learn(y, PROBLEM, "flowdiff", out=tmp_path / "a", recipe=recipe, **SHORT)
    learn(y, PROBLEM, FlowDiff, out=tmp_path / "b", recipe=recipe, **SHORT)
    learner = FlowDiff(recipe=recipe)
    learn(y, PROBLEM, learner, out=tmp_path / "c", **SHORT)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "abc"]
    assert configs[0] == configs[1] == configs[2] and configs[0]["method"] == "flowdiff"
    assert not hasattr(learner, "prior")  # a description stays one
    with pytest.raises(InputError, match="'objective' is given beside a learner"):
        learn(y, PROBLEM, learner, out=tmp_path / "d", objective="elbo", **SHORT)
    with pytest.raises(InputError, match="method is 3: give a name, a class"):
        learn(y, PROBLEM, 3, out=tmp_path / "d", **SHORT)


def test_a_class_of_ones_own_learns_without_a_name(y, tmp_path, monkeypatch):
    monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
    prior, posterior = learn(y, PROBLEM, Weighted, out=tmp_path / "own", weight=2.0, **SHORT)
    assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["method"].endswith("test_open.Weighted") and config["options"] == {"weight": 2.0}
    with pytest.raises(InputError, match="holds a run with another weight"):
        learn(y, PROBLEM, Weighted(weight=1.0), out=tmp_path / "own", **SHORT)
    with pytest.raises(InputError, match="weight must be a number from 0 to 10, got 11"):
        Weighted(weight=11)
    with pytest.raises(InputError, match="option 'speed' of Weighted: its options are weight"):
        learn(y, PROBLEM, Weighted, out=tmp_path / "other", speed=1, **SHORT)


class Undecorated(Weighted):
    """Declares an option without the decorator."""

    speed: float = 1.0


def test_what_a_class_of_ones_own_lacks_is_one_line(y, tmp_path, monkeypatch):
    monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
    for make in (
        lambda: Undecorated(speed=2.0),
        lambda: learn(y, PROBLEM, Undecorated, out=tmp_path / "a", speed=2.0, **SHORT),
    ):
        with pytest.raises(InputError, match="Undecorated declares the option speed but is no"):
            make()

    class Empty(training.Learner):
        pass

    with pytest.raises(InputError, match="Empty has no losses: define losses"):
        learn(y, PROBLEM, Empty, out=tmp_path / "b", **SHORT)
    for wrong in (torch.zeros(()), {"prior": 1.0}, {"prior": torch.zeros(2)}, {}):
        monkeypatch.setattr(Empty, "losses", lambda *_, wrong=wrong: wrong)
        with pytest.raises(InputError, match="Empty.losses must return scalar tensors by name"):
            learn(y, PROBLEM, Empty, out=tmp_path / "c", **SHORT)
    with pytest.raises(InputError, match="network is the class Linear: give a module, Linear"):
        learn(y, PROBLEM, "noisy", network=nn.Linear, out=tmp_path / "d", **SHORT)


def test_the_solver_of_the_e_step_from_text():
    """Own solvers, with or without an option steps, which is 16 unless it is given."""
    assert training.configure("em", {"solver": "mmps"})["solver"].solver.steps == 16
    given = training.configure("em", {"solver": "mmps,steps=3,iterations=2"})["solver"]
    assert (given.solver.steps, given.solver.iterations) == (3, 2)
    with pytest.raises(InputError, match="method 'magic' is unknown"):
        training.configure("em", {"solver": "magic"})


@pytest.mark.usefixtures("registered")
def test_a_decorator_registers_a_name():
    training.register("weighted")(Weighted)
    assert training.METHODS["weighted"] is Weighted and "weighted" in training.names()
    assert training.configure("weighted", {"weight": "0.5"}) == {"weight": 0.5}
    with pytest.raises(TypeError):
        training.METHODS["other"] = Weighted
    with pytest.raises(InputError, match="a learner 'weighted' is registered already"):
        training.register("weighted")(FlowDiff)
    with pytest.raises(InputError, match="derive it from training.Learner"):
        training.register("none")(dict)


@pytest.mark.usefixtures("registered")
def test_entry_points_are_read_when_their_name_is_asked_for(monkeypatch):
    points = [
        metadata.EntryPoint("weighted", f"{__name__}:Weighted", registry.GROUP),
        metadata.EntryPoint("broken", "no_such_package:Learner", registry.GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    assert training.names()[-2:] == ["weighted", "broken"]
    assert training.learner_class("weighted") is Weighted
    with pytest.raises(InputError) as raised:
        training.learner_class("broken")
    text = str(raised.value)
    assert "'broken' cannot be loaded from no_such_package:Learner" in text
    assert "\n" not in text
    with pytest.raises(InputError, match="unknown method 'x': choose one of flowdiff, .*, broken"):
        training.learner_class("x")


def test_every_paper_is_cited():
    own = {n: c for n, c in training.METHODS.items() if c.__module__.startswith("unmurk.")}
    assert len(own) == 7  # other tests may register further learners
    for name, cls in own.items():
        assert (not cls.citation) == (name in ("noisy", "clean"))
        assert not cls.citation or cls.citation.startswith("@") and "eprint" in cls.citation


# -- options from text ---------------------------------------------------------------------------


def test_options_are_read_as_what_they_are_declared_as():
    found = training.configure(
        "flowdiff",
        {
            "recipe.e_step": "0.7",
            "recipe.buffer": "64",
            "recipe.ambient_target": "image",
            "objective": "elbo",
            "solver": "diffpir,steps=3",
        },
    )
    assert found["recipe"] == Recipe(e_step=0.7, buffer=64, ambient_target="image")
    assert found["objective"] == "elbo" and found["solver"].spec == "diffpir,steps=3"
    em = training.configure("em", {"rounds.images": "16", "solver": "mmps", "e_step": "prior"})
    assert em["rounds"] == Rounds(images=16) and isinstance(em["solver"], Draws)
    assert em["solver"].spec == "mmps,steps=16"
    assert training.configure("ambientflow", {"draws": "3"}) == {"draws": 3}
    assert training.configure("noisy", {}) == {}


@pytest.mark.parametrize(
    "method, key, value, words",
    [
        ("flowdiff", "recipe.e_step", "1.5", "recipe.e_step must be a number from 0 to 1"),
        ("flowdiff", "recipe.e_step", "nan", "recipe.e_step must be a number from 0 to 1"),
        ("flowdiff", "recipe.e_step", "0.1", "before the end of recipe.r2r"),
        ("flowdiff", "recipe.speed", "1", "unknown option 'recipe.speed': recipe has r2r"),
        ("flowdiff", "recipe", "1", "'recipe' is a group"),
        ("flowdiff", "objective.x", "1", "'objective' has no parts"),
        ("flowdiff", "objective", "x", "objective must be one of default, elbo, got 'x'"),
        ("flowdiff", "solver", "nothing", "nothing"),
        ("flowdiff", "solver", "mmps,steps", "NAME,OPTION=VALUE"),
        ("em", "rounds.rounds", "2.5", "rounds.rounds must be a whole number from 1"),
        ("ambient", "delta", "2", "delta must be a number from 0.001 to 0.999"),
        ("ambientflow", "bound", "x", "bound must be one of elbo, importance"),
        ("noisy", "x", "1", "option 'x' of noisy: it has none"),
        ("x", "y", "1", "unknown method 'x'"),
    ],
)
def test_options_that_are_none_are_named(method, key, value, words):
    with pytest.raises(InputError) as raised:
        training.configure(method, {key: value})
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_all_options_are_described():
    found = training.describe("flowdiff")
    assert found["recipe.e_step"] == "a number from 0 to 1 (default 0.76)"
    assert found["objective"] == "one of default, elbo (default default)"
    assert found["solver"].startswith("a solver and its options")
    assert len(found) == 2 + len(inspect.signature(Recipe).parameters)
    assert training.describe("em")["rounds.rounds"].startswith("a whole number from 1 to 10000")


def test_the_signature_of_learn_shows_its_parameters():
    names = list(inspect.signature(unmurk.learn).parameters)
    assert names[:3] == ["data", "problem", "method"] and "network" in names


# -- networks ------------------------------------------------------------------------------------


class Own(nn.Module):
    """A network of one's own: two convolutions, blind to the time."""

    def __init__(self, channels=1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, channels, 3, padding=1)
        )

    def forward(self, x, t):
        return self.layers(x)


def test_any_module_learns_as_the_network_of_the_prior(y, tmp_path, monkeypatch):
    """It is copied, saved with a note, read back with the module, and a run goes on with it."""
    monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
    torch.manual_seed(0)
    module = Own()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    kw = {**SHORT, "recipe": Recipe(r2r=0.2, e_step=0.4, flow=0.6)}
    prior, posterior = learn(y, PROBLEM, out=tmp_path, network=module, **kw)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.1, 0.5])
    found = prior.denoise(x, sigma)
    assert found.shape == x.shape and posterior.mean(y[:2], PROBLEM.bind([0, 1], (1, 8, 8))).shape
    loaded = Prior.load(tmp_path, network=Own())
    assert torch.equal(loaded.denoise(x, sigma), found)
    with pytest.raises(InputError, match="network"):
        Prior.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["prior network"]["own"] and config["prior network"]["class"].endswith("Own")
    assert config["settings"]["network"] == "tiny"
    again, _ = learn(y, PROBLEM, out=tmp_path, network=Own(), **kw)
    assert torch.equal(again.denoise(x, sigma), found)
    with pytest.raises(InputError, match="another prior network"):
        learn(y, PROBLEM, out=tmp_path, network=nn.Identity(), **kw)


def test_a_network_that_conditioning_cannot_enter_is_named(y, tmp_path):
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    with pytest.raises(InputError, match="network is a Own, and conditioning needs"):
        learn(y, problem, "ambient", out=tmp_path / "run", network=Own(), **SHORT)
    assert not (tmp_path / "run").exists()


# -- the run folder ------------------------------------------------------------------------------


def test_a_folder_of_format_1_is_read(tmp_path, monkeypatch):
    """A folder of this format, written once and kept without its checkpoint, which is large."""
    monkeypatch.setitem(networks.PRESETS, "tiny", SMALLEST)
    config = training.read_config(FOLDER)
    assert config["format"] == 1 and config["method"] == "noisy"
    problem = Problem.from_dict(config["problem"])
    prior, posterior = Prior.load(FOLDER), Posterior.load(FOLDER)
    kept = load_file(FOLDER / "expected.safetensors")
    y, bound = kept["y"], problem.bind([0, 1], (1, 8, 8))
    torch.testing.assert_close(prior.denoise(kept["x"], 0.3), kept["denoised"])
    torch.testing.assert_close(posterior.mean(y[:2], bound), kept["mean"])
    shutil.copytree(FOLDER, tmp_path / "run")
    (tmp_path / "run" / "expected.safetensors").unlink()
    settings = training.Settings(**config["settings"])
    again, _ = learn(y, problem, "noisy", out=tmp_path / "run", settings=settings, quiet=True)
    assert training.read_config(tmp_path / "run") == config  # it was continued, not refused
    torch.testing.assert_close(
        again.denoise(kept["x"], 0.3), kept["denoised"], rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("form", [None, 0, 2, "1", True, 1.0])
def test_a_folder_of_another_format_is_refused_in_one_line(y, tmp_path, form):
    config = json.loads((FOLDER / "config.json").read_text())
    config["format"] = form
    if form is None:
        del config["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for call in (
        lambda: training.read_config(tmp_path),
        lambda: learn(y, PROBLEM, "noisy", out=tmp_path, **SHORT),
    ):
        with pytest.raises(InputError, match="this version reads format 1: use that") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_learners_check_what_they_are_given():
    with pytest.raises(InputError, match="at least 2"):
        Em(rounds=Rounds(1), e_step="conditional")
    with pytest.raises(InputError, match="unknown objective 'x': choose one of default, elbo"):
        FlowDiff(objective="x")


class Gappy(Source):
    """Floats that are read when they are needed, some of them missing."""

    floats = True

    def __init__(self, y):
        self.y, self.shape = y, tuple(y.shape)

    def read(self, indices):
        return self.y[indices]

    def fingerprint(self):
        return {"gappy": len(self)}


def test_missing_pixels_of_a_source_are_hidden_as_those_of_a_tensor(tmp_path):
    y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y[3, :, 2, 5] = torch.nan
    how = {"kimg": 0.016, "batch": 4, "precision": "fp32", "quiet": True, "nan": "mask"}
    problem = Problem("identity", 0.1)
    models = [
        unmurk.learn(data, problem, "noisy", out=tmp_path / str(i), **how)[0]
        for i, data in enumerate((y, Gappy(y)))
    ]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="not finite"):
        unmurk.learn(Gappy(y), problem, "noisy", out=tmp_path / "c", **(how | {"nan": "refuse"}))
