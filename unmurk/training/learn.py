"""Learn a prior and a posterior from corrupted images.

For example::

    prior, posterior = unmurk.learn(y, unmurk.Problem("identity", noise=0.3), out="runs/digits")

One module holds one learner, and one training loop serves all of them. The run folder holds every
setting, the models, and a checkpoint (`run_folder`). The same call on the same folder continues a
run, or returns what it has learned.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import check_fields
from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.error_bars import ErrorBars
from ..flows.glow import Glow
from ..flows.posterior import Posterior
from ..io.datasets import Source, as_source
from ..io.formats.pictures import Nan
from ..io.gaps import gaps
from ..io.images import ImageSet
from ..io.outputs import output
from ..io.scale import Spans, check_units
from ..missing import with_missing
from ..noise import Gaussian
from ..problem import Problem
from . import memory
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .baselines import Clean, Noisy
from .distributed import first_process, processes
from .em import Em
from .error_bars import calibrate_run, held_out, leading, say, write_record
from .flowdiff import FlowDiff
from .learner import Learner, as_dict
from .registry import METHODS, name_of, register, resolve
from .run_folder import fingerprint, open_run, save_model
from .sure import Sure
from .trainer import Settings, Trainer
from .validation import Checks

__all__ = ["METHODS", "learn"]

register("flowdiff")(FlowDiff)
register("em")(Em)
register("ambient")(Ambient)
register("sure")(Sure)
register("ambientflow")(AmbientFlow)
register("noisy")(Noisy)
register("clean")(Clean)

CHECKED = 128  # images whose values must be in units of [0, 1]


def _in_its_folder(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hold the lock of the run folder, which is left as it was if nothing is learned."""

    @wraps(function)
    def run(*args: Any, out: str | Path, **kwargs: Any) -> Any:
        with output(Path(out), owner=True):
            return function(*args, out=out, **kwargs)

    return run


@_in_its_folder
def learn(
    data: Any,
    problem: Problem,
    method: str | type[Learner] | Learner = "flowdiff",
    *,
    out: str | Path,
    network: str | nn.Module | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    **options: Any,
) -> tuple[Prior, Posterior]:
    r"""Learn a prior :math:`p(x)` and a posterior :math:`q(x \mid y)` from corrupted images.

    Args:
        data: Measurements y of shape (N, ...): a tensor, an array (which may be mapped from a
            file), the path of a .npy file or of a folder of pictures, what `load_images` returns,
            a `Dataset` or `DataLoader` of torch, a `Source`, or any object whose attribute `y` is
            one of these; nothing else of that object is read. For method "clean": clean images.
        problem: How the measurements were made; image i of the data has number i.
        method: A name in `training.METHODS`, a class derived from `training.Learner`, or an
            instance of one, such as `training.FlowDiff(recipe=training.Recipe(steps=8))`.
        out: The run folder.
        network: A preset of the networks (tiny, small, base), or for the prior any `nn.Module`
            that maps (x, t) to a tensor like x. The module is copied, and the posterior then takes
            the preset of the settings. Its weights are saved with a note that the network is your
            own: `Prior.load(folder, network=module)` reads them.
        settings: Training settings. Single fields can be given by name instead (kimg, batch, ...).
        quiet: Whether to show no progress.
        span: File values of black and white, for integers and files; None takes them from the type
            (see `io.scale`). The run folder keeps them for `restore` and `solve`.
        nan: "mask" treats pixels that are not finite as hidden; "refuse" names them.
        options: Fields of the settings, and options of the method by name.

    Returns:
        The prior and the posterior with EMA weights, in evaluation mode, on the device of the
        data.

    Raises:
        InputError: Data, problem, networks and options do not fit together, images are not finite,
            settings are out of their bounds, the budget is too small to train the prior, the run
            needs more memory than there is, or the run folder belongs to another run, has another
            format, or is in use by another process.
    """
    settings, module, options = _settings(settings, network, options)
    learner = resolve(method, options)
    y: Any = as_source(data, span, nan)
    clean = _is_clean(learner)
    _check_data(y, problem, clean)
    if isinstance(data, str | Path) and isinstance(y, Source) and y.note and not quiet:
        print(y.note, file=sys.stderr)
    given = problem
    y, problem, learner = _with_gaps(y, problem, nan, learner)
    _check_takes(learner, problem)
    shape: Any = tuple(y.shape[1:] if clean else problem.operator.x_shape(y.shape))
    held = held_out(y, shape, settings.kimg)
    trained: Any = leading(y, len(y) - held)
    built = learner.build(trained, problem, shape, settings.network, settings.seed, module)
    folder, quiet = Path(out), quiet or not first_process()
    if first_process():
        config = _config(built, settings, given, module) | _range(data, y)
        if problem is not given:
            config["nan"] = nan
        if held:
            config["held_out"] = held
        open_run(folder, config | {"data": fingerprint(y)})
    _check_length(built, settings, quiet)
    memory.check(built, settings, shape, len(y), processes().device, quiet)
    checks = None
    if not clean and isinstance(problem.noise, Gaussian):
        checks = Checks.within(trained, problem, shape, settings.kimg, settings.seed)
    trainer = Trainer(built, trained, settings, folder, quiet=quiet, checks=checks)
    if settings.compile:
        built.prior.network.compile()
    trainer.run()
    if trainer.accelerator.is_main_process:
        record = calibrate_run(
            folder,
            built.student.eval(),
            y,
            problem,
            held=held,
            kimg=settings.kimg,
            seed=settings.seed,
            clean=clean,
        )
        for name, model in built.ema.items():
            if isinstance(model, Prior | Posterior | Glow):
                save_model(folder / name, model)
        if record is not None:
            write_record(folder, record)
            if not quiet:
                say(record)
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        built.student.error_bars = ErrorBars.load(folder / "posterior")
    return built.teacher.to(y.device).eval(), built.student.to(y.device).eval()


