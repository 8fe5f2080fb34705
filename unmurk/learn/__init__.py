"""Learning a prior and a posterior from corrupted images.

    prior, posterior = unmurk.learn(y, unmurk.Problem("identity", noise=0.3), out="runs/digits")

One file for each way to learn (`METHODS`), one loop for all of them. The run folder holds
`config.json` (every setting, versions, a fingerprint of the data), `prior/` (a diffusers
pipeline), `posterior/`, `state/` (to continue from) and `metrics.jsonl`. The same call on the same
folder continues a run, or returns what it learnt.
"""

import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import __version__
from ..errors import InputError
from ..glow import Glow
from ..io.datasets import CHUNK, Array, Source, as_source
from ..noise import Gaussian
from ..posterior import Posterior
from ..prior import Prior
from ..problem import Problem
from . import memory
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .clean import Clean
from .em import Em, Rounds
from .flowdiff import FlowDiff, Recipe
from .loop import Method, Settings, Trainer, unwritable, write_atomically
from .noisy import Noisy
from .processes import first_process, processes
from .selection import Checks
from .sure import Sure

__all__ = ["METHODS", "Recipe", "Rounds", "Settings", "Source", "learn"]

METHODS: dict[str, Callable[..., Method]] = {
    "flowdiff": FlowDiff,
    "em": Em,
    "ambient": Ambient,
    "sure": Sure,
    "ambientflow": AmbientFlow,
    "noisy": Noisy,
    "clean": Clean,
}
"""The ways to learn by name. Each is a class in a file of its own, built from (y, problem, shape,
network=, seed=); what else it takes are its options, each kept as an attribute. A static method
`takes(problem)` says which problems it can learn from; without one these are all linear ones."""

GIVEN = ("self", "y", "problem", "shape", "network", "seed")  # what every method takes


