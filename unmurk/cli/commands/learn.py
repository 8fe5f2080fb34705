"""`unmurk learn`: a prior and a posterior from corrupted images."""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ...bounds import Real, Whole
from ...errors import InputError
from ...io.outputs import output
from ..data import (
    EVEN,
    Sample,
    captures_of,
    list_skipped,
    measured,
    note_channels,
    note_even,
    problem_of,
    run_frames,
    selection_of,
)
from ..maps import NO_MAP, check_maps, given_maps, is_scaled, noise_of
from ..options import (
    Axes,
    Channel,
    Command,
    Corrupted,
    Dark,
    Flat,
    FlatNoise,
    HotPixels,
    Json,
    MaybeInt,
    MaybePath,
    NanOption,
    NoiseMaps,
    Options,
    Ranges,
    Repeats,
    Seed,
    SkipBad,
    Text,
    job_of,
    pairs,
)

if TYPE_CHECKING:
    import torch

    from ...io.capture_set import Captures
    from ...io.frames import Frames
    from ...io.images import ImageSet
    from ...problem import Problem

__all__ = ["Learn"]


@dataclass
class Learn(Command):
    """Learn a prior and a posterior from corrupted images; the same command continues a run."""

    data: Corrupted
    out: Path
    """Run folder: settings, networks, training state, metrics, report."""
    operator: Text = "identity"
    """Forward model of the images, such as inpaint:random,keep=0.4 or blur:gaussian,sigma=1.5."""
    noise: Text = "0"
    """Standard deviation of the noise in the images, in units where the image range is 1; or
    12dn, in gray levels of the files; or poisson-gaussian,gain=0.01,sigma=0.02; or auto: model and
    numbers from DATA (see the page Noise). It is required unless the images are clean."""
    method: Text = "flowdiff"
    """Method; an unknown name lists all. flowdiff: a prior and a flow, trained together; em: a
    prior refitted to its own posterior samples, round after round; ambient: Ambient Diffusion, for
    masks or for noise alone; sure: SURE-Score; ambientflow: a flow as the prior; noisy: a prior of
    the images as they are (lower bound); clean: a prior of clean images (upper bound). See
    the page Learning methods."""
    solver: Text = "diffpir"
    """Solver that draws the images of flowdiff and em during training, if the operator is not
    identity: NAME or NAME,OPTION=VALUE,..., in 16 steps unless given."""
    e_step: Literal["prior", "conditional"] = "prior"
    """E-step of em. prior: sample under the prior; conditional: by a diffusion model of x given y
    (DiffEM)."""
    objective: Literal["default", "elbo"] = "default"
    """Objective of flowdiff. elbo: the paper's alone; default: ours, which is easier to
    optimize."""
    option: Options = ()
    """Further options of the method, such as recipe.flow=0.9, and the settings of training rate
    and average; an unknown key lists the options of the method."""
    network: Literal["tiny", "small", "base"] = "tiny"
    """Size of the networks, unless --start brings its own."""
    start: Text = "auto"
    """Networks to start from: generic (in the package, trained on synthetic images), a run folder,
    or another prior that `solve` takes. none: random weights, so that the run learns from the
    images of DATA alone. auto: generic for gray images that are only noisy, generic-color for such
    images of three channels, if the method is flowdiff with its default objective and networks,
    and else none."""
    kimg: Annotated[float, Real(0.001, 1e7)] = 100.0
    """Length of the run in thousands of images, a number from 0.001 to 1e+07."""
    batch: Annotated[int, Whole(2, 65_536)] = 32
    """Batch size, a whole number from 2 to 65536; a smaller batch takes less memory."""
    crop: Annotated[MaybeInt, Whole(0, 65_536)] = None
    """Side in pixels of the random crops that are learned from, a whole number from 0 to 65536,
    where 0 learns from whole images of one size. Unset: crops of 64 pixels, or fewer if an image
    is smaller, where an image has a side above 96 pixels; else whole images."""
    augment: Literal["auto", "on", "off"] = "auto"
    """Flip the crops and turn them by quarter turns; auto: if the operator allows it."""
    seed: Seed = 0
    repeats: Repeats = 1
    noise_maps: NoiseMaps = None
    clean: MaybePath = None
    """A few clean images of the same kind, which join the training (flowdiff and em): a folder or
    file as for DATA."""
    simulate: bool = False
    """DATA are clean: corrupt them first with the operator and the noise (for development)."""
    range: Ranges = ()
    axes: Axes = None
    channel: Channel = ()
    dark: Dark = None
    flat: Flat = None
    flat_noise: FlatNoise = "map"
    hot_pixels: HotPixels = "off"
    nan: NanOption = "refuse"
    skip_bad: SkipBad = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic inside the networks; auto: bf16 if a short test finds it faster."""
    compile: bool = False
    """Compile the networks first: a slow start, then faster steps."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        if self.simulate and self.repeats > 1:
            raise InputError("--simulate makes one capture of each image: leave out --repeats")
        check_maps(self)
        inputs = [path for path in (self.data, self.clean, self.dark, self.flat) if path]
        with output(self.out, inputs, owner=True, job=job_of(self)) as to:
            to.expect(["report.html"])
            from ...io.captures import simulated_captures
            from ...io.datasets import head, simulated
            from ...io.frames import corrected_set
            from ...io.images import ImageSet
            from ...io.scale import Scale
            from ...training import learn
            from ...training.distributed import first_process
            from ...training.run_folder import start_of

            options = self._options()
            given = (self.skip_bad, self.range, self.nan)
            operator = "identity" if self.method == "clean" else self.operator
            select = selection_of(self)
            captures = captures_of(self.data, operator, self.crop, *given, self.out, select)
            data: Any = captures or measured(self.data, *given, select)
            sample = partial(_sample, data)
            frames = run_frames(self.dark, self.flat, self.hot_pixels, sample, select=select)
            nan = self.nan if frames.hidden is None else "mask"
            even = frames.sensitivity is None or self._is_even(frames)
            # the noise is that of the images as recorded, or of the divided ones
            noisy = frames if even else frames.undivided()
            raw: Any = captures.corrected(noisy) if captures else corrected_set(data, noisy)
            if captures is not None:
                data = captures = captures.corrected(frames)
            else:
                data = corrected_set(data, frames)
            y: Any = getattr(data, "images", data)
            skipped = dict(data.skipped)
            noise = noise_of(self) if self.noise_maps else self.noise
            problem = problem_of(
                self.operator,
                noise if self.simulate else _run_noise(self.out, noise),
                None if self.simulate else lambda: _measured(raw),
                lambda: data.scale,
                check=self.noise_maps is not None,
            )
            if problem.operator.pictorial:
                few = _sample(data)
                note_channels(few.images, few.scale)
            maps, _ = given_maps(
                self,
                problem,
                lambda: data.scale or Scale(),
                lambda: Sample(captures or head(y), getattr(data, "numbers", None)),
                None if even else frames.sensitivity,
                compare=True,
            )
            if captures is not None and maps is not None and maps.empty:
                lost = captures.without(maps.empty, NO_MAP)
                list_skipped(dict(lost.skipped[len(captures.skipped) :]))
                data = captures = y = lost
                skipped = dict(lost.skipped)
            to.reads(problem.operator.digests())
            if captures is None:
                _keeps_numbers(skipped, y, problem, self.repeats)
            if self.simulate and self.method != "clean":
                if captures is None:
                    y = simulated(y, problem, self.seed)
                else:
                    y = simulated_captures(captures, problem, self.seed, self.out)
            learn(
                replace(data, images=y) if isinstance(data, ImageSet) else y,
                problem,
                method=self.method,
                out=self.out,
                network=self._network(),
                start=self.start,
                kimg=self.kimg,
                batch=self.batch,
                seed=self.seed,
                precision=self.precision,
                compile=self.compile,
                crop=self.crop,
                augment={"auto": None, "on": True, "off": False}[self.augment],
                nan=nan,
                repeats=self.repeats,
                clean=self.clean,
                noise_maps=maps,
                calibration=frames.record() | (EVEN if even and self.flat else {}),
                watch=self._show,
                **options,
            )
            if not first_process():
                return {}
            from .report import page_of, verdict_of

            page, verdict = page_of(self.out, self.data), verdict_of(self.out)
        found = {"run": self.out, "report": page, "images": len(y), "skipped": skipped}
        if self.repeats > 1:
            found["scenes"] = len(y) // self.repeats
        if not self.json:  # `learn` has printed it
            verdict.pop("verdict", None)
        found |= {"start": start_of(self.out), **verdict}
        if maps is not None and is_scaled(self):
            return {**found, "noise": f"gaussian,sigma={maps.level:.4g}", "factor": maps.factor}
        return {**found, "noise": problem.noise.spec} if "auto" in self.noise else found

    def _is_even(self, frames: "Frames") -> bool:
        """Whether the noise of images that a flat field divided is taken as even."""
        if self.method == "clean" or self.simulate:
            return True
        if self.flat_noise == "even":
            note_even(frames, "--flat-noise map weighs each pixel")
        return self.flat_noise == "even"

    def _show(self, share: float) -> None:
        """Write the page of the run while it trains."""
        from ..run_page import unfinished

        unfinished(self.out, share)

    def _network(self) -> str | None:
        """The size of the networks; None for the default where a start brings its own."""
        return None if self.network == "tiny" and self.start != "none" else self.network

    def _options(self) -> dict[str, Any]:
        """The options of the method, those of --option and with a flag, and further settings."""
        from ...training.registry import configure, configure_settings, sampler_of
        from ...training.settings import Settings

        given = pairs(self.option)
        settings = {field.name for field in fields(Settings)} & given.keys()
        for key in sorted(settings & vars(self).keys()):
            raise InputError(f"--option {key}={given[key]}: use the option --{key} instead")
        chosen = configure_settings({key: given.pop(key) for key in sorted(settings)})
        options = chosen | configure(self.method, given)
        flags: dict[str, Any] = {}
        if self.objective != "default":
            flags["objective"] = self.objective
        if self.e_step != "prior":
            flags["e_step"] = self.e_step
        elif self.method in ("flowdiff", "em") and self.operator != "identity":
            flags["solver"] = sampler_of(self.solver)
        return flags | options


