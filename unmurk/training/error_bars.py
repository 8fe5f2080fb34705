"""Calibration of a run's error bars and the verdict at its end, from held-out measurements.

A set that is large enough gives up its last measurements: no step trains on them, and the
calibration uses them alone. From smaller sets the calibration uses measurements that the run has
seen. The errors then look smaller than they are, as far as the networks have memorized the noise
of these measurements; the record says so (`held_out`).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import remark
from ..evaluation.calibration import Calibration, calibrate
from ..evaluation.verdict import Verdict, examine
from ..flows.error_bars import ErrorBars
from ..flows.posterior import Posterior
from ..io.atomic import write
from ..io.datasets import Source
from ..io.json_files import read_object
from ..noise import Gaussian, PerChannel, PoissonGaussian
from ..noise_checks import check_noise
from ..operators.masks import Inpaint
from ..problem import Problem

__all__ = [
    "RECORD",
    "Leading",
    "calibrate_run",
    "held_out",
    "kept_out",
    "leading",
    "read_record",
    "say",
    "write_record",
]

RECORD = "calibration.json"
VALUES = 2**18  # values of the images of a calibration after 20 kimg
FEWEST, MOST = 8, 2048  # images of a calibration
PART = 8  # a set gives up images if it has at least so many times as many


class Leading(Source):
    """The first measurements of a source.

    Args:
        y: The source.
        count: Number of measurements.

    >>> import numpy as np
    >>> from unmurk.io.source import of_array
    >>> first = Leading(of_array("set", np.zeros((5, 8, 8), np.uint8), None), 3)
    >>> first.shape, first[1:].shape
    ((3, 1, 8, 8), torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, y: Source, count: int) -> None:
        self.y, self.scale, self.note, self.device = y, y.scale, y.note, y.device
        self.shape = (count, *y.shape[1:])

    def read(self, indices: list[int]) -> Tensor:
        """See `Source.read`."""
        return self.y.read(indices)

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return {**self.y.fingerprint(), "first": len(self)}


def leading(y: Tensor | Source, count: int) -> Tensor | Source:
    """Return the first measurements of a set.

    >>> leading(torch.zeros(5, 1, 4, 4), 3).shape
    torch.Size([3, 1, 4, 4])
    """
    if count == len(y):
        return y
    return y[:count] if isinstance(y, Tensor) else Leading(y, count)


def wanted(shape: tuple[int, int, int], kimg: float) -> int:
    """Return how many images calibrate a run, so that they take less than 10 % of its time.

    Args:
        shape: Shape (C, H, W) of the images.
        kimg: Budget of the run in thousands of images.

    >>> wanted((1, 28, 28), 100), wanted((1, 64, 64), 5)
    (668, 16)
    """
    values = VALUES * min(max(kimg / 20, 1 / 64), 2)
    return min(max(int(values / math.prod(shape)), FEWEST), MOST)


def held_out(y: Tensor | Source, shape: tuple[int, int, int], kimg: float) -> int:
    """Return how many of the last measurements no step trains on; 0 for small sets and for crops.

    Args:
        y: Measurements (N, ...).
        shape: Shape (C, H, W) of the images.
        kimg: Budget of the run in thousands of images.

    >>> held_out(torch.zeros(1, 1, 1, 1).expand(12_000, 1, 28, 28), (1, 28, 28), 100)
    668
    >>> held_out(torch.zeros(500, 1, 28, 28), (1, 28, 28), 100)
    0
    """
    count = wanted(shape, kimg)
    if isinstance(y, Source) and y.endless:  # its parts overlap, so none is unseen
        return 0
    return count if len(y) >= PART * count else 0


def kept_out(folder: Path, count: int) -> int:
    """Return how many measurements a run that has begun gave up; `count` for a new run.

    A run whose budget is raised keeps the measurements that it has not seen.

    >>> Path("begun").mkdir()
    >>> Path("begun/config.json").write_text('{"held_out": 16}')
    16
    >>> kept_out(Path("begun"), 668), kept_out(Path("not-begun"), 668)
    (16, 668)
    """
    config = folder / "config.json"
    if not config.exists():
        return count
    found = read_object(config).get("held_out", 0)
    return found if isinstance(found, int) and 0 <= found else count


