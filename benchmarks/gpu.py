"""What a GPU has to show in ten minutes.

Pieces, each of some seconds, in this order:

    runs        every way to learn for some steps in bf16, on operators with Fourier transforms and
                with small matrices, and every solver for two steps: that they run at all
    training    images per second of our loop with the prior alone, and of diffusers' example of
                unconditional training with the same network, in float32 and bfloat16 (`speed.py`)
    sampling    images per second of `Prior.sample` and of diffusers' pipelines (`speed.py`)
    overhead    time of a solver's run over that of its network calls (`overhead.py`)
    waits       how often a step of training, and one of a solver, waits for the device, as
                torch's own debug mode counts it (None on a CPU)
    largest     side of the largest square image that a step of training, a draw and a solver
                take, one at a time, doubled until memory runs out or `--most` is reached

The file of figures is written after every piece. The same command leaves out the pieces that it
holds, if its settings are the same; a piece is not begun when the budget is spent.

    python benchmarks/gpu.py                          ten minutes on a GPU
    python benchmarks/gpu.py --toy --out toy.json     the same pieces, in a minute on a CPU
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import overhead
import speed
import torch
import tyro
from provenance import ROOT, command, machine, write_json

from unmurk.devices import default_device, device_kind, out_of_memory
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.solvers import METHODS, Draws, solve
from unmurk.training import Recipe, Rounds, Settings, learn

__all__: list[str] = []

FIGURES = ROOT / "benchmarks" / "results" / "gpu.json"
BLUR, MASK = "blur:gaussian,sigma=1,pad=reflect", "inpaint:random,keep=0.5"
SOON = Recipe(mean=0.3, polish=0.5, flow=0.7)
LEARNING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flowdiff, identity": ("flowdiff", "identity", {"recipe": SOON}),
    "flowdiff, blur": ("flowdiff", BLUR, {"recipe": SOON, "solver": Draws("diffpir", steps=4)}),
    "flowdiff, bicubic": (
        "flowdiff",
        "sr:bicubic,factor=2",
        {"recipe": SOON, "solver": Draws("diffpir", steps=4)},
    ),
    "em, masks": ("em", MASK, {"rounds": Rounds(2, 32, 0.5, 4), "e_step": "conditional"}),
    "ambient, masks": ("ambient", MASK, {}),
    "sure, blur": ("sure", BLUR, {}),
    "ambientflow, blur": ("ambientflow", BLUR, {}),
}
Piece = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """Measure on a GPU what the tests cannot see on a CPU."""

    networks: tuple[str, ...] = ("tiny", "small", "base")
    """Presets whose training is measured; the first of them samples and solves too."""
    side: int = 32
    """Height and width of the images, one channel."""
    batch: int = 128
    """Images in a step of training, and drawn together."""
    seconds: float = 5.0
    """How long a speed is measured."""
    most: int = 4096
    """Largest side of an image that is tried."""
    budget: float = 600.0
    """Seconds after which no further piece is begun."""
    seed: int = 0
    """Seed of images, weights and draws."""
    toy: bool = False
    """Toy sizes: side 16, batches of 4, a tenth of a second, images up to 32 pixels."""
    out: Path = FIGURES
    """File for the figures; pieces that it holds are left out."""


def toy(options: Options) -> Options:
    """The sizes with which every piece takes a moment on a CPU."""
    return replace(options, networks=("tiny",), side=16, batch=4, seconds=0.1, most=32)


# -- pieces ---------------------------------------------------------------------------------------


def pieces(options: Options) -> Iterator[tuple[str, Piece]]:
    """Names and actions, the most wanted first."""
    for name in LEARNING:
        yield f"runs/{name}", lambda name=name: runs(name, options)
    for method in METHODS:
        yield f"runs/{method}", lambda method=method: solves(method, options)
    for network in options.networks:
        for party, step in trainers(network, options).items():
            yield f"training/{network}/{party}", lambda step=step: rate(step(), options)
    for party in ("DDPMPipeline", "the same with DDIM", "unmurk"):
        yield f"sampling/{party}", lambda party=party: draws(party, options)
    for method in METHODS:
        yield f"overhead/{method}", lambda method=method: cost(method, options)
    yield "waits/training", lambda: waits(trainers(options.networks[0], options)["unmurk, bf16"]())
    for method in ("red-diff", "ddnm", "diffpir", "mmps"):
        yield f"waits/{method}", lambda method=method: waits(solving(method, options))
    for what in ("training", "sampling", "solving"):
        yield f"largest/{what}", lambda what=what: largest(what, options)


def picture(count: int, side: int, options: Options) -> torch.Tensor:
    """Images (count, 1, side, side)."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.rand(count, 1, side, side, generator=generator)


def runs(name: str, options: Options) -> dict[str, float]:
    """Seconds of a short run in bf16, which raises what a GPU would raise."""
    method, operator, given = LEARNING[name]
    problem, began = Problem(operator, 0.1), time.perf_counter()
    y = problem.simulate(picture(32, options.side, options))
    settings = Settings(kimg=8 * options.batch / 1000, batch=options.batch, precision="bf16")
    with tempfile.TemporaryDirectory() as folder:
        learn(y, problem, method, out=folder, settings=settings, quiet=True, **given)
    return {"seconds": time.perf_counter() - began}


def prior_of(options: Options, side: int | None = None) -> Prior:
    """An untrained prior where commands compute."""
    torch.manual_seed(options.seed)
    side = side or options.side
    return Prior.create(options.networks[0], (1, side, side)).to(default_device()).eval()


