"""Compare the speed of training and sampling a prior with diffusers, for the same network.

Training: images per second of our loop with only the prior in it, and of the steps of diffusers'
own example of unconditional training (`train_unconditional.py`, release 0.35, with its defaults:
AdamW 1e-4, betas 0.95 and 0.999, weight decay 1e-6, gradients clipped at 1, a cosine learning
rate, EMA weights, prediction of the noise, float32; and the same in bfloat16, its
`--mixed_precision`). Its data pipeline is left out: images are tensors from a DataLoader.

Sampling: images per second of `Prior.sample` and of diffusers' `DDPMPipeline` with its DDPM and
DDIM schedulers, for the saved prior and the same number of network evaluations.

The parties alternate in blocks of some steps; the ratios are medians over blocks, of one process.

    python benchmarks/speed/run.py --out OUT         # two CPU threads, or a GPU
    python benchmarks/speed/run.py --table
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.common import CommonOptions, Row, Suite, markdown, synchronized_time
from unmurk.devices import default_device
from unmurk.diffusion.prior import Prior
from unmurk.io.datasets import Source
from unmurk.problem import Problem
from unmurk.training.baselines import Clean
from unmurk.training.losses import denoising, levels
from unmurk.training.trainer import ParamGroup, Settings, Trainer

__all__ = [
    "PriorAlone",
    "diffusers_step",
    "prior_trainer",
    "samplers",
    "seconds_of",
    "speed_ratios",
    "unmurk_step",
]

EVALUATIONS = 49  # Heun's method with 25 levels
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Compare training and sampling with diffusers."""

    networks: tuple[str, ...] = ("tiny", "small")
    """Presets of the network that both sides use."""
    side: int = 32
    """Height and width of the images, one channel."""
    batch: int = 32
    """Images in a training step, and samples drawn together."""
    blocks: int = 7
    """Blocks of every party; the medians over them count."""
    seconds: float = 2.0
    """Approximate length of a block."""


class PriorAlone(Clean):
    """Training of the prior without a posterior."""

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


def prior_trainer(
    images: Tensor | Source, network: str, precision: Any, batch: int, compiled: bool = False
) -> Trainer:
    """A trainer of the prior alone."""
    method = PriorAlone.of(images, network)
    settings = Settings(network, 1e6, batch, precision=precision)
    trainer = Trainer(method, images, settings, Path("unused"), quiet=True)
    if compiled:
        method.prior.unet.compile()
    return trainer


def unmurk_step(
    images: Tensor, network: str, precision: Any, batch: int, compiled: bool = False
) -> Step:
    """A step of our training loop."""
    trainer = prior_trainer(images.to(default_device()), network, precision, batch, compiled)

    def step() -> None:
        trainer.update()
        trainer.step += 1

    return step


def diffusers_step(images: Tensor, network: str, precision: str, batch: int) -> Step:
    """A step of diffusers' example."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device = default_device()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = Prior.create(network, shape).unet.to(device).train()
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    ema.to(device)
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
        ema.step(model.parameters())
        loss.detach().item()  # the example logs it at every step

    return step


def samplers(network: str, side: int, batch: int) -> dict[str, Step]:
    """Samplers that draw `batch` images with EVALUATIONS evaluations of the same network."""
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

    device = default_device()
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


def alternate(parties: dict[str, Step], batch: int, options: Options) -> dict[str, list[float]]:
    """Images per second of every party in every block; the parties alternate."""
    counts, found = {}, {name: list[float]() for name in parties}
    for name, step in parties.items():
        step()  # the first call includes work that is done once
        counts[name] = max(1, round(options.seconds / seconds_of(step, 1)))
    for _ in range(options.blocks):
        for name, step in parties.items():
            found[name].append(batch * counts[name] / seconds_of(step, counts[name]))
    return found


def seconds_of(step: Step, count: int) -> float:
    """The time of some calls in seconds."""
    began = synchronized_time()
    for _ in range(count):
        step()
    return synchronized_time() - began


def speed_ratios(found: dict[str, list[float]], base: str) -> dict[str, float]:
    """The median over blocks of every party's speed over that of `base` in the same block."""

    def ratio(speeds: Sequence[float]) -> float:
        return statistics.median(a / b for a, b in zip(speeds, found[base], strict=True))

    return {name: ratio(speeds) for name, speeds in found.items()}


def measure(options: Options) -> Row:
    """All ratios, and on a GPU images per second; writes OUT/speed.json."""
    shape = (2048, 1, options.side, options.side)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(options.seed))
    gpu = torch.cuda.is_available()
    rows = []
    for network in options.networks:
        training = {
            "diffusers, float32": diffusers_step(images, network, "fp32", options.batch),
            "diffusers, bfloat16": diffusers_step(images, network, "bf16", options.batch),
            "unmurk, float32": unmurk_step(images, network, "fp32", options.batch),
            "unmurk, bfloat16": unmurk_step(images, network, "bf16", options.batch),
        }
        if gpu:
            compiled = unmurk_step(images, network, "bf16", options.batch, True)
            training["unmurk, bfloat16, compiled"] = compiled
        sampling = samplers(network, options.side, options.batch)
        for what, parties in (("training", training), ("sampling", sampling)):
            found = alternate(parties, options.batch, options)
            for name, ratio in speed_ratios(found, base=next(iter(parties))).items():
                speed = statistics.median(found[name]) if gpu else None
                row = {"what": what, "network": network, "party": name, "ratio": ratio}
                rows.append(row | {"images_per_second": speed})
                print(rows[-1], file=sys.stderr, flush=True)
    settings = {"side": options.side, "batch": options.batch, "blocks": options.blocks}
    return SUITE.store(options, settings, rows=rows)


def table(rows: list[Row], what: str) -> str:
    """The ratios of training or of sampling."""
    rows = [row for row in rows if row["what"] == what]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = [["", *(f"`{network}`" for network in networks)]]
    for party in dict.fromkeys(row["party"] for row in rows):
        texts = []
        for network in networks:
            row = next(r for r in rows if (r["party"], r["network"]) == (party, network))
            speed = row["images_per_second"]
            texts.append(f"{row['ratio']:.2f}" + (f" ({speed:.0f}/s)" if speed else ""))
        lines.append([party, *texts])
    return markdown(lines)


def view(result: Row) -> Row:
    """What the page shows: a table of training and one of sampling."""
    tables = {what: table(result["rows"], what) for what in ("training", "sampling")}
    return tables | {"evaluations": EVALUATIONS}


SUITE = Suite("speed", view, "speed")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
