"""What each command takes and does: one dataclass a command, its fields the options.

Nothing heavy is imported until a command runs. `run` returns what is printed, and
writes at its end.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from .errors import InputError
from .options import (
    FILES,
    AnyPrior,
    Clean,
    Command,
    Corrupted,
    Json,
    MaybeInt,
    MaybePath,
    MaybeText,
    Seed,
    SkipBad,
    Text,
    at_least,
    solver_options,
)
from .output import output, save_like, save_new

if TYPE_CHECKING:
    import torch

    from .images import ImageSet
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
    """Standard deviation of the noise in the images, in units where the image range is 1; needed
    unless the images are clean."""
    method: Literal["flowdiff", "em", "noisy", "clean"] = "flowdiff"
    """flowdiff: prior and flow learnt together; em: a prior refitted to its own restorations,
    round after round; noisy: a prior of the images as they are (floor); clean: DATA are clean, a
    prior of them (ceiling)."""
    solver: Text = "diffpir"
    """Solver that flowdiff and em draw images with while learning, where the operator is not
    identity; 16 steps."""
    objective: Literal["default", "elbo"] = "default"
    """elbo: the paper's objective alone; default: ours, which is easier to optimise."""
    network: Literal["tiny", "small", "base"] = "tiny"
    """Size of the networks."""
    kimg: float = 100.0
    """Length of the run in thousands of images seen."""
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
            problem = _problem(self.operator, self.noise)
            data = _images(self.data, skip_bad=self.skip_bad)
            y = data.images
            if self.simulate and self.method != "clean":
                y = problem.simulate(y, seed=self.seed)
            from .learn import learn
            from .solve.draws import Draws

            learn(
                y,
                problem,
                method=self.method,
                out=self.out,
                network=self.network,
                kimg=self.kimg,
                seed=self.seed,
                objective=self.objective,
                precision=self.precision,
                compile=self.compile,
                solver=None if self.operator == "identity" else Draws(self.solver, steps=16),
            )
            page = _page(self.out)
        skipped = dict(data.skipped)
        return {"run": self.out, "report": page, "images": len(y), "skipped": skipped}


@dataclass
class Restore(Command):
    """Restore corrupted images in one pass, with the posterior that was learnt with a prior."""

    data: Corrupted
    prior: Text
    """Run folder, or digits (in the package)."""
    out: Path
    """Where the restored images go, in the type and the range that they came in."""
    operator: MaybeText = None
    """How the images were made; unset: as those that the run was trained with."""
    noise: MaybeText = None
    """Standard deviation of the noise, in units where the image range is 1; unset: the run's."""
    samples: int = 16
    """Draws from the posterior behind every mean and standard deviation; an even number."""
    std: bool = False
    """Also write every pixel's standard deviation (image range 1), (N, C, H, W), to std.npy."""
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, folder=False):
            problem = _trained_problem(self.prior, self.operator, self.noise)
            data = _images(self.data, skip_bad=self.skip_bad)
            mean, std = _restore(self.prior, problem, data.images, self.samples, self.seed)
            return save_like(self.out, data, mean, std=std if self.std else None)


