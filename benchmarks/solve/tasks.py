"""Images, tasks and solver settings of the comparison of solvers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError
from unmurk.io.images import load_images, read_idx
from unmurk.io.packaged import ASSETS
from unmurk.problem import Problem
from unmurk.solvers import METHODS

__all__ = [
    "LEARNED_AT",
    "NONLINEAR",
    "PAPER",
    "PROFILES",
    "RESTARTS",
    "PartName",
    "PriorName",
    "Profile",
    "ProfileName",
    "SetName",
    "Task",
    "images",
    "labels",
    "operators",
    "part_of",
    "released_start",
    "solver_options",
    "tasks",
]

SetName = Literal["digits", "nuclei"]
PriorName = Literal["clean", "flowdiff"]
PartName = Literal["linear", "nonlinear"]
ProfileName = Literal["small", "full", "toy"]
LEARNED_AT = {"digits": 0.3, "nuclei": 0.2}  # noise of the images that flowdiff learns from
HOLE = {"digits": 10, "nuclei": 24}
NOISES = (0.05, 0.2, 0.01)
PAPER = "red-diff paper"
NONLINEAR = {
    "phase:fourier,oversample=2": 0.01,
    "hdr:clip,factor=2": 0.01,
    "blur:nonlinear,length=7": 0.01,
    "jpeg,quality=10": 0.01,
    "quantise,bits=2": 0.01,
}
"""Nonlinear operators, and the noise level of each."""
RESTARTS = {"phase:fourier,oversample=2": 2}
"""Runs of each image, for every solver, where the result depends on the draw. The run with the
lowest chi-square is kept."""


@dataclass(frozen=True)
class Profile:
    """How large the comparison is.

    Attributes:
        network: Preset of the networks.
        batch: Images in a training step.
        kimg: Thousands of images seen by the (clean, flowdiff) prior, for digits and nuclei.
        images: Images restored, of digits and of nuclei.
        noises: Noise levels of the measurements of each set.
        slow: Number of network evaluations above which a solver runs at the first noise level
            only.
        left_out: Solvers that do not run because they take too long.
        rare: Solvers that run on digits with the flowdiff prior only.
    """

    network: str
    batch: int
    kimg: dict[SetName, tuple[float, float]]
    images: dict[SetName, int]
    noises: dict[SetName, tuple[float, ...]]
    slow: int
    left_out: tuple[str, ...] = ()
    rare: tuple[str, ...] = ()


PROFILES = {
    "small": Profile(
        "tiny",
        32,
        {"digits": (36.0, 102.0), "nuclei": (20.0, 45.0)},
        {"digits": 16, "nuclei": 4},
        {"digits": NOISES, "nuclei": NOISES[:1]},  # a level of nuclei takes hours
        150,
        left_out=("tds",),  # 320 evaluations with several gradients each
        rare=("dps",),  # 1000
    ),
    "full": Profile(
        "small",
        128,
        {"digits": (2000.0, 3000.0), "nuclei": (1000.0, 1500.0)},
        {"digits": 256, "nuclei": 50},
        {"digits": NOISES, "nuclei": NOISES},
        10**9,
    ),
    "toy": Profile(
        "tiny",
        8,
        {"digits": (0.016, 0.032), "nuclei": (0.008, 0.016)},
        {"digits": 2, "nuclei": 2},
        {"digits": NOISES[:1], "nuclei": NOISES[:1]},
        0,
        left_out=("tds", "dps", "pnp-dm", "snips"),
    ),
}


def operators(name: SetName) -> tuple[str, ...]:
    """The linear operators of a set, as text."""
    return (
        "identity",
        f"inpaint:box,size={HOLE[name]}",
        "inpaint:random,keep=0.4",
        "sr:average,factor=4",
        "blur:gaussian,sigma=1.5",
        "blur:motion,length=9,angle=30",
    )


def part_of(operator: str) -> PartName:
    """The part of the comparison that an operator belongs to."""
    return "nonlinear" if operator in NONLINEAR else "linear"


def images(name: SetName, part: Literal["train", "test"]) -> Tensor:
    """The packaged clean images (N, 1, H, W) in [0, 1]."""
    test = {"digits": "digits:test", "nuclei": "nuclei:val"}
    return load_images(name if part == "train" else test[name]).images


def labels(count: int) -> Tensor:
    """The classes of the first test digits, (count,)."""
    return torch.from_numpy(read_idx(ASSETS / "digits" / "test.idx1-ubyte.gz").copy())[:count]


@dataclass(frozen=True)
class Task:
    """A row: one solver on one problem with one prior."""

    set: SetName
    prior: PriorName
    operator: str
    noise: float
    method: str

    @property
    def file(self) -> str:
        """The name of its files, without suffix."""
        text = "-".join((self.set, self.prior, self.operator, f"{self.noise:g}", self.method))
        return "".join(c if c.isalnum() or c in "-.=" else "_" for c in text)


def tasks(
    profile: Profile,
    parts: tuple[PartName, ...],
    sets: tuple[SetName, ...],
    priors: tuple[PriorName, ...],
    methods: tuple[str, ...] = (),
    noises: tuple[float, ...] = (),
) -> Iterator[Task]:
    """The rows of a profile: the linear tasks in the order of the noise levels, then the others.

    The nonlinear tasks are digits with the flowdiff prior, for the solvers that do not require a
    linear operator.

    Raises:
        InputError: A method is unknown.
    """
    known = (*METHODS, PAPER)
    unknown = [m for m in methods if m not in known]
    if unknown:
        raise InputError(f"method '{unknown[0]}' is unknown: choose from {', '.join(known)}")
    wanted = methods or tuple(m for m in known if m not in profile.left_out)
    if "linear" in parts:
        levels = dict.fromkeys(noise for name in sets for noise in profile.noises[name])
        for noise in noises or levels:
            for name in sets:
                if not noises and noise not in profile.noises[name]:
                    continue
                for operator in operators(name):
                    for prior in priors:
                        for method in wanted:
                            common = (name, prior) == ("digits", "flowdiff")
                            if common or methods or method not in profile.rare:
                                yield Task(name, prior, operator, noise, method)
    if "nonlinear" in parts and "digits" in sets and "flowdiff" in priors:
        for operator, noise in NONLINEAR.items():
            for method in wanted:
                if method == PAPER or METHODS[method].requires != "linear":
                    yield Task("digits", "flowdiff", operator, noise, method)


def solver_options(method: str, operator: str, noise: float) -> dict[str, Any]:
    """Method and options of a row: the defaults, or the released settings for the paper preset.

    The released code of RED-diff (Mardani et al., 2023, arXiv 2305.04391) has lr 0.25 for
    inpainting, with lam 1 if the noise is at least 0.05, lr 0.1 for super-resolution, and lr 0.5
    for blurs and nonlinear operators; lam is 0.25 elsewhere. It has no settings for denoising,
    which uses those of inpainting.
    """
    runs = {"restarts": RESTARTS[operator]} if operator in RESTARTS else {}
    if method != PAPER:
        return {"method": method, **runs}
    family = operator.split(":")[0]
    lr = {"inpaint": 0.25, "identity": 0.25, "sr": 0.1}.get(family, 0.5)
    lam = 1.0 if family in ("inpaint", "identity") and noise >= 0.05 else 0.25
    return {"method": "red-diff", "preset": "paper", "lr": lr, "lam": lam, **runs}


def released_start(task: Task, problem: Problem, y: Tensor) -> Tensor | None:
    """The initial image of the released solvers for a nonlinear A, (B, 1, H, W); else None.

    The released RED-diff starts from the center of :math:`|F^{-1} y|` for Fourier magnitudes, from
    half the contrast for HDR (:math:`u = y_u / 2`, so :math:`x = y / 2 + 1/4`), and from y for the
    other operators. Restarts have the same initial image and differ by their noise alone.
    """
    if task.method not in (PAPER, "hrdis") or part_of(task.operator) == "linear":
        return None
    family = task.operator.split(":")[0]
    if family == "phase":
        wide = torch.fft.ifft2(torch.fft.ifftshift(y, dim=(-2, -1)), norm="ortho")
        wide = torch.fft.fftshift(wide, dim=(-2, -1)).abs()
        height, width = problem.operator.x_shape(y.shape[1:])[-2:]
        down, across = ((n - m) // 2 for n, m in zip(y.shape[-2:], (height, width), strict=True))
        return F.pad(wide, (-across, -across, -down, -down))
    return y / 2 + 0.25 if family == "hdr" else y
