"""Every option has bounds, declared where it is: out of them it is one line."""

import re
from dataclasses import fields, replace
from typing import get_type_hints

import numpy as np
import pytest
import torch

import unmurk
from unmurk.bounds import (
    Choice,
    File,
    Option,
    Real,
    Sides,
    Whole,
    check_fields,
    check_total_memory,
)
from unmurk.cli.commands import COMMANDS
from unmurk.errors import InputError
from unmurk.noise import Gaussian, PoissonGaussian, as_noise
from unmurk.operators import FAMILIES, Compose, parse
from unmurk.operators.weighted import Weighted
from unmurk.problem import Problem
from unmurk.training.trainer import Settings

NEEDED = {
    "blur:gaussian": {"sigma": 1},
    "blur:uniform": {"size": 3},
    "blur:file": {"path": "k.npy"},
    "blur:anisotropic": {"sigma": 1, "ratio": 0.5},
    "blur:motion": {"length": 3},
    "inpaint:random": {"keep": 0.5},
    "inpaint:box": {"size": 3},
    "inpaint:file": {"path": "m.npy"},
    "inpaint:freeform": {"strokes": 1, "width": 2},
    "mri:file": {"path": "scan.h5"},
    "sr:average": {"factor": 2},
    "sr:bicubic": {"factor": 2},
    "cs:structured": {"ratio": 0.5},
    "jpeg": {"quality": 50},
}
"""What an operator cannot do without."""

STRANGE = (
    "1e300 -1e300 nan inf -inf 9223372036854775808 99999999999 １ ٣ 1_0 0x1 1e 1,5 - +".split()
)
STRANGE += ["", "1" * 400, "1e999999", "1.5.2", "true", "None", "１x１", "3x", "x3", "1x2x3"]
NUMBERS = [
    (form, name, option)
    for form, family in FAMILIES.items()
    for name, option in family.options.items()
    if isinstance(option, Real | Whole | Sides)
]


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    assert all(part in text for part in parts), text


def text_of(form, **values):
    kept = {**NEEDED.get(form, {}), **values}
    return ",".join([form, *(f"{name}={value}" for name, value in kept.items())])


@pytest.mark.parametrize("form, name, option", NUMBERS)
def test_every_number_of_every_operator_is_bounded(form, name, option):
    """As text and in Python: just outside, the usual traps, and the two ends, which are taken."""
    family, needed = FAMILIES[form], NEEDED.get(form, {})
    whole = isinstance(option, Whole | Sides)
    outside = [option.least - 1, option.most + 1 if whole else option.most * 1.01 + 1]
    inside = {"99999999999"} if option.most > 1e12 else set()
    for text in [*(t for t in STRANGE if t not in inside), *map(str, outside)]:
        with pytest.raises(InputError) as error:
            parse(text_of(form, **{name: text}))
        if text and "," not in text:
            one_line(error, form, f"{name} must be {option.bounds}, got ")
    for value in [*outside, "1", float("nan"), float("inf"), 10**400, [1], True, None, 2 + 1j]:
        if value is None and option.optional:
            continue
        with pytest.raises(InputError) as error:
            family(**{**needed, name: value})
        one_line(error, form, name)
    if isinstance(option, Real):
        for text in ("-0", "-0.0"):
            if option.least <= 0:
                assert str(getattr(parse(text_of(form, **{name: text})), name)) == "0.0"


@pytest.mark.parametrize("form, name, option", NUMBERS)
def test_ends_are_taken(form, name, option):
    for end in (option.least, option.most):
        others = {"top": {"left": 0}, "left": {"top": 0}}.get(name, {})
        if (form, name) in {("mri:cartesian", "acceleration"), ("mri:cartesian", "center")}:
            others = {"center": 0} if name == "acceleration" else {"acceleration": 1}
        if form == "blur:motion" and name == "length" and end > 1000:
            others = {"angle": 0}
        found = getattr(parse(text_of(form, **{name: end}, **others)), name)
        assert found == ((end, end) if isinstance(option, Sides) else end)
        assert type(found) is (tuple if isinstance(option, Sides) else type(found))


