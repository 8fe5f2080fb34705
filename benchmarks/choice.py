"""Which weights of a run to keep, chosen without clean images, against the choice of an oracle.

While a method learns from noisy digits (y = x + 0.3 n) its averaged weights are judged eight times
in the second half of the run: by the figures of `unmurk.training.validation`, once on measurements
that it learns from and once on others, and by an oracle that has the clean images. A rule keeps
the weights of one of these moments. Its regret is how much worse they are than the best of the
moments in the eyes of the oracle.

    last          the last weights
    evidence      the highest evidence bound, on measurements that were learnt from
    evidence'     the same on others
    gap, gap'     the least distance of re-corrupted samples from measurements
    residual      chi-square nearest to 1

Learning keeps the weights with the highest evidence, of the moments at which every part of them
is in training. The rules here may choose any moment.

On 20,000 images, and on 500, which the methods see about a hundred times.

    python benchmarks/choice.py --data DIR --out OUT             # two cores, half an hour
    python benchmarks/choice.py --table

DIR/mnist is described in learn_sets.py; budgets are those of the small profile of learn.py. The
same command goes on where the last one ended. From a copy of OUT/choice.json kept in
benchmarks/results/ `--table` writes docs/benchmark_choice.md.
"""

import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from learn_profiles import PROFILES, RowName, method, options
from learn_sets import SETS, TEST, Images, load, measure
from provenance import ROOT, command, machine, markdown, write_json

import unmurk.training
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.metrics import psnr, sliced_wasserstein
from unmurk.flows.posterior import Posterior
from unmurk.io.atomic import write as write_atomically
from unmurk.training import Settings, learn
from unmurk.training.validation import Checks

__all__ = ["Options", "Watch", "compare", "page", "regrets"]

FIGURES = ROOT / "benchmarks" / "results" / "choice.json"
PAGE = ROOT / "docs" / "benchmark_choice.md"
ROWS: tuple[RowName, ...] = ("ambient", "sure", "ambientflow", "em", "flowdiff")
SHARES = 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0
DRAWS = 16  # behind a posterior mean
ORACLE = {
    "posterior": "posterior mean, dB",
    "denoiser": "prior's denoiser, dB",
    "swd": "SWD of prior samples, %",
}
Amount = Literal["20000", "500"]


@dataclass(frozen=True)
class Options:
    """Choose weights without clean images."""

    data: Path | None = None
    """Folder of the image sets."""
    out: Path | None = None
    """Folder for runs and figures."""
    profile: Literal["small", "toy"] = "small"
    """small: two cores, half an hour; toy: seconds, figures without meaning."""
    rows: tuple[RowName, ...] = ROWS
    """Methods to run now."""
    amounts: tuple[Amount, ...] = get_args(Amount)
    """Images learnt from."""
    seed: int = 0
    """Seed of noise, weights, batches and samples."""
    table: bool = False
    """Write docs/benchmark_choice.md and run nothing."""


