"""Compare the learning methods on four problems, with one budget.

    digits        MNIST,         y = x + 0.3 n
    dogs-blur     CIFAR-10 dogs, y = blurred x + 0.02 n
    dogs-masks    CIFAR-10 dogs, y = 40 % of the pixels of x, different in each image, + 0.02 n
    nuclei        DSB 2018,      y = x + 0.2 n

The rows are the methods of unmurk (docs/guide/learners.md) that can treat the problem, and

    noisy     y (or :math:`A^+ y`) is treated as if it were clean: the floor
    elbo      the objective of FlowDiff alone (arXiv 2407.11162); digits
    mean      R2R alone: no draws, and the flow is not trained; digits
    flowdiff_generic    flowdiff from the networks of `generic`, which has seen synthetic images
    flowdiff_clean      flowdiff from nothing with 50 clean images beside the y of all
    clean     trained on x: the ceiling; the only row that learns from clean images alone

The budget is time (small: 60 to 85 s of learning for a row on two cores; long: 8 to 15 minutes on
one, where a processor multiplies in bfloat16; others take two to three times as long) or images
seen (full).

    python benchmarks/learn/run.py --data DIR --out OUT                    # two cores, an hour
    python benchmarks/learn/run.py --data DIR --out OUT --profile full     # a GPU
    python benchmarks/learn/run.py --table

sets.py describes DIR. Every row runs in a process of its own; the same command continues an
interrupted run, and `--sets` and `--rows` run a part. OUT/learn-PROFILE.json has all figures,
OUT/learn-PROFILE-SET.png pictures. Rows of a file OUT/learn-PROFILE.json that is there at the
start, such as the published one, are kept and not run again: take out the rows that shall be.
Beside this file: sets.py, the images and problems; profiles.py, the rows and their budgets;
scores.py, the scores.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import Column, DataOptions, Row, Suite, markdown, tabulate
from benchmarks.learn.profiles import (
    CLEAN,
    FEW,
    FEW_CLEAN,
    PROFILES,
    ROWS,
    STARTED,
    ProfileName,
    RowName,
    absent_reason,
    learner_options,
    method,
)
from benchmarks.learn.scores import (
    DRAWS,
    RESTORATIONS,
    SHOWN,
    Scoring,
    downstream_psnr,
    evaluate,
    reference_scores,
)
from benchmarks.learn.sets import SETS, TEST, Images, SetName, downstream_tasks, load
from benchmarks.learn.sets import measure as measurements
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.solvers import Draws
from unmurk.training import Recipe, Rounds, Settings, learn

__all__: list[str] = []

CHAMPION: RowName = "flowdiff"
ROW_SETTINGS = ("kimg", "recipe", "rounds", "e_step")  # of a plan: they concern some rows alone
NEAR = 0.02
"""A figure is near the best one if it differs by at most this fraction of it."""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Compare the learning methods."""

    profile: ProfileName = "small"
    """small: two cores, an hour; long: one core, a night; full: a GPU; toy: seconds, figures
    without meaning."""
    sets: tuple[SetName, ...] = get_args(SetName)
    """Sets to run now; finished rows of others are shown with them."""
    rows: tuple[RowName, ...] = get_args(RowName)
    """Rows to run now; finished rows are shown with them."""


def images(name: SetName, how: Options) -> Images:
    """The images of a set, as many as the profile needs."""
    plan = PROFILES[how.profile].plans[name]
    return load(name, how.data_folder, plan.train, (plan.held, plan.reference, plan.samples))


# -- rows -----------------------------------------------------------------------------------------


