"""Every solver on every task, with priors learnt from clean and from noisy images.

Held-out digits (28 x 28) and nuclei (64 x 64) of the package are measured by operators at several
noise levels and restored by every solver that can treat the operator, with its defaults. Two
priors for each set, of the same network and the same budget of time: one learnt from clean
images, one by `flowdiff` from images with noise 0.3 (digits) or 0.2 (nuclei) alone. Operators that
are not linear have tables of their own: digits, the `flowdiff` prior, noise 0.01.

    python benchmarks/solve.py --out OUT                      # two cores
    python benchmarks/solve.py --out OUT --profile full       # a GPU
    python benchmarks/solve.py --table

First the priors are learnt, into OUT/priors; then rows are added to OUT/rows as they are done,
by as many processes as `--jobs` says: what it took, and the restored images. The same command goes
on where the last one ended. Scores are taken from the kept images at the end, so that a new score
needs no new run (`--score` takes them of the rows there are). OUT/solve.json has all figures,
OUT/solve-SET.png pictures. From copies kept as benchmarks/results/solve-PROFILE.json (and .png)
`--table` writes docs/benchmark_solve.md.

Beside this file: solve_tasks.py, what is compared; solve_scores.py, by what; solve_page.py, how it
is shown.
"""

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from provenance import command, commit, forget_peak, held, machine, peak, write_json
from solve_page import PAGE, draw_picture, page, tables
from solve_scores import fidelity, pooled, restored
from solve_tasks import (
    LEARNT_AT,
    PAPER,
    PROFILES,
    PartName,
    PriorName,
    ProfileName,
    SetName,
    Task,
    chosen,
    images,
    part_of,
    released_start,
    tasks,
)

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.evaluation.metrics import psnr
from unmurk.io.atomic import write as write_atomically
from unmurk.problem import Problem
from unmurk.solvers import METHODS, solve
from unmurk.training import Settings, learn

__all__: list[str] = []


@dataclass(frozen=True)
class Options:
    """Compare the solvers with learnt priors."""

    out: Path | None = None
    """Folder for priors, rows, figures and pictures."""
    profile: ProfileName = "small"
    """small: two cores; full: a GPU; toy: seconds, figures without meaning."""
    parts: tuple[PartName, ...] = ("linear", "nonlinear")
    """Operators to run now."""
    sets: tuple[SetName, ...] = ("digits", "nuclei")
    """Image sets to run now."""
    priors: tuple[PriorName, ...] = ("clean", "flowdiff")
    """Priors to run now."""
    methods: tuple[str, ...] = ()
    """Solvers to run now; none named: all."""
    noises: tuple[float, ...] = ()
    """Noise levels of linear operators to run now, of the profile's; none named: all."""
    jobs: int = 2
    """Processes, each of one thread, that share the rows on a CPU."""
    seed: int = 0
    """Seed of noise, weights and draws."""
    score: bool = False
    """Run nothing: take the scores of the rows in OUT."""
    table: bool = False
    """Write docs/benchmark_solve.md from benchmarks/results/ and run nothing."""


def learn_prior(name: SetName, kind: PriorName, options: Options) -> None:
    """Learns the prior of a set into OUT/priors/SET-KIND, or finds it there."""
    assert options.out
    profile = PROFILES[options.profile]
    folder = options.out / "priors" / f"{name}-{kind}"
    if (folder / "prior").exists():
        return
    x, problem = images(name, "train"), Problem("identity", LEARNT_AT[name])
    budget = profile.kimg[name][kind == "flowdiff"]
    settings = Settings(profile.network, budget, profile.batch, seed=options.seed)
    data = x if kind == "clean" else problem.simulate(x, options.seed)
    prior, _ = learn(data, problem, kind, out=folder, settings=settings)
    prior.save(folder / "prior")


