r"""Train the generic prior and posterior on synthetic images, at all noise levels.

    python tools/synthetic_images.py --count 8192 --side 96 --seed 1 --out images.npy
    python tools/train_generic.py images.npy --out runs/generic --kimg 2000
    python tools/train_generic.py images.npy --out runs/generic --kimg 2000     # continues it
    python tools/train_generic.py images.npy --out runs/generic --kimg 4000     # makes it longer

The model of color images starts from that of gray ones, whose first and last layers are converted:

    python tools/synthetic_images.py --count 8192 --side 96 --channels 3 --seed 2 --out color.npy
    python tools/train_generic.py color.npy --out runs/generic-color --start runs/generic

Every image of a batch is a crop of a synthetic image, turned, inverted at times, and with another
gamma and contrast. The prior learns by denoising score matching. The mean network and the flow of
the posterior learn from pairs of a clean crop x and a noisy one y, with a noise of its own for
every crop: Gaussian with :math:`\sigma_y` log-uniform from 0.005 to 0.7, or for two crops in five
Poisson-Gaussian, of that standard deviation at mid-gray and with a random share of photon noise.
The networks see the noise as `Problem.deviation` estimates it from y.

A denoiser of natural images has an error of about

.. math:: e(\sigma)^2 = \Bigl(\frac1{\sigma^2} + \frac1{0.016\,\sigma} + 16\Bigr)^{-1}

(BM3D on photographs, from 0.005 to 0.5), and the squared errors are divided by it. So the losses
are about 1 at all levels, and a decibel counts the same at all of them.

**Schedule.** The learning rate rises for 0.2 kimg, stays, and falls linearly to zero over the last
part of the run (`--decay`). Before it falls, the state is kept beside the latest one. A longer run
starts from there, so that it equals one that was never shorter. The EMA weights have a half-life
of 5 % of the images seen; they are exported every 4 kimg and can be used at any
time.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unmurk.diffusion.losses import gaussian, levels
from unmurk.diffusion.networks import preset
from unmurk.flows.conditioner import known
from unmurk.flows.posterior import Config, Posterior
from unmurk.gaussian import Wiener
from unmurk.operators.base import per_image
from unmurk.problem import Problem
from unmurk.rng import integers, permutation, poisson, uniform
from unmurk.training import Learner
from unmurk.training.run_folder import FORMAT, fingerprint, save_model
from unmurk.training.schedule import LRPhase, ParamGroup
from unmurk.training.start import Start
from unmurk.training.trainer import Settings, Trainer

__all__ = ["Generic", "SteadyGroup", "error", "main"]

LOW, HIGH = 0.005, 0.7  # noise levels of the posterior
PHOTONS = 0.4  # share of crops with Poisson-Gaussian noise
SAMPLING = 0.2  # share of the prior's noise levels that are those of `learn`, up to 20
RISE = 0.2  # kimg over which the learning rate rises
EXPORT = 4.0  # kimg between two exports of the EMA weights


@dataclass(frozen=True)
class SteadyGroup(ParamGroup):
    """Parameters whose learning rate rises, stays, and falls to zero at the end of the run.

    Attributes:
        kimg: Length of the run.
        decay: Fraction of the run over which the rate falls.

    >>> group = SteadyGroup([], kimg=100, decay=0.2)
    >>> [round(group.rate(p), 1) for p in (0.001, 0.5, 0.8, 0.9, 1.0)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    phases: tuple[LRPhase, ...] = field(default=(LRPhase(),))
    kimg: float = 100.0
    decay: float = 0.2

    def rate(self, progress: float) -> float:
        """Return the learning rate relative to that of the settings."""
        rise = min(1.0, (progress * self.kimg + 1e-3) / RISE)
        return rise * min(1.0, max(0.0, 1 - progress) / max(self.decay, 1e-9))


def error(sigma: Tensor) -> Tensor:
    """Return the mean squared error to be expected of a denoiser at a noise level; see above.

    >>> [round(float(v), 5) for v in error(torch.tensor([0.005, 0.05, 0.5]))]
    [2e-05, 0.0006, 0.0069]
    """
    return 1 / (sigma**-2 + 1 / (0.016 * sigma) + 16)


@dataclass(eq=False, kw_only=True)
class Generic(Learner):
    """Learn prior and posterior of synthetic images (N, C, H, W), uint8, at all noise levels.

    Attributes:
        kimg: Length of the run.
        decay: Fraction of the run over which the learning rate falls.
        flow_every: The flow is trained in one of so many steps.
    """

    kimg: float = 100.0
    decay: float = 0.2
    flow_every: int = 4

    def _build(self) -> None:
        super()._build()
        self.step = 0
        self.groups = [
            SteadyGroup(group.parameters, kimg=self.kimg, decay=self.decay)
            for group in self.groups
        ]

    def make_posterior(self, start: Wiener | None) -> Posterior:
        """Create the posterior of the start, or an untrained one of many noise levels."""
        if self.start is not None:
            return super().make_posterior(start)
        size = preset(self.network)
        sizes = (size.mean, size.context, size.couplings, size.hidden)
        return Posterior(Config(*self.shape, *sizes, many_levels=1, turnable=1))

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Note the step; keep the state before the rate falls; export the EMA weights."""
        self.step = step
        start = math.floor((1 - self.decay) * trainer.steps)
        if step >= start > trainer_step(trainer.out / STABLE):
            trainer.save()
            state = trainer.checkpoint.path
            shutil.copyfile(state, state.with_name("stable.pt.part"))
            state.with_name("stable.pt.part").replace(trainer.out / STABLE)
            (trainer.out / STABLE).with_suffix(".json").write_text(json.dumps({"step": step}))
        if step and step % math.ceil(1000 * EXPORT / trainer.settings.batch) == 0:
            export(self, trainer.out)

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step on crops of the clean images y, uint8."""
        x = augmented(y.float() / 255, self.shape[-1], generator)
        found = {"prior": self.prior_loss(x, generator)}
        noisy, deviation = self.corrupted(x, generator)
        inputs = known(noisy, None, deviation)
        level = deviation.square().flatten(1).mean(1).sqrt()
        if self.step % self.flow_every:
            mean = noisy + self.posterior.correction(inputs)
        else:
            context = self.posterior.read(noisy, inputs)
            mean = context.mean
            held = replace(context, mean=mean.detach())
            found["flow"] = -self.posterior.log_density(x, held).mean() / x[0].numel()
        wrong = (mean - x).square().flatten(1).mean(1)
        found["mean"] = (wrong / error(level)).mean()
        return found

    def prior_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the weighted squared error of the denoiser at random noise levels."""
        sigma = torch.where(
            uniform((len(x),), generator, device=x.device) < SAMPLING,
            levels(len(x), generator, x.device),
            log_uniform(len(x), LOW / 2, 1.0, generator),
        )
        noisy = x + per_image(sigma, x) * gaussian(x, generator)
        wrong = (self.prior.denoise(noisy, sigma) - x).square().flatten(1).mean(1)
        return (wrong / error(sigma)).mean()

    def corrupted(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Add noise to crops; return them with the deviation that is estimated from them."""
        level = per_image(log_uniform(len(x), LOW, HIGH, generator), x)
        share = uniform((len(x), 1, 1, 1), generator, device=x.device)
        photons = uniform((len(x), 1, 1, 1), generator, device=x.device) < PHOTONS
        gain = torch.where(photons, 2 * share * level**2, 0.0)
        read = torch.where(photons, (1 - share).sqrt() * level, level)
        rate = x.clamp_min(0) / gain.clamp_min(1e-9)
        counted = gain * poisson(torch.where(photons, rate, 0.0), generator)
        y = torch.where(photons, counted, x) + read * gaussian(x, generator)
        mean = F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False)
        return y, (gain * mean.clamp_min(0) + read**2).sqrt()