def _sample(data: Any) -> "ImageSet":
    """Return the first images of a set, with its scale."""
    from ...io.capture_set import Captures
    from ...io.datasets import head
    from ...io.images import ImageSet
    from ...io.scale import Scale

    if isinstance(data, Captures):
        return ImageSet(data.first(), [], data.scale or Scale())
    images = getattr(data, "images", None)
    return ImageSet(head(data if images is None else images), [], data.scale or Scale())


def _keeps_numbers(skipped: dict[str, str], y: Any, problem: "Problem", repeats: int = 1) -> None:
    """Learning numbers the images itself: none may be missing if the operator, or the scenes that
    captures belong to, go by numbers."""
    if not skipped:
        return
    if repeats > 1:
        raise InputError(
            f"{len(skipped)} images were left out, and each scene has {repeats} captures: correct"
            f" {next(iter(skipped))}, or leave out all captures of its scene"
        )
    shape = problem.operator.x_shape(y.shape)
    bound = problem.operator.bind([0, 1], shape)
    parts = getattr(bound, "members", (bound,))
    held = [getattr(part, name) for part in parts for name in part.tensors]
    if any(value is not None and len(value) > 1 for value in held):
        raise InputError(
            f"{len(skipped)} images were left out, and '{problem.operator.spec}' depends on the "
            f"numbers of the images, which would shift: correct {next(iter(skipped))}, or learn "
            "from a set without --skip-bad"
        )


def _measured(data: Any) -> "torch.Tensor | Captures":
    """The images of a set from which the noise is estimated."""
    from ...io.capture_set import Captures
    from ...io.datasets import head

    return data if isinstance(data, Captures) else head(getattr(data, "images", data))


def _run_noise(run: Path, noise: str) -> str:
    """Return the noise; if it is to be estimated and the run exists, the estimate of the run."""
    config = run / "config.json"
    if "auto" not in noise or not config.exists():
        return noise
    from ...io.json_files import read_object

    problem = read_object(config).get("problem")
    if not isinstance(problem, dict) or "noise" not in problem:
        raise InputError(f"{config} does not give the noise of a run: give another folder")
    return str(problem["noise"])
