"""`unmurk solve`: any operator, by an iterative solver."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ...bounds import Whole
from ...errors import InputError
from ...io.outputs import files_of, output
from ..data import note_run, place, problem_of
from ..maps import check_maps, given_maps, kept, noise_of, scene_of
from ..options import (
    AnyPrior,
    Axes,
    Batch,
    Channel,
    Command,
    Corrupted,
    Dark,
    Flat,
    HotPixels,
    Json,
    MaybeInt,
    MaybeTile,
    NanOption,
    NoiseMaps,
    Options,
    Ranges,
    Repeats,
    Seed,
    SkipBad,
    Text,
    job_of,
    solver_options,
)
from .restoring import (
    Models,
    calibration,
    frames_of,
    recorded,
    restore_data,
    sample_images,
    sample_maps,
    sample_scale,
)

if TYPE_CHECKING:
    import torch

    from ...io.frames import Frames
    from ...problem import Problem

__all__ = ["Solve"]


@dataclass
class Solve(Command):
    """Restore images of any operator with a prior, by an iterative solver.

    A folder is processed file by file, and the same command continues it.
    """

    data: Corrupted
    prior: AnyPrior
    operator: Text
    """Forward model of the images, such as inpaint:box,size=12 or sr:average,factor=4."""
    noise: Text
    """Standard deviation of the noise in the measurements, in units where the image range is 1; or
    12dn, in gray levels of the files; or poisson-gaussian,gain=0.01,sigma=0.02; or auto: estimated
    from DATA (see the page Noise)."""
    out: Path
    """Folder for the restored images (the mean of several samples)."""
    method: Text = "red-diff"
    """Name of the solver; an unknown name lists all. auto: one that fits the operator, the number
    of samples and --option budget=100, the network evaluations per sample."""
    samples: Annotated[int, Whole(1, 100_000)] = 1
    """Solutions for each image, a whole number from 1 to 100000. With more than one,
    NAME-samples.npy (image range 1) and the standard deviation are written too, the latter in the
    numbers of the file: an image NAME-std of float32, std.npy or NAME-std.npy for an array."""
    restarts: Annotated[MaybeInt, Whole(1, 10_000)] = None
    """Runs for each solution, a whole number from 1 to 10000, of which the best fit is kept (phase
    retrieval); unset: 1, or the choice of --method auto."""
    steps: Annotated[MaybeInt, Whole(1, 100_000)] = None
    """Steps of the solver, a whole number from 1 to 100000; unset: its default."""
    option: Options = ()
    """Other options of the solver; an unknown key lists the options."""
    init: Literal["pinv", "posterior"] = "pinv"
    """Starting point. pinv: the solver's own (see the page Solvers); posterior: a sample of
    the run's posterior."""
    noise_maps: NoiseMaps = None
    repeats: Repeats = 1
    tile: MaybeTile = None
    batch: Batch = None
    range: Ranges = ()
    axes: Axes = None
    channel: Channel = ()
    dark: Dark = None
    flat: Flat = None
    hot_pixels: HotPixels = "off"
    nan: NanOption = "refuse"
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        check_maps(self)
        frame_files = [str(path) for path in (self.dark, self.flat) if path is not None]
        inputs = [str(self.data), *files_of(self.prior), *frame_files]
        with output(self.out, inputs, folder=None, job=job_of(self)) as to:
            options = solver_options(self.method, self.option, self.steps)
            read = frames_of(self)
            noise = noise_of(self) if self.noise_maps else self.noise
            scale = sample_scale(self)
            images, check = sample_images(self, read), self.noise_maps is not None
            problem = problem_of(self.operator, noise, images, scale, check=check)
            frames = read()
            raw = frames.undivided()  # the solver fits g A(x) to these images
            maps, problem = given_maps(self, problem, scale, sample_maps(self, lambda: raw))
            nan = self.nan if frames.hidden is None else "mask"
            to.reads(problem.operator.digests())
            from ...diffusion.prior import Prior
            from ...flows.posterior import Posterior
            from ...solvers import solve
            from ...tiling import posterior_for, prior_for

            starts = self.init == "posterior"
            posteriors = Models(Posterior.load, self.prior) if starts else None
            priors = Models(Prior.load, self.prior)
            note_run(self.prior)
            ends: list[End] = []

            def engine(y: "torch.Tensor", numbers: list[int]) -> dict[str, "torch.Tensor"]:
                y = frames.correct(place(y)[0], divide=False)
                single = y.flatten(0, 1) if y.ndim == 5 else y
                prior = priors.of(single.shape[1] if single.ndim == 4 else 1)
                shape = _shape(problem, single, prior.shape)
                y, bound = scene_of(maps, y, problem, numbers, shape, nan)
                flow = None
                if posteriors is not None:
                    flow = posterior_for(posteriors.of(shape[0]), shape, self.tile)
                result = solve(
                    y,
                    _weighted(bound, frames, y),
                    prior_for(prior, shape, self.tile),
                    method=self.method,
                    samples=self.samples,
                    restarts=self.restarts,
                    seed=self.seed,
                    init="posterior" if starts else None,
                    posterior=flow,
                    nan=nan,
                    **options,
                )
                chi2 = result.trace[-1]["chi2"] if result.trace else None
                ends.append((len(y), chi2, result.method, result.nfe))
                several = {"samples": result.samples, "std": result.std}
                return {"images": result.mean, **(several if self.samples > 1 else {})}

            weights = {"weights": priors.weights, **calibration(frames), **kept(maps)}
            if posteriors is not None:
                weights["posterior"] = posteriors.weights
            settings = recorded(self, problem, {**weights, "options": options})
            arrays = ["samples", "std"] if self.samples > 1 else []
            unmapped = frozenset() if maps is None else maps.empty
            written = restore_data(self, to, problem, engine, settings, arrays, unmapped)
        return {**written, **_sum_up(ends)}


End = tuple[int, float | None, str, int]
"""Images of a batch, their mean chi-square at the end, the method, network evaluations."""


def _sum_up(ends: list[End]) -> dict[str, Any]:
    """Return the figures of all batches together."""
    if not ends:
        return {}
    *_, (_, _, method, nfe) = ends
    weighted = [count * chi2 for count, chi2, *_ in ends if chi2 is not None]
    mean = sum(weighted) / sum(end[0] for end in ends) if weighted else None
    return {"method": method, "nfe": nfe, "chi2": mean}


def _shape(problem: "Problem", y: "torch.Tensor", known: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the images behind y: the prior's if it fits, else the operator's."""
    try:
        fits = problem.operator.y_shape(known) == tuple(y.shape[1:])
    except InputError:
        fits = False
    shape = tuple(known) if fits else tuple(problem.operator.x_shape(y.shape[1:]))
    if shape[0] != known[0] == 1 and y.shape[1] != shape[0]:
        raise InputError(
            f"operator '{problem.operator.spec}' mixes the {shape[0]} channels of an image, which "
            "a prior of gray images cannot distinguish: use a prior of color images"
        )
    return shape


def _weighted(problem: "Problem", frames: "Frames", y: "torch.Tensor") -> "Problem":
    """Return the problem of images that a flat field has not divided: y = g A(x) + n, bound."""
    if frames.sensitivity is None:
        return problem
    from ...operators.weighted import Weighted

    weights = frames.sensitivity[None].to(y.device)
    return problem._with(Weighted(problem.operator, weights), problem.index)
