"""Priors from elsewhere: pipelines of diffusers, the Hub, and checkpoints of guided-diffusion.

Each reader returns a `UNet2DModel` and a `DDPMScheduler`, which `Prior` takes.

Schedules. A variance-preserving model is trained on x_t = sqrt(abar_t) u + sqrt(1 - abar_t) n
for u in [-1, 1], at the indices t = 0..T-1 of betas with abar_t = prod_{i<=t} (1 - beta_i) (Ho et
al., 2020, arXiv 2006.11239, eq. 4). Divided by sqrt(abar_t) that is u + s_t n with

    s_t = sqrt((1 - abar_t) / abar_t),     sigma_t = s_t / 2 for images in [0, 1].

A level between two of these gets a fractional t, linear in log sigma: the sinusoidal embedding of
time takes it. Levels at which abar is zero (betas rescaled to end in pure noise) are left out.

ADM (Dhariwal and Nichol, 2021, arXiv 2105.05233), the U-Net of guided-diffusion, is a
`UNet2DModel` whose residual blocks do the resampling: h -> Conv(resample(SiLU(GN(h)))) on the main
path, resample(h) beside it. The time enters as GN(h) (1 + scale) + shift. The embedding is
(cos, sin) of t 10000^(-2 i / C). Only names differ, and one matrix: the rows of its `qkv` are

    [head][q, k, v][channel] ("legacy", all published models)   or   [q, k, v][head][channel].

`UNet2DModel` keeps q, k and v apart, with rows [head][channel].
"""

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..bounds import Real, Sides, Whole, shown
from ..errors import InputError
from ..io.json_files import read_object
from ..io.weights import count_weights, finite, read_weights, reason

__all__ = [
    "LAYOUTS",
    "PREDICTIONS",
    "Adm",
    "adm",
    "download",
    "hub_name",
    "image_size",
    "pipeline",
]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a network may predict of x_t: n, u, or v = sqrt(abar) n - sqrt(1 - abar) u."""

SIDES = Sides(1, 16384)
CHANNELS = Whole(1, 8192)
LAYERS = Whole(1, 16)
STEPS = Whole(2, 100_000)
BETA = Real(0, 1)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def pipeline(folder: Path) -> tuple[Any, Any]:
    """Network and schedule of a folder written by `DiffusionPipeline.save_pretrained`.

    Weights are read from safetensors, or from a .bin file with torch's `weights_only`. The parts
    lie in `unet/` and `scheduler/`, or all beside `model_index.json` as in the oldest models.

    Raises:
        InputError: for any other kind of model, and for files that cannot be read.
    """
    from diffusers import UNet2DModel

    _unconditional(read_object(folder / "model_index.json"), folder)
    # diffusers itself writes infinities into some of these
    config = read_object(_part(folder, "scheduler") / "scheduler_config.json", infinite=True)
    scheduler = _schedule(config, folder)
    place = _part(folder, "unet")
    config = read_object(place / "config.json")
    _unlabelled(config, place)
    _fits(config, place)
    with _quietly(f"cannot load the network in {place}"):
        unet, info = UNet2DModel.from_pretrained(place, output_loading_info=True)
    if info["missing_keys"]:
        raise InputError(
            f"the weights in {place} lack {min(info['missing_keys'])}: they are of another network"
        )
    finite(unet.state_dict(), place)
    return _owned(unet), scheduler


def _owned(unet: Any) -> Any:
    """The network with weights in memory of its own.

    What safetensors returns lies in the mapped file: it changes if the file is written to, and
    starts at odd addresses, for which kernels of other rounding are taken.
    """
    for tensor in (*unet.parameters(), *unet.buffers()):
        tensor.data = tensor.data.clone()
    return unet


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Every error of diffusers as one of input, and none of its log lines.

    What diffusers does with a stranger's settings ends in errors of many classes.
    """
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images of a network, of its config. Raises InputError."""
    size = config["sample_size"]
    return SIDES.check("sample_size in the config of the network", size)


def _fits(config: dict[str, Any], place: Path) -> None:
    """Raises InputError unless a network of this config runs, and is as large as its weights.

    It is built and run on the device "meta", which takes no memory.
    """
    from diffusers import UNet2DModel

    _bounded(config, place)
    height, width = image_size(config)
    channels = config.get("in_channels", 3)
    with _quietly(f"the network in {place} cannot be built"), torch.device("meta"):
        unet = UNet2DModel.from_config(config)
    with _quietly(f"the network in {place} cannot run on images {channels}x{height}x{width}"):
        unet.eval()(
            torch.empty(1, channels, height, width, device="meta"), torch.zeros(1, device="meta")
        )
    needs = sum(value.numel() for value in unet.state_dict().values())
    kept = [place / name for name in WEIGHTS if (place / name).is_file()]
    if not kept or any(place.glob("*.index.json")):
        found = "sharded weights: merge them into one file" if kept else f"no {WEIGHTS[0]}"
        raise InputError(f"cannot load the network in {place}: there is {found}")
    if kept[0].suffix == ".safetensors":
        holds = count_weights(kept[0])
    else:  # at least one byte a number; `from_pretrained` reads it after this
        holds = sum(value.numel() for value in read_weights(kept[0]).values())
    if needs > holds:
        raise InputError(
            f"the network in {place} has {needs} weights and {kept[0].name} only {holds}: they are"
            " of another network"
        )


def _bounded(value: Any, place: Path) -> None:
    """Raises InputError for numbers and lists that no network of images needs."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(parts) > 64 or (isinstance(value, int | float) and abs(value) > 65536):
        raise InputError(f"the config in {place} asks for {shown(value)}, which is out of bounds")
    for part in parts:
        _bounded(part, place)
    if isinstance(value, dict) and "layers_per_block" in value:
        LAYERS.check(f"layers_per_block in the config in {place}", value["layers_per_block"])
        widths = value.get("block_out_channels", [])
        if not isinstance(widths, list) or len(widths) > 16:
            raise InputError(f"the config in {place} has block_out_channels {shown(widths)}")
        for width in widths:
            CHANNELS.check(f"block_out_channels in the config in {place}", width)


