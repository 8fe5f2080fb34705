"""Check and measure on a GPU, in ten minutes, what the tests cannot see on a CPU.

Pieces, each of some seconds, in this order:

    runs        every learning method for some steps in bf16, on operators with Fourier transforms
                and with small matrices, and every solver for two steps: that they run at all
    training    images per second of our loop with the prior alone, and of diffusers' example of
                unconditional training with the same network, in float32 and bfloat16 (see speed)
    sampling    images per second of `Prior.sample` and of diffusers' pipelines (see speed)
    overhead    time of a solver's run over that of its network calls (see overhead)
    waits       how often a training step, and a step of a solver, waits for the device, counted by
                torch's own debug mode (None on a CPU)
    largest     side of the largest square image that a training step, a draw and a solver take,
                one at a time, doubled until memory runs out or `--largest` is reached

OUT/gpu.json is written after every piece. The same command skips the pieces that it holds, if its
settings are the same. No piece begins after the budget is spent.

    python benchmarks/gpu/run.py --out OUT            # ten minutes on a GPU
    python benchmarks/gpu/run.py --out OUT --toy      # the same pieces, in a minute on a CPU
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, markdown
from benchmarks.overhead import run as overhead
from benchmarks.speed import run as speed
from unmurk.devices import default_device, device_kind, out_of_memory
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError, reason
from unmurk.problem import Problem
from unmurk.solvers import METHODS, Draws, solve
from unmurk.training import Recipe, Rounds, Settings, learn

__all__: list[str] = []

BLUR, MASK = "blur:gaussian,sigma=1,pad=reflect", "inpaint:random,keep=0.5"
EARLY = Recipe(r2r=0.3, e_step=0.5, flow=0.7)
LEARNING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flowdiff, identity": ("flowdiff", "identity", {"recipe": EARLY}),
    "flowdiff, blur": ("flowdiff", BLUR, {"recipe": EARLY, "solver": Draws("diffpir", steps=4)}),
    "flowdiff, bicubic": (
        "flowdiff",
        "sr:bicubic,factor=2",
        {"recipe": EARLY, "solver": Draws("diffpir", steps=4)},
    ),
    "em, masks": ("em", MASK, {"rounds": Rounds(2, 32, 0.5, 4), "e_step": "conditional"}),
    "ambient, masks": ("ambient", MASK, {}),
    "sure, blur": ("sure", BLUR, {}),
    "ambientflow, blur": ("ambientflow", BLUR, {}),
}
Piece = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Measure on a GPU what the tests cannot see on a CPU."""

    networks: tuple[str, ...] = ("tiny", "small", "base")
    """Presets whose training is measured; the first of them samples and solves too."""
    side: int = 32
    """Height and width of the images, one channel."""
    batch: int = 128
    """Images in a training step, and drawn together."""
    seconds: float = 5.0
    """Length of the measurement of a speed."""
    largest: int = 4096
    """Largest side of an image that is tried."""
    budget: float = 600.0
    """Seconds after which no further piece begins."""
    toy: bool = False
    """Toy sizes: side 16, batches of 4, a tenth of a second, images up to 32 pixels."""


def toy_sizes(options: Options) -> Options:
    """Sizes with which every piece takes a moment on a CPU."""
    return replace(options, networks=("tiny",), side=16, batch=4, seconds=0.1, largest=32)


# -- pieces ---------------------------------------------------------------------------------------


def pieces(options: Options) -> Iterator[tuple[str, Piece]]:
    """Names and actions, the most important first."""
    for name in LEARNING:
        yield f"runs/{name}", lambda name=name: learns(name, options)
    for method in METHODS:
        yield f"runs/{method}", lambda method=method: solves(method, options)
    for network in options.networks:
        for party, step in trainers(network, options).items():
            yield f"training/{network}/{party}", lambda step=step: rate(step(), options)
    for party in ("DDPMPipeline", "the same with DDIM", "unmurk"):
        yield f"sampling/{party}", lambda party=party: sampling_rate(party, options)
    for method in METHODS:
        yield f"overhead/{method}", lambda method=method: cost(method, options)
    yield "waits/training", lambda: waits(trainers(options.networks[0], options)["unmurk, bf16"]())
    for method in ("red-diff", "ddnm", "diffpir", "mmps"):
        yield f"waits/{method}", lambda method=method: waits(solving(method, options))
    for what in ("training", "sampling", "solving"):
        yield f"largest/{what}", lambda what=what: largest(what, options)


