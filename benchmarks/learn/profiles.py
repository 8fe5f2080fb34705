"""Rows of the comparison of learning methods, and their budgets in each profile."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from benchmarks.learn.sets import SETS, SetName
from unmurk.solvers import Draws
from unmurk.training import METHODS, Recipe, Rounds

__all__ = [
    "CLEAN",
    "FEW",
    "FEW_CLEAN",
    "PROFILES",
    "ROWS",
    "STARTED",
    "Plan",
    "Profile",
    "ProfileName",
    "RowName",
    "absent_reason",
    "learner_options",
    "method",
]

ProfileName = Literal["small", "long", "full", "toy"]
RowName = Literal[
    "noisy",
    "elbo",
    "mean",
    "ambient",
    "sure",
    "ambientflow",
    "em",
    "diffem",
    "flowdiff",
    "flowdiff_generic",
    "flowdiff_clean",
    "clean",
]
ROWS: dict[RowName, str] = {
    "noisy": "noisy",
    "elbo": "flowdiff --objective elbo",
    "mean": "R2R pre-training alone",
    "ambient": "ambient",
    "sure": "sure",
    "ambientflow": "ambientflow",
    "em": "em",
    "diffem": "em --e-step conditional",
    "flowdiff": "flowdiff",
    "flowdiff_generic": "flowdiff --start generic",
    "flowdiff_clean": "flowdiff --clean",
    "clean": "clean",
}
"""The rows and their labels."""
assert tuple(ROWS) == get_args(RowName)
CLEAN = "clean"
"""The only row that learns from clean images alone."""
FEW = "flowdiff_clean"
"""The only other row that sees clean images, as many as FEW_CLEAN, beside all measurements."""
FEW_CLEAN = 50
STARTED = "flowdiff_generic"
"""The only row that starts from the packaged model; all others start from nothing."""
PARTS = ("elbo", "mean")  # parts of flowdiff, shown on digits


@dataclass(frozen=True)
class Plan:
    """How large the comparison is on one set.

    Attributes:
        kimg: Thousands of images seen by each row; "" is for the rows that are not named.
        batch: Images in a step.
        train: Number of training images, the first of the set.
        held: Number of test images restored.
        reference: Number of clean test images that are compared with samples.
        samples: Samples of each distance.
        tasks: Held-out images restored on each downstream task.
        levels: Noise levels of the prior's sampler.
        steps: Noise levels of `red-diff` on downstream tasks.
        recipe: Schedule of `flowdiff`; without E-step and ambient target, of `mean`.
        rounds: Schedule of `em`.
        e_step: Options of `mmps`, with which `em` draws if A is not the identity.
    """

    kimg: dict[str, float]
    batch: int
    train: int
    held: int
    reference: int
    samples: int
    tasks: int
    levels: int = 12
    steps: int = 50
    recipe: Recipe = Recipe()
    rounds: Rounds = Rounds()
    e_step: dict[str, int] = field(default_factory=dict)

    def budget(self, row: RowName) -> float:
        """The kimg of a row; a start and a few clean images change no row's cost."""
        name = "flowdiff" if row in (STARTED, FEW) else row
        return self.kimg.get(name, self.kimg.get("", 0.0))


@dataclass(frozen=True)
class Profile:
    """How large the comparison is: a network, its precision, and a plan for each set."""

    network: str
    precision: Literal["auto", "fp32", "bf16"]
    plans: dict[SetName, Plan]


