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
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import __version__
from ..bounds import check_fields
from ..devices import default_device, device_kind
from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.glow import Glow
from ..flows.posterior import Posterior
from ..io.atomic import place_folder, unwritable, write
from ..io.datasets import Source, as_source
from ..io.formats.pictures import Nan
from ..io.gaps import gaps
from ..io.images import ImageSet
from ..io.json_files import read_object
from ..io.outputs import output
from ..io.scale import Spans, check_units
from ..missing import with_missing
from ..noise import Gaussian
from ..problem import Problem
from . import memory
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .baselines import Clean
from .distributed import first_process, processes
from .em import Em, Rounds
from .flowdiff import FlowDiff, Recipe
from .noisy import Noisy
from .sure import Sure
from .trainer import Method, Settings, Trainer
from .validation import Checks

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

LOOKED = 128  # images whose numbers must be in units of [0, 1]
GIVEN = ("self", "y", "problem", "shape", "network", "seed")  # what every method takes


def _in_its_folder(function: Callable[..., Any]) -> Callable[..., Any]:
    """Holds the lock of the run folder, which is left as it was if nothing is learnt."""

    @wraps(function)
    def run(*args: Any, out: str | Path, **kwargs: Any) -> Any:
        with output(Path(out), owner=True):
            return function(*args, out=out, **kwargs)

    return run


