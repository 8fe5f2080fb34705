"""Text forms of operators and noise: valid ones, extreme ones, and texts that are none."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmurk.errors import InputError
from unmurk.operators import FAMILIES, parse
from unmurk.problem import Problem

from .judge import Mishandled, check_numbers
from .mutate import mutated, odd_text

SHAPES = [(1, 16, 16), (1, 16, 16), (3, 16, 16), (2, 12, 16), (1, 8, 12), (3, 28, 28), (1, 1, 1)]
LARGEST = 2**22  # numbers of a measurement of two small images

GOOD = {
    "keep": ["0.5", "0.9", "1"],
    "seed": ["0", "1", "3"],
    "size": ["3", "5", "3x5", "4"],
    "top": ["0", "2"],
    "left": ["0", "2"],
    "sigma": ["0.5", "1", "1.5", "0.1"],
    "ratio": ["0.25", "0.5", "1"],
    "angle": ["0", "30", "-45"],
    "length": ["3", "5", "7"],
    "factor": ["1", "2", "4"],
    "bits": ["1", "2", "8"],
    "quality": ["10", "50", "90"],
    "chroma": ["4:2:0", "4:4:4"],
    "pad": ["reflect", "circular"],
    "strokes": ["1", "4"],
    "width": ["1", "2.5"],
    "acceleration": ["2", "4"],
    "center": ["0", "0.08"],
    "coils": ["1", "4"],
    "channels": ["1", "2", "3"],
    "angles": ["3", "20", "60"],
    "detectors": ["9", "24"],
    "oversample": ["0", "1", "2"],
    "gain": ["0.01", "0.1"],
    "offset": ["0", "0.05"],
}
EXTREME = [
    "-1",
    "-0.0",
    "1e-320",
    "1e-30",
    "1e-9",
    "0.999999999",
    "1.0000001",
    "1e6",
    "999999",
    "2147483647",
    "2147483648",
    "4294967296",
    "9223372036854775808",
    "99999999999",
    "1e30",
    "1e300",
    "1e308",
    "1e309",
    "-1e300",
    "nan",
    "inf",
    "-inf",
    "infinity",
    "9" * 400,
    "1" + "0" * 5000,
]
FORMS = [
    "",
    " ",
    "+4",
    " 4 ",
    "1_0",
    "0x10",
    "1e1",
    "4.0",
    "\u0664",
    "\uff14",
    "four",
    "None",
    "True",
    "4,",
    "4=4",
    "1j",
    "1.",
    ".5",
    "1e",
    "--1",
    "4\n",
    "\x1b[31m4",
    "4\0",
    "'4'",
    "[4]",
]
SIZES = [
    "4",
    "3x5",
    "1x1",
    "5x5",
    "16x16",
    "0x0",
    "-3x3",
    "3x",
    "x",
    "3x3x3",
    "99999x99999",
    "1x99",
]
WORDS = ["reflect", "circular", "zeros", "4:2:0", "4:4:4", "4:2:2", "", "REFLECT", "\u00df" * 50]


def value(draws: random.Random, kind: Any, folder: Path, key: str, odd: float = 0.1) -> str:
    """The text of an option's value, odd with a probability."""
    if key == "path":
        return path(draws, folder)
    if draws.random() > odd:
        return draws.choice(GOOD.get(key, ["1", "2", "0.5"]))
    chance = draws.random()
    if chance < 0.2:
        return draws.choice(FORMS)
    if chance < 0.25:
        return odd_text(draws)
    if kind is str:
        return draws.choice(WORDS)
    if getattr(kind, "__name__", "") == "size" and chance < 0.6:
        return draws.choice(SIZES)
    return draws.choice(EXTREME)


def path(draws: random.Random, folder: Path) -> str:
    """A file with a mask or a kernel in it, or a path to something else."""
    chance = draws.random()
    if chance < 0.2:
        return draws.choice(
            ["", ".", "/", "nowhere.npy", "a" * 300 + ".npy", "/dev/null", "/dev/zero", "a|b.npy"]
        )
    shape = draws.choice(
        [(16, 16), (3, 3), (2, 2), (9, 9, 1), (3, 16, 16), (1,), (0, 3), (16, 16, 4)]
    )
    numbers = np.random.default_rng(draws.getrandbits(32))
    array = numbers.random(shape) * draws.choice([1, 1, 1e-30, 1e30, -1, 0])
    with np.errstate(all="ignore"):
        array = array.astype(draws.choice(["f4", "f8", "u1", "i8", "?", "c8", "f2", "u8"]))
    if array.dtype.kind == "f" and draws.random() < 0.2:
        array.flat[:1] = draws.choice([np.nan, np.inf])
    name = draws.choice(["m.npy", "m,x.npy", "m=1.npy", "\u00e4 \u4e2d.npy", "m.png"])
    file = folder / name
    with file.open("wb") as stream:
        np.save(stream, array)
    if draws.random() < 0.3:
        file.write_bytes(mutated(draws, file.read_bytes()))
    return name  # the folder is the current one: a text must not depend on where it is