# -- what is seen of a run ------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch(Checks):
    """Checks at more moments, and what an oracle says.

    Args:
        other: The same figures of measurements that are not learnt from.
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
        y = measure(self.problem, truth, self.seed, index.start)
        problem = self.problem.bind(index, shape)
        mean = posterior.mean_std(y, problem, DRAWS, self.seed + 1, index)[0]
        x = prior.sample(len(self.images.others), self.levels, self.seed + 1)
        return found | {
            "posterior": float(psnr(mean, truth).mean()),
            "denoiser": float(psnr(prior.denoise(y, self.problem.sigma), truth).mean()),
            "swd": 100 * sliced_wasserstein(self.images.reference, x),
        }


def run(row: RowName, amount: Amount, how: Options) -> None:
    """Learns, watched; OUT/METHOD-AMOUNT.json is written last."""
    assert how.data is not None and how.out is not None
    profile, name = PROFILES[how.profile], "digits"
    plan, problem = profile.plans[name], SETS[name].problem
    count = min(int(amount), plan.train)
    x = load(name, how.data, count, (plan.held, plan.reference, plan.samples))
    y = measure(problem, x.train, how.seed, 0)
    first = TEST + len(x.held)
    others = measure(problem, x.others, how.seed, first)

    class Watching:
        """Stands where learning makes its checks."""

        @staticmethod
        def within(*given: Any) -> Watch:
            checks = Checks.within(*given)
            if not checks.count:
                checks = Checks(y, problem, given[2], 16, how.seed)
            fixed = problem.bind(range(first, first + len(others)), given[2])
            other = replace(checks, y=others, problem=fixed)
            return Watch(**vars(checks), other=other, images=x, levels=plan.levels)

    settings = Settings(
        profile.network, plan.budget(row), plan.batch, seed=how.seed, precision=profile.precision
    )
    folder = how.out / "runs" / f"{row}-{amount}"
    made = unmurk.learn.Checks
    unmurk.learn.Checks = Watching  # type: ignore[attr-defined]
    try:
        learn(
            y, problem, method(row), out=folder, settings=settings, quiet=True,
            **options(row, name, plan),
        )  # fmt: skip
    finally:
        unmurk.learn.Checks = made  # type: ignore[attr-defined]
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    checks = [
        {k.removeprefix("check/"): v for k, v in line.items() if k.startswith("check/")}
        | {"share": round(line["kimg"] / lines[-1]["kimg"], 3)}
        for line in lines
        if "check/measurement_swd" in line
    ]
    write_json(
        how.out / f"{row}-{amount}.json",
        {"settings": described(how), "machine": machine(), "checks": checks},
    )


def described(how: Options) -> dict[str, Any]:
    """All that decides the figures."""
    plan = PROFILES[how.profile].plans["digits"]
    kimg = {row: plan.budget(row) for row in ROWS}
    return {"profile": how.profile, "seed": how.seed, "kimg": kimg, "noise": SETS["digits"].noise}


def compare(how: Options) -> dict[str, Any]:
    """Runs what is not finished and writes OUT/choice.json."""
    if how.data is None or how.out is None:
        raise InputError("give --data (folder of the image sets) and --out, or --table")
    found: dict[str, Any] = {}
    for amount in how.amounts:
        for row in how.rows:
            file = how.out / f"{row}-{amount}.json"
            if not file.exists():
                print(f"{row}, {amount} images ...", file=sys.stderr, flush=True)
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    process.submit(run, row, amount, how).result()
            kept = json.loads(file.read_text())
            if kept["settings"] != described(how):
                raise InputError(f"{file} was made with other settings: give another --out")
            found[f"{row}-{amount}"] = kept["checks"]
    result = {"settings": described(how), "machine": machine(), "runs": found}
    write_json(how.out / "choice.json", result)
    return result


# -- rules ----------------------------------------------------------------------------------------

Check = dict[str, float]
RULES: dict[str, Callable[[Check], float]] = {
    "last": lambda check: check["share"],
    "elbo": lambda check: check["elbo"],
    "elbo'": lambda check: check["elbo'"],
    "measurement_swd": lambda check: -check["measurement_swd"],
    "measurement_swd'": lambda check: -check["measurement_swd'"],
    "chi2": lambda check: -abs(check["chi2"] - 1),
}
"""What a rule keeps is where its figure is highest."""


def regrets(checks: list[Check]) -> dict[str, dict[str, float]]:
    """By rule: the share kept, and by how much it is worse than the best in each figure."""
    best = {k: (min if k == "swd" else max)(c[k] for c in checks) for k in ORACLE}
    found = {}
    for rule, merit in RULES.items():
        kept = max(checks, key=merit)
        lost = {k: abs(kept[k] - best[k]) for k in ORACLE}
        found[rule] = {"share": kept["share"], **lost}
    return found


def tables(result: dict[str, Any]) -> str:
    """Markdown: medians and worst cases of every rule, then every run."""
    of = {name: regrets(checks) for name, checks in result["runs"].items()}
    parts = []
    for amount in get_args(Amount):
        runs = [name for name in of if name.endswith(f"-{amount}")]
        if not runs:
            continue
        lines = [["rule", *(f"{title}: median, worst" for title in ORACLE.values())]]
        for rule in RULES:
            lost = [[of[name][rule][key] for name in runs] for key in ORACLE]
            lines.append([rule, *(f"{statistics.median(v):.2f}, {max(v):.2f}" for v in lost)])
        parts += [f"## {int(amount):,} images", "Regret by rule:", markdown(lines)]
        parts.append(across({name: result["runs"][name][-1] for name in runs}))
        lines = [
            [
                "method",
                "share",
                *ORACLE.values(),
                "elbo",
                "elbo'",
                "measurement_swd",
                "measurement_swd'",
            ]
        ]
        lines[0] += ["chi2"]
        for name in runs:
            for check in result["runs"][name]:
                keys = [*ORACLE, "elbo", "elbo'", "measurement_swd", "measurement_swd'", "chi2"]
                forms = ["{:.2f}"] * 3 + ["{:.3f}"] * 2 + ["{:.4f}"] * 2 + ["{:.3f}"]
                figures = [f.format(check[k]) for k, f in zip(keys, forms, strict=True)]
                row = name.removesuffix(f"-{amount}")
                lines.append([f"`{row}`", f"{check['share']:g}", *figures])
        parts += ["Every moment:", markdown(lines)]
    return "\n\n".join(parts)


def across(ends: dict[str, Check]) -> str:
    """Whether the evidence compares methods too, by the last figures of each."""
    likely = max(ends, key=lambda name: ends[name]["elbo'"])
    best = max(ends, key=lambda name: ends[name]["posterior"])
    said = {
        name: f"`{name.rsplit('-', 1)[0]}` ({ends[name]['posterior']:.2f} dB)" for name in ends
    }
    return (
        f"Between methods: the highest evidence' in the end is that of {said[likely]}, the best "
        f"posterior mean that of {said[best]}."
    )


def page(file: Path = FIGURES) -> str:
    """The page, from figures kept."""
    if not file.exists():
        raise InputError(f"no figures in {file}: put OUT/choice.json there")
    result = json.loads(file.read_text())
    made, theory = result["machine"], (__doc__ or "").split("\n\n    python")[0]
    head = (
        "# Benchmark: choosing weights without clean images\n\nWritten by `python "
        "benchmarks/choice.py --table` from `benchmarks/results/choice.json`; made by `python "
        "benchmarks/choice.py --data DIR --out OUT`.\n\n" + theory + "\n\n"
        f"{made['cpu']}, {made['threads']} threads, torch {made['torch']}, commit "
        f"{made['commit']}; seed {result['settings']['seed']}."
    )
    return f"{head}\n\n{tables(result)}\n"


@command
def main() -> None:
    how = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if how.table:
        write_atomically(PAGE, page().encode())
    else:
        print(tables(compare(how)))


if __name__ == "__main__":
    sys.exit(main())
