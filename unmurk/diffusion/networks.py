"""Network presets: `diffusers.UNet2DModel` in three sizes.

The backbone of a prior is the U-Net of Ho et al. (2020, arXiv 2006.11239) as implemented by
diffusers. The presets differ in width and depth only. `tiny` has no attention: on a CPU in
bfloat16, attention with small heads costs more than all its convolutions together (measured,
docs/experiments.md). Any other network can take their place; see `unmurk.diffusion.prior`.
"""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError, size_text

__all__ = ["PRESETS", "Preset", "backbone", "check_size", "preset"]


@dataclass(frozen=True)
class Preset:
    """Sizes of the networks of a run.

    Attributes:
        channels: Channels of the prior's U-Net at each resolution, finest first.
        layers: Residual blocks at each resolution.
        attention: Whether the two coarsest resolutions have self-attention.
        mean: Width of the mean network of the posterior.
        context: Width of the network that conditions the flow.
        couplings: Coupling steps at each of the flow's two scales.
        hidden: Width inside a coupling.

    >>> {name: size.channels for name, size in PRESETS.items()}
    {'tiny': (16, 32, 64), 'small': (64, 96, 128), 'base': (128, 256, 256)}
    """

    channels: tuple[int, ...]
    layers: int
    attention: bool
    mean: int
    context: int
    couplings: int
    hidden: int


PRESETS = {
    "tiny": Preset((16, 32, 64), 1, False, 32, 24, 4, 32),
    "small": Preset((64, 96, 128), 2, True, 64, 48, 6, 96),
    "base": Preset((128, 256, 256), 2, True, 128, 96, 8, 160),
}


def preset(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        InputError: The name is unknown.

    >>> preset("tiny").channels
    (16, 32, 64)
    """
    if isinstance(name, type):
        raise InputError(f"network is the class {name.__name__}: give a module, {name.__name__}()")
    if name not in PRESETS:
        raise InputError(f"unknown network '{name}': choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check_size(name: str, shape: tuple[int, int, int]) -> None:
    """Raise InputError unless images of `shape` (C, H, W) fit the networks of a preset.

    >>> check_size("tiny", (1, 28, 28))
    >>> check_size("tiny", (1, 27, 28))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: images of 27x28 pixels do not fit network 'tiny': ...
    """
    factor = 2 ** (len(preset(name).channels) - 1)
    _, h, w = shape
    if h % factor or w % factor:
        raise InputError(
            f"images of {size_text((h, w))} pixels do not fit network '{name}': "
            f"crop or pad them so that both sides are multiples of {factor}"
        )


def backbone(name: str, shape: tuple[int, int, int]) -> Any:
    """Build an untrained `UNet2DModel` for images of a shape.

    Args:
        name: Name of a preset.
        shape: Shape (C, H, W) of the images.

    Returns:
        The network, whose weights come from torch's global random stream.

    Raises:
        InputError: The preset is unknown, or it cannot halve the sides often enough.

    >>> import torch
    >>> unet = backbone("tiny", (1, 8, 12))
    >>> unet(torch.zeros(2, 1, 8, 12), torch.tensor([0, 999])).sample.shape
    torch.Size([2, 1, 8, 12])
    """
    from diffusers import UNet2DModel

    size = preset(name)
    check_size(name, shape)
    c, h, w = shape
    levels = len(size.channels)
    attends = [size.attention and i >= levels - 2 for i in range(levels)]
    return UNet2DModel(
        sample_size=(h, w) if h != w else h,
        in_channels=c,
        out_channels=c,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        add_attention=size.attention,
        attention_head_dim=32 if size.attention else 8,
        norm_num_groups=8,
    )
