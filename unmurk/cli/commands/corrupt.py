"""`unmurk corrupt`: simulated measurements of clean images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import remark
from ...io.formats.readers import holds_images, is_folder
from ...io.formats.registry import is_written
from ...io.outputs import Output, key_of, output
from ...progress import each
from ..data import check_floats, images_of, note_pages, problem_of, selection_of
from ..options import (
    Axes,
    Channel,
    Clean,
    Command,
    Json,
    Ranges,
    Seed,
    SkipBad,
    Text,
    job_of,
)

if TYPE_CHECKING:
    import torch

    from ...io.scale import Scale, Spans
    from ...problem import Problem

__all__ = ["Corrupt"]

BATCH = 256  # images corrupted together


@dataclass
class Corrupt(Command):
    """Corrupt clean images, to try things out."""

    data: Clean
    out: Path
    """A .npy or .npz file keeps every value. A folder gets files like those of DATA, in their
    format; integers are clipped to their range, with a warning."""
    operator: Text = "identity"
    """Forward model, such as inpaint:random,keep=0.4 or blur:gaussian,sigma=1.5."""
    noise: Text = "0"
    """Standard deviation of the noise to add, in units where the image range is 1; or
    poisson,gain=0.01 or poisson-gaussian,gain=0.01,sigma=0.02 (see the page Noise)."""
    range: Ranges = ()
    axes: Axes = None
    channel: Channel = ()
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def _scale(self) -> "Scale":
        """The scale of the data, for a noise in gray levels."""
        from ...io.images import pictures_in, read_images
        from .restoring import spans_of

        span: Spans = self.range
        select = selection_of(self)
        if is_folder(self.data) or holds_images(self.data):
            files = pictures_in(self.data) if is_folder(self.data) else [self.data]
            span = spans_of(self.data, files, span, None, select)
        first = read_images(self.data, limit=1, skip_bad=True, span=span, select=select)
        check_floats(lambda: first.images, first.scale)
        return first.scale

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        with output(self.out, [self.data], folder=None, job=job_of(self)) as to:
            from .restoring import recorded

            problem = problem_of(self.operator, self.noise, scale=self._scale)
            to.reads(problem.operator.digests())
            settings = recorded(self, problem)
            pictures = is_folder(self.data) or holds_images(self.data)
            if pictures and (to.folder or is_written(to.path)):
                return self._pictures(to, problem, settings)
            from ...io.generated import GeneratedWriter
            from ...io.sets import measurements_of

            to.record(settings)
            read = partial(images_of, sigma=0.0)
            select = selection_of(self)
            data = measurements_of(
                self.data, True, self.skip_bad, self.range, read=read, select=select
            )
            with GeneratedWriter(to.path, len(data), data.scale, data.names) as writer:
                for first in each(range(0, len(data), BATCH)):
                    numbers = data.numbers[first : first + BATCH]
                    x = data.y[first : first + BATCH]
                    writer.write(problem.simulate(x, seed=self.seed, index=numbers))
                clipped = writer.close()
            if clipped:
                remark(clipped)
            to.end(key_of(self.data))
        return {"out": self.out, "images": len(data), "skipped": data.skipped}

    def _pictures(
        self, to: Output, problem: "Problem", settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Corrupt picture files one by one; each keeps its format, type, range and metadata."""
        from ...io.generated import clipped_text
        from ...io.job_list import jobs_of
        from .restoring import history_of, restore_pictures, spans_of

        select = selection_of(self)
        note_pages(self.data, select)
        jobs = jobs_of(self.data, to.path, self.skip_bad, select)
        spans = spans_of(self.data, [job.file for job in jobs], self.range, 0.0, jobs[0].select)
        ledger = to.record(settings | {"range": spans or None})

        def engine(x: "torch.Tensor", numbers: list[int]) -> dict[str, "torch.Tensor"]:
            return {"images": problem.simulate(x, seed=self.seed, index=numbers)}

        done = restore_pictures(
            jobs,
            engine,
            self.data,
            ledger=ledger,
            span=spans,
            skip_bad=self.skip_bad,
            history=history_of(settings),
        )
        if done.clipped:
            remark(clipped_text(done.clipped, to.shown))
        images = done.images + done.before
        return {"out": self.out, "images": images, "skipped": done.skipped}
