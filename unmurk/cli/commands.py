"""What each command takes and does: one dataclass a command, its fields the options.

Nothing heavy is imported until a command runs. `run` returns what is printed, and
writes at its end.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ..bounds import Real, Whole
from ..errors import InputError
from ..io.outputs import files_of, key_of, output
from .commands_restore import Restore, Solve, recorded, weights_of
from .options import (
    FILES,
    AnyPrior,
    Clean,
    Command,
    Corrupted,
    Json,
    MaybePath,
    MaybeRange,
    NanOption,
    Seed,
    SkipBad,
    Text,
    images_of,
    job_of,
    measured,
    place,
    problem_of,
)

if TYPE_CHECKING:
    import torch

    from ..problem import Problem

__all__ = ["COMMANDS", "Command"]


@dataclass
class Demo(Command):
    """Learn a prior from noisy digits only, and restore with it (minutes on a CPU)."""

    out: Path = Path("demo")
    """Folder for the report and the run; a killed demo continues from there."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        from . import demo

        with output(self.out, owner=True, job=job_of(self)) as to:
            to.expect(["report.html"])
            return demo.run(to.path, seed=self.seed)

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console

        from . import demo

        Console().print(demo.table(result))
        print(f"{result['seconds']:.0f} s; pictures: {result['report']}")


@dataclass
class Learn(Command):
    """Learn a prior and a posterior from corrupted images; the same command continues a run."""

    data: Corrupted
    out: Path
    """Run folder: settings, networks, state to continue from, metrics, report."""
    operator: Text = "identity"
    """How the images were made, such as inpaint:random,keep=0.4 or blur:gaussian,sigma=1.5."""
    noise: Text = "0"
    """Standard deviation of the noise in the images, in units where the image range is 1; or
    poisson-gaussian,gain=0.01,sigma=0.02; or auto or poisson-gaussian,auto: estimated from DATA.
    Needed unless the images are clean."""
    method: Literal["flowdiff", "em", "ambient", "sure", "ambientflow", "noisy", "clean"] = (
        "flowdiff"
    )
    """flowdiff: prior and flow learnt together; em: a prior refitted to its own restorations,
    round after round; ambient: Ambient Diffusion, for holes or for noise alone; sure: SURE-Score;
    ambientflow: a flow as the prior; noisy: a prior of the images as they are (floor); clean: DATA
    are clean, a prior of them (ceiling). See docs/learning.md."""
    solver: Text = "diffpir"
    """Solver that flowdiff and em draw images with while learning, where the operator is not
    identity; 16 steps."""
    e_step: Literal["prior", "conditional"] = "prior"
    """Of em: draw under the prior, or by a diffusion model of x given y (DiffEM)."""
    objective: Literal["default", "elbo"] = "default"
    """Of flowdiff. elbo: the paper's objective alone; default: ours, easier to optimise."""
    network: Literal["tiny", "small", "base"] = "tiny"
    """Size of the networks."""
    kimg: Annotated[float, Real(0.001, 1e7)] = 100.0
    """Length of the run in thousands of images seen, a number from 0.001 to 1e+07."""
    batch: Annotated[int, Whole(2, 65_536)] = 32
    """Images in a step, a whole number from 2 to 65536; fewer take less memory."""
    seed: Seed = 0
    simulate: bool = False
    """DATA are clean: corrupt them first with the operator and the noise (for development)."""
    range: MaybeRange = None
    nan: NanOption = "refuse"
    skip_bad: SkipBad = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic inside the networks; auto: bf16 where a short probe says that it is faster."""
    compile: bool = False
    """Compile the networks first: a slow start, then faster steps."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, [self.data], owner=True, job=job_of(self)) as to:
            to.expect(["report.html"])
            from ..io.datasets import head, simulated
            from ..io.gaps import full
            from ..io.images import ImageSet

            data, skipped = measured(self.data, self.skip_bad, self.range, self.nan)
            y = getattr(data, "images", data)
            noise = self.noise if self.simulate else _run_noise(self.out, self.noise)
            problem = problem_of(
                self.operator, noise, None if self.simulate else lambda: full(head(y))
            )
            to.reads(problem.operator.digests())
            _keeps_numbers(skipped, y, problem)
            from ..solvers import Draws
            from ..training.distributed import first_process
            from ..training.learn import learn

            options: dict[str, Any] = {}
            if self.objective != "default":
                options["objective"] = self.objective
            if self.e_step != "prior":
                options["e_step"] = self.e_step
            elif self.method in ("flowdiff", "em") and self.operator != "identity":
                options["solver"] = Draws(self.solver, steps=16)
            if self.simulate and self.method != "clean":
                y = simulated(y, problem, self.seed)
            learn(
                replace(data, images=y) if isinstance(data, ImageSet) else y,
                problem,
                method=self.method,
                out=self.out,
                network=self.network,
                kimg=self.kimg,
                batch=self.batch,
                seed=self.seed,
                precision=self.precision,
                compile=self.compile,
                nan=self.nan,
                **options,
            )
            if not first_process():
                return {}
            page = _page(self.out)
        found = {"run": self.out, "report": page, "images": len(y), "skipped": skipped}
        return {**found, "noise": problem.noise.spec} if "auto" in self.noise else found