def run_row(name: SetName, row: RowName, how: Options) -> None:
    """Learn and score a row; OUT/rows/SET-ROW.json is written last and says it is finished."""
    plan, run = PROFILES[how.profile].plans[name], how.folder / "runs" / f"{name}-{row}"
    x = images(name, how)
    prior, posterior = train(name, row, x, how, run)
    figures = cost(run)
    bf16, began = figures["precision"] == "bf16", time.perf_counter()
    scoring = Scoring(plan.levels, plan.tasks, plan.steps, bf16, how.seed)
    scores, singly, pictures = evaluate(prior, posterior, name, x, scoring)
    tasks = downstream_psnr(prior, name, x, scoring)
    common.write_tensors(row_file(name, row, how, ".safetensors"), pictures)
    decided = settings(name, how) | row_settings(name, how, row)
    made: Row = {"settings": decided} | common.provenance()
    made |= {"sampling": "bf16 autocast" if bf16 else "fp32"}
    made |= {"downstream": {task: fmean(values) for task, values in tasks.items()}}
    made["of each image"] = singly | tasks
    made["scoring_seconds"] = time.perf_counter() - began
    common.write_json(row_file(name, row, how), made | scores | figures)


def train(
    name: SetName, row: RowName, x: Images, how: Options, run: Path
) -> tuple[Prior, Posterior]:
    """The prior and posterior of a row; all rows except CLEAN and FEW learn from y alone."""
    profile = PROFILES[how.profile]
    plan, problem = profile.plans[name], SETS[name].problem
    trained = Settings(
        profile.network,
        plan.budget(row),
        plan.batch,
        seed=how.seed,
        precision=profile.precision,
    )
    data = x.train if row == CLEAN else measurements(problem, x.train, how.seed, 0)
    more = learner_options(row, name, plan)
    if row == FEW:
        more["clean"] = x.train[-FEW_CLEAN:]
    return learn(data, problem, method(row), out=run, settings=trained, **{"start": "none"} | more)


def cost(run: Path) -> Row:
    """The cost of the learning; to be called right after it, before the scoring uses memory.

    It is stored in the run folder, because a process that finds the learning finished cannot
    measure its memory.
    """
    file = run / "cost.json"
    if file.exists():
        return json.loads(file.read_text())
    # in kB on Linux; at least the memory of the parent at the fork, so the parent uses little
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    last = common.metrics(run)[-1]
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
    common.write_json(file, figures)
    return figures


def settings(name: SetName, how: Options) -> Row:
    """All settings that decide the figures of every row of a set."""
    profile, kind = PROFILES[how.profile], SETS[name]
    fixed = {"restorations": RESTORATIONS, "draws": DRAWS, "network": profile.network}
    tasks = {title: task.to_dict() for title, task in downstream_tasks(name).items()}
    made = {"profile": how.profile, "seed": how.seed, **fixed, **kind.problem.to_dict()}
    plan = asdict(profile.plans[name])
    made |= {"downstream": tasks} | {k: v for k, v in plan.items() if k not in ROW_SETTINGS}
    return plain(made)


def row_settings(name: SetName, how: Options, row: RowName) -> Row:
    """The settings that decide the figures of one row beside those of its set."""
    plan = PROFILES[how.profile].plans[name]
    options = learner_options(row, name, plan)
    used = {key: recorded(value) for key, value in options.items()}
    return plain({"kimg": plan.budget(row), "options": used})


def recorded(option: Any) -> Any:
    """An option of a learner, as JSON."""
    if isinstance(option, Draws):
        return option.spec
    return asdict(option) if isinstance(option, Recipe | Rounds) else option


def plain(settings: Row) -> Row:
    """Settings as they are read back from JSON."""
    return json.loads(json.dumps(settings))


def finished(name: SetName, how: Options) -> dict[RowName, Row]:
    """The finished rows, in their order: those of OUT/rows, then those of OUT/learn-PROFILE.json.

    Raises:
        InputError: A row has other settings.
    """
    part, common_settings = stored(how)["sets"].get(name), settings(name, how)
    rows: dict[RowName, Row] = {}
    for row in ROWS:
        own = row_settings(name, how, row)
        made = common.read_row(row_file(name, row, how), common_settings | own)
        if made is not None:
            rows[row] = made | {"settings": own}
        elif part is not None and row in part["rows"]:
            kept = part["rows"][row]
            if (part["settings"], kept.get("settings")) != (common_settings, own):
                raise InputError(
                    f"{SUITE.file(how)}: the row {row} of {name} was made with other settings: "
                    "take it out of the file, or give another --out"
                )
            rows[row] = kept
    return rows


