"""`unmurk restore`: one pass with the posterior of a run."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...bounds import Whole
from ...errors import InputError, remark
from ...io.outputs import files_of, output
from ..data import is_even, note_run, place
from ..maps import check_maps, kept, run_maps, scene_of
from ..options import (
    Axes,
    Batch,
    Channel,
    Command,
    Corrupted,
    Dark,
    Flat,
    HotPixels,
    Json,
    MaybeText,
    MaybeTile,
    NanOption,
    NoiseMaps,
    Ranges,
    Repeats,
    Seed,
    SkipBad,
    Text,
    job_of,
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
    trained_problem,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Restore"]


@dataclass
class Restore(Command):
    """Restore corrupted images in one pass, with the posterior that was learned with a prior.

    A folder is processed file by file, and the same command continues it.
    """

    data: Corrupted
    prior: Text
    """Run folder; or in the package: generic (images of any kind, only noisy), digits, nuclei."""
    out: Path
    """Where the restored images go, in the type and the range of the corrupted ones."""
    operator: MaybeText = None
    """Forward model of the images; unset: that of the run."""
    noise: MaybeText = None
    """Standard deviation of the noise, in units where the image range is 1, or 12dn in gray
    levels, or another noise; auto: estimated from DATA; unset: that of the run, with generic
    auto."""
    samples: Annotated[int, Whole(2, 100_000, even=True)] = 16
    """Posterior samples for each mean and standard deviation, an even number from 2 to 100000."""
    std: bool = False
    """Also write the standard deviation of every pixel, in the numbers of the file: an image
    NAME-std of float32 beside each picture, std.npy or NAME-std.npy for an array. It is calibrated
    if the run could calibrate it."""
    uncalibrated: bool = False
    """Write the standard deviation of the samples as it is, without calibration."""
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
            read = frames_of(self)
            problem = trained_problem(
                self.prior,
                self.operator,
                self.noise,
                sample_images(self, read),
                sample_scale(self),
                mapped=self.noise_maps is not None,
                ranged=bool(self.range),
            )
            frames = read()
            flat = None if is_even(self.prior) else frames.sensitivity
            scale, sample = sample_scale(self), sample_maps(self, read)
            maps, problem = run_maps(self, problem, scale, sample, flat)
            nan = self.nan if frames.hidden is None else "mask"
            to.reads(problem.operator.digests())
            from ...checks import require_plausible_flow
            from ...flows.posterior import Posterior
            from ...tiling import posterior_for

            posterior = Models(Posterior.load, self.prior)
            note_run(self.prior)

            def engine(y: "torch.Tensor", numbers: list[int]) -> dict[str, "torch.Tensor"]:
                y = frames.correct(place(y)[0])
                shape = problem.operator.x_shape(y.shape[-3:])
                y, bound = scene_of(maps, y, problem, numbers, shape, nan)
                flow = posterior_for(posterior.of(shape[0]), shape, self.tile)
                mean, std = flow.mean_std(
                    y, bound, self.samples, self.seed, numbers, calibrated=not self.uncalibrated
                )
                prior = partial(_denoiser, self.prior, shape, self.tile)
                require_plausible_flow(mean, std, y, bound, prior, self.prior)
                return {"images": mean, "std": std} if self.std else {"images": mean}

            bars = posterior.error_bars if self.std and not self.uncalibrated else []
            for one in bars:
                if not one.trusted:
                    remark(f"the error bars are not calibrated: {one.why}")
            more: dict[str, Any] = {
                "weights": posterior.weights,
                **calibration(frames),
                **kept(maps),
            }
            if bars:
                more["error bars"] = [asdict(one) for one in bars]
            settings = recorded(self, problem, more)
            arrays = ["std"] if self.std else []
            unmapped = frozenset() if maps is None else maps.empty
            return restore_data(self, to, problem, engine, settings, arrays, unmapped)


def _denoiser(run: str, shape: tuple[int, ...], tile: int | None) -> "tuple[Any, float]":
    """Return D(x, sigma) of a run for images (C, H, W), and its highest level; else (None, 0)."""
    from ...diffusion.prior import Prior, locate
    from ...tiling import prior_for

    try:
        locate(run, "prior", "model_index.json")
    except InputError:  # the run has no prior
        return None, 0.0
    prior = prior_for(place(Prior.load(run))[0], shape, tile)
    return prior.denoise, prior.sigma_max
