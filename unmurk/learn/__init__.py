"""Learning a prior and a posterior from corrupted images.

    prior, posterior = unmurk.learn(y, unmurk.Problem("identity", noise=0.3), out="runs/digits")

One file for each way to learn, one loop for all of them. The run folder holds `config.json`
(every setting, versions, a fingerprint of the data), `prior/` (a diffusers pipeline),
`posterior/`, `state/` (to continue from) and `metrics.jsonl`. The same call on the same folder
continues a run, or returns what it learnt.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from .. import __version__
from ..errors import InputError
from ..posterior import Posterior
from ..prior import Prior
from ..problem import Problem
from .clean import Clean
from .em import Em, Rounds
from .flowdiff import FlowDiff, Recipe
from .loop import Method, Settings, Trainer, write_atomically
from .noisy import Noisy
from .replay import Solver
from .selection import Checks

__all__ = ["Recipe", "Rounds", "Settings", "learn"]

METHODS = ("flowdiff", "em", "noisy", "clean")


def learn(
    data: Any,
    problem: Problem,
    method: Literal["flowdiff", "em", "noisy", "clean"] = "flowdiff",
    *,
    out: str | Path,
    objective: Literal["default", "elbo"] = "default",
    recipe: Recipe | Rounds | None = None,
    settings: Settings | None = None,
    solver: Solver | None = None,
    quiet: bool = False,
    **changes: Any,
) -> tuple[Prior, Posterior]:
    """Learns a prior p(x) and a posterior q(x | y) from corrupted images.

    Args:
        data: Measurements y (N, ...), or any object with an attribute `y` that holds them; nothing
            else of it is ever read. For method "clean": clean images.
        problem: How the measurements were made (image i of the data is number i).
        method: "flowdiff" (arXiv 2407.11162 and our recipe), "em" (arXiv 2405.13712), "noisy"
            (floor) or "clean" (ceiling).
        out: Run folder.
        objective: For flowdiff: our "default", or the paper's "elbo" alone.
        recipe: Schedule: a `Recipe` of flowdiff's default objective, or `Rounds` of em.
        settings: How to train; single fields can be given by name instead (network, kimg, ...).
        solver: For A other than the identity: draws posterior samples, for flowdiff's polish and
            em's E-step (em cannot do without).
        quiet: Whether to show no progress.

    Returns:
        The averaged prior and posterior, in evaluation mode, on the device of the data.

    Raises:
        InputError: data, problem and networks that do not fit, or a run folder of other settings.
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
    if objective not in ("default", "elbo"):
        raise InputError(f"unknown objective '{objective}': choose default or elbo")
    try:
        settings = replace(settings or Settings(), **changes)
    except TypeError as error:
        raise InputError(f"unknown setting: {str(error).split()[-1]}") from error
    y = data if isinstance(data, Tensor) else data.y
    y = y.float()
    if y.ndim != 4 or not len(y):
        raise InputError(f"measurements must be (N, C, H, W) with N > 0, not {tuple(y.shape)}")
    if problem.sigma <= 0 and method != "clean":
        raise InputError("learning needs the noise level: give a noise above 0")
    if settings.kimg <= 0 or settings.batch < 2 or settings.rate <= 0:
        raise InputError("kimg and rate must be positive and batch at least 2")
    clean = method == "clean"
    shape = tuple(y.shape[1:] if clean else problem.operator.x_shape(y.shape))
    learner: Method
    schedule = {"flowdiff": Recipe, "em": Rounds}.get(method, type(None))
    if recipe is not None and not isinstance(recipe, schedule):
        raise InputError(f"method {method} does not take a recipe of type {type(recipe).__name__}")
    if isinstance(recipe, Rounds) or method == "em":
        rounds = recipe if isinstance(recipe, Rounds) else Rounds()
        learner = Em(y, problem, shape, settings.network, rounds, settings.seed, solver)
    elif method == "flowdiff":
        learner = FlowDiff(
            y, problem, shape, settings.network, objective, recipe, settings.seed, solver
        )
    else:
        kind = Clean if clean else Noisy
        learner = kind(y, problem, shape, settings.network, settings.seed)
    folder = Path(out)
    config = {
        "method": method,
        "objective": objective if method == "flowdiff" else None,
        "solver": getattr(solver, "spec", "own") if solver else None,
        "recipe": asdict(recipe or schedule()) if schedule is not type(None) else None,
        "settings": asdict(settings),
        "problem": problem.to_dict(),
        "data": {"shape": list(y.shape), "sha256": _fingerprint(y)},
    }
    _open(folder, config)
    checks = None
    if method != "clean":
        checks = Checks.within(y, problem, shape, settings.kimg, settings.seed)
    trainer = Trainer(learner, y, settings, folder, quiet=quiet, checks=checks)
    if settings.compile:
        learner.modules["prior"].unet.compile()  # type: ignore[union-attr]
    trainer.run()
    prior, posterior = learner.averages["prior"], learner.averages["posterior"]
    assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
    if trainer.accelerator.is_main_process:
        _replace(folder / "prior", prior)
        _replace(folder / "posterior", posterior)
    return prior.to(y.device).eval(), posterior.to(y.device).eval()


def _fingerprint(y: Tensor) -> str:
    return hashlib.sha256(y.contiguous().cpu().numpy().tobytes()).hexdigest()


def _open(folder: Path, config: dict[str, Any]) -> None:
    """Starts a run folder, or checks that it belongs to the same run."""
    path = folder / "config.json"
    try:
        if path.exists():
            old = json.loads(path.read_text())
            for key, value in config.items():
                if old.get(key) != value:
                    raise InputError(
                        f"{folder} holds a run with another {key}: "
                        "give another folder, or the same settings to continue it"
                    )
            return
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot use {folder} as a run folder: {error}") from error
    versions = {
        "unmurk": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps({**config, "versions": versions}, indent=2) + "\n"
    write_atomically(path, text.encode())


def _replace(folder: Path, model: Prior | Posterior) -> None:
    """Writes a model's folder beside the old one, then puts it in its place."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


class _Callable(ModuleType):
    """`unmurk.learn` is this package and the function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Prior, Posterior]:
        return learn(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