@dataclass
class Sample(Command):
    """Draw new images from a prior."""

    prior: AnyPrior
    out: Path
    """Folder for PNG files, or a .npy or .npz file."""
    n: Annotated[int, arg(aliases=["-n"]), Whole(1, 10_000_000)] = 16
    """How many images, a whole number from 1 to 10000000."""
    steps: Annotated[int, Whole(2, 10_000)] = 24
    """Noise levels of the sampler, a whole number from 2 to 10000; the network runs 2 steps - 1
    times."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, files_of(self.prior), folder=None, job=job_of(self)) as to:
            from ..diffusion.prior import Prior
            from ..io.images import names_of, save_new

            prior = place(Prior.load(self.prior))[0]
            made = {"command": "sample", "steps": self.steps, "seed": self.seed}
            to.record(made | {"n": self.n, "weights": weights_of(prior)})
            to.expect(names_of(self.n) if to.folder else [to.path.name])
            images = prior.sample(self.n, steps=self.steps, seed=self.seed)
            save_new(images, to.path)
            to.end(("weights", 0, 0, 0))
        return {"out": self.out, "images": len(images)}


@dataclass
class Corrupt(Command):
    """Corrupt clean images, to try things out."""

    data: Clean
    out: Path
    """A .npy or .npz file keeps every value. A folder gets PNG or TIFF files like those of DATA:
    integers are clipped to their range, and a line says so."""
    operator: Text = "identity"
    """What to do to them, such as inpaint:random,keep=0.4 or blur:gaussian,sigma=1.5."""
    noise: Text = "0"
    """Standard deviation of the noise to add, in units where the image range is 1; or
    poisson,gain=0.01 or poisson-gaussian,gain=0.01,sigma=0.02 (docs/data_and_files.md)."""
    range: MaybeRange = None
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, [self.data], folder=None, job=job_of(self)) as to:
            from ..io.images import save_new

            problem = problem_of(self.operator, self.noise)
            to.reads(problem.operator.digests())
            to.record(recorded(self, problem))
            data = images_of(self.data, self.skip_bad, self.range, sigma=0.0)
            y = problem.simulate(data.images, seed=self.seed, index=data.numbers)
            clipped = save_new(y, to.path, data)
            if clipped:
                print(clipped, file=sys.stderr)
            to.end(key_of(self.data))
        return {"out": self.out, "images": len(y), "skipped": dict(data.skipped)}


@dataclass
class Evaluate(Command):
    """Compare restored images with the clean ones."""

    restored: Annotated[
        Positional[Path], arg(metavar="RESTORED", help=f"Restored images: {FILES}")
    ]
    reference: Annotated[
        Positional[Path], arg(metavar="REFERENCE", help="The clean images, in the same order.")
    ]
    samples: MaybePath = None
    """Posterior samples (S, N, C, H, W) in a .npy file, for coverage and spread."""
    level: Annotated[float, Real(0.001, 0.999)] = 0.9
    """Level of the intervals whose coverage is counted, a number from 0.001 to 0.999."""
    range: MaybeRange = None
    json: Json = False

    def run(self) -> dict[str, Any]:
        restored, truth = _in_one_scale(self.restored, self.reference, self.range)
        if restored.shape != truth.shape:
            raise InputError(
                f"{self.restored} has images {_shape(restored)}, {self.reference} "
                f"{_shape(truth)} (number, channels, height, width): they must agree"
            )
        from ..evaluation import metrics

        restored, truth = place(restored, truth)
        scores: dict[str, Any] = {"images": len(truth), **metrics.fidelity(restored, truth)}
        if tuple(truth.shape[1:]) in {(1, 28, 28), (1, 32, 32)} and len(truth) > 1:
            scores["frechet"] = metrics.frechet(truth, restored)
        if self.samples is not None:
            samples = place(_samples(self.samples, tuple(truth.shape)))[0]
            scores["coverage"] = metrics.coverage(samples, truth, level=self.level)
            scores["spread"] = metrics.spread(samples)
        return scores


@dataclass
class Certify(Command):
    """Test the solvers on problems whose posterior is known exactly, to noise of 0.005 to 0.5.

    Runs on the CPU, a process for each core: the images have 60 pixels. A few minutes on two
    cores.
    """

    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Solvers, such as pnp-dm or red-diff:paper (method:preset); unset: those that claim to give
    posterior samples or a point estimate, with --thorough all."""
    thorough: bool = False
    """All problems, not the dozen that covers them, and all solvers: half an hour."""
    out: MaybePath = None
    """Folder for certify.json, every figure, and certify.png, a picture of them."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        from . import certificate

        with output(self.out) if self.out else nullcontext() as to:
            if to is None:
                return certificate.run(self.methods, None, seed=self.seed, thorough=self.thorough)
            to.record()
            to.expect(["certify.json", "certify.png"])
            found = certificate.run(self.methods, to.path, seed=self.seed, thorough=self.thorough)
            to.end(("certify", 0, 0, 0))
            return found

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console

        from . import certificate

        wide = Console(width=max(Console().width, certificate.WIDTH))
        rows = certificate.read(result)
        wide.print(certificate.lines(rows))
        print(certificate.CAPTION)
        print(certificate.reference(rows), end="")


@dataclass
class Report(Command):
    """Write the page of a run: settings, curves, pictures."""

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Run folder."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.run_folder / "report.html", folder=False) as to:
            return {"report": _page(to.path.parent)}


COMMANDS: dict[str, Callable[..., Command]] = {
    kind.__name__.lower(): kind
    for kind in (Demo, Learn, Restore, Solve, Sample, Corrupt, Evaluate, Certify, Report)
}


def _keeps_numbers(skipped: dict[str, str], y: Any, problem: "Problem") -> None:
    """Learning numbers the images it is given: none may be missing where numbers matter."""
    if not skipped:
        return
    shape = problem.operator.x_shape(y.shape)
    bound = problem.operator.bind([0, 1], shape)
    parts = getattr(bound, "members", (bound,))
    held = [getattr(part, name) for part in parts for name in part.tensors]
    if any(value is not None and len(value) > 1 for value in held):
        raise InputError(
            f"{len(skipped)} images were left out, and '{problem.operator.spec}' goes by "
            f"their numbers, which learning would shift: mend {next(iter(skipped))}, or learn "
            "from a set without --skip-bad"
        )


def _in_one_scale(
    restored: Path, reference: Path, span: tuple[float, float] | None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Restored images and the clean ones in the scale of the latter: numbers of the same type
    have the same range. Files of another type go by their own; floats are what they are."""
    from ..io.scale import Span

    truth = images_of(reference, span=span)
    scale = truth.scale
    full = scale.dtype[0] in "iu"
    known = Span(scale.offset, scale.offset + scale.gain, scale.dtype) if full else None
    return images_of(restored, span=span or known).images, truth.images


