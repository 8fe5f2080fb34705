r"""Checkpoints of guided-diffusion (ADM), read into diffusers' `UNet2DModel`.

ADM (Dhariwal and Nichol, 2021, arXiv 2105.05233), the U-Net of guided-diffusion, is a
`UNet2DModel` whose residual blocks do the resampling: the main path is

.. math:: h \mapsto \mathrm{Conv}(\mathrm{resample}(\mathrm{SiLU}(\mathrm{GN}(h)))),

with resample(h) beside it. The time enters as GN(h) (1 + scale) + shift. Its embedding is
(cos, sin) of :math:`t\, 10000^{-2i/C}`. Only names differ, and one matrix: the rows of `qkv` are
ordered

    [head][q, k, v][channel] ("legacy", all published models)   or   [q, k, v][head][channel].

`UNet2DModel` keeps q, k and v apart, with rows [head][channel].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..io.weights import check_finite_weights, read_weights
from .pretrained import ddpm_scheduler, own_memory

__all__ = ["LAYOUTS", "Adm", "adm"]


@dataclass(frozen=True)
class Adm:
    """Settings of a guided-diffusion model with residual resampling and scale-shift norm.

    The number of channels of the images, and whether the model has a learned variance, are read
    off the weights. All published models have linear betas in 1,000 steps and predict the noise.

    >>> LAYOUTS["adm-ffhq256"].attends  # at 16 x 16 pixels
    [False, False, False, False, True, False]
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
    """Order of the rows of `qkv`: "new" for models trained with `use_new_attention_order`."""

    @property
    def attends(self) -> list[bool]:
        """Whether each resolution attends, finest first."""
        return [self.size >> level in self.attention for level in range(len(self.multipliers))]

    def network(self, channels: int, out: int) -> Any:
        """Build the `UNet2DModel` of these settings without weights (on the device "meta").

        Args:
            channels: Channels of the images.
            out: Channels of the output, twice as many with a learned variance.
        """
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
        """Yield pairs of names of each layer: in guided-diffusion, and in `UNet2DModel`."""
        yield "time_embed.0", "time_embedding.linear_1"
        yield "time_embed.2", "time_embedding.linear_2"
        yield "input_blocks.0.0", "conv_in"
        yield "out.0", "conv_norm_out"
        yield "out.2", "conv_out"
        for there, here in self._blocks():
            parts = ATTENTION if ".attentions." in here else RESIDUAL
            yield from ((f"{there}.{a}", f"{here}.{b}") for a, b in parts.items())

    def _blocks(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of names of the residual and attention blocks.

        Guided-diffusion numbers them in the order in which they run.
        """
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
                    # on the way down a block of its own, on the way up the end of the last one
                    down = there == "input_blocks"
                    place = f"{number}.0" if down else f"{number - 1}.{1 + attention}"
                    yield f"{there}.{place}", f"{here}.{level}.{resampler}.0"
                    number += down

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split `qkv` (3 C, ...) into queries, keys and values, each with rows [head][channel]."""
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
their LSUN models have the same settings."""


def adm(path: Path, layout: str | Adm) -> tuple[Any, Any]:
    """Load network and scheduler from a guided-diffusion checkpoint.

    Args:
        path: A .pt file (read with `weights_only`) or a .safetensors file.
        layout: A name in `LAYOUTS`, or settings.

    Returns:
        The `UNet2DModel` and a `DDPMScheduler`.

    Raises:
        InputError: The layout is unknown, the file cannot be read, or its weights have other
            settings.

    >>> adm(Path("model.pt"), "adm-cifar10")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: layout 'adm-cifar10' is unknown: choose from adm-ffhq256, ...
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
    return own_memory(unet), ddpm_scheduler({**betas, "variance_type": variance}, path)


def _renamed(theirs: dict[str, Tensor], layout: Adm) -> dict[str, Tensor]:
    """Rename a state dict to the names of `UNet2DModel`; unknown names stay as they are."""
    left, ours = dict(theirs), {}
    for there, here in layout.names():
        for kind in ("weight", "bias"):
            value = left.pop(f"{there}.{kind}", None)
            if value is None:
                continue
            if ".attentions." in here and value.ndim == 3:
                value = value.squeeze(2)  # their 1x1 convolutions are linear maps here
            if here.endswith("to_qkv"):
                for part, matrix in zip("qkv", layout.split(value), strict=True):
                    ours[f"{here.removesuffix('qkv')}{part}.{kind}"] = matrix
            else:
                ours[f"{here}.{kind}"] = value
    return ours | left


def _weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, in float32."""
    state = read_weights(path)
    check_finite_weights(state, path)
    return {key: value.float() for key, value in state.items()}


def _reason(error: Exception) -> str:
    """Return the first difference that torch's message about weights names."""
    lines = [line.strip() for line in str(error).splitlines()]
    return (lines[1] if len(lines) > 1 else lines[0])[:120].rstrip(".")