def kimg_within(seconds: float, speeds: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The kimg of each row for a time, from (ms for an image, seconds of fixed cost)."""
    return {row: round((seconds - once) / ms, 1) for row, (ms, once) in speeds.items()}


# Milliseconds for an image and seconds of fixed cost (the first draws of ambient, sure, flowdiff
# and em; the Gaussian prior of the last two if A is not the identity), for network `tiny`, bf16
# (on a processor that multiplies in it) and two threads. They were measured in processor time of
# one thread, phase by phase, weighted by each phase's fraction of a run, and divided by 1.8 (the
# gain of a second thread). An image costs some methods five times as much as others, because their
# steps train other parts. So rows of equal time have not seen equally many images. The speeds of
# flowdiff on digits and nuclei are 1.6 times, that of mean twice an earlier version's, as found
# side by side.
SPEEDS: dict[SetName, dict[str, tuple[float, float]]] = {
    "digits": {
        "noisy": (5.7, 0.0),
        "elbo": (7.6, 0.0),
        "mean": (4.2, 0.0),
        "ambient": (4.0, 7.0),
        "sure": (11.2, 7.0),
        "ambientflow": (4.2, 0.0),
        "em": (3.6, 18.0),
        "diffem": (4.4, 26.0),
        "flowdiff": (3.5, 14.0),
        "clean": (5.7, 0.0),
    },
    "dogs-blur": {
        "noisy": (10.0, 0.0),
        "sure": (8.0, 19.0),
        "ambientflow": (6.3, 0.0),
        "em": (5.0, 27.0),
        "diffem": (7.8, 10.0),
        "flowdiff": (5.0, 6.0),
        "clean": (10.0, 0.0),
    },
    "dogs-masks": {
        "noisy": (12.0, 0.0),
        "ambient": (7.7, 19.0),
        "sure": (8.3, 19.0),
        "ambientflow": (6.3, 0.0),
        "em": (5.0, 27.0),
        "diffem": (7.7, 14.0),
        "flowdiff": (5.0, 6.0),
        "clean": (12.0, 0.0),
    },
    "nuclei": {
        "noisy": (24.0, 0.0),
        "ambient": (14.5, 32.0),
        "sure": (36.0, 32.0),
        "ambientflow": (13.8, 0.0),
        "em": (14.0, 25.0),
        "diffem": (13.0, 27.0),
        "flowdiff": (16.6, 16.0),
        "clean": (24.0, 0.0),
    },
}
DIGITS, DOGS, NUCLEI = 85, 60, 85  # seconds of learning for a row of the small profile
CORE = 60 / 1.8  # a minute of one thread, in seconds of two
_DOGS: dict[str, Any] = {
    "batch": 16,
    "train": 5_000,
    **{"held": 32, "reference": 800, "samples": 96, "tasks": 16},
    "recipe": Recipe(buffer=1024),
    "rounds": Rounds(3, 192),
    "e_step": {"steps": 8, "iterations": 2},
}
_LONG_DOGS: dict[str, Any] = {
    **_DOGS,
    **{"held": 128, "reference": 600, "samples": 256},
    "recipe": Recipe(),
    "rounds": Rounds(6, 512),
}
_FULL: dict[str, Any] = {"batch": 128, "tasks": 16, "levels": 24}
_FULL_DOGS: dict[str, Any] = {
    **_FULL,
    "kimg": {"": 1200.0, "em": 600.0, "sure": 800.0},
    **{"train": 5_000, "held": 128, "reference": 600, "samples": 256},
    "rounds": Rounds(6, 1024),
    "e_step": {"steps": 16, "iterations": 3},
}
_TOY: dict[str, Any] = {
    "kimg": {"": 0.064},
    **{
        "batch": 8,
        "train": 24,
        "held": 4,
        "reference": 16,
        "samples": 8,
        "tasks": 2,
        "levels": 3,
        "steps": 4,
    },
    "recipe": Recipe(buffer=8),
    "rounds": Rounds(2, 8, steps=2),
    "e_step": {"steps": 2, "iterations": 1},
}

PROFILES: dict[ProfileName, Profile] = {
    # equal learning times for the rows of a set on two cores; less than an hour in all
    "small": Profile(
        *("tiny", "auto"),
        {
            "digits": Plan(
                kimg_within(DIGITS, SPEEDS["digits"]),
                *(32, 20_000, 64, 4_744, 256, 16),
                rounds=Rounds(4, 512),
            ),
            "dogs-blur": Plan(kimg_within(DOGS, SPEEDS["dogs-blur"]), **_DOGS),
            "dogs-masks": Plan(kimg_within(DOGS, SPEEDS["dogs-masks"]), **_DOGS),
            "nuclei": Plan(
                kimg_within(NUCLEI, SPEEDS["nuclei"]),
                *(16, 3_555, 32, 264, 64, 8),
                rounds=Rounds(3, 192),
            ),
        },
    ),
    # equal learning times of one core: 15 minutes a row for digits and nuclei, 8 for dogs
    "long": Profile(
        *("tiny", "auto"),
        {
            "digits": Plan(
                kimg_within(15 * CORE, SPEEDS["digits"]),
                *(32, 20_000, 256, 4_744, 1000, 32),
                rounds=Rounds(6, 1024),
            ),
            "dogs-blur": Plan(kimg_within(8 * CORE, SPEEDS["dogs-blur"]), **_LONG_DOGS),
            "dogs-masks": Plan(kimg_within(8 * CORE, SPEEDS["dogs-masks"]), **_LONG_DOGS),
            "nuclei": Plan(
                kimg_within(15 * CORE, SPEEDS["nuclei"]),
                *(16, 3_555, 64, 168, 128, 16),
                rounds=Rounds(6, 512),
            ),
        },
    ),
    # the same number of images for all rows except the most costly ones; every row should take
    # less than 10 minutes on one GPU
    "full": Profile(
        *("small", "bf16"),
        {
            "digits": Plan(
                {"": 3000.0, "sure": 1500.0}, train=60_000, held=256, reference=4_744,
                samples=5_000, **_FULL,
            ),
            "dogs-blur": Plan(**_FULL_DOGS),
            "dogs-masks": Plan(**_FULL_DOGS),
            "nuclei": Plan(
                {"": 600.0, "sure": 400.0}, train=3_555, held=64, reference=168, samples=128,
                **_FULL,
            ),
        },
    ),
    # seconds: figures without meaning
    "toy": Profile("tiny", "fp32", {name: Plan(**_TOY) for name in SETS}),
}  # fmt: skip


def method(row: RowName) -> str:
    """The learning method of a row."""
    return "flowdiff" if row in (*PARTS, STARTED, FEW) else "em" if row == "diffem" else row


def learner_options(row: RowName, name: SetName, plan: Plan) -> dict[str, Any]:
    """The options of a row's method that are not its defaults."""
    if row == "elbo":
        return {"objective": "elbo"}
    if row == "mean":
        bare = {"e_step": 1.0, "flow": 1.0, "ambient_target": "none"}
        return {"recipe": Recipe(**vars(plan.recipe) | bare)}
    if row in ("flowdiff", FEW):
        return {"recipe": plan.recipe}
    if row == STARTED:
        return {"recipe": plan.recipe, "start": "generic"}
    if row == "diffem":
        steps = (plan.rounds.steps + 1) // 2  # Heun's method evaluates the network twice a step
        return {"rounds": replace(plan.rounds, steps=steps), "e_step": "conditional"}
    if row == "em":
        solver = {} if SETS[name].operator == "identity" else draws(plan)
        return {"rounds": plan.rounds, **solver}
    return {}


def draws(plan: Plan) -> dict[str, Draws]:
    """The E-step of `em` if A is not the identity: EM-MMPS."""
    return {"solver": Draws("mmps", **plan.e_step)}


def absent_reason(row: RowName, name: SetName) -> str:
    """The reason why a set has no such row; empty if it has one."""
    if row in PARTS and name != "digits":
        return "is a part of `flowdiff`, shown on digits alone"
    problem = SETS[name].problem
    own = getattr(METHODS[method(row)], "takes", None)
    takes = problem.linear if own is None else own(problem)
    return "" if takes else f"cannot learn from {SETS[name].operator}"
