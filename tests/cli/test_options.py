"""What commands share: options of solvers and learners as text."""

import json
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest

from unmurk.cli.commands.learn import Learn
from unmurk.cli.main import main
from unmurk.cli.options import solver_options
from unmurk.errors import InputError
from unmurk.solvers import METHODS, PRESETS
from unmurk.training import Settings, configure

KINDS = [(name, None, solver) for name, solver in METHODS.items()]
KINDS += [(name, preset, solver) for (name, preset), solver in PRESETS.items()]


def text(declared, default) -> str:
    """A value of the declared type that is in range, as a user writes it."""
    if default is None:  # unset, so that the text has to be of the other type
        declared = next(kind for kind in get_args(declared) if kind is not type(None))
        return {float: "1", int: "3", str: "2"}[declared]
    return str(default).lower()


@pytest.mark.parametrize("name, preset, solver", KINDS)
def test_every_option_of_every_solver_can_be_written(name, preset, solver):
    hints = get_type_hints(solver)
    for option in fields(solver):
        written = text(hints[option.name], option.default)
        chosen = [] if preset is None else [f"preset={preset}"]
        found = solver_options(name, [*chosen, f"{option.name}={written}"], None)[option.name]
        wanted = option.default
        if wanted is None:  # a number, or levels, which are read as text
            wanted = type(found)(written)
        assert found == wanted, option.name
        if get_origin(hints[option.name]) is None and option.default is not None:
            assert type(found) is type(option.default), option.name


# -- learners -------------------------------------------------------------------------------------


def given(method, **texts):
    return configure(method, texts)


def test_options_of_learners_are_read_as_their_types():
    assert given("ambient", delta="0.2") == {"delta": 0.2}
    assert given("flowdiff", objective="elbo") == {"objective": "elbo"}
    recipe = configure("flowdiff", {"recipe.buffer": "8", "recipe.flow": "0.9"})["recipe"]
    assert (recipe.buffer, recipe.flow) == (8, 0.9)
    assert configure("em", {"rounds.images": "64"})["rounds"].images == 64
    assert configure("ambientflow", {"draws": "4", "bound": "importance"})["draws"] == 4


@pytest.mark.parametrize(
    "method, texts, part",
    [
        ("ambient", {"zeta": "1"}, "zeta"),
        ("flowdiff", {"recipe.zeta": "1"}, "recipe.zeta"),
        ("ambient", {"delta": "wide"}, "delta"),
        ("flowdiff", {"recipe.buffer": "1.5"}, "recipe.buffer"),
        ("flowdiff", {"recipe.flow": "7"}, "flow"),
        ("flowdiff", {"objective": "best"}, "objective"),
        ("noisy", {"delta": "1"}, "delta"),
    ],
)
def test_options_of_learners_that_do_not_fit(method, texts, part):
    with pytest.raises(InputError, match=part):
        configure(method, texts)


def test_learn_takes_settings_without_an_option_of_their_own():
    """All of them; the others are refused with the name of their option."""
    own = {"rate": "1e-3", "average": "5"}
    others = {field.name for field in fields(Settings)} - own.keys()
    command = Learn(Path("y.npy"), Path("run"))
    assert others <= vars(command).keys()
    command.option = ("recipe.buffer=8", *(f"{key}={value}" for key, value in own.items()))
    found = command._options()
    assert (found["rate"], found["average"], found["recipe"].buffer) == (1e-3, 5.0, 8)
    for name in others:
        command.option = (f"{name}=1",)
        with pytest.raises(InputError, match=f"--option {name}=1: use .*--{name} instead"):
            command._options()
    for written, part in (("rate=20", "rate must be"), ("average=x", "average must be")):
        command.option = (written,)
        with pytest.raises(InputError, match=part):
            command._options()


@pytest.mark.slow
def test_learn_takes_options_of_its_method(tmp_path, capsys):
    """They are in the run's config.json; a wrong one is one line, and nothing is left."""
    np.save(tmp_path / "y.npy", np.random.default_rng(0).uniform(0, 1, (8, 8, 8)).astype("f4"))
    argv = ["learn", "y.npy", "--noise", "0.1", "--kimg", "0.064", "--precision", "fp32"]
    argv = [str(tmp_path / a) if a == "y.npy" else a for a in argv]
    argv += ["--out", str(tmp_path / "run")]
    assert main([*argv, "--method", "flowdiff", "--option", "recipe.zeta=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe.zeta" in line and not (tmp_path / "run").exists()
    assert main([*argv, "--option", "recipe.flow=0.9", "rate=1e-3", "average=5"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["recipe"]["flow"] == 0.9
    assert (config["settings"]["rate"], config["settings"]["average"]) == (1e-3, 5.0)