@pytest.mark.parametrize("form", FAMILIES)
def test_docstrings_state_the_bounds(form):
    text = " ".join((FAMILIES[form].__doc__ or "").split()).lower()
    for name, option in FAMILIES[form].options.items():
        assert isinstance(option, Option) and f"{name}: " in text
        assert option.bounds.split(",")[0].lower() in text, (name, option.bounds)


def annotated(kind):
    hints = get_type_hints(kind, include_extras=True)
    return {
        f.name: found[0]
        for f in fields(kind)
        if (
            found := [
                m for m in getattr(hints[f.name], "__metadata__", ()) if isinstance(m, Option)
            ]
        )
    }


def test_help_states_the_bounds(capsys):
    from unmurk.cli import main as cli

    for name, kind in COMMANDS.items():
        assert cli.main([name, "--help"]) == 0
        # words are wrapped in a box
        shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        for option in annotated(kind).values():
            assert option.bounds in shown, (name, option.bounds)


def test_settings_state_and_hold_their_bounds():
    text = " ".join((Settings.__doc__ or "").split())
    options = annotated(Settings)
    assert set(options) == {"kimg", "batch", "rate", "average", "seed"}
    for name, option in options.items():
        assert option.bounds in text, name
        for value in (option.least - 1, option.most * 2 + 1, float("nan"), "7"):
            with pytest.raises(InputError, match=f"{name} must be"):
                check_fields(replace(Settings(), **{name: value}))
        check_fields(replace(Settings(), **{name: option.least}))


COMMAND_LINES = [
    (["sample", "--prior", "digits", "-n", "100000000000"], "--n must be"),
    (["sample", "--prior", "digits", "-n", "0"], "--n must be"),
    (["sample", "--prior", "digits", "--steps", "1"], "--steps must be"),
    (["sample", "--prior", "digits", "--seed", "-1"], "--seed must be"),
    (["sample", "--prior", "digits", "--seed", "9223372036854775808"], "--seed must be"),
    (["restore", "y.npy", "--prior", "digits", "--samples", "1000000000"], "--samples must be"),
    (["restore", "y.npy", "--prior", "digits", "--samples", "3"], "--samples must be an even"),
    (["restore", "y.npy", "--prior", "digits", "--tile", "0"], "--tile must be"),
    (["restore", "y.npy", "--prior", "digits", "--noise", "100"], "noise must be"),
    (["solve", "--samples", "1000000000"], "--samples must be"),
    (["solve", "--restarts", "1000000000"], "--restarts must be"),
    (["solve", "--steps", "1000000000"], "--steps must be"),
    (["solve", "--option", "relax=1_0"], "write it as float"),
    (["solve", "--option", "relax=１"], "write it as float"),
    (["learn", "y.npy", "--noise", "0.1", "--kimg", "nan"], "--kimg must be"),
    (["learn", "y.npy", "--noise", "0.1", "--kimg", "1e300"], "--kimg must be"),
    (["corrupt", "y.npy", "--noise", "poisson,gain=1e-30"], "gain must be"),
    (["corrupt", "y.npy", "--operator", "ct:parallel,angles=99999999999"], "angles must be"),
    (["corrupt", "y.npy", "--operator", "ct:parallel,detectors=999999"], "detectors must be"),
    (["corrupt", "y.npy", "--operator", "blur:motion,length=2147483648"], "length must be"),
    (["corrupt", "y.npy", "--operator", "blur:motion,length=1024"], "1024"),
    (["corrupt", "y.npy", "--operator", "phase:fourier,oversample=1e300"], "oversample must be"),
]