def _schedule(config: dict[str, Any], where: object) -> Any:
    """The `DDPMScheduler` with the betas and the prediction of another scheduler's config."""
    from diffusers import DDPMScheduler

    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or "beta_schedule" not in config:
        raise InputError(
            f"{where} has a {config.get('_class_name')!s:.60} with prediction {shown(prediction)}:"
            f" only schedules of betas with {', '.join(PREDICTIONS)} are known"
        )
    trained = config.get("trained_betas") or []
    STEPS.check(f"{where}: num_train_timesteps", config.get("num_train_timesteps", 1000))
    if not isinstance(trained, list) or len(trained) > STEPS.most:
        raise InputError(f"{where}: trained_betas must be a list of at most {STEPS.most} numbers")
    for name in ("beta_start", "beta_end"):
        BETA.check(f"{where}: {name}", config.get(name, 0.01))
    for beta in trained:
        BETA.check(f"{where}: every one of trained_betas", beta)
    known = inspect.signature(DDPMScheduler.__init__).parameters
    try:
        with _quietly(f"{where}: the schedule cannot be built"):
            return DDPMScheduler(**{key: config[key] for key in known if key in config})
    except InputError as error:
        if isinstance(error.__cause__, NotImplementedError):
            name = shown(config["beta_schedule"])
            raise InputError(f"{where}: diffusers does not know the betas {name}") from error
        raise


