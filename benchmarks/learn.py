"""What each way to learn from corrupted images is worth: one budget, four problems.

    digits        MNIST,         y = x + 0.3 n
    dogs-blur     CIFAR-10 dogs, y = blurred x + 0.02 n
    dogs-masks    CIFAR-10 dogs, y = 40 % of the pixels of x, others in each image, + 0.02 n
    nuclei        DSB 2018,      y = x + 0.2 n

Rows are the methods of unmurk (docs/learning.md), where they take the problem, and

    noisy     y (or A^+ y) taken as if it were clean: the floor
    elbo      FlowDiff's objective alone (arXiv 2407.11162); digits
    mean      mean start alone: to the end, the prior is trained on m(y) below the noise level and
              on y above it; the flow never starts; digits
    clean     trained on x: the ceiling; the only row that sees a clean image

The budget is time (small: 60 to 85 s of learning a row on two cores) or images seen (full).

    python benchmarks/learn.py --data DIR --out OUT                    # two cores, an hour
    python benchmarks/learn.py --data DIR --out OUT --profile full     # a GPU
    python benchmarks/learn.py --table

DIR is described in learn_sets.py. Every row runs in a process of its own; the same command goes on
where the last one ended, and `--sets` and `--rows` run a part. OUT/learn.json has all figures,
OUT/learn-SET.png pictures. From copies kept as benchmarks/results/learn-PROFILE.json (and
learn-PROFILE-SET.png) `--table` writes docs/benchmark_learn.md.

Beside this file: learn_sets.py, what is learnt from; learn_profiles.py, the rows and how much;
learn_scores.py, by what they are compared; learn_page.py, how it is shown.
"""

import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
import tyro
from learn_page import PAGE, draw_picture, page, tables
from learn_profiles import (
    CLEAN,
    PROFILES,
    ROWS,
    ProfileName,
    RowName,
    absent,
    method,
    options,
)
from learn_scores import DRAWS, RESTORATIONS, SHOWN, Scoring, downstream, evaluate, scale
from learn_sets import SETS, TEST, Images, SetName, downstream_tasks, load, measure
from provenance import command, machine, write_json

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.atomic import write as write_atomically
from unmurk.training import Settings, learn

__all__: list[str] = []


@dataclass(frozen=True)
class Options:
    """Compare the ways to learn from corrupted images."""

    data: Path | None = None
    """Folder of the image sets; learn_sets.py says what it holds."""
    out: Path | None = None
    """Folder for runs, figures and pictures."""
    profile: ProfileName = "small"
    """small: two cores, an hour; full: a GPU; toy: seconds, figures without meaning."""
    sets: tuple[SetName, ...] = get_args(SetName)
    """Sets to run now; what is finished of others is shown with them."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Rows to run now; rows that are finished are shown with them."""
    seed: int = 0
    """Seed of noise, weights, batches and samples."""
    table: bool = False
    """Write docs/benchmark_learn.md from benchmarks/results/ and run nothing."""


def images(name: SetName, options: Options) -> Images:
    """The images of a set, as many as the profile takes."""
    assert options.data
    plan = PROFILES[options.profile].plans[name]
    return load(name, options.data, plan.train, (plan.held, plan.reference, plan.samples))


def run_row(name: SetName, row: RowName, how: Options) -> None:
    """Learns and scores a row; OUT/rows/SET-ROW.json is written last and says it is finished."""
    assert how.out
    plan, run = PROFILES[how.profile].plans[name], how.out / "runs" / f"{name}-{row}"
    x = images(name, how)
    prior, posterior = train(name, row, x, how, run)
    figures = cost(run)
    bf16, began = figures["precision"] == "bf16", time.perf_counter()
    scoring = Scoring(plan.levels, plan.tasks, plan.steps, bf16, how.seed)
    scores, pictures = evaluate(prior, posterior, name, x, scoring)
    tasks = downstream(prior, name, x, scoring)
    rows = how.out / "rows"
    write_atomically(rows / f"{name}-{row}.safetensors", safetensors.torch.save(pictures))
    made: dict[str, Any] = {"settings": settings(name, how, row), "machine": machine()}
    made |= {"sampling": "bf16 autocast" if bf16 else "fp32", "downstream": tasks}
    made["scoring_seconds"] = time.perf_counter() - began
    write_json(rows / f"{name}-{row}.json", made | scores | figures)


