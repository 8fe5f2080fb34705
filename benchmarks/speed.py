"""How fast priors are trained and sampled, beside diffusers with the same network.

Training: images per second of our loop with only the prior in it, and of the steps that diffusers'
own example of unconditional training makes (`train_unconditional.py` of its examples, release
0.35, with its defaults: AdamW 1e-4, betas 0.95 and 0.999, weight decay 1e-6, gradients clipped at
1, a rate that falls as a cosine, averaged weights, prediction of the noise, float32; and the same
in bfloat16, its `--mixed_precision`). Its data pipeline is left out: images come as tensors, from
a DataLoader.

Sampling: images per second of `Prior.sample` and of diffusers' `DDPMPipeline` with its DDPM and
DDIM schedulers, the saved prior and as many evaluations of the network.

The parties take turns in blocks of some steps; ratios are medians over blocks, of one process.

    python benchmarks/speed.py             two threads of a CPU, or a GPU
    python benchmarks/speed.py --table     write docs/benchmark_speed.md again
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from provenance import ROOT, machine, write_json
from torch import Tensor, nn

from unmurk.diffusion.prior import Prior
from unmurk.io.atomic import write as write_atomically
from unmurk.io.datasets import Source
from unmurk.problem import Problem
from unmurk.training.baselines import Clean
from unmurk.training.losses import denoising, levels
from unmurk.training.trainer import ParamGroup, Settings, Trainer

__all__: list[str] = []

FIGURES = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "benchmark_speed.md"
EVALUATIONS = 49  # Heun's method with 25 levels
Step = Callable[[], None]


@dataclass(frozen=True)
class Options:
    """Measure training and sampling beside diffusers."""

    networks: tuple[str, ...] = ("tiny", "small")
    """Presets of the network that both sides use."""
    side: int = 32
    """Height and width of the images, one channel."""
    batch: int = 32
    """Images in a step of training, and samples drawn together."""
    blocks: int = 7
    """Turns of every party; medians over them count."""
    seconds: float = 2.0
    """About how long a turn is."""
    out: Path = FIGURES
    """File for the figures."""
    table: bool = False
    """Write the page from the figures kept and run nothing."""


class PriorAlone(Clean):
    """Training of the prior and of nothing else."""

    @classmethod
    def of(cls, images: Tensor | Source, network: str) -> "PriorAlone":
        """Build it for images."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        return cls().build(images, Problem("identity", 0.1), shape, network)

    def finish(self) -> None:
        """Leave the posterior out."""
        self.modules = {"prior": self.prior}
        self.ema = {"prior": self.ema["prior"]}
        self.groups = [ParamGroup(list(self.prior.parameters()))]

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Denoising score matching."""
        return {"prior": denoising(self.prior, y, levels(len(y), generator), generator)}


def ours(images: Tensor, network: str, precision: Any, batch: int, compiled: bool) -> Step:
    """A step of our training loop."""
    settings = Settings(network, 1000.0, batch, precision=precision)
    method = PriorAlone.of(images, network)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(method, images.to(device), settings, Path("unused"), quiet=True)
    if compiled:
        method.prior.unet.compile()

    def step() -> None:
        trainer.update()
        trainer.step += 1

    return step


def theirs(images: Tensor, network: str, precision: str, batch: int) -> Step:
    """A step as diffusers' example makes it."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = Prior.create(network, shape).unet.to(device).train()
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    average.to(device)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    data = torch.utils.data.TensorDataset(2 * images - 1)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    batches = iter(loader)

    def step() -> None:
        nonlocal batches
        try:
            (clean,) = next(batches)
        except StopIteration:
            batches = iter(loader)
            (clean,) = next(batches)
        clean = clean.to(device)
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (len(clean),), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = model(schedule.add_noise(clean, noise, times), times).sample
        loss = nn.functional.mse_loss(found.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        loss.detach().item()  # the example logs it at every step

    return step


def samplers(network: str, side: int, batch: int) -> dict[str, Step]:
    """Ways to draw `batch` images with EVALUATIONS evaluations of the same network."""
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = Prior.create(network, (1, side, side)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        prior.save(folder)
        pipeline = DDPMPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def own() -> None:
        prior.sample(batch, steps=(EVALUATIONS + 1) // 2).cpu()

    def piped(kind: Any) -> Step:
        scheduler = kind.from_config(pipeline.scheduler.config)

        def draw() -> None:
            pipeline.scheduler = scheduler
            pipeline(batch_size=batch, num_inference_steps=EVALUATIONS, output_type="np")

        return draw

    return {
        "DDPMPipeline": piped(DDPMScheduler),
        "the same with DDIM": piped(DDIMScheduler),
        "unmurk": own,
    }


def turns(parties: dict[str, Step], batch: int, options: Options) -> dict[str, list[float]]:
    """Images per second of every party in every block, the parties taking turns."""
    counts, found = {}, {name: list[float]() for name in parties}
    for name, step in parties.items():
        step()  # what is made once is not counted
        counts[name] = max(1, round(options.seconds / _time(step, 1)))
    for _ in range(options.blocks):
        for name, step in parties.items():
            found[name].append(batch * counts[name] / _time(step, counts[name]))
    return found


def _time(step: Step, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def against(found: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over blocks of every party's speed over that of `base` in the same block."""
    return {
        name: statistics.median(a / b for a, b in zip(speeds, found[base], strict=True))
        for name, speeds in found.items()
    }


def measure(options: Options) -> dict[str, Any]:
    """All figures: ratios, and on a GPU images per second."""
    shape = (2048, 1, options.side, options.side)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    gpu = torch.cuda.is_available()
    rows = []
    for network in options.networks:
        parties = {
            "diffusers, float32": theirs(images, network, "fp32", options.batch),
            "diffusers, bfloat16": theirs(images, network, "bf16", options.batch),
            "unmurk, float32": ours(images, network, "fp32", options.batch, False),
            "unmurk, bfloat16": ours(images, network, "bf16", options.batch, False),
        }
        if gpu:
            compiled = ours(images, network, "bf16", options.batch, True)
            parties["unmurk, bfloat16, compiled"] = compiled
        sides = {"training": parties, "sampling": samplers(network, options.side, options.batch)}
        for what, these in sides.items():
            found = turns(these, options.batch, options)
            ratios = against(found, base=next(iter(these)))
            for name, ratio in ratios.items():
                speed = statistics.median(found[name]) if gpu else None
                row = {"what": what, "network": network, "party": name, "ratio": ratio}
                rows.append(row | {"images_per_second": speed})
                print(rows[-1], file=sys.stderr, flush=True)
    settings = {"side": options.side, "batch": options.batch, "blocks": options.blocks}
    return {"settings": settings, "machine": machine(), "rows": rows}


def table(rows: list[dict[str, Any]], what: str) -> str:
    """Ratios of training or of sampling as Markdown."""
    rows = [row for row in rows if row["what"] == what]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = ["| | " + " | ".join(f"`{n}`" for n in networks) + " |"]
    lines.append("|---|" + "---:|" * len(networks))
    for party in dict.fromkeys(row["party"] for row in rows):
        cells = []
        for network in networks:
            row = next(r for r in rows if (r["party"], r["network"]) == (party, network))
            speed = row["images_per_second"]
            cells.append(f"{row['ratio']:.2f}" + (f" ({speed:.0f}/s)" if speed else ""))
        lines.append(f"| {party} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page() -> str:
    """The page of the figures kept."""
    found = json.loads(FIGURES.read_text())
    made, how = found["machine"], found["settings"]
    parts = [
        "# Benchmark: speed beside diffusers",
        "Written by `python benchmarks/speed.py --table`; that file says what is measured. Images "
        f"per second over those of the first line, {how['batch']} images of 1 x {how['side']} x "
        f"{how['side']} at a time, median of {how['blocks']} blocks in which the parties take "
        "turns. More than 1 is faster.",
        "## Training the prior",
        table(found["rows"], "training"),
        f"## Sampling with {EVALUATIONS} evaluations of the network",
        table(found["rows"], "sampling"),
        f"{made['cpu']}, {made['threads']} threads, {made['gpu'] or 'no GPU'}, torch "
        f"{made['torch']}, commit {made['commit']}.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
        return 0
    found = measure(options)
    write_json(options.out, found)
    for what in ("training", "sampling"):
        print(table(found["rows"], what), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
