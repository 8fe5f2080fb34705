"""`unmurk restore`: one pass with the posterior of a run."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...bounds import Whole
from ...errors import InputError
from ...io.outputs import files_of, output
from ..data import place
from ..options import (
    Batch,
    Command,
    Corrupted,
    Json,
    MaybeRange,
    MaybeText,
    MaybeTile,
    NanOption,
    Repeats,
    Seed,
    SkipBad,
    Text,
    job_of,
)
from .restoring import (
    recorded,
    restore_data,
    sample_images,
    scene_of,
    trained_problem,
    weights_of,
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
    """Run folder, or digits (in the package)."""
    out: Path
    """Where the restored images go, in the type and the range of the corrupted ones."""
    operator: MaybeText = None
    """Forward model of the images; unset: that of the run."""
    noise: MaybeText = None
    """Standard deviation of the noise, in units where the image range is 1, or another noise; auto
    or poisson-gaussian,auto: estimated from DATA; unset: that of the run."""
    samples: Annotated[int, Whole(2, 100_000, even=True)] = 16
    """Posterior samples for each mean and standard deviation, an even number from 2 to 100000."""
    std: bool = False
    """Also write the standard deviation of every pixel (image range 1), (N, C, H, W), to
    NAME-std.npy (std.npy in a folder for an array)."""
    repeats: Repeats = 1
    tile: MaybeTile = None
    batch: Batch = None
    range: MaybeRange = None
    nan: NanOption = "refuse"
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        inputs = [str(self.data), *files_of(self.prior)]
        with output(self.out, inputs, folder=None, job=job_of(self)) as to:
            problem = trained_problem(self.prior, self.operator, self.noise, sample_images(self))
            to.reads(problem.operator.digests())
            from ...checks import require_plausible_flow
            from ...flows.posterior import Posterior
            from ...tiling import posterior_for

            posterior = place(Posterior.load(self.prior))[0]

            def engine(y: "torch.Tensor", numbers: list[int]) -> dict[str, "torch.Tensor"]:
                y = place(y)[0]
                shape = problem.operator.x_shape(y.shape[-3:])
                y, bound = scene_of(y, problem, numbers, shape, self.nan)
                flow = posterior_for(posterior, shape, self.tile)
                mean, std = flow.mean_std(y, bound, self.samples, self.seed, numbers)
                prior = partial(_denoiser, self.prior, shape, self.tile)
                require_plausible_flow(mean, std, y, bound, prior, self.prior)
                return {"images": mean, "std": std} if self.std else {"images": mean}

            settings = recorded(self, problem, {"weights": weights_of(posterior)})
            arrays = ["std"] if self.std else []
            return restore_data(self, to, problem, engine, settings, arrays)


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