def random_images(count: int, side: int, options: Options) -> torch.Tensor:
    """Random images (count, 1, side, side)."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.rand(count, 1, side, side, generator=generator)


def measurements(problem: Problem, count: int, side: int, options: Options) -> torch.Tensor:
    """Measurements of random images, on the default device."""
    return problem.simulate(random_images(count, side, options)).to(default_device())


def learns(name: str, options: Options) -> dict[str, float]:
    """The seconds of a short run in bf16."""
    method, operator, given = LEARNING[name]
    problem, began = Problem(operator, 0.1), time.perf_counter()
    y = problem.simulate(random_images(32, options.side, options))
    settings = Settings(kimg=8 * options.batch / 1000, batch=options.batch, precision="bf16")
    with tempfile.TemporaryDirectory() as folder:
        given = {"start": "none", "settings": settings, **given}
        learn(y, problem, method, out=folder, quiet=True, **given)
    return {"seconds": time.perf_counter() - began}


def untrained_prior(options: Options, side: int | None = None) -> Prior:
    """An untrained prior on the default device."""
    torch.manual_seed(options.seed)
    side = side or options.side
    return Prior.create(options.networks[0], (1, side, side)).to(default_device()).eval()


def solves(method: str, options: Options) -> dict[str, float]:
    """The seconds of a short run of a solver on a blur and on masks."""
    prior, began = untrained_prior(options), time.perf_counter()
    steps = "steps" in METHODS[method].__dataclass_fields__  # type: ignore[attr-defined]
    for operator in (BLUR, MASK):
        problem = Problem(operator, 0.1)
        y = measurements(problem, 2, options.side, options)
        try:
            solve(y, problem, prior, method, **({"steps": 2} if steps else {}))
        except InputError as error:  # an untrained network may make a solver diverge
            if "diverged" not in str(error):
                raise
    return {"seconds": time.perf_counter() - began}


def trainers(network: str, options: Options) -> dict[str, Callable[[], Piece]]:
    """Makers of a training step, by party."""
    images, batch = random_images(2048, options.side, options), options.batch
    found: dict[str, Callable[[], Piece]] = {}
    for precision in ("fp32", "bf16"):
        found[f"diffusers, {precision}"] = lambda p=precision: speed.diffusers_step(
            images, network, p, batch
        )
        found[f"unmurk, {precision}"] = lambda p=precision: speed.unmurk_step(
            images, network, p, batch
        )
    return found


def rate(step: Piece, options: Options) -> dict[str, float]:
    """Images per second."""
    for _ in range(3):  # the first calls include work that is done once
        step()
    count = max(1, round(options.seconds / max(speed.seconds_of(step, 1), 1e-6)))
    return {"images_per_second": options.batch * count / speed.seconds_of(step, count)}


def sampling_rate(party: str, options: Options) -> dict[str, float]:
    """Images per second of a sampler, with the same number of evaluations for all."""
    return rate(speed.samplers(options.networks[0], options.side, options.batch)[party], options)


def cost(method: str, options: Options) -> dict[str, float | None]:
    """Time of a solver's run over that of its network calls, on each operator; None: refused."""
    seeds = range(1 if options.toy else 3)
    return overhead.ratios(method, overhead.packaged_prior(), seeds)


def solving(method: str, options: Options) -> Piece:
    """A run of a solver in eight steps."""
    prior, problem = untrained_prior(options), Problem(BLUR, 0.1)
    y = measurements(problem, 2, options.side, options)
    return lambda: solve(y, problem, prior, method, steps=8)


def waits(step: Piece) -> dict[str, int | None]:
    """How often a step waits for the GPU in its second run."""
    step()
    if not torch.cuda.is_available():
        return {"waits": None}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum("synchroniz" in str(w.message) for w in caught)}


def largest(what: str, options: Options) -> dict[str, Any]:
    """The side of the largest image that was done, its seconds, and what stopped a larger one."""
    side, done = options.side, {"side": 0, "seconds": 0.0, "ended": "--largest"}
    while side <= options.largest:
        began = time.perf_counter()
        try:
            _one(what, side, options)
        except (InputError, RuntimeError, MemoryError) as error:
            memory = out_of_memory(error) or "out of memory" in str(error)
            return done | {"ended": "memory" if memory else reason(error)}
        done = {"side": side, "seconds": time.perf_counter() - began, "ended": "--largest"}
        if done["seconds"] > 20:
            return done | {"ended": "20 seconds"}
        side *= 2
    return done


def _one(what: str, side: int, options: Options) -> None:
    """A training step on two images, a draw of one image, or one solution."""
    if what == "training":
        images = random_images(2, side, options)
        speed.unmurk_step(images, options.networks[0], "bf16", 2)()
        return
    prior = untrained_prior(options, side)
    if what == "sampling":
        prior.sample(1, steps=2).cpu()
        return
    problem = Problem(BLUR, 0.1)
    solve(measurements(problem, 1, side, options), problem, prior, "red-diff", steps=2)


# -- the run --------------------------------------------------------------------------------------


def begin(file: Path, head: Row) -> Row:
    """The stored figures; raises InputError if their settings, device or commit differ."""
    if not file.exists():
        return head | {"pieces": {}}
    found = json.loads(file.read_text())
    for key in ("settings", "seed", "device", "hardware", "software", "commit"):
        if found.get(key) != head[key]:
            raise InputError(f"{file} has figures of another {key}: give another --out")
    return found


def measure(options: Options, clock: Callable[[], float] = time.monotonic) -> Row:
    """Run all pieces that the budget allows; OUT/gpu.json is written after each."""
    file, start = SUITE.file(options), clock()
    options = toy_sizes(options) if options.toy else options
    common_names = ("out", "table", "seed", "budget")
    settings = {k: v for k, v in asdict(options).items() if k not in common_names}
    head = SUITE.header(options, json.loads(json.dumps(settings)))
    found = begin(file, head | {"device": device_kind(default_device())})
    for name, piece in pieces(options):
        if name in found["pieces"]:
            continue
        if clock() - start > options.budget:
            print("the budget is spent: run the same command to continue", file=sys.stderr)
            break
        began = time.perf_counter()
        try:
            figures = piece()
        except (InputError, RuntimeError, MemoryError) as error:
            figures = {"error": reason(error)}
        found["pieces"][name] = {"figures": figures, "took": time.perf_counter() - began}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        common.write_json(file, found)
        print(name, figures, file=sys.stderr, flush=True)
    return found


def view(result: Row) -> Row:
    """What the page shows: the figures of every piece."""
    lines = [[name, _text(piece["figures"])] for name, piece in result["pieces"].items()]
    return {"table": markdown([["piece", "figures"], *lines])}


def _text(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
    )


SUITE = Suite("gpu", view)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