def run_task(task: Task, options: Options) -> str:
    """Restores; OUT/rows/TASK.json is written last. Returns a line on the outcome."""
    assert options.out
    if options.jobs > 1:
        torch.set_num_threads(1)
    profile, rows = PROFILES[options.profile], options.out / "rows"
    file = rows / f"{task.file}.json"
    if file.exists() or too_slow(task, options):
        return ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = Prior.load(options.out / "priors" / f"{task.set}-{task.prior}" / "prior").to(device)
    truth = images(task.set, "test")[: profile.images[task.set]]
    problem = Problem(task.operator, task.noise)
    y = problem.simulate(truth, options.seed).to(device)
    row: dict[str, Any] = asdict(task) | {"images": len(truth), "error": None, "commit": commit()}
    try:
        forget_peak()
        began, before = time.perf_counter(), held()
        start = released_start(task, problem, y)
        result = solve(y, problem, prior, seed=options.seed, init=start, **chosen(task))
        seconds, memory = time.perf_counter() - began, max(0.0, peak() - before)
    except InputError as error:
        write_json(file, row | {"error": str(error)})
        return f"{task.file}: {error}"
    row |= {
        "residual": result.trace[-1]["chi2"],
        "evaluations": result.nfe,
        "seconds_per_evaluation": seconds / max(result.nfe, 1),
        "memory_mib": memory,
    }
    x = result.mean.cpu().contiguous()
    write_atomically(rows / f"{task.file}.safetensors", safetensors.torch.save({"x": x}))
    write_json(file, row)
    return f"{task.file}: {float(psnr(x, truth).mean()):.2f} dB"


def too_slow(task: Task, options: Options) -> bool:
    """Whether a profile has no time for it: its row at the first noise level cost too much.

    The paper's preset is what red-diff is held against, and runs at all levels.
    """
    assert options.out
    profile = PROFILES[options.profile]
    first = Task(task.set, task.prior, task.operator, profile.noises[0], task.method)
    file = options.out / "rows" / f"{first.file}.json"
    if task.noise == first.noise or task.method == PAPER or not file.exists():
        return False
    return (json.loads(file.read_text()).get("evaluations") or 0) > profile.slow


def run(options: Options) -> None:
    """Learns what priors are missing and runs what rows are missing."""
    wanted = list(
        tasks(
            PROFILES[options.profile],
            *(options.parts, options.sets, options.priors, options.methods, options.noises),
        )
    )
    for name in options.sets:
        for kind in options.priors:
            print(f"prior of {name}, {kind} ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                process.submit(learn_prior, name, kind, options).result()
    jobs = 1 if torch.cuda.is_available() else options.jobs
    began = time.perf_counter()
    # linear tasks at the first noise level decide what is too slow for the others
    for noise in dict.fromkeys((part_of(task.operator), task.noise) for task in wanted):
        now = [task for task in wanted if (part_of(task.operator), task.noise) == noise]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for number, line in enumerate(pool.map(run_task, now, [options] * len(now)), 1):
                if line:
                    spent = time.perf_counter() - began
                    what = f"{noise[0]}, {noise[1]:g}: {number}/{len(now)}"
                    print(f"{what} {line} ({spent:.0f} s)", file=sys.stderr, flush=True)


def score(options: Options) -> dict[str, Any]:
    """Takes the scores of all rows there are and writes OUT/solve.json and the pictures."""
    assert options.out
    folder = options.out / "rows"
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not rows:
        raise InputError(f"no rows in {folder}: run without --score first")
    order = {m: i for i, m in enumerate((*METHODS, PAPER))}
    rows.sort(
        key=lambda row: (
            *(row["set"], part_of(row["operator"]), row["prior"], row["noise"], row["operator"]),
            order[row["method"]],
        )
    )
    for row in rows:
        if row["error"] is None:
            row |= fidelity(row["set"], restored(row, folder), row["operator"])
    settings = {"profile": options.profile, "seed": options.seed}
    result = {
        "settings": settings | asdict(PROFILES[options.profile]),
        "machine": machine(),
        "rows": rows,
        "pools": list(pooled(rows, folder)),
    }
    write_json(options.out / "solve.json", result)
    for name, part in dict.fromkeys((row["set"], part_of(row["operator"])) for row in rows):
        end = "" if part == "linear" else "-nonlinear"
        draw_picture(
            options.out / f"solve-{name}{end}.png", rows, folder, name, part, options.seed
        )
    return result


@command
def main() -> None:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
        return
    if options.out is None:
        raise InputError("give --out, or --table")
    if not options.score:
        run(options)
    print("\n\n".join(tables(score(options))))


if __name__ == "__main__":
    sys.exit(main())