@pytest.mark.parametrize("argv, part", COMMAND_LINES, ids=lambda v: " ".join(v)[:50])
def test_commands_refuse_in_one_line(argv, part, tmp_path, capsys, monkeypatch):
    from unmurk.cli import main as cli

    monkeypatch.chdir(tmp_path)
    np.save("y.npy", np.full((2, 28, 28), 0.5, np.float32))
    if argv[0] == "solve":
        argv = [argv[0], "y.npy", "--prior", "digits", "--operator", "identity", *argv[1:]]
        argv += ["--noise", "0.1"]
    assert cli.main([*argv, "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unmurk: ") and part in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["y.npy"]


COSTS = [
    ("ct:parallel,angles=10000", (1, 512, 512), "angles=10000", "87.9 GiB"),
    ("ct:parallel,angles=10000,detectors=65536", (1, 4, 4), "detectors=65536", "2.45 GiB"),
    ("mri:cartesian,coils=256,channels=1", (1, 640, 640), "coils=256", "4.69 GiB"),
    ("cs:structured,ratio=0.5", (1, 65536, 65536), "65536x65536", "96 GiB"),
    ("phase:fourier,oversample=32", (1, 4096, 4096), "oversample=32", "20.2 GiB"),
    ("sr:bicubic,factor=1", (1, 16384, 16384), "factor=1", "6 GiB"),
    ("blur:motion,length=1024", (1, 64, 64), "length=1024", "out of proportion"),
    ("blur:nonlinear,length=1000", (1, 64, 64), "length=1000", "out of proportion"),
    ("blur:anisotropic,sigma=256,ratio=1", (1, 64, 64), "sigma=256", "out of proportion"),
    ("blur:motion,length=1024,angle=45", (1, 65536, 65536), "length=1024", "multiplications"),
]


@pytest.mark.parametrize("form, shape, number, size", COSTS, ids=lambda v: str(v)[:40])
def test_what_costs_too_much_together_is_refused_before_it_is_paid(form, shape, number, size):
    for use in (
        lambda op: op.bind([0], shape),
        lambda op: parse(f"{form}|identity").bind([0], shape),
        lambda op: Problem(op, 0.1).bind([0], shape),
    ):
        with pytest.raises(InputError) as error:
            use(parse(form))
        one_line(error, number, size)


def test_small_images_are_not_asked_to_grow():
    """Four super-resolutions in a row would make an image of 10^18 pixels of one of 28x28."""
    op = Compose(*(parse("sr:average,factor=256") for _ in range(4)))
    with pytest.raises(InputError, match="above the limit of 2 GiB"):
        op.A_dagger(torch.zeros(1, 1, 28, 28))


def test_results_that_no_memory_holds(monkeypatch):
    prior = unmurk.Prior.load("digits")
    with pytest.raises(InputError, match="images of 1x28x28 would take"):
        prior.sample(10**12)
    with pytest.raises(InputError, match="n is 0"):
        prior.sample(0)
    y = torch.rand(1, 1, 28, 28)
    for name, value in {"samples": 10**9, "batch": 0, "restarts": 10**9}.items():
        with pytest.raises(InputError, match=f"{name} must be"):
            unmurk.solve(y, Problem("identity", 0.1), prior, **{name: value})
    posterior = unmurk.Posterior.load("digits")
    for n in (0, 3, 10**9):
        with pytest.raises(InputError, match="draws must be an even number from 2 to 100000"):
            posterior.mean_std(y, Problem("identity", 0.1), n)
    with pytest.raises(InputError, match="draws of 1 images would take"):
        posterior.sample(y, Problem("identity", 0.1), 10**12)
    check_total_memory("nothing", 1, "")


def test_chains_and_texts_end():
    with pytest.raises(InputError, match="at most 16 operators, got 17"):
        parse("|".join(["identity"] * 17))
    deep = parse("identity|identity")
    for _ in range(14):
        deep = Compose(deep, parse("identity"))
    with pytest.raises(InputError, match="at most 16"):
        Compose(deep, parse("identity"))
    with pytest.raises(InputError, match="at most 16384 characters, this one 300017"):
        parse("blur:file,path=ab" + "x" * 300_000)
    for text in ("blur:gaussian,sigma=1,sigma=1", "blur:gaussian,wide=1", "b" * 9000):
        with pytest.raises(InputError) as error:
            parse(text)
        one_line(error)


def test_weights_are_positive_and_never_nest():
    inner = Weighted(parse("identity"), torch.full((1, 1, 2, 2), 2.0))
    outer = Weighted(inner, torch.full((1, 1, 2, 2), 3.0))
    assert outer.operator == parse("identity")
    assert torch.equal(outer.A(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 6.0))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite and > 0"):
            Weighted(parse("identity"), torch.full((1, 1, 2, 2), bad))


NOISES = ["11", "1e300", "nan", "inf", "-0.1", "1e-30", "1_0", "１", "gaussian,sigma=100"]
NOISES += [
    "poisson,gain=1e-30",
    "poisson,gain=0",
    "poisson,gain=11",
    "poisson,gain=9223372036854775808",
]
NOISES += ["poisson-gaussian,gain=0.1,sigma=11", "poisson,gain=0.1,offset=-1", "poisson,gain=１"]
NOISES += ["poisson,gain=0.1,offset=11", "poisson,gain=0.1,gain=0.1", "poisson," + "x" * 9000]


@pytest.mark.parametrize(
    "noise",
    [*NOISES, 11, -1, 1e-30, True, None, "x", [0.1], 10**400, 1j],
    ids=lambda v: str(v)[:20],
)
def test_noise_is_bounded(noise):
    if noise is None:
        assert as_noise("-0") == Gaussian(0.0) and str(as_noise("-0").sigma) == "0.0"
        assert as_noise("10").sigma == 10 and as_noise(np.float32(0.25)).sigma == 0.25
        return
    with pytest.raises(InputError) as error:
        Problem("identity", noise)
    one_line(error, "noise")


@pytest.mark.parametrize("kind", [Gaussian, PoissonGaussian])
def test_noise_states_its_bounds(kind):
    import inspect

    text = " ".join(inspect.getsource(kind).split())
    for option in kind.options.values():
        assert option.bounds in text


def restored(noise, tmp_path, capsys):
    from unmurk.cli import main as cli

    np.save(tmp_path / "y.npy", np.full((2, 28, 28), 0.5, np.float32))
    argv = ["restore", str(tmp_path / "y.npy"), "--prior", "digits", "--samples", "2"]
    code = cli.main([*argv, "--noise", noise, "--out", str(tmp_path / f"{noise}.npy")])
    return code, capsys.readouterr().err


def test_a_noise_that_the_flow_has_not_met_is_named(tmp_path, capsys):
    """The digits' posterior was trained with noise 0.3."""
    assert restored("0.3", tmp_path, capsys) == (0, "")
    for noise in ("0.6", "0.01", "0"):
        code, said = restored(noise, tmp_path, capsys)
        assert code == 0 and f"trained with noise 0.3, and this is {noise}:" in said
    code, said = restored("5", tmp_path, capsys)
    assert code == 2 and "and this is 5: use `unmurk solve`" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "5.npy").exists()


def test_the_declarations_themselves():
    assert Whole(1, 9).check("n", np.int64(3)) == 3 and Whole(1, 9).check("n", 3.0) == 3
    assert Whole(1, 9).check("n", torch.tensor(3)) == 3
    assert Real(0, 1).check("x", np.float32(0.5)) == 0.5 and Real(0, 1).parse("x", ".5") == 0.5
    assert Sides(1, 9).parse("s", "3x5") == (3, 5) and Sides(1, 9).check("s", [3, 5]) == (3, 5)
    assert Choice(("a", "b")).check("c", "a") == "a" and File().check("f", "a,b.png") == "a,b.png"
    for option, value in [
        (Choice(("a",)), "A"),
        (File(), ""),
        (File(), "a\0b"),
        (File(), "x" * 5000),
    ]:
        with pytest.raises(InputError) as error:
            option.check("it", value)
        one_line(error, "it must be")