def hub_name(text: str) -> bool:
    """Whether a text can be the name of a model on the Hub, and is no path on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)) and not os.path.exists(
        os.path.dirname(text)
    )


def download(name: str) -> Path:
    """The folder of the Hub model `owner/name` in the local cache, fetched where it is not there.

    Raises:
        InputError: when it cannot be had, or is not an unconditional model of images.
    """
    folder = _fetch(name, "*.json")
    # refused before gigabytes are on their way
    _unconditional(read_object(folder / "model_index.json"), name)
    place = _part(folder, "unet").relative_to(folder)
    for file in WEIGHTS:
        if not (folder / place / file).exists():
            folder = _fetch(name, str(place / file))
        if (folder / place / file).exists():
            break
    return folder


def _fetch(name: str, pattern: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[pattern]))
    except Exception as error:  # the Hub's errors have no common class
        raise InputError(
            f"no folder '{name}' here, and the Hub does not give it: {_first_line(error)} "
            "(check the name, go online or log in, or copy the model and give its folder)"
        ) from error


def _unconditional(index: dict[str, Any], where: object) -> None:
    """Raises InputError unless a pipeline is an image network and its schedule, nothing else."""
    lists = {k: v for k, v in index.items() if isinstance(v, list)}
    for key, value in lists.items():
        if len(value) != 2 or not all(isinstance(v, str | None) for v in value):
            raise InputError(
                f"model_index.json in {where}: {shown(key)} must be [library, class], got"
                f" {shown(value)}"
            )
    parts = {k: v[1] for k, v in lists.items() if v[1] is not None}
    others = sorted(parts.keys() - {"unet", "scheduler"})
    if others or parts.get("unet") != "UNet2DModel":
        holds = ", ".join(others)[:200] or f"the network {shown(parts.get('unet'))}"
        raise InputError(
            f"{where} is a {index.get('_class_name')!s:.60} with {holds}: a prior is an"
            " unconditional model of images (a UNet2DModel and its scheduler)"
        )


def _unlabelled(config: dict[str, Any], where: object) -> None:
    """Raises InputError unless a network takes images and time only, and says their shape."""
    channels, out = (
        CHANNELS.check(f"{key} of the network in {where}", config.get(key, 3))
        for key in ("in_channels", "out_channels")
    )
    wrong = {
        "has classes": config.get("num_class_embeds") or config.get("class_embed_type"),
        "takes time as " + str(config.get("time_embedding_type"))[:60]: (
            config.get("time_embedding_type", "positional") != "positional"
        ),
        f"maps {channels} channels to {out}": out not in (channels, 2 * channels),
        "does not say the size of its images": config.get("sample_size") is None,
    }
    for what, so in wrong.items():
        if so:
            raise InputError(f"the network in {where} {what}: it cannot serve as a prior")


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Adm:
    """The settings of a guided-diffusion model with residual resampling and scale-shift norm.

    The number of channels of the images, and whether there is a learned variance, is read off the
    weights. All published models have linear betas in 1,000 steps and predict the noise.
    """

    size: int
    """Side of the images."""
    channels: int
    """Channels at the finest resolution (`num_channels`)."""
    multipliers: tuple[int, ...]
    """Channels at each resolution, in units of the finest (`channel_mult`)."""
    layers: int
    """Residual blocks at each resolution (`num_res_blocks`)."""
    attention: tuple[int, ...]
    """Sides of the feature maps that attend (`attention_resolutions`)."""
    head: int = 64
    """Channels of each attention head (`num_head_channels`)."""
    order: Literal["legacy", "new"] = "legacy"
    """Order of the rows of `qkv`; "new" where it was trained with `use_new_attention_order`."""

    @property
    def attends(self) -> list[bool]:
        """Whether each resolution attends, finest first."""
        return [self.size >> level in self.attention for level in range(len(self.multipliers))]

    def network(self, channels: int, out: int) -> Any:
        """The `UNet2DModel` of these settings, without weights (on the device "meta")."""
        from diffusers import UNet2DModel

        with torch.device("meta"):
            return UNet2DModel(
                sample_size=self.size,
                in_channels=channels,
                out_channels=out,
                block_out_channels=tuple(self.channels * m for m in self.multipliers),
                layers_per_block=self.layers,
                down_block_types=tuple(
                    "AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in self.attends
                ),
                up_block_types=tuple(
                    "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D"
                    for a in reversed(self.attends)
                ),
                downsample_type="resnet",
                upsample_type="resnet",
                resnet_time_scale_shift="scale_shift",
                attention_head_dim=self.head,
                norm_num_groups=32,
                attn_norm_num_groups=32,  # unset, the middle would attend without a norm
                norm_eps=1e-5,
                flip_sin_to_cos=True,
                freq_shift=0,
            )

    def names(self) -> Iterator[tuple[str, str]]:
        """Pairs of names: of a convolution, norm, linear map or qkv there, and of it here."""
        yield "time_embed.0", "time_embedding.linear_1"
        yield "time_embed.2", "time_embedding.linear_2"
        yield "input_blocks.0.0", "conv_in"
        yield "out.0", "conv_norm_out"
        yield "out.2", "conv_out"
        for there, here in self._blocks():
            parts = ATTENTION if ".attentions." in here else RESIDUAL
            yield from ((f"{there}.{a}", f"{here}.{b}") for a, b in parts.items())

    def _blocks(self) -> Iterator[tuple[str, str]]:
        """Residual and attention blocks: numbered there in the order that they are run in."""
        yield from ((f"middle_block.{2 * i}", f"mid_block.resnets.{i}") for i in range(2))
        yield "middle_block.1", "mid_block.attentions.0"
        last = len(self.multipliers) - 1
        ways = (
            ("input_blocks", 1, "down_blocks", "downsamplers", self.layers, self.attends),
            ("output_blocks", 0, "up_blocks", "upsamplers", self.layers + 1, self.attends[::-1]),
        )
        for there, number, here, resampler, layers, attends in ways:
            for level, attention in enumerate(attends):
                for layer in range(layers):
                    yield f"{there}.{number}.0", f"{here}.{level}.resnets.{layer}"
                    if attention:
                        yield f"{there}.{number}.1", f"{here}.{level}.attentions.{layer}"
                    number += 1
                if level < last:
                    # going down a step of its own, going up the end of the step before
                    down = there == "input_blocks"
                    at = f"{number}.0" if down else f"{number - 1}.{1 + attention}"
                    yield f"{there}.{at}", f"{here}.{level}.{resampler}.0"
                    number += down

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each with rows [head][channel], out of `qkv` (3 C, ...)."""
        if self.order == "legacy":
            heads = qkv.unflatten(0, (-1, 3, self.head))
            qkv = heads.transpose(0, 1).flatten(0, 2)
        q, k, v = qkv.chunk(3)
        return q, k, v


RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}

LAYOUTS = {
    "adm-ffhq256": Adm(256, 128, (1, 1, 2, 2, 4, 4), 1, (16,)),
    "adm-imagenet256": Adm(256, 256, (1, 1, 2, 2, 4, 4), 2, (32, 16, 8)),
}
"""Published settings. adm-ffhq256: faces (`ffhq_10m.pt` of Choi et al., 2021, arXiv 2108.02938).
adm-imagenet256: `256x256_diffusion_uncond.pt` of Dhariwal and Nichol (2021, arXiv 2105.05233);
their LSUN models have the same."""


def adm(path: Path, layout: str | Adm) -> tuple[Any, Any]:
    """Network and schedule of a guided-diffusion checkpoint, .pt (`weights_only`) or .safetensors.

    Args:
        layout: A name in `LAYOUTS`, or settings.

    Raises:
        InputError: Unknown layout, a file that cannot be read, or weights of other settings.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise InputError(f"layout '{layout}' is unknown: choose from {', '.join(LAYOUTS)}")
        layout = LAYOUTS[layout]
    theirs = _weights(path)
    if "label_emb.weight" in theirs:
        raise InputError(f"{path} is conditional on classes: give an unconditional model")
    try:
        unet = layout.network(
            theirs["input_blocks.0.0.weight"].shape[1], theirs["out.2.weight"].shape[0]
        )
        unet.load_state_dict(_renamed(theirs, layout), assign=True)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the weights in {path} do not fit its layout ({_reason(error)}): "
            f"choose another of {', '.join(LAYOUTS)}"
        ) from error
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    learned = unet.config.out_channels > unet.config.in_channels
    variance = "learned_range" if learned else "fixed_large"
    return _owned(unet), _schedule({**betas, "variance_type": variance}, path)


def _renamed(theirs: dict[str, Tensor], layout: Adm) -> dict[str, Tensor]:
    """The state dict under the names of `UNet2DModel`; what has no name there keeps its own."""
    left, ours = dict(theirs), {}
    for there, here in layout.names():
        for kind in ("weight", "bias"):
            value = left.pop(f"{there}.{kind}", None)
            if value is None:
                continue
            if ".attentions." in here and value.ndim == 3:
                value = value.squeeze(2)  # their 1x1 convolutions are linear maps here
            if here.endswith("to_qkv"):
                for part, rows in zip("qkv", layout.split(value), strict=True):
                    ours[f"{here.removesuffix('qkv')}{part}.{kind}"] = rows
            else:
                ours[f"{here}.{kind}"] = value
    return ours | left


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in float32."""
    state = read_weights(path)
    finite(state, path)
    return {key: value.float() for key, value in state.items()}


def _reason(error: Exception) -> str:
    """What torch found first, of the lines that it writes about weights that do not fit."""
    lines = [line.strip() for line in str(error).splitlines()]
    return (lines[1] if len(lines) > 1 else lines[0])[:120].rstrip(".")
