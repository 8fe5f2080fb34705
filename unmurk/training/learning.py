"""Learn a prior and a posterior from corrupted images.

For example::

    prior, posterior = unmurk.learn(y, unmurk.Problem("identity", noise=0.3), out="runs/digits")

One module holds one learner, and one training loop serves all of them. The run folder holds every
setting, the models, and a checkpoint (`run_folder`). The same call on the same folder continues a
run, or returns what it has learned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..bounds import check_fields
from ..diffusion.prior import Prior
from ..errors import InputError, remark
from ..evaluation.verdict import Verdict
from ..flows.error_bars import ErrorBars
from ..flows.glow import Glow
from ..flows.posterior import Posterior
from ..io.axes import Selection
from ..io.capture_set import Captures
from ..io.crops import Crops
from ..io.datasets import Source
from ..io.formats.pictures import Nan
from ..io.images import ImageSet
from ..io.noise_maps import NoiseMaps
from ..io.outputs import output
from ..io.scale import Spans
from ..missing import Missing
from ..noise import Gaussian
from ..operators import Compose, Operator, as_operator
from ..problem import Problem
from . import memory
from .ambient import Ambient
from .ambientflow import AmbientFlow
from .baselines import Clean, Noisy
from .distributed import first_process, processes
from .em import Em
from .error_bars import calibrate_run, held_out, kept_out, leading, say, write_record
from .examples import FILE, are_kept, choose_examples
from .flowdiff import FlowDiff
from .inputs import (
    captures_in_line,
    check_data,
    check_helpers,
    check_light,
    check_takes,
    clean_images,
    file_ends,
    is_clean,
    measurements,
    on_crops,
    scale_record,
    weighed,
    with_gaps,
    with_maps,
)
from .learner import Learner, as_dict
from .preview import Preview
from .registry import METHODS, name_of, register, resolve
from .run_folder import fingerprint, open_run, raise_kimg, save_model
from .start import Start, own_network
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
    start: Any = "auto",
    settings: Settings | None = None,
    quiet: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    repeats: int = 1,
    clean: Any = None,
    axes: str = "",
    channel: int | str | Sequence[int | str] = (),
    noise_maps: Any = None,
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
            instance of one, such as `training.FlowDiff(recipe=training.Recipe(flow=0.9))`.
        out: The run folder.
        network: A preset of the networks (tiny, small, base), or for the prior any `nn.Module`
            that maps (x, t) to a tensor like x. The module is copied, and the posterior then takes
            the preset of the settings. Its weights are saved with a note that the network is your
            own: `Prior.load(folder, network=module)` reads them.
        start: Networks that the run starts from: "generic", a run folder, a prior or its name, or
            a pair (Prior, Posterior); see `training.start`. They replace `network`. None or "none"
            starts from random weights. "auto" is "generic" for gray images that are only noisy and
            "generic-color" for those of three channels, if the method is `flowdiff` with its
            default objective and networks, and else "none".
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
        noise_maps: A standard deviation of the noise for every pixel of every image, in place of
            the noise of `problem`: a tensor (N, 1 or C, H, W), `NoiseMaps`, or a path; see
            `io.noise_maps`. Pixels without a usable number are hidden.
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

    >>> import torch
    >>> problem = Problem("identity", noise=0.2)
    >>> y = problem.simulate(torch.full((8, 1, 8, 8), 0.5), seed=0)
    >>> short = {"kimg": 0.004, "batch": 2, "precision": "fp32", "quiet": True}
    >>> prior, posterior = learn(y, problem, out="runs/a", **short)
    >>> mean, std = posterior.mean_std(y, problem)
    >>> prior.shape, mean.shape, bool((std > 0).all())
    ((1, 8, 8), torch.Size([8, 1, 8, 8]), True)
    """
    settings, module, options = _settings(settings, network, options)
    learner = resolve(method, options)
    only_clean = is_clean(learner)
    operator = as_operator("identity") if only_clean else problem.operator
    check_helpers(learner, repeats, clean)
    data = captures_in_line(data, repeats)
    one = (channel,) if isinstance(channel, int | str) else tuple(channel)
    select = Selection(axes, tuple(map(str, one)), repeats=repeats)
    y: Any = measurements(data, operator, settings, span, nan, Path(out), repeats, select)
    files = next((d for d in (data, y) if isinstance(d, ImageSet | Source | Captures)), None)
    select = select if files is None else files.select
    y, problem, maps = with_maps(noise_maps, data, y, problem, learner, select)
    nan = "mask" if maps is not None and maps.hides else nan
    check_data(y, problem, only_clean)
    if isinstance(data, str | Path) and isinstance(y, Source) and y.note and not quiet:
        remark(y.note)
    given = problem
    if isinstance(y, Crops):
        problem, learner = on_crops(y, problem, learner)
    else:
        y, problem, learner = with_gaps(y, problem, nan, learner)
    shape: Any = tuple(y.shape[1:] if only_clean else problem.operator.x_shape(y.shape))
    unweighted = problem.operator
    white, problem = weighed(y, problem, maps, shape, repeats)
    check_takes(learner, problem, given)
    known = clean_images(clean, y, shape, span or file_ends(data, y), Path(out), select)
    check_light(known, y, problem, shape)
    held = 0 if repeats > 1 else kept_out(Path(out), held_out(y, shape, settings.kimg))
    observed: Any = leading(white, len(y) - held)
    begin, why = None, ""
    if start != "auto":
        begin = Start.of(start, given, shape[0])
        own_network(begin, network)
    elif network is None and settings.network == Settings.network:
        begin, why = Start.default(learner.default_start, given, shape)
        why = why and f"start: none, as {why}"
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
    turned = isinstance(y, Crops) and y.augment
    for flow in (built.posterior, built.student):  # a Wiener start does not turn with the image
        flow.turnable = turned and flow.start is None
    folder, quiet = Path(out), quiet or not first_process()
    if first_process():
        config = _config(built, settings, given, module) | scale_record(data, y) | select.to_dict()
        text = f"start: {begin.name} ({begin.changes(shape)})" if begin else why
        if text and not quiet:
            remark(text)
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
        if maps is not None:
            config["noise maps"] = maps.record()
        open_run(folder, config | {"data": fingerprint(y)})
        _keep_examples(folder, y, given, unweighted, only_clean, maps)
    _check_length(built, settings, quiet)
    what = y.text if isinstance(y, Crops) else memory.described(shape, len(y))
    if repeats > 1:
        count = len(y.captures) if isinstance(y, Crops) else len(y)
        what += f" ({count // repeats} scenes of {repeats} captures)"
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
            white,
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
    prior, posterior = built.teacher.to(y.device).eval(), built.student.to(y.device).eval()
    prior.any_size = posterior.any_size = isinstance(y, Crops)  # as `load` reads it of the run
    return prior, posterior


def _keep_examples(
    folder: Path,
    y: Tensor | Source,
    problem: Problem,
    operator: Operator,
    clean: bool,
    maps: NoiseMaps | None,
) -> None:
    """Keep a few measurements for the page of the run, once."""
    if clean or (folder / FILE).exists() or not are_kept(y):
        return
    last = operator.members[-1] if isinstance(operator, Compose) else operator
    missing = last.pixels if isinstance(last, Missing) else {}
    choose_examples(y, problem, missing, maps).save(folder)


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
    if getattr(learner, "halves", None) is not None:
        config["half scale"] = True
    return config


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
        if any(phase.start <= last for phase in group.phases if not phase.pretraining)
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
        remark(f"{text} train all of the {' and the '.join(left)}")