def train(
    name: SetName, row: RowName, x: Images, how: Options, run: Path
) -> tuple[Prior, Posterior]:
    """Prior and posterior of a row, from images x of which all rows but one see only y."""
    profile = PROFILES[how.profile]
    plan, problem = profile.plans[name], SETS[name].problem
    trained = Settings(
        profile.network,
        plan.budget(row),
        plan.batch,
        seed=how.seed,
        precision=profile.precision,
    )
    data = x.train if row == CLEAN else measure(problem, x.train, how.seed, 0)
    more = options(row, name, plan)
    return learn(data, problem, method(row), out=run, settings=trained, **more)


def cost(run: Path) -> dict[str, Any]:
    """What the learning took; to be called right after it, before the scoring uses memory.

    Kept in the run folder: a process that finds the learning done has no memory of it.
    """
    file = run / "cost.json"
    if file.exists():
        return json.loads(file.read_text())
    # in kB on Linux; never below what the parent held at the fork, so the parent holds little
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    state = torch.load(run / "state" / "latest.pt", map_location="cpu", weights_only=True)
    figures = {
        "seconds": last["seconds"],
        "kimg": last["kimg"],
        "images_per_second": 1000 * last["kimg"] / last["seconds"],
        "peak_memory_mib": memory / (2**20 if sys.platform == "darwin" else 2**10),
        "peak_gpu_memory_mib": gpu,
        "precision": state["precision"],
        "steps_skipped": last["skipped"],
    }
    write_json(file, figures)
    return figures


def settings(name: SetName, how: Options, row: RowName | None = None) -> dict[str, Any]:
    """All that decides a figure of a set, or of a row of it; rows of other settings are never put
    side by side."""
    profile, kind = PROFILES[how.profile], SETS[name]
    fixed = {"restorations": RESTORATIONS, "draws": DRAWS, "network": profile.network}
    tasks = {title: task.to_dict() for title, task in downstream_tasks(name).items()}
    made = {"profile": how.profile, "seed": how.seed, **fixed, **kind.problem.to_dict()}
    plan = profile.plans[name]
    made |= {"downstream": tasks, **asdict(plan)}
    return made if row is None else made | {"kimg": plan.budget(row)}


def finished(name: SetName, how: Options) -> dict[RowName, dict[str, Any]]:
    """The rows that are done, in their order; raises InputError for rows of other settings."""
    assert how.out
    rows = {}
    files = {row: how.out / "rows" / f"{name}-{row}.json" for row in ROWS}
    for row, file in ((row, file) for row, file in files.items() if file.exists()):
        rows[row] = json.loads(file.read_text())
        if rows[row]["settings"] != json.loads(json.dumps(settings(name, how, row))):
            raise InputError(f"{file} was made with other settings: give another --out")
    return rows


def compare(how: Options) -> dict[str, Any]:
    """Runs the rows that are not finished and writes OUT/learn.json and OUT/learn-SET.png."""
    if how.data is None or how.out is None:
        raise InputError("give --data (folder of the image sets) and --out, or --table")
    for name in how.sets:
        images(name, how)  # what is absent is said before an hour has gone
        finished(name, how)
    for name in (name for name in SETS if name in how.sets):
        done = finished(name, how)
        wanted = [row for row in ROWS if row in how.rows and not absent(row, name)]
        for row in (row for row in wanted if row not in done):
            print(f"{name}: {ROWS[row]} ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                process.submit(run_row, name, row, how).result()
    result: dict[str, Any] = {
        "settings": {"profile": how.profile, "seed": how.seed},
        "machine": machine(),
        "sets": {name: show(name, how) for name in SETS if finished(name, how)},
    }
    if not result["sets"]:
        raise InputError("no row is finished: name one in --rows that a set of --sets has")
    write_json(how.out / "learn.json", result)
    return result


def show(name: SetName, how: Options) -> dict[str, Any]:
    """The figures of a set, and its picture."""
    assert how.out
    x, rows = images(name, how), finished(name, how)
    truth = x.held[:SHOWN]
    shown = {
        ROWS[row]: safetensors.torch.load_file(how.out / "rows" / f"{name}-{row}.safetensors")
        for row in rows
    }
    y = measure(SETS[name].problem, truth, how.seed, TEST)
    draw_picture(how.out / f"learn-{name}.png", truth, y, shown)
    return {
        "settings": settings(name, how),
        "scale": scale(name, x, how.seed),
        "absent": {row: absent(row, name) for row in ROWS if absent(row, name)},
        "rows": {row: {k: v for k, v in rows[row].items() if k != "settings"} for row in rows},
    }


@command
def main() -> None:
    how = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if how.table:
        write_atomically(PAGE, page().encode())
    else:
        print("\n\n".join(tables(compare(how))))


if __name__ == "__main__":
    sys.exit(main())