@dataclass
class Solve(Command):
    """Restore images of any operator with a prior, by an iterative solver."""

    data: Corrupted
    prior: AnyPrior
    operator: Text
    """How the images were made, such as inpaint:box,size=12 or sr:average,factor=4."""
    noise: Text
    """Standard deviation of the noise in the measurements, in units where the image range is 1; or
    poisson,gain=0.01 or poisson-gaussian,gain=0.01,sigma=0.02 (docs/data_and_files.md)."""
    out: Path
    """Folder for the restored images (the mean where there are several samples)."""
    method: Text = "red-diff"
    """Name of the solver; an unknown one lists those there are. auto: one that fits the operator,
    the number of samples and --option budget=100, network evaluations for each."""
    samples: int = 1
    """Solutions of every image; with more than one, samples.npy and std.npy are written too."""
    restarts: int = 1
    """Runs for each solution, of which the one that fits best is kept (phase retrieval)."""
    steps: MaybeInt = None
    """Steps of the solver; unset: its own."""
    option: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Other options of the solver; an unknown key lists those there are."""
    init: Literal["pinv", "posterior"] = "pinv"
    """Where it starts: where the solver itself starts (docs/solvers.md), or at a draw of the run's
    posterior."""
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        with output(self.out, folder=False):
            at_least(1, samples=self.samples, restarts=self.restarts)
            options = solver_options(self.method, self.option, self.steps)
            problem = _problem(self.operator, self.noise)
            data = _images(self.data, skip_bad=self.skip_bad)
            from .posterior import Posterior
            from .prior import Prior
            from .solve import solve

            starts = self.init == "posterior"
            posterior = _place(Posterior.load(self.prior))[0] if starts else None
            prior, y = _place(Prior.load(self.prior), data.images)
            with _progress(self.method) as callback:
                result = solve(
                    y,
                    problem,
                    prior,
                    method=self.method,
                    samples=self.samples,
                    restarts=self.restarts,
                    seed=self.seed,
                    init="posterior" if starts else None,
                    posterior=posterior,
                    callback=callback,
                    **options,
                )
            several = {"samples": result.samples, "std": result.std} if self.samples > 1 else {}
            written = save_like(self.out, data, result.mean, **several)
        residual = result.trace[-1].get("residual") if result.trace else None
        return {**written, "method": result.method, "nfe": result.nfe, "residual": residual}


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
            from .prior import Prior

            prior = _place(Prior.load(self.prior))[0]
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
            problem = _problem(self.operator, self.noise)
            data = _images(self.data, skip_bad=self.skip_bad)
            y = problem.simulate(data.images, seed=self.seed)
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
        restored, truth = _images(self.restored).images, _images(self.reference).images
        if restored.shape != truth.shape:
            raise InputError(
                f"{self.restored} has images {_shape(restored)}, {self.reference} "
                f"{_shape(truth)} (number, channels, height, width): they must agree"
            )
        from . import metrics

        scores: dict[str, Any] = {
            "images": len(truth),
            "psnr": float(metrics.psnr(restored, truth).mean()),
            "ssim": float(metrics.ssim(restored, truth).mean()),
        }
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


def _shape(images: "torch.Tensor") -> str:
    return "x".join(map(str, images.shape))


def _problem(operator: str, noise: str) -> "Problem":
    from .problem import Problem

    return Problem(operator, noise)


def _images(path: Path, skip_bad: bool = False) -> "ImageSet":
    """The images of a path; those that were left out are listed on stderr."""
    from .images import load_images

    data = load_images(path, skip_bad=skip_bad)
    for name, reason in data.skipped:
        print(f"left out {name}: {reason}", file=sys.stderr)
    return data


def _place(*things: Any) -> list[Any]:
    """Models and tensors on the accelerator, if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [thing.to(device) for thing in things]


def _trained_problem(run: str, operator: str | None, noise: str | None) -> "Problem":
    """The problem of a run's config.json, with the parts that are given in its place."""
    if operator is not None and noise is not None:
        return _problem(operator, noise)
    from .prior import locate
    from .problem import Problem

    config = locate(run, "posterior", "model.safetensors").parent / "config.json"
    try:
        trained = Problem.from_dict(json.loads(config.read_text())["problem"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{config} does not say what '{run}' was trained with: give --operator and --noise"
        ) from error
    spec = trained.to_dict()
    return _problem(operator or spec["operator"], spec["noise"] if noise is None else noise)


def _restore(
    prior: str, problem: "Problem", y: "torch.Tensor", draws: int, seed: int, batch: int = 256
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mean and standard deviation of the posterior, batch by batch."""
    import torch

    from .posterior import Posterior

    posterior, y = _place(Posterior.load(prior), y)
    problem = problem.to(y.device).at(range(len(y)), problem.operator.x_shape(y.shape[1:]))
    parts = []
    for start in range(0, len(y), batch):
        rows = range(start, min(start + batch, len(y)))
        part = posterior.mean_std(y[rows.start : rows.stop], problem.take(rows), draws, seed, rows)
        parts.append(part)
    means, stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stds)


def _page(run: Path) -> Path:
    """The page of a run, with new images from its prior once there is one."""
    from .report import Images, Section, run_report

    sections: list[Section] = []
    if (run / "config.json").exists() and (run / "prior" / "model_index.json").exists():
        from .prior import Prior

        new = _place(Prior.load(run))[0].sample(16).cpu()
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


@contextmanager
def _progress(label: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr, moved by a solver's callback."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda at: bar.update(task, completed=at["step"], total=at["steps"])