def operator(draws: random.Random, folder: Path) -> str:
    """The text form of an operator."""
    form = draws.choice(list(FAMILIES))
    options = FAMILIES[form].options
    odd = draws.choice([0.0, 0.3, 0.3, 0.6])
    names = [name for name in options if draws.random() < 0.97]
    if form == "inpaint:box":  # a place or a seed, not both
        names = draws.choice([["size"], ["size", "seed"], ["size", "top", "left"], names])
    pairs = [f"{name}={value(draws, options[name], folder, name, odd)}" for name in names]
    chance = draws.random()
    if pairs and chance < 0.02:
        pairs.append(draws.choice(pairs))
    elif chance < 0.04:
        pairs.append(
            draws.choice(["zeta=1", "=", "=1", "size", ",", "sigma=1", "seed=1", "keep=2"])
        )
    elif chance < 0.05:
        pairs *= 100
    return draws.choice([*[","] * 12, ", ", ",,"]).join([form, *pairs])


NOISES = {
    "gaussian": ["sigma"],
    "poisson": ["gain"],
    "poisson-gaussian": ["gain", "sigma"],
    "auto": [],
    "salt": ["amount"],
}


def noise(draws: random.Random, folder: Path) -> str:
    """The text form of a noise."""
    odd = draws.choice([0.0, 0.5, 0.8])
    if draws.random() < 0.2:
        return value(draws, float, folder, "sigma", odd)
    form = draws.choice(list(NOISES))
    names = NOISES[form] + ["offset"] * (draws.random() < 0.3) + ["zeta"] * (draws.random() < 0.05)
    pairs = [f"{name}={value(draws, float, folder, name, odd)}" for name in names]
    return ",".join([form, *pairs, *["auto"] * (draws.random() < 0.05)])


def whole(draws: random.Random, folder: Path) -> tuple[str, str]:
    """An operator and a noise, both as text; one of them or a letter of it may be odd."""
    parts = [operator(draws, folder)]
    if draws.random() < 0.2:
        parts += [operator(draws, folder) for _ in range(draws.choice([1, 1, 2, 5]))]
    if draws.random() < 0.01:
        parts *= draws.choice([100, 1000])
    text, sound = "|".join(parts), noise(draws, folder) if draws.random() < 0.4 else "0.1"
    if draws.random() < 0.08:
        text = mutated(draws, text.encode("utf-8", "replace")).decode("utf-8", "replace")
    if draws.random() < 0.02:
        sound = odd_text(draws)
    return text, sound


def run(draws: random.Random, folder: Path) -> None:
    """Parse a text form, bind it to small images, and apply what it gives."""
    text, sound = whole(draws, folder)
    shape = draws.choice(SHAPES)
    x = torch.rand(2, *shape)
    problem = Problem(text, sound)
    if parse(problem.operator.spec) != problem.operator:
        raise Mishandled(f"{text[:80]!r} is not read back from its own text form")
    apply(problem.bind([0, 1], shape), x)


def apply(problem: Problem, x: torch.Tensor) -> None:
    """Measure images, and map the measurements back in each way that there is."""
    y = problem.simulate(x, seed=1)
    if y.numel() > LARGEST:
        raise Mishandled(f"a measurement of {y.numel()} numbers of {x.numel()}")
    check_numbers("the measurement", y)
    for name, back in ways_back(problem, x, y).items():
        try:
            found = back()
        except InputError:
            if name in ("A_adjoint", "A_dagger") and problem.linear:
                raise Mishandled(f"{name} is refused although A is linear") from None
            continue
        check_numbers(name, found)


def ways_back(
    problem: Problem, x: torch.Tensor, y: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """What solvers ask of a problem."""
    return {
        "A_adjoint": lambda: problem.A_adjoint(y),
        "A_dagger": lambda: problem.A_dagger(y),
        "prox": lambda: problem.prox(x, y, 0.1),
        "log_likelihood": lambda: problem.log_likelihood(x, y).clamp(-1e6, 1e6),
        "A_vjp": lambda: problem.operator.A_vjp(x, problem.residual(x, y)),
    }
