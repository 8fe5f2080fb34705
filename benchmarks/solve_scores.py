"""Scores of restored images that are kept: of each row, and of a solver over all its tasks."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from solve_tasks import SetName, Task, images, labels, part_of
from torch import Tensor
from torch.nn import functional as F

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

__all__ = ["ENOUGH", "fidelity", "groups", "pooled", "restored", "shared"]

ENOUGH = 512
"""Pooled images below which no Frechet distance of 128 features is shown."""

Row = dict[str, Any]


def fidelity(name: SetName, x: Tensor, operator: str = "") -> dict[str, Any]:
    """How close restorations (B, 1, H, W) of the first test images are to them: means over images.

    For digits `accuracy` is the share that is read as what it is; for Fourier magnitudes, which
    cannot tell, `psnr_turned` is that of the image or of its turn by 180 degrees, the better one.
    """
    truth = images(name, "test")[: len(x)]
    found: dict[str, Any] = {
        "psnr": float(psnr(x, truth).mean()),
        "psnr_median": float(psnr(x, truth).median()),
        "psnr_turned": None,
        "ssim": float(ssim(x, truth).mean()),
        "lpips": perceptual(x, truth),
        "accuracy": None,
    }
    if operator.startswith("phase"):
        turned = torch.maximum(psnr(x, truth), psnr(x.flip(-2, -1), truth))
        found["psnr_turned"] = float(turned.mean())
    if name == "digits":
        read = load_digit_classifier()(x.clamp(0, 1)).argmax(1)
        found["accuracy"] = float((read == labels(len(x))).float().mean())
    return found


def perceptual(x: Tensor, truth: Tensor) -> float | None:
    """Mean LPIPS, small images framed in black to 32 pixels; None where it is not to be had."""
    if not lpips_here():
        return None
    short = max(0, 32 - x.shape[-1])
    frame = (short // 2, short - short // 2) * 2
    return float(lpips(F.pad(x, frame), F.pad(truth, frame)).mean())


@cache
def lpips_here() -> bool:
    """Whether LPIPS is to be had; if not, it is said once why."""
    try:
        lpips(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    except InputError as error:
        print(f"LPIPS is left out: {error}", file=sys.stderr)
        return False
    return True


def groups(rows: list[Row]) -> Iterator[tuple[tuple[str, str, float | None], list[Row]]]:
    """Rows that share tables: by (set, part, noise), noise None where the part sets its own."""
    found: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        part = part_of(row["operator"])
        key = (row["set"], part, row["noise"] if part == "linear" else None)
        found.setdefault(key, []).append(row)
    yield from found.items()


def shared(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Methods with a row for every operator among rows of one group and prior, and the operators
    that all of these could treat. A method that could treat none is not among them."""
    every = list(dict.fromkeys(row["operator"] for row in rows))
    treated: dict[str, set[str]] = {}
    observed: dict[str, set[str]] = {}
    for row in rows:
        observed.setdefault(row["method"], set()).add(row["operator"])
        if row["error"] is None:
            treated.setdefault(row["method"], set()).add(row["operator"])
    methods = [m for m in observed if observed[m] == set(every) and m in treated]
    return methods, [o for o in every if all(o in treated[m] for m in methods)]


def pooled(rows: list[Row], folder: Path) -> Iterator[Row]:
    """Realism of the images of each solver, over the tasks of a group that all solvers treated.

    Against clean test images that are not among the restored ones. The first line of each group
    has the true images themselves as if a solver had returned them.
    """
    for (name, part, noise), group in groups(rows):
        for prior in dict.fromkeys(row["prior"] for row in group):
            own = [row for row in group if row["prior"] == prior]
            methods, operators = shared(own)
            if not methods or not operators:
                continue
            found = {(row["method"], row["operator"]): row for row in own}
            count = min(row["images"] for row in own)
            where = {"set": name, "part": part, "noise": noise, "prior": prior}
            truth = images(name, "test")[:count]
            yield where | {"method": "truth"} | realism(name, [truth] * len(operators))
            for method in methods:
                kept = [restored(found[method, o], folder)[:count] for o in operators]
                yield where | {"method": method} | realism(name, kept)


def restored(row: Row, folder: Path) -> Tensor:
    """The images of a row, (B, 1, H, W)."""
    task = Task(*(row[key] for key in ("set", "prior", "operator", "noise", "method")))
    return safetensors.torch.load_file(folder / f"{task.file}.safetensors")["x"].float()


def realism(name: SetName, restorations: list[Tensor]) -> dict[str, Any]:
    """Distances of images, as many for each task and of the same truths, from other clean ones."""
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