def _shape(images: "torch.Tensor") -> str:
    return "x".join(map(str, images.shape))


def _run_noise(run: Path, noise: str) -> str:
    """The noise for a run: where it is to be estimated and the run has begun, what it found."""
    config = run / "config.json"
    if "auto" not in noise or not config.exists():
        return noise
    from ..io.json_files import read_object

    problem = read_object(config).get("problem")
    if not isinstance(problem, dict) or "noise" not in problem:
        raise InputError(f"{config} does not say the noise of a run: give another folder")
    return str(problem["noise"])


def _page(run: Path) -> Path:
    """The page of a run, with new images from its prior once there is one."""
    from .report import Images, Section, run_report

    sections: list[Section] = []
    if (run / "config.json").exists() and (run / "prior" / "model_index.json").exists():
        from ..diffusion.prior import Prior

        new = place(Prior.load(run))[0].sample(16).cpu()
        sections.append(Images("Drawn from the prior", [list(new[:8]), list(new[8:])], tile=84))
    return run_report(run, sections=sections)


def _samples(path: Path, shape: tuple[int, ...]) -> "torch.Tensor":
    """Posterior samples (S, N, C, H, W) of images of a shape (N, C, H, W)."""
    import numpy as np
    import torch

    from ..io.formats.arrays import read_array
    from ..io.formats.pictures import check_finite

    array = check_finite(read_array(path)[0], str(path))
    if array.dtype.kind not in "buif":
        raise InputError(f"{path} holds {array.dtype}: give real numbers")
    samples = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if samples.ndim == 4 and shape[1] == 1:
        samples = samples.unsqueeze(2)
    if samples.ndim != 5 or tuple(samples.shape[1:]) != shape:
        raise InputError(
            f"{path} has shape {_shape(samples)}: samples x {'x'.join(map(str, shape))} is needed"
        )
    return samples