def _is_clean(learner: Learner) -> bool:
    """Whether a learner is given clean images in place of measurements."""
    return isinstance(learner, Clean) and not isinstance(learner, Noisy)


def _settings(
    settings: Settings | None, network: str | nn.Module | None, options: dict[str, Any]
) -> tuple[Settings, nn.Module | None, dict[str, Any]]:
    """Split options into settings, a network of the caller's own, and options of the method."""
    names = {field.name for field in fields(Settings)}
    changes = {key: value for key, value in options.items() if key in names}
    module = network if isinstance(network, nn.Module) else None
    if network is not None and module is None:
        changes["network"] = network
    settings = replace(settings or Settings(), **changes)
    check_fields(settings)
    return settings, module, {k: v for k, v in options.items() if k not in names}


def _check_data(y: Tensor | Source, problem: Problem, clean: bool) -> None:
    """Raise InputError for measurements or noise that no method can learn from."""
    if y.ndim != 4 or not len(y):
        raise InputError(f"measurements must be (N, C, H, W) with N > 0, not {tuple(y.shape)}")
    if not isinstance(problem.noise, Gaussian) and problem.operator.spec != "identity":
        raise InputError(
            f"noise '{problem.noise.spec}' is not Gaussian: learning takes it from images that are"
            " only noisy (--operator identity)"
        )
    if problem.level <= 0 and not clean:
        raise InputError("learning needs the noise level: give a noise above 0")
    if problem.operator.pictorial:
        index = torch.linspace(0, len(y) - 1, min(len(y), CHECKED)).long()
        check_units("the set", y[index], 0.0 if clean else problem.level)


def _check_takes(learner: Learner, problem: Problem) -> None:
    """Raise InputError for a problem that the learner cannot learn from."""
    if learner.takes(problem):
        return
    others = [name for name in METHODS if name != "clean" and METHODS[name].takes(problem)]
    hint = f"take one of {', '.join(others)}" if others else "no method can"
    what = f"{problem.operator.spec} with noise {problem.noise.spec}"
    raise InputError(f"{name_of(learner)} cannot learn from {what}: {hint}")


def _with_gaps(
    y: Tensor | Source, problem: Problem, nan: Nan, learner: Learner
) -> tuple[Tensor | Source, Problem, Learner]:
    """Hide pixels that are not finite: return such measurements, problem and learner."""
    y, pixels = gaps(y, nan)
    if not pixels:
        return y, problem, learner
    if _is_clean(learner):
        raise InputError("clean images have no missing pixels: leave these images out")
    if getattr(learner, "solver", ...) is None and problem.operator.spec == "identity":
        from ..solvers import Draws

        learner = replace(learner, solver=Draws("diffpir", steps=16))  # type: ignore[call-arg]
    return y, Problem(with_missing(problem.operator, pixels), problem.noise), learner


def _config(
    learner: Learner, settings: Settings, problem: Problem, module: nn.Module | None
) -> dict[str, Any]:
    """Return what config.json says of a run, without its data."""
    config: dict[str, Any] = {
        "method": name_of(learner),
        "options": as_dict(learner),
        "settings": asdict(settings),
        "problem": problem.to_dict(),
    }
    if module is not None:
        kind = type(module)
        parameters = sum(p.numel() for p in module.parameters())
        own = {"class": f"{kind.__module__}.{kind.__qualname__}", "parameters": parameters}
        config["prior network"] = {"own": True, **own}
    if problem.operator.digests():
        config["mask or kernel"] = problem.operator.digests()
    return config


def _range(data: Any, y: Tensor | Source) -> dict[str, Any]:
    """Return what config.json says of the file values, if more than their type is needed."""
    held = y if isinstance(y, Source) else data if isinstance(data, ImageSet) else None
    scale = None if held is None else held.scale
    if scale is None or scale.span is None:
        return {}
    black, white, dtype = scale.span
    return {"range": [black, white], "file_type": dtype}


def _check_length(learner: Learner, settings: Settings, quiet: bool) -> None:
    """Say which parts a run is too short to train.

    Raises:
        InputError: The prior is one of them.
    """
    steps = max(1, math.ceil(1000 * settings.kimg / settings.batch))
    last = (steps - 1) / steps
    trained = {
        parameter
        for group in learner.groups
        if any(phase.start <= last for phase in group.phases)
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