def stored(how: Options) -> Row:
    """The figures of OUT/learn-PROFILE.json; those of no set if there is no such file."""
    file = SUITE.file(how)
    return json.loads(file.read_text()) if file.exists() else {"sets": {}}


def row_file(name: SetName, row: RowName, how: Options, suffix: str = ".json") -> Path:
    """The file of a finished row; its pictures with `.safetensors`."""
    return how.folder / "rows" / f"{name}-{row}{suffix}"


def measure(how: Options) -> Row:
    """Run the missing rows; write OUT/learn-PROFILE.json and the pictures."""
    for name in how.sets:
        images(name, how)  # reports absent files at once
        finished(name, how)
    for name in (name for name in SETS if name in how.sets):
        done = finished(name, how)
        wanted = [row for row in ROWS if row in how.rows and not absent_reason(row, name)]
        for row in (row for row in wanted if row not in done):
            print(f"{name}: {ROWS[row]} ...", file=sys.stderr, flush=True)
            common.in_new_process(run_row, name, row, how)
    sets = {name: collect(name, how) for name in SETS if finished(name, how)}
    if not sets:
        raise InputError("no row is finished: name one in --rows that a set of --sets has")
    note = {key: value for key, value in stored(how).items() if key == "note"}
    return SUITE.store(how, {}, **note, sets=sets)


def collect(name: SetName, how: Options) -> Row:
    """The figures of a set; draws a picture of the rows that were run in OUT."""
    x, rows = images(name, how), finished(name, how)
    files = {row: row_file(name, row, how, ".safetensors") for row in rows}
    shown = {ROWS[row]: common.read_tensors(f) for row, f in files.items() if f.exists()}
    if shown:
        truth = x.held[:SHOWN]
        y = measurements(SETS[name].problem, truth, how.seed, TEST)
        draw_picture(SUITE.file(how, f"-{name}.png"), truth, y, shown)
    return {
        "settings": settings(name, how),
        "scale": reference_scores(name, x, how.seed),
        "absent": {row: absent_reason(row, name) for row in ROWS if absent_reason(row, name)},
        "rows": {row: published(rows[row], rows.get(CHAMPION)) for row in rows},
    }


def published(row: Row, champion: Row | None) -> Row:
    """A row with its figures of each image in five digits, and its differences from `flowdiff`.

    "difference" has, for each figure that is a mean over images, the mean of the paired
    differences from the row `flowdiff` and its standard error. Rows of old files have no figures
    of each image: their differences stay as long as that of `flowdiff` is old too.
    """
    own, other = (given.get("of each image") for given in (row, champion or {}))
    kept = {k: v for k, v in row.items() if k != "difference" or (own is None and other is None)}
    if own is None:
        return kept
    kept["of each image"] = {k: [float(f"{v:.5g}") for v in values] for k, values in own.items()}
    if other is None:
        return kept
    return kept | {"difference": {k: paired(own[k], other[k]) for k in own if k in other}}


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """The mean of a - b and its standard error."""
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    error = differences.std() / len(a) ** 0.5
    return float(differences.mean()), float(error)


# -- tables ---------------------------------------------------------------------------------------


def _largest(value: float) -> float:
    return value


def _smallest(value: float) -> float:
    return -value


def _nominal(value: float) -> float:
    """Of a coverage: near 0.9."""
    return -abs(value - 0.9)