def learn(
    data: Any,
    problem: Problem,
    method: str = "flowdiff",
    *,
    out: str | Path,
    settings: Settings | None = None,
    quiet: bool = False,
    **options: Any,
) -> tuple[Prior, Posterior]:
    """Learns a prior p(x) and a posterior q(x | y) from corrupted images.

    Args:
        data: Measurements y (N, ...): a tensor, an array (mapped from a file, say), the path of a
            .npy file or of a folder of pictures, a `Source`; or any object with an attribute `y`
            that holds them, nothing else of which is ever read. For method "clean": clean images.
        problem: How the measurements were made (image i of the data is number i).
        method: A name in `METHODS`; docs/learning.md says which for what.
        out: Run folder.
        settings: How to train; single fields can be given by name instead (network, kimg, ...).
        quiet: Whether to show no progress.
        options: Fields of the settings, and options of the method: those that its class takes,
            such as `objective`, `recipe` and `solver` of flowdiff.

    Returns:
        The averaged prior and posterior, in evaluation mode, on the device of the data.

    Raises:
        InputError: data, problem, networks and options that do not fit; images with numbers that
            are not finite; settings out of their bounds; a budget too small to train the prior; a
            run that needs more memory than there is; a run folder of other settings.
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
    names = {field.name for field in fields(Settings)}
    changes = {key: options.pop(key) for key in names & set(options)}
    settings = Settings(**asdict(settings or Settings()) | changes)
    kind = METHODS[method]
    _check(method, options)
    y: Any = as_source(data)
    if y.ndim != 4 or not len(y):
        raise InputError(f"measurements must be (N, C, H, W) with N > 0, not {tuple(y.shape)}")
    if not isinstance(problem.noise, Gaussian) and problem.operator.spec != "identity":
        raise InputError(
            f"noise '{problem.noise.spec}' is not Gaussian: learning takes it from images that are"
            " only noisy (--operator identity)"
        )
    if problem.level <= 0 and method != "clean":
        raise InputError("learning needs the noise level: give a noise above 0")
    _check_settings(settings)
    _check_numbers(y, data)
    if not takes(method, problem):
        others = [name for name in METHODS if name != "clean" and takes(name, problem)]
        hint = f"take one of {', '.join(others)}" if others else "no method can"
        what = f"{problem.operator.spec} with noise {problem.noise.spec}"
        raise InputError(f"{method} cannot learn from {what}: {hint}")
    shape = tuple(y.shape[1:] if method == "clean" else problem.operator.x_shape(y.shape))
    learner = kind(y, problem, shape, network=settings.network, seed=settings.seed, **options)
    _check_length(learner, settings, quiet or not first_process())
    device = processes().device
    memory.check(learner, settings, shape, len(y), device, quiet or not first_process())
    folder = Path(out)
    config = {
        "method": method,
        **_recorded(learner, method),
        "settings": asdict(settings),
        "problem": problem.to_dict(),
    }
    if problem.operator.digests():
        config["mask or kernel"] = problem.operator.digests()
    if first_process():
        _open(folder, config | {"data": _fingerprint(y)})
    checks = None
    if method != "clean" and isinstance(problem.noise, Gaussian):
        checks = Checks.within(y, problem, shape, settings.kimg, settings.seed)
    trainer = Trainer(learner, y, settings, folder, quiet=quiet, checks=checks)
    if settings.compile:
        learner.modules["prior"].unet.compile()  # type: ignore[union-attr]
    trainer.run()
    prior, posterior = learner.averages["prior"], learner.averages["posterior"]
    assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
    if trainer.accelerator.is_main_process:
        for name, model in learner.averages.items():
            if isinstance(model, Prior | Posterior | Glow):
                _replace(folder / name, model)
    trainer.accelerator.wait_for_everyone()
    return prior.to(y.device).eval(), posterior.to(y.device).eval()


def _check_settings(settings: Settings) -> None:
    """Raises InputError for settings out of their bounds."""
    for name in ("kimg", "rate", "average"):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}: it must be positive")
    if settings.batch < 2:
        raise InputError(f"batch is {settings.batch}: at least 2 is needed")
    if settings.seed < 0:
        raise InputError(f"seed is {settings.seed}: give a number of 0 or more")


def _check_numbers(y: Tensor | Source, data: Any) -> None:
    """Raises InputError for the first image with a number that is not finite.

    A source of whole numbers has none, one of a path was looked through when it was opened, and
    others are looked at as they are read.
    """
    real = isinstance(y, Array) and y.array.dtype.kind == "f" and not isinstance(data, str | Path)
    if not isinstance(y, Tensor) and not real:
        return
    rows = max(1, CHUNK // (4 * math.prod(y.shape[1:])))
    for start in range(0, len(y), rows):
        finite = y[start : start + rows].isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(
                f"image number {start + int(finite.int().argmin())} has values that are not "
                "finite: leave it out, or mend it"
            )


def _check_length(learner: Method, settings: Settings, quiet: bool) -> None:
    """Says what a run is too short to train; raises InputError where that is the prior."""
    steps = max(1, math.ceil(1000 * settings.kimg / settings.batch))
    last = (steps - 1) / steps
    trained = {
        parameter
        for group in learner.groups
        if any(span.start <= last for span in group.spans)
        for parameter in group.parameters
    }
    left = [
        name
        for name, module in learner.modules.items()
        if not set(module.parameters()) <= trained and name != "conditional"
    ]
    text = f"kimg {settings.kimg:g} with a batch of {settings.batch} is {steps} steps, too few to"
    if "prior" in left:
        raise InputError(f"{text} train the prior: give more")
    if left and not quiet:
        print(f"{text} train all of the {' and the '.join(left)}", file=sys.stderr)


def takes(method: str, problem: Problem) -> bool:
    """Whether a method can learn from measurements of this kind."""
    own = getattr(METHODS[method], "takes", None)
    return problem.linear if own is None else bool(own(problem))


def _options(method: str) -> dict[str, Any]:
    """The options of a method and their types."""
    own = METHODS[method].__init__
    names = [name for name in inspect.signature(own).parameters if name not in GIVEN]
    hints = get_type_hints(own)
    return {name: hints[name] for name in names}


def _check(method: str, options: dict[str, Any]) -> None:
    """Raises InputError for an option that the method lacks or a value that it does not know."""
    known = _options(method)
    for name, value in options.items():
        if name not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has none"
            raise InputError(f"unknown setting or option '{name}' of {method}: {listed}")
        if get_origin(known[name]) is Literal and value not in get_args(known[name]):
            choices = ", ".join(get_args(known[name]))
            raise InputError(f"unknown {name} '{value}': choose one of {choices}")


def _recorded(learner: Method, method: str) -> dict[str, Any]:
    """The options of a method as config.json keeps them; of a function its `spec`, or "own"."""
    values = {name: getattr(learner, name) for name in _options(method)}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if callable(value):
        return getattr(value, "spec", "own")
    return asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]


def _fingerprint(y: Tensor | Source) -> dict[str, Any]:
    if isinstance(y, Source):
        return y.fingerprint()
    digest = hashlib.sha256(y.contiguous().cpu().numpy().data).hexdigest()  # no copy
    return {"shape": list(y.shape), "sha256": digest}


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


def _replace(folder: Path, model: Prior | Posterior | Glow) -> None:
    """Writes a model's folder beside the old one, then puts it in its place."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise unwritable(folder, error) from error


class _Callable(ModuleType):
    """`unmurk.learn` is this package and the function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Prior, Posterior]:
        return learn(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
