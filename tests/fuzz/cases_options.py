"""Option sets of every command, on tiny data: valid ones, extreme ones, and odd names of files.

Values are tiny or absurd, nothing between: what is absurd must be refused at once.
"""

import contextlib
import dataclasses
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unmurk.solvers import METHODS

from . import cases_runs
from .cases_runs import room
from .cases_specs import EXTREME, FORMS, noise, operator
from .commands import call
from .mutate import ODD_TEXTS

SECONDS = 10.0  # of CPU time: some of this is real work
ABSURD = [*EXTREME, *FORMS, "1000000000", "100000000000", "-5", "0"]
DATA = [
    "in/pics",
    "in/pics",
    "in/pics",
    "in/pics/1.png",
    "in/a.npy",
    "in/b.npz",
    "in/c-idx3-ubyte",
]
DATA += ["in/rgb.npy", "in/mixed", "in/empty", "in/nowhere", "in/text.png", "in/link", "in/t.tif"]
WRITTEN = ["out", "out", "out", "out.npy", "out.npz", "new/deep/out", "out.png", "out.tif", "o/.."]
"""Where results go. Nothing here or among the odd texts may lie outside of the case's folder."""
OVER = [
    "in/pics",
    "in",
    "in/a.npy",
    "in/pics/1.png",
    "in/../in/pics",
    "in/link",
    "in/text.png",
    ".",
]
PRIORS = [
    "RUN",
    "RUN",
    "RUN",
    "RUN",
    "RUN",
    "RUN/prior",
    "RUN/posterior",
    "in/pics",
    "nobody/none",
]
PRIORS += [
    "adm:ffhq256:in/a.npy",
    "adm:zeta:x",
    "adm::",
    "RUN/config.json",
    "nowhere",
    "adm:ffhq256:",
]


def prepare() -> None:
    """Learn the run that commands need, and put something quick in the place of the long ones."""
    from unmurk.cli import demo

    if not room().exists():
        cases_runs.prepare()

    def short(out: Path, seed: int = 0) -> dict[str, Any]:
        out.mkdir(parents=True, exist_ok=True)
        return {"seconds": 1.0, "report": out / "report.html"}

    demo.run = short  # type: ignore[assignment]


def run(draws: random.Random, folder: Path) -> None:
    """Run one command with options of all kinds."""
    Path("here").mkdir()
    os.chdir("here")
    make_inputs()
    name = draws.choices(list(COMMANDS), WEIGHTS)[0]
    argv = [name, *COMMANDS[name](draws)]
    if draws.random() < 0.03:
        argv.insert(
            draws.randrange(len(argv) + 1), draws.choice([*ODD_TEXTS, "--zeta", "--json=1"])
        )
    with ranks(draws) if name in ("restore", "solve", "sample") else contextlib.nullcontext():
        call([a for a in argv if "\0" not in a], Path("in"), room() / "whole")


@contextlib.contextmanager
def ranks(draws: random.Random) -> Iterator[None]:
    """Sometimes variables of a launcher that make no sense."""
    odd = [
        {"LOCAL_RANK": "x"},
        {"RANK": "3", "WORLD_SIZE": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
    ]
    chosen = draws.choice(odd) if draws.random() < 0.03 else {}
    before = dict(os.environ)
    os.environ.update(chosen)
    try:
        yield
    finally:
        for key in chosen:
            os.environ.pop(key)
        os.environ.update(before)


def make_inputs() -> None:
    """Images of some kinds, and what are none."""
    numbers = np.random.default_rng(0)
    shutil.copytree(room() / "data", "in/pics")
    Path("in/empty").mkdir()
    shutil.copytree("in/pics", "in/mixed")
    Image.fromarray(np.zeros((16, 20), np.uint8)).save("in/mixed/w.png")
    Path("in/mixed/x.png").write_text("no picture")
    Path("in/text.png").write_text("no picture")
    os.symlink("pics", "in/link")
    values = numbers.random((3, 16, 16)).astype(np.float32)
    np.save("in/a.npy", values)
    np.savez("in/b.npz", images=values)
    np.save("in/rgb.npy", numbers.random((2, 3, 16, 16)).astype(np.float32))
    np.save("in/s.npy", numbers.random((4, 3, 16, 16)).astype(np.float32))
    head = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 16, 0, 0, 0, 16])
    Path("in/c-idx3-ubyte").write_bytes(head + (values * 255).astype(np.uint8).tobytes())
    Image.fromarray((values[0] * 65535).astype(np.uint16)).save("in/t.tif")


# -- options -------------------------------------------------------------------------------------


def pick(
    draws: random.Random, good: list[str], odd: list[str] = ABSURD, chance: float = 0.06
) -> str:
    """A good value, or now and then an odd one."""
    return draws.choice(odd if draws.random() < chance else good)


def some(draws: random.Random, **values: list[str]) -> list[str]:
    """Some options, each with one of its values; an empty list makes a flag."""
    found = []
    for name, good in values.items():
        if draws.random() < 0.5:
            found += [f"--{name.replace('_', '-')}", *([pick(draws, good)] if good else [])]
    return found


def data(draws: random.Random) -> str:
    """What is read: mostly a folder of pictures."""
    good = ["in/pics", "in/pics", "in/pics", "in/pics/1.png", "in/a.npy", "in/b.npz", "in/link"]
    return draws.choice(ODD_TEXTS) if draws.random() < 0.04 else pick(draws, good, DATA, 0.15)


