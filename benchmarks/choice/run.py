"""Choose the weights of a run without clean images, and compare with the choice of an oracle.

While a method learns from noisy digits (y = x + 0.3 n), its EMA weights are scored eight times in
the second half of the run: by the figures of `unmurk.training.validation`, once on measurements
that it learns from and once on others, and by an oracle that has the clean images. A rule keeps
the weights of one of these checks. Its regret is how much worse they are than the best of the
checks by the scores of the oracle.

    python benchmarks/choice/run.py --data DIR --out OUT        # two cores, half an hour
    python benchmarks/choice/run.py --table

benchmarks/learn/sets.py describes DIR/mnist; the budgets are those of the small profile of
benchmarks/learn/. The same command continues an interrupted run. OUT/choice-PROFILE.json has all
figures.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import Column, DataOptions, Row, Suite, markdown
from benchmarks.learn.profiles import PROFILES, RowName, learner_options, method
from benchmarks.learn.sets import SETS, TEST, Images, load
from benchmarks.learn.sets import measure as measurements
from unmurk.diffusion.prior import Prior
from unmurk.evaluation.metrics import psnr, sliced_wasserstein
from unmurk.flows.posterior import Posterior
from unmurk.training import Settings, learn
from unmurk.training.validation import Checks

__all__: list[str] = []

ROWS: tuple[RowName, ...] = ("ambient", "sure", "ambientflow", "em", "flowdiff")
SHARES = 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0
DRAWS = 16  # of a posterior mean
ORACLE = (
    Column("posterior mean, dB", "posterior", "{:.2f}"),
    Column("prior's denoiser, dB", "denoiser", "{:.2f}"),
    Column("SWD of prior samples, %", "swd", "{:.2f}"),
)
FIGURES = (
    Column("ELBO", "elbo", "{:.3f}"),
    Column("ELBO'", "elbo'", "{:.3f}"),
    Column("measurement SWD", "measurement_swd", "{:.4f}"),
    Column("measurement SWD'", "measurement_swd'", "{:.4f}"),
    Column("chi-square", "chi2", "{:.3f}"),
)
Amount = Literal["20000", "500"]


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Choose weights without clean images."""

    profile: Literal["small", "toy"] = "small"
    """small: two cores, half an hour; toy: seconds, figures without meaning."""
    rows: tuple[RowName, ...] = ROWS
    """Methods to run now."""
    amounts: tuple[Amount, ...] = get_args(Amount)
    """Numbers of images to learn from."""


# -- runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OracleChecks(Checks):
    """Checks at more steps, with the scores of an oracle.

    Args:
        other: The same figures on measurements that are not learned from.
        images: Clean images for the oracle.
        levels: Noise levels of the prior's sampler.
    """

    other: Checks | None = None
    images: Images | None = None
    levels: int = 12

    def due(self, step: int, steps: int) -> bool:
        return step in {round(share * steps) for share in SHARES}

    @torch.no_grad()
    def measure(self, prior: Prior, posterior: Posterior) -> dict[str, float]:
        assert self.other is not None and self.images is not None
        found = super().measure(prior, posterior)
        found |= {f"{k}'": v for k, v in self.other.measure(prior, posterior).items()}
        truth, shape = self.images.held, self.shape
        index = range(TEST, TEST + len(truth))
        y = measurements(self.problem, truth, self.seed, index.start)
        problem = self.problem.bind(index, shape)
        mean = posterior.mean_std(y, problem, DRAWS, self.seed + 1, index)[0]
        x = prior.sample(len(self.images.others), self.levels, self.seed + 1)
        return found | {
            "posterior": float(psnr(mean, truth).mean()),
            "denoiser": float(psnr(prior.denoise(y, self.problem.sigma), truth).mean()),
            "swd": 100 * sliced_wasserstein(self.images.reference, x),
        }


def run(row: RowName, amount: Amount, how: Options) -> None:
    """Learn with the checks; OUT/METHOD-AMOUNT.json is written last."""
    profile = PROFILES[how.profile]
    plan, problem = profile.plans["digits"], SETS["digits"].problem
    count = min(int(amount), plan.train)
    x = load("digits", how.data_folder, count, (plan.held, plan.reference, plan.samples))
    y = measurements(problem, x.train, how.seed, 0)
    first = TEST + len(x.held)
    others = measurements(problem, x.others, how.seed, first)

    class Maker:
        """Makes the checks in place of `Checks`."""

        @staticmethod
        def within(*given: Any) -> OracleChecks:
            checks = Checks.within(*given)
            if not checks.count:
                checks = Checks(y, problem, given[2], 16, how.seed)
            bound = problem.bind(range(first, first + len(others)), given[2])
            other = replace(checks, y=others, problem=bound)
            return OracleChecks(**vars(checks), other=other, images=x, levels=plan.levels)

    settings = Settings(
        profile.network, plan.budget(row), plan.batch, seed=how.seed, precision=profile.precision
    )
    folder, options = how.folder / "runs" / f"{row}-{amount}", learner_options(row, "digits", plan)
    with mock.patch.object(sys.modules[learn.__module__], "Checks", Maker):
        given = {"start": "none", "settings": settings, **options}
        learn(y, problem, method(row), out=folder, quiet=True, **given)
    lines = common.metrics(folder)
    checks = [
        {k.removeprefix("check/"): v for k, v in line.items() if k.startswith("check/")}
        | {"share": round(line["kimg"] / lines[-1]["kimg"], 3)}
        for line in lines
        if "check/measurement_swd" in line
    ]
    made = {"settings": settings_of(how)} | common.provenance()
    common.write_json(how.folder / f"{row}-{amount}.json", made | {"checks": checks})