def calibrate_run(
    folder: Path,
    posterior: Posterior,
    y: Tensor | Source,
    problem: Problem,
    *,
    held: int,
    kimg: float,
    seed: int,
    clean: bool = False,
) -> dict[str, Any] | None:
    """Calibrate the posterior of a finished run, and write the verdict on it into its folder.

    A run that has been calibrated before keeps its calibration and its verdict.

    Args:
        folder: The run folder.
        posterior: The posterior, which receives the calibration.
        y: Measurements (N, ...), or clean images, which are then corrupted first.
        problem: How the measurements are made.
        held: Number of measurements at the end of the set that the run did not see.
        kimg: Budget of the run in thousands of images.
        seed: Seed of the run.
        clean: Whether y holds clean images.

    Returns:
        The record to be written, or None if the run already has one.

    >>> problem = Problem("identity", 0.1)
    >>> x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> posterior = Posterior.create("tiny", (1, 8, 8), 0.1).eval()  # untrained: N(y, 0.1^2)
    >>> y = problem.simulate(x, 0)
    >>> record = calibrate_run(Path("bars"), posterior, y, problem, held=8, kimg=1.0, seed=0)
    >>> record["images"], sorted(path.name for path in Path("bars").iterdir())
    (8, ['verdict.json'])
    """
    old = read_record(folder)
    if old is not None and old.get("kimg") == kimg:
        posterior.error_bars = ErrorBars.load(folder / "posterior")
        return None
    count = held or min(len(y), wanted(posterior.shape, kimg))
    index = torch.arange(len(y) - count, len(y))
    numbers = index.tolist()
    held_y = y[index.to(y.device)]
    if clean:
        held_y = problem.simulate(held_y, seed, numbers)
    made = _calibration(posterior, held_y, problem, numbers, seed, clean)
    psnr = (made.record.get("unbiased_psnr") or {}).get("after")
    trusted = bool(made.record["trusted"])
    examine(
        posterior,
        held_y,
        problem,
        numbers,
        seed=seed,
        unbiased_psnr=psnr,
        calibrated=trusted,
    ).save(folder)
    posterior.error_bars = made.error_bars
    return {"kimg": kimg, "held_out": held > 0, **_finite(made.record)}


def _calibration(
    posterior: Posterior, y: Tensor, problem: Problem, index: list[int], seed: int, clean: bool
) -> Calibration:
    """Calibrate a posterior, or say why that is not possible."""
    operator, noise = problem.operator, problem.noise
    pixels = operator.spec == "identity" or isinstance(operator, Inpaint)
    why = ""
    if problem.level <= 0:
        why = "there is no noise"
    elif not isinstance(noise, Gaussian | PoissonGaussian) and not (
        pixels and isinstance(noise, PerChannel)
    ):
        why = f"noise '{noise.spec}' has no unbiased estimate of the error"
    elif not operator.linear or not (pixels or operator.proximal):
        why = f"operator '{operator.spec}' has no regularized inverse"
    if not why:
        doubt = "" if clean else _doubt(y, problem, posterior.shape, index)
        return calibrate(posterior, y, problem, index, seed=seed, trusted=not doubt, why=doubt)
    return Calibration(None, {"images": 0, "trusted": False, "why": why})


def _doubt(y: Tensor, problem: Problem, shape: tuple[int, int, int], index: list[int]) -> str:
    """Return how the noise of measurements differs from every model; "" if it does not."""
    if not problem.operator.pictorial:
        return ""
    bound = problem.operator.to(y.device).bind(index, shape)
    findings = check_noise(y, bound.apply_mask(torch.ones_like(y)) > 0)
    return findings[0].text if findings else ""


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write calibration.json into a run folder. Raises InputError if it cannot be written.

    >>> write_record(Path("bars"), {"images": 16, "trusted": True})
    >>> read_record("bars")["images"]
    16
    """
    write(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Read the calibration.json of a run folder.

    Returns:
        The record, or None if there is none.

    Raises:
        InputError: The file cannot be read.

    >>> read_record("no-run") is None
    True
    """
    path = Path(folder) / RECORD
    return read_object(path) if path.exists() else None


def say(record: dict[str, Any], verdict: Verdict | None = None) -> None:
    """Print one line on a calibration to stderr, and one with the verdict.

    >>> import sys
    >>> from contextlib import redirect_stderr
    >>> with redirect_stderr(sys.stdout):
    ...     say({"trusted": False, "why": "there is no noise"})
    error bars are not calibrated: there is no noise
    """
    ratios = record.get("spread_over_error", {}).get("measured", {})
    before, psnr = ratios.get("before"), (record.get("unbiased_psnr") or {}).get("after")
    text = "" if psnr is None else f"; unbiased PSNR {psnr:.2f} dB"
    if not record["trusted"]:
        remark(f"error bars are not calibrated: {record['why']}{text}")
    elif before is not None:
        remark(
            f"error bars calibrated on {record['images']} measurements: before, the predicted"
            f" standard deviation was {before:.2f} times the error{text}"
        )
    if verdict is not None:
        remark(verdict.text)


def _finite(value: Any) -> Any:
    """Return a record in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
