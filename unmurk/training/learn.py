"""Learn a prior and a posterior from corrupted images.

For example::

    prior, posterior = unmurk.learn(y, unmurk.Problem("identity", noise=0.3), out="runs/digits")

One module holds one learner, and one training loop serves all of them. The run folder holds every
setting, the models, and a checkpoint (`run_folder`). The same call on the same folder continues a
run, or returns what it has learned.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bounds import Whole, check_fields
from ..diffusion.prior import Prior
from ..errors import InputError
from ..evaluation.verdict import Verdict
from ..flows.error_bars import ErrorBars
from ..flows.glow import Glow
from ..flows.posterior import Posterior
from ..io.axes import ALL, Selection
from ..io.captures import Captures, as_captures, sizes_in
from ..io.crops import Crops, crop_side, croppable, cut_by_default
from ..io.datasets import Source, as_source
from ..io.formats.pictures import Nan
from ..io.gaps import gaps
from ..io.images import ImageSet
from ..io.outputs import output
from ..io.scale import Spans, check_units
from ..missing import Missing, with_missing
from ..noise import Gaussian
from ..operators import Compose, Operator, as_operator
from ..operators.crops import Crop
from ..problem import Problem
from . import memory
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .baselines import Clean, Noisy
from .distributed import first_process, processes
from .em import Em
from .error_bars import calibrate_run, held_out, kept_out, leading, say, write_record
from .examples import FILE, choose_examples
from .flowdiff import FlowDiff
from .learner import Learner, as_dict
from .preview import Preview
from .registry import METHODS, name_of, register, resolve
from .run_folder import fingerprint, open_run, raise_kimg, save_model
from .start import RATE, Start, own_network
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

REPEATS = Whole(1, 1000)
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
    start: Any = None,
    settings: Settings | None = None,
    quiet: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    repeats: int = 1,
    clean: Any = None,
    axes: str = "",
    channel: int | str | Sequence[int | str] = (),
    calibration: dict[str, Any] | None = None,
    watch: Callable[[float], object] | None = None,
    **options: Any,
) -> tuple[Prior, Posterior]:
    r"""Learn a prior :math:`p(x)` and a posterior :math:`q(x \mid y)` from corrupted images.

    Args:
        data: Measurements y of shape (N, ...): a tensor, an array (which may be mapped from a
            file), the path of a .npy file or of a folder of pictures, what `load_images` returns,
            a `Dataset` or `DataLoader` of torch, a `Source`, `Captures`, a list of images (C, H,
            W), or any object whose attribute `y` is one of these; nothing else of that object is
            read. For method "clean": clean images. Images with a side above 96 pixels are learned
            from in random crops, and may then differ in size.
        problem: How the measurements were made; image i of the data has number i.
        method: A name in `training.METHODS`, a class derived from `training.Learner`, or an
            instance of one, such as `training.FlowDiff(recipe=training.Recipe(steps=8))`.
        out: The run folder.
        network: A preset of the networks (tiny, small, base), or for the prior any `nn.Module`
            that maps (x, t) to a tensor like x. The module is copied, and the posterior then takes
            the preset of the settings. Its weights are saved with a note that the network is your
            own: `Prior.load(folder, network=module)` reads them.
        start: Networks that the run starts from: "generic", a run folder, a prior or its name, or
            a pair (Prior, Posterior); see `training.start`. They replace `network`, and the
            default of `rate` is then 0.002. None starts from random weights.
        settings: Training settings. Single fields can be given by name instead (kimg, batch, ...).
        quiet: Whether to show no progress.
        span: File values of black and white, for integers and files; None takes them from the type
            (see `io.scale`). The run folder keeps them for `restore` and `solve`.
        nan: "mask" treats pixels that are not finite as hidden; "refuse" names them.
        repeats: Number N of captures of each scene, a whole number from 1 to 1000; the data hold
            those of a scene one after another, or are (S, N, C, H, W). They are each other's
            target, and samples follow the posterior given all of them.
        clean: A few clean images of the same kind, as for `data`, that join the training; None:
            there are none.
        axes, channel: The axes of arrays and files, and the channels to read; see `load_images`.
            The run folder keeps them too.
        calibration: What the run folder keeps of the calibration frames that the data were
            corrected with (`io.frames.Frames.record`); `restore` and `solve` then ask for them.
        watch: Called about once a minute with the share of the run, after its folder has received
            the models so far; None: nothing is called. See `training.preview`.
        options: Fields of the settings, and options of the method by name.

    Returns:
        The prior and the posterior with EMA weights, in evaluation mode, on the device of the
        data.

    Raises:
        InputError: Data, problem, networks and options do not fit together, images are not finite,
            settings are out of their bounds, the budget is too small to train the prior, or
            smaller than that of the run folder, the run needs more memory than there is, or the
            run folder belongs to another run, has another format, or is in use by another process.
    """
    own = settings is not None or "rate" in options
    settings, module, options = _settings(settings, network, options)
    learner = resolve(method, options)
    only_clean = _is_clean(learner)
    operator = as_operator("identity") if only_clean else problem.operator
    _check_helpers(learner, repeats, clean)
    data = _captures_in_line(data, repeats)
    one = (channel,) if isinstance(channel, int | str) else tuple(channel)
    select = Selection(axes, tuple(map(str, one)))
    y: Any = _measurements(data, operator, settings, span, nan, Path(out), repeats, select)
    files = next((d for d in (data, y) if isinstance(d, ImageSet | Source | Captures)), None)
    select = select if files is None else files.select
    _check_data(y, problem, only_clean)
    if isinstance(data, str | Path) and isinstance(y, Source) and y.note and not quiet:
        print(y.note, file=sys.stderr)
    given = problem
    if isinstance(y, Crops):
        problem, learner = _on_crops(y, problem, learner)
    else:
        y, problem, learner = _with_gaps(y, problem, nan, learner)
    _check_takes(learner, problem)
    shape: Any = tuple(y.shape[1:] if only_clean else problem.operator.x_shape(y.shape))
    known = _clean_images(clean, y, shape, span or _file_span(data, y), Path(out))
    held = 0 if repeats > 1 else kept_out(Path(out), held_out(y, shape, settings.kimg))
    observed: Any = leading(y, len(y) - held)
    begin = Start.of(start, given, shape[0])
    own_network(begin, network)
    if begin is not None and not own:
        settings = replace(settings, rate=RATE)
    built = learner.build(
        observed,
        problem,
        shape,
        settings.network,
        settings.seed,
        module,
        repeats,
        known,
        begin,
    )
    folder, quiet = Path(out), quiet or not first_process()
    if first_process():
        config = _config(built, settings, given, module) | _range(data, y) | select.to_dict()
        if begin is not None and not quiet:
            print(f"start: {begin.name} ({begin.changes(shape)})", file=sys.stderr)
        if problem is not given and (nan == "mask" or not isinstance(y, Crops)):
            config["nan"] = nan
        config |= {} if repeats == 1 else {"repeats": repeats}
        config |= {} if known is None else {"clean": fingerprint(known)}
        if isinstance(y, Crops):
            config |= {"crop": y.side, "augment": y.augment}
        if held:
            config["held_out"] = held
        if calibration:
            config["calibration"] = calibration
        open_run(folder, config | {"data": fingerprint(y)})
        _keep_examples(folder, y, given, problem.operator, only_clean)
    _check_length(built, settings, quiet)
    what = y.text if isinstance(y, Crops) else memory.described(shape, len(y))
    taken = memory.check(built, settings, shape, len(y), processes().device, quiet, what)
    if first_process():
        raise_kimg(folder, settings.kimg)
    checks = None
    if not only_clean and isinstance(problem.noise, Gaussian):
        checks = Checks.within(observed, problem, shape, settings.kimg, settings.seed)
    preview = Preview(folder, watch) if first_process() else None
    announce = None if quiet else partial(memory.announce, taken, what)
    trainer = Trainer(
        built,
        built.y,
        settings,
        folder,
        quiet=quiet,
        checks=checks,
        announce=announce,
        about={"start": begin.name} if begin else None,
        preview=preview,
    )
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
            clean=only_clean,
        )
        for name, model in built.ema.items():
            if isinstance(model, Prior | Posterior | Glow):
                save_model(folder / name, model)
        if preview is not None:
            preview.end()
        if record is not None:
            write_record(folder, record)
            if not quiet:
                say(record, Verdict.load(folder))
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        built.student.error_bars = ErrorBars.load(folder / "posterior")
    return built.teacher.to(y.device).eval(), built.student.to(y.device).eval()


def _keep_examples(
    folder: Path, y: Tensor | Source, problem: Problem, operator: Operator, clean: bool
) -> None:
    """Keep a few measurements for the page of the run, once."""
    if clean or (folder / FILE).exists():
        return
    last = operator.members[-1] if isinstance(operator, Compose) else operator
    missing = last.pixels if isinstance(last, Missing) else {}
    examples = choose_examples(y, problem, missing)
    if examples is not None:
        examples.save(folder)


def _measurements(
    data: Any,
    operator: Operator,
    settings: Settings,
    span: Spans,
    nan: Nan,
    scratch: Path,
    repeats: int = 1,
    select: Selection = ALL,
) -> Tensor | Source:
    """Return measurements as a tensor or a source: crops of large images, else whole images.

    Raises:
        InputError: The data cannot be read, or crops are asked for and do not fit the operator.
    """
    crop = settings.crop
    if isinstance(data, list | tuple) and len({tuple(image.shape) for image in data}) == 1:
        data = torch.stack([torch.as_tensor(image) for image in data])
    if not crop and not (
        crop is None and croppable(operator) and _cut_by_default(data, span, nan, select)
    ):
        if settings.augment:
            raise InputError("augmentation needs crops: give their side too (--crop 64)")
        if isinstance(data, Captures | list | tuple):
            raise InputError(
                f"whole images of '{operator.spec}' have one size: give them as one array, or "
                "learn from crops"
            )
        return as_source(data, span, nan, select)
    if not croppable(operator):
        operator.on_crops([Crop(0, 0, 0, 1, 1)], 1)  # says why there are none
    captures = as_captures(data, span, nan, scratch, select)
    side = crop or crop_side(captures, operator)
    return Crops(captures, operator, side, settings.augment, settings.seed, repeats=repeats)


def _check_helpers(learner: Learner, repeats: int, clean: Any) -> None:
    """Raise InputError for repeated captures, or clean images, that a method cannot use."""
    REPEATS.check("repeats (--repeats)", repeats)
    for given, word, what in (
        (repeats > 1, "takes_repeats", "repeated captures (--repeats)"),
        (clean is not None, "takes_clean", "clean images beside the measurements (--clean)"),
    ):
        if given and not getattr(learner, word):
            others = ", ".join(name for name, cls in METHODS.items() if getattr(cls, word))
            raise InputError(
                f"{name_of(learner)} does not learn from {what}: take one of {others}"
            )


def _captures_in_line(data: Any, repeats: int) -> Any:
    """Return captures (S, N, C, H, W) as (S N, C, H, W); other data as they are."""
    if not isinstance(data, Tensor | np.ndarray) or data.ndim != 5 or repeats == 1:
        return data
    if data.shape[1] != repeats:
        raise InputError(
            f"captures of shape {tuple(data.shape)} are {data.shape[1]} of each scene, not"
            f" {repeats}: give repeats={data.shape[1]}"
        )
    return data.reshape(-1, *data.shape[2:])


def _clean_images(
    clean: Any, y: Tensor | Source, shape: tuple[int, ...], span: Spans, scratch: Path
) -> Tensor | Source | None:
    """Return clean images of the shape that is learned: crops of them, or whole images.

    Args:
        clean: The images, as for `data` of `learn`, or None.
        y: The measurements.
        shape: Shape (C, H, W) of the images that are learned.
        span: File values of black and white.
        scratch: See `_measurements`.

    Raises:
        InputError: The images cannot be read, or have another shape.
    """
    if clean is None:
        return None
    if isinstance(y, Crops):
        captures = as_captures(clean, span, "refuse", scratch)
        if any(min(size) < y.side for size in captures.sizes):
            raise InputError(
                f"the clean images are smaller than the crops of {y.side}: give larger ones, or"
                " smaller crops (--crop)"
            )
        found: Tensor | Source = Crops(
            captures, as_operator("identity"), y.side, y.augment, y.seed
        )
    else:
        found = as_source(clean, span)
    if tuple(found.shape[1:]) != shape or not len(found):
        raise InputError(
            f"the clean images have the shape {tuple(found.shape[1:])}, those that are learned"
            f" {shape}: give clean images of that shape"
        )
    index = torch.linspace(0, len(found) - 1, min(len(found), CHECKED)).long()
    check_units("the clean set", found[index], 0.0)
    return found


def _cut_by_default(data: Any, span: Spans, nan: Nan, select: Selection) -> bool:
    """Whether data are learned from in crops if nothing else is asked for."""
    if isinstance(data, str | Path):
        return cut_by_default(sizes_in(Path(data), select))
    if isinstance(data, Captures):
        return cut_by_default(data.sizes)
    if isinstance(data, list | tuple):
        return cut_by_default([tuple(image.shape[-2:]) for image in data])
    y = as_source(data, span, nan, select)
    return y.ndim == 4 and cut_by_default([(int(y.shape[-2]), int(y.shape[-1]))])


def _on_crops(crops: Crops, problem: Problem, learner: Learner) -> tuple[Problem, Learner]:
    """Return the problem of the crops, and the learner with a solver if crops hide pixels."""
    if crops.masked and _is_clean(learner):
        raise InputError(
            "clean images have no missing pixels: leave out those that have, or that are smaller "
            f"than the crops of {crops.side}"
        )
    found = crops.problem(problem)
    return found, learner if found is problem else _with_solver(learner, problem)


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
        part = y.read(index.tolist()) if isinstance(y, Source) else y[index]
        check_units("the set", part, 0.0 if clean else problem.level)


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
    learner = _with_solver(learner, problem)
    return y, Problem(with_missing(problem.operator, pixels), problem.noise), learner


def _with_solver(learner: Learner, problem: Problem) -> Learner:
    """Return a learner that has a solver where hidden pixels make a mask of the identity."""
    if not isinstance(problem.noise, Gaussian):
        raise InputError(
            f"noise '{problem.noise.spec}' is not Gaussian: learning takes it only where no pixel"
            " is hidden: give --noise gaussian,auto or a number, or images without missing pixels"
        )
    if getattr(learner, "solver", ...) is None and problem.operator.spec == "identity":
        from ..solvers import Draws

        return replace(learner, solver=Draws("diffpir", steps=16))  # type: ignore[call-arg]
    return learner


def _config(
    learner: Learner, settings: Settings, problem: Problem, module: nn.Module | None
) -> dict[str, Any]:
    """Return what config.json says of a run, without its data."""
    config: dict[str, Any] = {
        "method": name_of(learner),
        "options": as_dict(learner),
        "settings": asdict(settings),
        "problem": problem.to_dict(),
        "start": learner.start.to_dict(learner.shape) if learner.start else "none",
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
    """Return what config.json says of the files: type, format, and range if it needs one."""
    held = y if isinstance(y, Source) else data if isinstance(data, ImageSet) else None
    scale = None if held is None else held.scale
    if scale is None:
        return {}
    found: dict[str, Any] = {"file_type": scale.dtype, "file_format": scale.format}
    if scale.span is None:
        return found
    return found | {"range": [scale.span.black, scale.span.white]}


def _file_span(data: Any, y: Tensor | Source) -> Any:
    """Return file values of black and white and their type, if the type is not enough."""
    held = y if isinstance(y, Source) else data if isinstance(data, ImageSet) else None
    return None if held is None or held.scale is None else held.scale.span


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