def out(draws: random.Random) -> list[str]:
    """Where results go, now and then over an input or under an odd name."""
    chance = draws.random()
    odd = [text for text in ODD_TEXTS if not text.startswith("/")]
    place = draws.choice(OVER if chance < 0.06 else odd if chance < 0.14 else WRITTEN)
    return ["--out", place]


def prior(draws: random.Random) -> list[str]:
    """The prior's option."""
    text = pick(draws, ["RUN"], [*PRIORS, *ODD_TEXTS], 0.1)
    return ["--prior", text.replace("RUN", str(room() / "whole"))]


def physics(draws: random.Random) -> list[str]:
    """Operator and noise, mostly simple ones."""
    simple = ["identity", "inpaint:box,size=4", "sr:average,factor=2", "blur:gaussian,sigma=1"]
    text = operator(draws, Path()) if draws.random() < 0.1 else draws.choice(simple)
    sound = (
        noise(draws, Path()) if draws.random() < 0.1 else draws.choice(["0.1", "0.1", "0.3", "0"])
    )
    return ["--operator", text, "--noise", sound]


def _is_hours(text: str) -> bool:
    """Whether a budget is one that may be asked for, only not here."""
    try:
        return 0.2 < float(text) <= 1e7
    except ValueError:
        return False


def learn(draws: random.Random) -> list[str]:
    """The shortest of runs."""
    methods = ["flowdiff", "em", "ambient", "sure", "ambientflow", "noisy", "clean"]
    odd = [text for text in ABSURD if not _is_hours(text)]
    argv = [data(draws), *out(draws), "--kimg", pick(draws, ["0.032"], odd), "--precision", "fp32"]
    argv += physics(draws) if draws.random() < 0.3 else ["--noise", pick(draws, ["0.2"])]
    more = {"method": methods, "seed": ["1"], "simulate": [], "skip_bad": [], "json": []}
    more |= {"solver": ["diffpir", "ddnm"], "e_step": ["prior"], "network": ["tiny"]}
    return argv + some(draws, **more)


def restoring(draws: random.Random) -> list[str]:
    """What `restore` and `solve` share."""
    argv = [data(draws), *prior(draws), *out(draws)]
    argv += some(draws, seed=["1"], skip_bad=[], json=[], samples=["2"], tile=["16", "8"])
    if draws.random() < 0.15:
        argv += ["--range", pick(draws, ["0", "10"], chance=0.2), pick(draws, ["255"], chance=0.2)]
    return argv


def restore(draws: random.Random) -> list[str]:
    """In one pass."""
    return (
        restoring(draws) + (physics(draws) if draws.random() < 0.3 else []) + some(draws, std=[])
    )


def solve(draws: random.Random) -> list[str]:
    """By a solver, of two steps."""
    method = pick(draws, list(METHODS), ["auto", "red-diff:paper", *ODD_TEXTS])
    argv = restoring(draws) + physics(draws) + ["--method", method, "--steps", pick(draws, ["2"])]
    argv += some(draws, init=["pinv", "posterior"]) if draws.random() < 0.3 else []
    argv += ["--restarts", pick(draws, ["1", "2"])] if draws.random() < 0.1 else []
    if draws.random() < 0.3 and method in METHODS:
        field = draws.choice(dataclasses.fields(METHODS[method]))  # type: ignore[arg-type]
        usual = "2" if type(field.default) is int else str(field.default).lower()
        value = usual if draws.random() < 0.3 else draws.choice(ABSURD)
        argv += ["--option", f"{field.name}={value}"]
    return argv


def sample(draws: random.Random) -> list[str]:
    """One or two images."""
    argv = [*prior(draws), *out(draws), "-n", pick(draws, ["1", "2"])]
    return argv + ["--steps", pick(draws, ["2", "3"])] + some(draws, seed=["1"], json=[])


def corrupt(draws: random.Random) -> list[str]:
    """With any operator."""
    argv = [data(draws), *out(draws), *physics(draws)]
    return argv + some(draws, seed=["1"], skip_bad=[], json=[])


def evaluate(draws: random.Random) -> list[str]:
    """Two sets, mostly the same."""
    argv = [data(draws), data(draws)] + some(draws, level=["0.9", "0.5"], json=[])
    odd = ["in/a.npy", "in/pics", "in/nowhere.npy", "in/text.png", *ODD_TEXTS]
    return argv + (
        ["--samples", pick(draws, ["in/s.npy"], odd, 0.4)] if draws.random() < 0.4 else []
    )


def certify(draws: random.Random) -> list[str]:
    """Of a solver that there is not."""
    return ["--methods", "red-diff", pick(draws, ["zeta"], ODD_TEXTS), *some(draws, seed=["1"])]


def report(draws: random.Random) -> list[str]:
    """Of a run, or of none."""
    shutil.copytree(room() / "cut", "run")
    return [pick(draws, ["run"], [*DATA, *ODD_TEXTS], 0.5), *some(draws, json=[])]


def demo(draws: random.Random) -> list[str]:
    """Its options alone."""
    return [*out(draws), *some(draws, seed=["1"]), "--json"]


COMMANDS = {
    "learn": learn,
    "restore": restore,
    "solve": solve,
    "sample": sample,
    "corrupt": corrupt,
    "evaluate": evaluate,
    "certify": certify,
    "report": report,
    "demo": demo,
}
WEIGHTS = [3, 4, 5, 2, 4, 2, 0.5, 1, 0.5]