def log_uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw n stratified numbers whose logarithm is uniform, shape (n,)."""
    device = generator.device
    place = permutation((n,), generator, device) + uniform((n,), generator, device=device)
    return low * torch.exp(math.log(high / low) * place / n)


def augmented(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Crop, turn and recolor images (B, C, H, W) in [0, 1] at random.

    Each is cropped to side x side and flipped or turned. It gets a gamma from 1/2 to 2, half of
    them a lower contrast around a random gray, and half of them are inverted. The channels of
    color images are permuted.
    """
    b, channels, height, width = images.shape
    top = integers(height - side + 1, (b,), generator).tolist()
    left = integers(width - side + 1, (b,), generator).tolist()
    turn = integers(8, (b,), generator).tolist()
    crops = []
    for image, i, j, k in zip(images, top, left, turn, strict=True):
        crop = image[:, i : i + side, j : j + side].rot90(k % 4, (1, 2))
        crops.append(crop.flip(2) if k >= 4 else crop)
    x = torch.stack(crops)
    draws = uniform((5, b, 1, 1, 1), generator, device=images.device)
    x = x ** torch.exp(math.log(2) * (2 * draws[0] - 1))
    contrast = torch.where(draws[1] < 0.5, 0.1 + 0.9 * draws[2], 1.0)
    x = contrast * x + (1 - contrast) * draws[3]
    if channels > 1:
        order = torch.stack([permutation((channels,), generator, x.device) for _ in range(b)])
        x = x.gather(1, order.long()[:, :, None, None].expand_as(x))
    return torch.where(draws[4] < 0.5, 1 - x, x)