@_in_its_folder
def learn(
    data: Any,
    problem: Problem,
    method: str = "flowdiff",
    *,
    out: str | Path,
    settings: Settings | None = None,
    quiet: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    **options: Any,
) -> tuple[Prior, Posterior]:
    """Learns a prior p(x) and a posterior q(x | y) from corrupted images.

    Args:
        data: Measurements y (N, ...): a tensor, an array (mapped from a file, say), the path of a
            .npy file or of a folder of pictures, what `load_images` returns, a `Source`; or any
            object with an attribute `y` that holds them, nothing else of which is ever read. For
            method "clean": clean images.
        problem: How the measurements were made (image i of the data is number i).
        method: A name in `METHODS`; docs/learning.md says which for what.
        out: Run folder.
        settings: How to train; single fields can be given by name instead (network, kimg, ...).
        quiet: Whether to show no progress.
        span: Numbers of black and white in integers and files; None: see `io.scale`. What they
            are found to be is kept in the run folder, for `restore` and `solve`.
        nan: "mask" counts pixels with numbers that are not finite as hidden; "refuse" names them.
        options: Fields of the settings, and options of the method: those that its class takes,
            such as `objective`, `recipe` and `solver` of flowdiff.

    Returns:
        The averaged prior and posterior, in evaluation mode, on the device of the data.

    Raises:
        InputError: data, problem, networks and options that do not fit; images with numbers that
            are not finite; settings out of their bounds; a budget too small to train the prior; a
            run that needs more memory than there is; a run folder of other settings, or one in
            use by another process.
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
    names = {field.name for field in fields(Settings)}
    changes = {key: options.pop(key) for key in names & set(options)}
    settings = Settings(**asdict(settings or Settings()) | changes)
    check_fields(settings)
    kind = METHODS[method]
    _check(method, options)
    y: Any = as_source(data, span, nan)
    if y.ndim != 4 or not len(y):
        raise InputError(f"measurements must be (N, C, H, W) with N > 0, not {tuple(y.shape)}")
    if not isinstance(problem.noise, Gaussian) and problem.operator.spec != "identity":
        raise InputError(
            f"noise '{problem.noise.spec}' is not Gaussian: learning takes it from images that are"
            " only noisy (--operator identity)"
        )
    if problem.level <= 0 and method != "clean":
        raise InputError("learning needs the noise level: give a noise above 0")
    if problem.operator.pictorial:
        rows = torch.linspace(0, len(y) - 1, min(len(y), LOOKED)).long()
        check_units("the set", y[rows], 0.0 if method == "clean" else problem.level)
    if isinstance(data, str | Path) and y.note and not quiet:
        print(y.note, file=sys.stderr)
    given = problem
    y, problem = _gaps(y, problem, nan, method, options)
    if not takes(method, problem):
        others = [name for name in METHODS if name != "clean" and takes(name, problem)]
        hint = f"take one of {', '.join(others)}" if others else "no method can"
        what = f"{problem.operator.spec} with noise {problem.noise.spec}"
        raise InputError(f"{method} cannot learn from {what}: {hint}")
    shape = tuple(y.shape[1:] if method == "clean" else problem.operator.x_shape(y.shape))
    learner = kind(y, problem, shape, network=settings.network, seed=settings.seed, **options)
    folder = Path(out)
    config = {
        "method": method,
        **_recorded(learner, method),
        "settings": asdict(settings),
        "problem": given.to_dict(),
        **_range(data, y),
    }
    if problem is not given:
        config["nan"] = nan
    if problem.operator.digests():
        config["mask or kernel"] = problem.operator.digests()
    if first_process():
        _open(folder, config | {"data": _fingerprint(y)})
    _check_length(learner, settings, quiet or not first_process())
    device = processes().device
    memory.check(learner, settings, shape, len(y), device, quiet or not first_process())
    checks = None
    if method != "clean" and isinstance(problem.noise, Gaussian):
        checks = Checks.within(y, problem, shape, settings.kimg, settings.seed)
    trainer = Trainer(learner, y, settings, folder, quiet=quiet, checks=checks)
    if settings.compile:
        learner.modules["prior"].unet.compile()  # type: ignore[union-attr]
    trainer.run()
    prior, posterior = learner.ema["prior"], learner.ema["posterior"]
    assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
    if trainer.accelerator.is_main_process:
        for name, model in learner.ema.items():
            if isinstance(model, Prior | Posterior | Glow):
                _replace(folder / name, model)
    trainer.accelerator.wait_for_everyone()
    return prior.to(y.device).eval(), posterior.to(y.device).eval()


def _gaps(
    y: Tensor | Source, problem: Problem, nan: Nan, method: str, options: dict[str, Any]
) -> tuple[Tensor | Source, Problem]:
    """Measurements without numbers that are not finite, and a problem that hides their pixels."""
    y, pixels = gaps(y, nan)
    if not pixels:
        return y, problem
    if method == "clean":
        raise InputError("clean images have no missing pixels: leave these images out")
    if "solver" in _options(method) and problem.operator.spec == "identity":
        from ..solvers import Draws

        options.setdefault("solver", Draws("diffpir", steps=16))
    return y, Problem(with_missing(problem.operator, pixels), problem.noise)


def _range(data: Any, y: Tensor | Source) -> dict[str, Any]:
    """What config.json says of the numbers in the files, if more than their type is needed."""
    held = y if isinstance(y, Source) else data if isinstance(data, ImageSet) else None
    scale = None if held is None else held.scale
    if scale is None or scale.span is None:
        return {}
    black, white, dtype = scale.span
    return {"range": [black, white], "file_type": dtype}


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
            old = read_object(path)
            for key, value in config.items():
                if old.get(key) != value:
                    raise InputError(
                        f"{folder} holds a run with another {key}: "
                        "give another folder, or the same settings to continue it"
                    )
            versions = old.get("versions")
            _name_devices(folder, versions.get("device") if isinstance(versions, dict) else None)
            return
        if folder.exists() and any(not p.name.startswith(".unmurk-") for p in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {folder} as a run folder: {error}") from error
    versions = {
        "unmurk": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_kind(default_device()),
    }
    text = json.dumps({**config, "versions": versions}, indent=2) + "\n"
    write(path, text.encode())


def _name_devices(folder: Path, first: object) -> None:
    """Says that a run goes on where numbers are rounded in another way."""
    here = device_kind(default_device())
    if first not in (None, here):
        print(
            f"{folder} was started on {first} and continues on {here}: it will not end bit for bit"
            " as on one of them",
            file=sys.stderr,
        )


def _replace(folder: Path, model: Prior | Posterior | Glow) -> None:
    """Writes a model's files beside the old ones, then puts them in their places."""
    try:
        with place_folder(folder) as part:
            model.save(part)
    except SafetensorError as error:
        raise unwritable(folder, error) from error