def solves(method: str, options: Options) -> dict[str, float]:
    """Seconds of a short run of a solver, and of the two where one is not linear."""
    prior, began = prior_of(options), time.perf_counter()
    steps = "steps" in METHODS[method].__dataclass_fields__  # type: ignore[attr-defined]
    for operator in (BLUR, MASK):
        problem = Problem(operator, 0.1)
        y = problem.simulate(picture(2, options.side, options)).to(default_device())
        try:
            solve(y, problem, prior, method, **({"steps": 2} if steps else {}))
        except InputError as error:  # an untrained network leads some astray: no fault of theirs
            if "diverged" not in str(error):
                raise
    return {"seconds": time.perf_counter() - began}


def trainers(network: str, options: Options) -> dict[str, Callable[[], Piece]]:
    """Makers of a step of training, by party."""
    images = picture(2048, options.side, options)
    found: dict[str, Callable[[], Piece]] = {}
    for precision in ("fp32", "bf16"):
        found[f"diffusers, {precision}"] = lambda p=precision: speed.theirs(  # type: ignore[misc]
            images, network, p, options.batch
        )
        found[f"unmurk, {precision}"] = lambda p=precision: speed.ours(  # type: ignore[misc]
            images, network, p, options.batch, False
        )
    return found


def rate(step: Piece, options: Options) -> dict[str, float]:
    """Images per second."""
    for _ in range(3):  # what is made once is not counted
        step()
    count = max(1, round(options.seconds / max(speed._time(step, 1), 1e-6)))
    return {"images_per_second": options.batch * count / speed._time(step, count)}


def draws(party: str, options: Options) -> dict[str, float]:
    """Images per second of a sampler, with as many evaluations for all."""
    return rate(speed.samplers(options.networks[0], options.side, options.batch)[party], options)


def cost(method: str, options: Options) -> dict[str, Any]:
    """Time of a solver's run over that of its network calls, on each operator; None: it cannot."""
    prior = prior_of(options, overhead.SHAPE[-1])
    found: dict[str, float | None] = {}
    for operator in overhead.OPERATORS:
        try:
            several = range(1 if options.toy else 3)
            ratios = [overhead.ratio(method, operator, prior, seed) for seed in several]
            found[operator] = statistics.median(ratios)
        except InputError:
            found[operator] = None
    return found


def solving(method: str, options: Options) -> Piece:
    """A run of a solver in eight steps."""
    prior, problem = prior_of(options), Problem(BLUR, 0.1)
    y = problem.simulate(picture(2, options.side, options)).to(default_device())
    return lambda: solve(y, problem, prior, method, steps=8)


def waits(step: Piece) -> dict[str, int | None]:
    """How often a step waits for the GPU, and where, in its second run."""
    if not torch.cuda.is_available():
        step()
        return {"waits": None}
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum("synchroniz" in str(w.message) for w in caught)}


def largest(what: str, options: Options) -> dict[str, Any]:
    """Side and seconds of the largest image that was done, and why no larger one was."""
    side, done = options.side, {"side": 0, "seconds": 0.0, "ended": "--most"}
    while side <= options.most:
        began = time.perf_counter()
        try:
            _one(what, side, options)
        except (InputError, RuntimeError, MemoryError) as error:
            memory = out_of_memory(error) or "out of memory" in str(error)
            return done | {"ended": "memory" if memory else str(error).splitlines()[0]}
        done = {"side": side, "seconds": time.perf_counter() - began, "ended": "--most"}
        if done["seconds"] > 20:
            return done | {"ended": "20 seconds"}
        side *= 2
    return done


def _one(what: str, side: int, options: Options) -> None:
    """A step of training on two images, a draw of one, or a solution of one."""
    if what == "training":
        speed.ours(picture(2, side, options), options.networks[0], "bf16", 2, False)()
        return
    prior = prior_of(options, side)
    if what == "sampling":
        prior.sample(1, steps=2).cpu()
        return
    problem = Problem(BLUR, 0.1)
    y = problem.simulate(picture(1, side, options)).to(default_device())
    solve(y, problem, prior, "red-diff", steps=2)


# -- the run --------------------------------------------------------------------------------------


def begun(options: Options, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures that the file holds, if they are of the same settings, device and commit."""
    here = {"settings": settings, "device": device_kind(default_device()), "machine": machine()}
    if not options.out.exists():
        return here | {"pieces": {}}
    found = json.loads(options.out.read_text())
    for key, value in here.items():
        if found.get(key) != value:
            raise InputError(f"{options.out} holds figures of another {key}: give another --out")
    return found


def measure(options: Options, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """All pieces that the budget allows; the file is written after each."""
    start, options = clock(), toy(options) if options.toy else options
    kept = {k: v for k, v in asdict(options).items() if k not in ("out", "budget")}
    found = begun(options, json.loads(json.dumps(kept)))
    for name, piece in pieces(options):
        if name in found["pieces"]:
            continue
        if clock() - start > options.budget:
            print("the budget is spent: run the same command to go on", file=sys.stderr)
            break
        began = time.perf_counter()
        try:
            figures = piece()
        except (InputError, RuntimeError, MemoryError) as error:
            figures = {"error": str(error).splitlines()[0]}
        found["pieces"][name] = {"figures": figures, "took": time.perf_counter() - began}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        write_json(options.out, found)
        print(name, figures, file=sys.stderr, flush=True)
    return found


@command
def main() -> None:
    found = measure(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
    for name, piece in found["pieces"].items():
        print(name, piece["figures"])


if __name__ == "__main__":
    sys.exit(main())