# -- the run --------------------------------------------------------------------------------------

STABLE = Path("state") / "stable.pt"
"""State before the learning rate falls, in the run folder."""


def trainer_step(stable: Path) -> int:
    """Return the step of a kept state, -1 if there is none."""
    about = stable.with_suffix(".json")
    return int(json.loads(about.read_text())["step"]) if about.exists() else -1


def export(learner: Learner, folder: Path) -> None:
    """Write the EMA weights of prior and posterior into a run folder."""
    for name in ("prior", "posterior"):
        save_model(folder / name, learner.ema[name])


def resume_longer(out: Path, steps: int, decay: float) -> None:
    """Go back to the state before the rate fell, if a run that has ended is made longer."""
    kept = trainer_step(out / STABLE)
    if 0 <= kept < math.floor((1 - decay) * steps):
        shutil.copyfile(out / STABLE, out / "state" / "latest.pt.part")
        (out / "state" / "latest.pt.part").replace(out / "state" / "latest.pt")


def main() -> None:
    """Train, or continue a run."""
    parser = argparse.ArgumentParser(description="Train the generic prior and posterior.")
    parser.add_argument("images", type=Path, help=".npy of synthetic_images.py")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--start", default="none", help="generic model whose weights it starts from"
    )
    parser.add_argument("--network", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--kimg", type=float, default=1000.0, help="length of the run")
    parser.add_argument("--decay", type=float, default=0.2, help="part in which the rate falls")
    parser.add_argument("--side", type=int, default=64, help="side of the crops")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--flow-every", type=int, default=4, help="one flow step in so many")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    how = parser.parse_args()
    array = np.load(how.images, mmap_mode="r", allow_pickle=False)
    images = torch.from_numpy(np.array(array if array.ndim == 4 else array[..., None]))
    images = images.permute(0, 3, 1, 2)
    settings = Settings(
        network=how.network,
        kimg=how.kimg,
        batch=how.batch,
        rate=how.rate,
        average=how.kimg,
        seed=how.seed,
        precision=how.precision,
    )
    problem, shape = Problem("identity", 0.05), (images.shape[1], how.side, how.side)
    start = Start.of(how.start, problem, images.shape[1])
    learner = Generic(kimg=how.kimg, decay=how.decay, flow_every=how.flow_every)
    learner = learner.build(images, problem, shape, how.network, start=start)
    how.out.mkdir(parents=True, exist_ok=True)
    resume_longer(how.out, math.ceil(1000 * how.kimg / how.batch), how.decay)
    write_config(how.out, learner, settings, images)
    Trainer(learner, images, settings, how.out, every=120).run()
    export(learner, how.out)


def write_config(out: Path, learner: Generic, settings: Settings, images: Tensor) -> None:
    """Write the settings into config.json of the run folder."""
    config = {
        "format": FORMAT,
        "method": "generic",
        "options": {"decay": learner.decay, "flow_every": learner.flow_every},
        "settings": {name: value for name, value in vars(settings).items() if name != "compile"},
        "start": learner.start.to_dict(learner.shape) if learner.start else "none",
        "shape": list(learner.shape),
        "noise levels": [LOW, HIGH],
        "data": fingerprint(images),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
