"""Scores of the restored images: of one row, and of a solver over all its tasks."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Row, read_tensors
from benchmarks.solve.tasks import SetName, Task, images, labels, part_of
from unmurk.errors import InputError
from unmurk.evaluation.distances import kid
from unmurk.evaluation.metrics import (
    frechet,
    load_digit_classifier,
    lpips,
    psnr,
    sliced_wasserstein,
    ssim,
)

__all__ = ["ENOUGH", "common_tasks", "fidelity", "groups", "has_lpips", "pooled", "restored"]

ENOUGH = 512
"""Number of pooled images below which no Frechet distance of 128 features is shown."""


def fidelity(name: SetName, x: Tensor, operator: str = "") -> dict[str, Any]:
    """How close restored images (B, 1, H, W) are to the first test images: means over images.

    For digits, `accuracy` is the fraction that the classifier reads correctly. Fourier magnitudes
    do not distinguish an image from the same image rotated by 180 degrees: for them `psnr_turned`
    is the PSNR of the better of the two.
    """
    truth = images(name, "test")[: len(x)]
    found: dict[str, Any] = {
        "psnr": float(psnr(x, truth).mean()),
        "psnr_median": float(psnr(x, truth).median()),
        "psnr_turned": None,
        "ssim": float(ssim(x, truth).mean()),
        "lpips": _perceptual(x, truth),
        "accuracy": None,
    }
    if operator.startswith("phase"):
        better = torch.maximum(psnr(x, truth), psnr(x.flip(-2, -1), truth))
        found["psnr_turned"] = float(better.mean())
    if name == "digits":
        read = load_digit_classifier()(x.clamp(0, 1)).argmax(1)
        found["accuracy"] = float((read == labels(len(x))).float().mean())
    return found


def _perceptual(x: Tensor, truth: Tensor) -> float | None:
    """Mean LPIPS, of images below 32 pixels with a black frame; None if it is not available."""
    if not has_lpips():
        return None
    short = max(0, 32 - x.shape[-1])
    frame = (short // 2, short - short // 2) * 2
    return float(lpips(F.pad(x, frame), F.pad(truth, frame)).mean())


@cache
def has_lpips() -> bool:
    """Whether LPIPS is available; prints the reason once if it is not."""
    try:
        lpips(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    except InputError as error:
        print(f"LPIPS is left out: {error}", file=sys.stderr)
        return False
    return True


def groups(rows: list[Row]) -> Iterator[tuple[tuple[str, str, float | None], list[Row]]]:
    """Rows that share a table: by (set, part, noise); noise is None for nonlinear operators."""
    found: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        part = part_of(row["operator"])
        key = (row["set"], part, row["noise"] if part == "linear" else None)
        found.setdefault(key, []).append(row)
    yield from found.items()


def common_tasks(rows: list[Row]) -> tuple[list[str], list[str]]:
    """The methods and operators that enter the means, among rows of one group and prior.

    Returns:
        The methods that have a row for every operator, except those that refused all of them; and
        the operators that all of these methods treated.
    """
    every = list(dict.fromkeys(row["operator"] for row in rows))
    tried: dict[str, set[str]] = {}
    treated: dict[str, set[str]] = {}
    for row in rows:
        tried.setdefault(row["method"], set()).add(row["operator"])
        if row["error"] is None:
            treated.setdefault(row["method"], set()).add(row["operator"])
    methods = [m for m in tried if tried[m] == set(every) and m in treated]
    return methods, [o for o in every if all(o in treated[m] for m in methods)]


def pooled(rows: list[Row], folder: Path) -> Iterator[Row]:
    """Distribution distances of each solver, over the tasks of a group that all solvers treated.

    The reference is the clean test images that were not restored. The first row of each group
    scores the true images themselves ("truth").
    """
    for (name, part, noise), group in groups(rows):
        for prior in dict.fromkeys(row["prior"] for row in group):
            own = [row for row in group if row["prior"] == prior]
            methods, operators = common_tasks(own)
            if not methods or not operators:
                continue
            found = {(row["method"], row["operator"]): row for row in own}
            count = min(row["images"] for row in own)
            where = {"set": name, "part": part, "noise": noise, "prior": prior}
            truth = images(name, "test")[:count]
            yield where | {"method": "truth"} | _realism(name, [truth] * len(operators))
            for method in methods:
                results = [restored(found[method, o], folder)[:count] for o in operators]
                yield where | {"method": method} | _realism(name, results)


def restored(row: Row, folder: Path) -> Tensor:
    """The images of a row, (B, 1, H, W)."""
    task = Task(*(row[key] for key in ("set", "prior", "operator", "noise", "method")))
    return read_tensors(folder / f"{task.file}.safetensors")["x"].float()


def _realism(name: SetName, restorations: list[Tensor]) -> dict[str, Any]:
    """Distances of restorations of the same images, one batch a task, from other clean images."""
    count = len(restorations[0])
    other = images(name, "test")[count:]
    x = torch.cat(restorations)
    found: dict[str, Any] = {"images": len(x), "references": len(other)}
    found["swd"] = sliced_wasserstein(other, x.clamp(0, 1))
    found["kid"] = found["frechet"] = None
    if name == "digits":
        found["kid"] = kid(other, x, families=torch.arange(count).repeat(len(restorations)))
        if len(x) >= ENOUGH:
            found["frechet"] = frechet(other, x)
    return found