QUALITY = (
    Column("posterior mean, dB", "posterior_psnr", "{:.2f}", _largest),
    Column("SSIM", "ssim", "{:.3f}", _largest),
    Column("LPIPS", "lpips", "{:.3f}", _smallest),
    Column("prior's denoiser, dB", "denoiser_psnr", "{:.2f}", _largest),
    Column("FD, prior", "prior_frechet", "{:.2f}", _smallest),
    Column("FD, posterior", "posterior_frechet", "{:.2f}", _smallest),
    Column("KID, prior", "prior_kid", "{:.3f}", _smallest),
    Column("KID, posterior", "posterior_kid", "{:.3f}", _smallest),
    Column("SWD, prior", "prior_swd", "{:.4f}", _smallest),
    Column("SWD, posterior", "posterior_swd", "{:.4f}", _smallest),
)
CALIBRATION = (
    Column("error", "error", "{:.3f}"),
    Column("spread", "spread", "{:.3f}"),
    Column("90 % coverage", "coverage", "{:.3f}", _nominal),
    Column("spread, calibrated", "calibrated_spread", "{:.3f}"),
    Column("90 % coverage, calibrated", "calibrated_coverage", "{:.3f}", _nominal),
    Column("chi-square", "chi2", "{:.2f}"),
    Column("measurement SWD", "measurement_swd", "{:.4f}"),
    Column("kimg seen", "kimg", "{:.1f}"),
    Column("seconds", "seconds", "{:.0f}"),
    Column("images/s", "images_per_second", "{:.0f}"),
    Column("memory, MiB", "peak_memory_mib", "{:.0f}"),
    Column("GPU memory, MiB", "peak_gpu_memory_mib", "{:.0f}"),
)
COLUMNS = QUALITY + CALIBRATION


def table(part: Row, columns: tuple[Column, ...], scale: bool = False) -> str:
    """The figures of a set; columns without figures are left out.

    Args:
        part: The result of the set.
        columns: The columns.
        scale: Whether the images themselves have lines below.
    """
    rows = {ROWS[name]: row for name, row in part["rows"].items()}
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows.values())]
    if scale:
        rows |= {f"*{name} images themselves*": row for name, row in part["scale"].items()}
    lines = [["", *(c.title for c in shown)]]
    lines += [[label, *(c.text(row.get(c.key)) for c in shown)] for label, row in rows.items()]
    return markdown(lines)


def task_columns(part: Row) -> tuple[Column, ...]:
    """The columns of the downstream tasks."""
    tasks = part["settings"]["downstream"]
    return tuple(Column(f"{task}, dB", task, "{:.2f}", _largest) for task in tasks)


def with_tasks(part: Row) -> Row:
    """The result of a set with the downstream figures of a row beside its others."""
    return part | {"rows": {name: row | row["downstream"] for name, row in part["rows"].items()}}


def verdict(part: Row) -> Row | None:
    """How `flowdiff` compares with the rows without clean images or a start, in every column of
    quality.

    Returns:
        The number of rows, the numbers of columns in which it is first, near the best, or behind,
        and a table; None if it has not run or has no rival.
    """
    part, lines = with_tasks(part), []
    rows = {k: figures for k, figures in part["rows"].items() if k not in (CLEAN, FEW, STARTED)}
    if CHAMPION not in rows or len(rows) < 2:
        return None
    counts = {"first": 0, "level": 0, "near the best": 0, "behind": 0}
    for column in COLUMNS + task_columns(part):
        values = {row: figures.get(column.key) for row, figures in rows.items()}
        known = {row: value for row, value in values.items() if value is not None}
        if column.merit is None or CHAMPION not in known:
            continue
        best, behind, near = standing(known, column.merit)
        resolved = is_resolved(rows[best], column.key)
        kind = "first" if behind <= 0 else "level" if not resolved else "behind"
        kind = "near the best" if kind == "behind" and near else kind
        counts[kind] += 1
        lines.append(
            {
                **{"column": column.title, CHAMPION: column.text(known[CHAMPION])},
                **{"best": column.text(known[best]), "of": ROWS[best], "rank": kind},  # type: ignore[index]
                "by": "" if kind == "first" else column.text(behind),
            }
        )
    return {"rows": len(rows), "counts": counts, "table": tabulate(lines)}


