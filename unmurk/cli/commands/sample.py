"""`unmurk sample`: new images from a prior."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ...bounds import Whole
from ...io.outputs import files_of, output
from ...progress import each
from ..data import note_run, place, run_scale
from ..options import AnyPrior, Command, Json, Seed, job_of

__all__ = ["Sample"]

BATCH = 256  # images drawn together, at most


@dataclass
class Sample(Command):
    """Draw new images from a prior."""

    prior: AnyPrior
    out: Path
    """Folder for pictures in the format, type and range of the files that the run learned from
    (unset there: 8-bit PNG), or a .npy or .npz file."""
    n: Annotated[int, arg(aliases=["-n"]), Whole(1, 10_000_000)] = 16
    """Number of images, a whole number from 1 to 10000000."""
    steps: Annotated[int, Whole(2, 10_000)] = 24
    """Noise levels of the sampler, a whole number from 2 to 10000; the network runs 2 steps - 1
    times."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        with output(self.out, files_of(self.prior), folder=None, job=job_of(self)) as to:
            from ...diffusion.prior import Prior
            from ...io.generated import GeneratedWriter, numbered
            from ...io.weights import digest

            prior = place(Prior.load(self.prior))[0]
            note_run(self.prior)
            made = {"command": "sample", "steps": self.steps, "seed": self.seed}
            to.record(made | {"n": self.n, "weights": digest(prior)})
            writer = GeneratedWriter(to.path, self.n, run_scale(self.prior))
            to.expect(numbered(self.n, writer.form) if to.folder else [to.path.name])
            batch = min(BATCH, prior.together(prior.shape[1] * prior.shape[2]))
            with writer:
                for first in each(range(0, self.n, batch)):
                    count = min(batch, self.n - first)
                    images = prior.sample(count, steps=self.steps, seed=self.seed, first=first)
                    writer.write(images.cpu())
                writer.close()
            to.end(("weights", 0, 0, 0))
        return {"out": self.out, "images": self.n}
