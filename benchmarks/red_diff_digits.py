"""RED-diff with a learned prior: the packaged digits, restored by the default and by others.

Held-out digits are measured by six operators at three noise levels and restored with the packaged
prior, which never saw a clean image. Figures are PSNR in dB, averaged over images. The paper
preset runs its 1000 steps with the settings that were released for the task at hand:

    inpainting    lr 0.25, lam 0.25, and lam 1 where there is noise to speak of
    blur          lr 0.5,  lam 0.25
    averaging     lr 0.1,  lam 0.25
    denoising     as inpainting (not among the released tasks)

Every other method has its defaults, at most 100 network evaluations.

    python benchmarks/red_diff_digits.py --out red_diff_digits.json

Rows are added to the file as they are done; a second start goes on where the first one ended.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import unmurk
from unmurk import Prior, Problem, load_images, metrics

OPERATORS = (
    *("identity", "inpaint:box,size=10", "inpaint:random,keep=0.4", "sr:average,factor=4"),
    *("blur:gaussian,sigma=1.5", "blur:motion,length=9,angle=30"),
)
NOISES = (0.05, 0.2, 0.01)
METHODS: dict[str, dict[str, Any]] = {
    "red-diff": {},
    "ddnm": {},
    "diffpir": {},
    "daps": {},
    "paper, 1000": {"method": "red-diff", "preset": "paper"},
}
DIGITS = Path(unmurk.__file__).parent / "assets" / "digits" / "test.idx3-ubyte.gz"


def released(operator: str, noise: float) -> dict[str, float]:
    """Options of the paper preset for a task."""
    if operator.startswith("sr"):
        return {"lr": 0.1, "lam": 0.25}
    if operator.startswith("blur"):
        return {"lr": 0.5, "lam": 0.25}
    return {"lr": 0.25, "lam": 1.0 if noise >= 0.05 else 0.25}


def score(prior: Prior, operator: str, noise: float, name: str, images: int) -> dict[str, Any]:
    """One method on one task."""
    truth = load_images(DIGITS).images[:images]
    problem = Problem(operator, noise)
    y = problem.simulate(truth, seed=1)
    options = {"method": name} | METHODS[name]
    if "preset" in options:
        options |= released(operator, noise)
    result = unmurk.solve(y, problem, prior, **options)
    return {
        "operator": operator,
        "noise": noise,
        "method": name,
        "images": images,
        "nfe": result.nfe,
        "psnr": [round(float(v), 3) for v in metrics.psnr(result.mean, truth)],
        "residual": round(result.trace[-1]["residual"], 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean PSNR as Markdown, a line for each task, and the mean over the tasks."""
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    found = {
        (row["operator"], row["noise"], row["method"]): statistics.mean(row["psnr"])
        for row in rows
    }
    tasks = [(o, n) for o in OPERATORS for n in sorted(NOISES)]
    tasks = [task for task in tasks if all((*task, name) in found for name in names)]
    lines = ["| operator | noise | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for task in tasks:
        values = " | ".join(f"{found[*task, name]:.2f}" for name in names)
        lines.append(f"| {task[0]} | {task[1]:g} | {values} |")
    means = [statistics.mean(found[*task, name] for task in tasks) for name in names]
    lines.append("| mean | | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("red_diff_digits.json"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    prior = Prior.load("digits")
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(row["operator"], row["noise"], row["method"]) for row in rows}
    for noise in NOISES:
        for operator in OPERATORS:
            for name in args.methods:
                if (operator, noise, name) not in done:
                    rows.append(score(prior, operator, noise, name, args.images))
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