def is_resolved(row: Row, key: str) -> bool:
    """Whether a row differs from `flowdiff` by more than two standard errors of the difference.

    True where the figures of the single images are not known.
    """
    mean, error = row.get("difference", {}).get(key, (1.0, 0.0))
    return abs(mean) > 2 * error


def standing(values: dict[str, float], merit: Callable[[float], float]) -> tuple[str, float, bool]:
    """The best row, how far `flowdiff` is behind it, and whether that is near.

    Near is at most NEAR of the best figure's magnitude.
    """
    best = max(values, key=lambda row: merit(values[row]))
    behind = merit(values[best]) - merit(values[CHAMPION])
    return best, behind, behind <= NEAR * abs(values[best])


def view(result: Row) -> Row:
    """What the page shows: the tables of every set."""
    return {"sets": {name: view_of_set(name, part) for name, part in result["sets"].items()}} | {
        **{"champion": CHAMPION, "near": f"{NEAR:.0%}"},
        **{"restorations": RESTORATIONS, "draws": DRAWS, "ceiling": CLEAN},
        **{"started": ROWS[STARTED], "few": ROWS[FEW], "few_clean": FEW_CLEAN},
    }


def view_of_set(name: SetName, part: Row) -> Row:
    """The tables and conditions of a set."""
    rows = part["rows"].values()

    def joined(get: Callable[[Row], Any], between: str = ", ") -> str:
        return between.join(dict.fromkeys(str(get(row)) for row in rows))

    tasks = part["settings"]["downstream"].items()
    lost = {"LPIPS": "lpips", "KID": "posterior_kid"}
    return {
        "set": SETS[name],
        "quality": table(part, QUALITY, scale=True),
        "calibration": table(part, CALIBRATION),
        "tasks": [f"{t}: {p['operator']}, noise {p['noise']:g}" for t, p in tasks],
        "task_table": table(with_tasks(part), task_columns(part)),
        "verdict": verdict(part),
        "absent": [f"`{row}` {why}" for row, why in part["absent"].items()],
        "unrun": [f"`{ROWS[row]}`" for row in ROWS if row not in {*part["rows"], *part["absent"]}],
        "missing": [t for t, key in lost.items() if all(row.get(key) is None for row in rows)],
        "precision": joined(lambda row: row["precision"]),
        "sampling": joined(lambda row: row["sampling"]),
        "commits": joined(lambda row: row["commit"]),
        "hardware": joined(
            lambda row: f"{common.hardware(row)}, torch {row['software']['torch']}", "; "
        ),
    }


# -- pictures -------------------------------------------------------------------------------------


def draw_picture(path: Path, truth: Tensor, y: Tensor, rows: dict[str, dict[str, Tensor]]) -> None:
    """Draw one line for each image (N, C, H, W): truth and y, then four columns for each row.

    A spread is that of the mean channel, in gray.
    """
    from matplotlib.figure import Figure

    limit = max(float(images["spread"].mean(1).max()) for images in rows.values())
    panels = {"": {"truth": truth, "y": y}}
    for name, images in rows.items():
        own = {key: images[key] for key in ("mean", "sample", "spread", "prior")}
        gray = images["spread"].mean(1, keepdim=True).expand_as(truth)
        panels[name] = own | {"spread": gray / limit}
    widths = [len(columns) for columns in panels.values()]
    size = (0.62 * sum(widths), 0.62 * len(truth) + 0.6)
    figure = Figure(size, dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (title, columns) in zip(grid, panels.items(), strict=True):
        tiles = zip(*(x[: len(truth)] for x in columns.values()), strict=True)
        common.draw_sheet(axes, list(tiles), [*columns], fontsize=8)
        axes.set_title(title, fontsize=9)
    figure.supxlabel(f"spread: black is 0, white {limit:.2f}", fontsize=8)
    figure.savefig(path)


SUITE = Suite(
    *("learn", view, "learn"), arguments="--data DIR --out OUT", profiles=("small", "long", "full")
)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
