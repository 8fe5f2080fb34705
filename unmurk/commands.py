"""What each command takes and does: one dataclass a command, its fields the options.

Nothing heavy is imported until a command runs. `run` returns what is printed, and
writes at its end.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from .commands_restore import Restore, Solve
from .errors import InputError
from .io.atomic import output
from .options import (
    FILES,
    AnyPrior,
    Clean,
    Command,
    Corrupted,
    Json,
    MaybePath,
    Seed,
    SkipBad,
    Text,
    at_least,
    images_of,
    measured,
    place,
    problem_of,
)

if TYPE_CHECKING:
    import torch

    from .problem import Problem

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

        with output(self.out):
            return demo.run(self.out, seed=self.seed)

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
    kimg: float = 100.0
    """Length of the run in thousands of images seen."""
    batch: int = 32
    """Images in a step, at least 2; fewer take less memory."""
    seed: Seed = 0
    simulate: bool = False
    """DATA are clean: corrupt them first with the operator and the noise (for development)."""
    skip_bad: SkipBad = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic inside the networks; auto: bf16 where a short probe says that it is faster."""
    compile: bool = False
    """Compile the networks first: a slow start, then faster steps."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out):
            from .io.datasets import simulated, some

            y, skipped = measured(self.data, self.skip_bad)
            noise = self.noise if self.simulate else _run_noise(self.out, self.noise)
            problem = problem_of(self.operator, noise, None if self.simulate else lambda: some(y))
            _keeps_numbers(skipped, y, problem)
            from .learn import learn
            from .learn.processes import first_process
            from .solve.draws import Draws

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
                y,
                problem,
                method=self.method,
                out=self.out,
                network=self.network,
                kimg=self.kimg,
                batch=self.batch,
                seed=self.seed,
                precision=self.precision,
                compile=self.compile,
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
    n: Annotated[int, arg(aliases=["-n"])] = 16
    """How many images."""
    steps: int = 24
    """Noise levels of the sampler; the network runs 2 steps - 1 times."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, folder=False):
            at_least(1, n=self.n)
            at_least(2, steps=self.steps)
            from .io.images import save_new
            from .prior import Prior

            prior = place(Prior.load(self.prior))[0]
            images = prior.sample(self.n, steps=self.steps, seed=self.seed)
            save_new(images, self.out)
        return {"out": self.out, "images": len(images)}


@dataclass
class Corrupt(Command):
    """Corrupt clean images, to try things out."""

    data: Clean
    out: Path
    """A .npy or .npz file keeps every value; a folder gets PNG files, clipped to the range."""
    operator: Text = "identity"
    """What to do to them, such as inpaint:random,keep=0.4 or blur:gaussian,sigma=1.5."""
    noise: Text = "0"
    """Standard deviation of the noise to add, in units where the image range is 1; or
    poisson,gain=0.01 or poisson-gaussian,gain=0.01,sigma=0.02 (docs/data_and_files.md)."""
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, folder=False):
            from .io.images import save_new

            problem = problem_of(self.operator, self.noise)
            data = images_of(self.data, skip_bad=self.skip_bad)
            y = problem.simulate(data.images, seed=self.seed, index=data.numbers)
            save_new(y, self.out, data)
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
    level: float = 0.9
    """Level of the intervals whose coverage is counted."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        if not 0 < self.level < 1:
            raise InputError(f"--level {self.level}: a level lies between 0 and 1")
        restored, truth = images_of(self.restored).images, images_of(self.reference).images
        if restored.shape != truth.shape:
            raise InputError(
                f"{self.restored} has images {_shape(restored)}, {self.reference} "
                f"{_shape(truth)} (number, channels, height, width): they must agree"
            )
        from . import metrics

        scores: dict[str, Any] = {"images": len(truth), **metrics.fidelity(restored, truth)}
        if tuple(truth.shape[1:]) in {(1, 28, 28), (1, 32, 32)} and len(truth) > 1:
            scores["frechet"] = metrics.frechet(truth, restored)
        if self.samples is not None:
            samples = _samples(self.samples, tuple(truth.shape))
            scores["coverage"] = metrics.coverage(samples, truth, level=self.level)
            scores["spread"] = metrics.spread(samples)
        return scores


@dataclass
class Certify(Command):
    """Hold the solvers against posteriors known in closed form (minutes on two cores)."""

    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Solvers, such as pnp-dm or red-diff:paper (method:preset); unset: all."""
    out: MaybePath = None
    """Folder for certify.json, every figure, and certify.png, a picture of them."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        from . import certificate

        with output(self.out) if self.out else nullcontext():
            return certificate.run(self.methods, self.out, seed=self.seed)

    def show(self, result: dict[str, Any]) -> None:
        from rich.console import Console

        from . import certificate

        wide = Console(width=max(Console().width, certificate.WIDTH))
        wide.print(certificate.lines(certificate.read(result)))
        print(certificate.CAPTION)


@dataclass
class Report(Command):
    """Write the page of a run: settings, curves, pictures."""

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Run folder."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        return {"report": _page(self.run_folder)}


COMMANDS: dict[str, Callable[..., Command]] = {
    kind.__name__.lower(): kind
    for kind in (Demo, Learn, Restore, Solve, Sample, Corrupt, Evaluate, Certify, Report)
}


def _keeps_numbers(skipped: dict[str, str], y: Any, problem: "Problem") -> None:
    """Learning numbers the images it is given: none may be missing where numbers matter."""
    if not skipped:
        return
    shape = problem.operator.x_shape(y.shape)
    bound = problem.operator.at([0, 1], shape)
    parts = getattr(bound, "members", (bound,))
    held = [getattr(part, name) for part in parts for name in part.tensors]
    if any(value is not None and len(value) > 1 for value in held):
        raise InputError(
            f"{len(skipped)} images were left out, and '{problem.operator.spec}' goes by "
            f"their numbers, which learning would shift: mend {next(iter(skipped))}, or learn "
            "from a set without --skip-bad"
        )


def _shape(images: "torch.Tensor") -> str:
    return "x".join(map(str, images.shape))


def _run_noise(run: Path, noise: str) -> str:
    """The noise for a run: where it is to be estimated and the run has begun, what it found."""
    config = run / "config.json"
    if "auto" not in noise or not config.exists():
        return noise
    try:
        return str(json.loads(config.read_text())["problem"]["noise"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {config}: give another folder") from error


def _page(run: Path) -> Path:
    """The page of a run, with new images from its prior once there is one."""
    from .report import Images, Section, run_report

    sections: list[Section] = []
    if (run / "config.json").exists() and (run / "prior" / "model_index.json").exists():
        from .prior import Prior

        new = place(Prior.load(run))[0].sample(16).cpu()
        sections.append(Images("Drawn from the prior", [list(new[:8]), list(new[8:])], tile=84))
    return run_report(run, sections=sections)


def _samples(path: Path, shape: tuple[int, ...]) -> "torch.Tensor":
    """Posterior samples (S, N, C, H, W) of images of a shape (N, C, H, W)."""
    import numpy as np
    import torch

    try:
        samples = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot read the samples in {path}: {reason}") from error
    if samples.ndim == 4 and shape[1] == 1:
        samples = samples.unsqueeze(2)
    if samples.ndim != 5 or tuple(samples.shape[1:]) != shape:
        raise InputError(
            f"{path} has shape {_shape(samples)}: samples x {'x'.join(map(str, shape))} is needed"
        )
    return samples