def settings_of(how: Options) -> Row:
    """All settings that decide the figures."""
    plan = PROFILES[how.profile].plans["digits"]
    kimg = {row: plan.budget(row) for row in ROWS}
    return {"profile": how.profile, "seed": how.seed, "kimg": kimg, "noise": SETS["digits"].noise}


def measure(how: Options) -> Row:
    """Run what is missing and write OUT/choice-PROFILE.json."""
    found: dict[str, Any] = {}
    settings = settings_of(how)
    for amount in how.amounts:
        for row in how.rows:
            file = how.folder / f"{row}-{amount}.json"
            if common.read_row(file, settings) is None:
                print(f"{row}, {amount} images ...", file=sys.stderr, flush=True)
                common.in_new_process(run, row, amount, how)
            finished = common.read_row(file, settings)
            assert finished is not None
            found[f"{row}-{amount}"] = finished["checks"]
    shown = {key: value for key, value in settings.items() if key != "seed"}
    return SUITE.store(how, shown, runs=found)


# -- rules ----------------------------------------------------------------------------------------

Check = dict[str, float]
RULES: dict[str, Callable[[Check], float]] = {
    "last": lambda check: check["share"],
    "ELBO": lambda check: check["elbo"],
    "ELBO'": lambda check: check["elbo'"],
    "measurement SWD": lambda check: -check["measurement_swd"],
    "measurement SWD'": lambda check: -check["measurement_swd'"],
    "chi-square": lambda check: -abs(check["chi2"] - 1),
}
"""A rule keeps the weights of the check where its value is highest."""


def regrets(checks: list[Check]) -> dict[str, dict[str, float]]:
    """By rule: the fraction of the run at its check, and its regret in each score."""
    keys = [column.key for column in ORACLE]
    best = {k: (min if k == "swd" else max)(c[k] for c in checks) for k in keys}
    found = {}
    for rule, merit in RULES.items():
        chosen = max(checks, key=merit)
        found[rule] = {"share": chosen["share"]} | {k: abs(chosen[k] - best[k]) for k in keys}
    return found


def regret_table(runs: dict[str, list[Check]]) -> str:
    """The median and worst regret of every rule over some runs."""
    of = [regrets(checks) for checks in runs.values()]
    lines = [["rule", *(f"{column.title}: median, worst" for column in ORACLE)]]
    for rule in RULES:
        lost = [[found[rule][column.key] for found in of] for column in ORACLE]
        lines.append([rule, *(f"{statistics.median(v):.2f}, {max(v):.2f}" for v in lost)])
    return markdown(lines)


def check_table(runs: dict[str, list[Check]]) -> str:
    """Every check of some runs."""
    columns = ORACLE + FIGURES
    lines = [["method", "fraction", *(column.title for column in columns)]]
    for name, checks in runs.items():
        for check in checks:
            figures = (column.text(check[column.key]) for column in columns)
            lines.append([f"`{_method(name)}`", f"{check['share']:g}", *figures])
    return markdown(lines)


def _method(run: str) -> str:
    return run.rsplit("-", 1)[0]


def across_methods(runs: dict[str, list[Check]]) -> str:
    """Whether the ELBO compares methods too, by the last check of each."""
    last = {name: checks[-1] for name, checks in runs.items()}
    likely = max(last, key=lambda name: last[name]["elbo'"])
    best = max(last, key=lambda name: last[name]["posterior"])
    said = {name: f"`{_method(name)}` ({last[name]['posterior']:.2f} dB)" for name in last}
    return (
        f"Between methods: the highest ELBO' at the end is that of {said[likely]}, the best "
        f"posterior mean that of {said[best]}."
    )


def view(result: Row) -> Row:
    """What the page shows: regrets and checks for each number of images."""
    amounts = {}
    for amount in get_args(Amount):
        runs = {n: checks for n, checks in result["runs"].items() if n.endswith(f"-{amount}")}
        if runs:
            tables = {"regrets": regret_table(runs), "checks": check_table(runs)}
            amounts[f"{int(amount):,}"] = tables | {"across": across_methods(runs)}
    return {"amounts": amounts}


SUITE = Suite(
    *("choice", view, "weights_choice"), arguments="--data DIR --out OUT", profiles=("small",)
)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
