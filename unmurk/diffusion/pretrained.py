r"""Priors from elsewhere: folders of diffusers pipelines, the Hub, and networks of your own.

Each reader returns a network and a `DDPMScheduler`, which `Prior` takes. Checkpoints of
guided-diffusion are read by `guided_diffusion.py`.

**Noise levels.** A variance-preserving model is trained on

.. math:: x_t = \sqrt{\bar\alpha_t}\, u + \sqrt{1 - \bar\alpha_t}\, n, \qquad
    \bar\alpha_t = \prod_{i \le t} (1 - \beta_i),

for u in [-1, 1] and the times t = 0, ..., T - 1 (Ho et al., 2020, arXiv 2006.11239, eq. 4).
Divided by :math:`\sqrt{\bar\alpha_t}` that is :math:`u + s_t n` with

.. math:: s_t = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}, \qquad
    \sigma_t = s_t / 2 \;\text{ for images in } [0, 1].

A level between two of these gets a fractional t, linear in log sigma, which the sinusoidal
embedding of the time accepts. Levels at which :math:`\bar\alpha` is zero (betas rescaled to end in
pure noise) are left out.
"""

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bounds import Real, Sides, Whole, shown
from ..errors import InputError, reason, size_text
from ..io.json_files import read_object
from ..io.weights import check_finite_weights, count_weights, read_weights

__all__ = [
    "OWN",
    "PREDICTIONS",
    "ddpm_scheduler",
    "download",
    "forget_place",
    "hub_name",
    "image_size",
    "own",
    "own_memory",
    "pipeline",
]

OWN = "prior.json"
"""The file that marks the folder of a prior whose network is not diffusers' `UNet2DModel`."""

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a network may predict from x_t: n, u, or v = sqrt(abar) n - sqrt(1 - abar) u."""

SIDES = Sides(1, 16384)
CHANNELS = Whole(1, 8192)
LAYERS = Whole(1, 16)
STEPS = Whole(2, 100_000)
BETA = Real(0, 1)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def pipeline(folder: Path) -> tuple[Any, Any]:
    """Load network and scheduler from a folder that `DiffusionPipeline.save_pretrained` wrote.

    Weights are read from safetensors, or from a .bin file with torch's `weights_only`. The parts
    lie in `unet/` and `scheduler/`, or all of them beside `model_index.json` as in the oldest
    models.

    Args:
        folder: The folder that holds `model_index.json`.

    Returns:
        The `UNet2DModel` and a `DDPMScheduler`.

    Raises:
        InputError: It is another kind of model, or a file cannot be read.

    >>> from diffusers import DDPMPipeline
    >>> from unmurk.diffusion.networks import backbone
    >>> unet, betas = backbone("tiny", (1, 8, 8)), {"beta_schedule": "linear"}
    >>> DDPMPipeline(unet, ddpm_scheduler(betas, "my model")).save_pretrained("saved")
    >>> found, _ = pipeline(Path("saved"))
    >>> torch.equal(found.conv_in.weight, unet.conv_in.weight)
    True
    """
    from diffusers import UNet2DModel

    _unconditional(read_object(folder / "model_index.json"), folder)
    # diffusers itself writes infinities into some of these files
    config = read_object(_part(folder, "scheduler") / "scheduler_config.json", infinite=True)
    scheduler = ddpm_scheduler(config, folder)
    place = _part(folder, "unet")
    config = read_object(place / "config.json")
    _unlabelled(config, place)
    _fits(config, place)
    with _quietly(f"cannot load the network in {place}"):
        unet, info = UNet2DModel.from_pretrained(place, output_loading_info=True)
    if info["missing_keys"]:
        raise InputError(
            f"the weights in {place} lack {min(info['missing_keys'])}: they belong to another"
            " network"
        )
    check_finite_weights(unet.state_dict(), place)
    return own_memory(unet), scheduler


def own(folder: Path, network: nn.Module | None) -> tuple[nn.Module, tuple[int, int, int], Any]:
    """Load a prior that was saved with a network of your own; see `Prior.save`.

    Args:
        folder: The folder that holds `prior.json`.
        network: The module that the weights belong to.

    Returns:
        The module with the weights of the folder, the shape (C, H, W) of the images, and the
        scheduler.

    Raises:
        InputError: No module is given, the weights do not fit it, or a file cannot be read.

    >>> from unmurk import Prior
    >>> class Shift(nn.Conv2d):
    ...     def forward(self, x, t):
    ...         return super().forward(x)
    >>> Prior(Shift(1, 1, 1), (1, 8, 8)).save("own")
    >>> network, shape, scheduler = own(Path("own"), Shift(1, 1, 1))
    >>> shape, len(scheduler.betas)
    ((1, 8, 8), 1000)
    """
    about = read_object(folder / OWN)
    shape = about.get("shape")
    if about.get("network") != "own" or not isinstance(shape, list) or len(shape) != 3:
        raise InputError(
            f'{folder / OWN} must hold "network": "own" and "shape": [C, H, W]: save the prior'
            " again"
        )
    where = f"the shape in {folder / OWN}"
    channels, (height, width) = CHANNELS.check(where, shape[0]), SIDES.check(where, shape[1:])
    if not isinstance(network, nn.Module):
        raise InputError(
            f"the prior in {folder} has a network of its own class ({about.get('class')!s:.80}),"
            " whose code is not stored: load it in Python, with Prior.load(folder, network=module)"
        )
    config = read_object(folder / "scheduler" / "scheduler_config.json", infinite=True)
    path = folder / "model.safetensors"
    state = read_weights(path)
    check_finite_weights(state, path)
    try:
        network.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f"the weights in {path} do not fit the {type(network).__name__} given as network="
            f" ({reason(error)})"
        ) from error
    return network, (channels, height, width), ddpm_scheduler(config, folder)


def own_memory(unet: Any) -> Any:
    """Copy the weights of a network into memory of its own.

    Tensors from safetensors lie in the mapped file. They change if the file is overwritten, and
    start at odd addresses, for which torch takes kernels that round differently.

    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.data
    >>> after = own_memory(layer).weight.data
    >>> torch.equal(after, before), after.data_ptr() == before.data_ptr()
    (True, False)
    """
    for tensor in (*unet.parameters(), *unet.buffers()):
        tensor.data = tensor.data.clone()
    return unet


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Turn every error of diffusers into an InputError, and silence its log.

    Settings of unknown origin make diffusers raise errors of many classes.
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
    """Return height and width of a network's images, from its config. Raises InputError.

    >>> image_size({"sample_size": 32}), image_size({"sample_size": [8, 12]})
    ((32, 32), (8, 12))
    """
    size = config["sample_size"]
    return SIDES.check("sample_size in the config of the network", size)


def _fits(config: dict[str, Any], place: Path) -> None:
    """Raise InputError unless a network of this config runs, and is as large as its weights.

    The network is built and run on the device "meta", which takes no memory.
    """
    from diffusers import UNet2DModel

    _bounded(config, place)
    height, width = image_size(config)
    channels = config.get("in_channels", 3)
    with _quietly(f"the network in {place} cannot be built"), torch.device("meta"):
        unet = UNet2DModel.from_config(config)
    with _quietly(
        f"the network in {place} cannot run on images {size_text((channels, height, width))}"
    ):
        unet.eval()(
            torch.empty(1, channels, height, width, device="meta"), torch.zeros(1, device="meta")
        )
    needs = sum(value.numel() for value in unet.state_dict().values())
    files = [place / name for name in WEIGHTS if (place / name).is_file()]
    if not files or any(place.glob("*.index.json")):
        found = "sharded weights: merge them into one file" if files else f"no {WEIGHTS[0]}"
        raise InputError(f"cannot load the network in {place}: there is {found}")
    if files[0].suffix == ".safetensors":
        holds = count_weights(files[0])
    else:  # at least one byte a number; `from_pretrained` reads it after this
        holds = sum(value.numel() for value in read_weights(files[0]).values())
    if needs > holds:
        raise InputError(
            f"the network in {place} has {needs} weights and {files[0].name} only {holds}: they"
            " belong to another network"
        )


def _bounded(value: Any, place: Path) -> None:
    """Raise InputError for numbers and lists that no network of images needs."""
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


def ddpm_scheduler(config: dict[str, Any], where: object) -> Any:
    """Build the `DDPMScheduler` with the betas and the prediction of a scheduler's config.

    Args:
        config: The config of any scheduler of diffusers that is defined by betas.
        where: What messages call its place.

    Raises:
        InputError: The config has no betas, or an unknown prediction.

    >>> scheduler = ddpm_scheduler({"beta_schedule": "linear", "beta_end": 0.02}, "my model")
    >>> round(float(scheduler.alphas_cumprod[0]), 4), len(scheduler.betas)  # 1 - beta_start
    (0.9999, 1000)
    """
    from diffusers import DDPMScheduler

    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or "beta_schedule" not in config:
        raise InputError(
            f"{where} has a {config.get('_class_name')!s:.60} with prediction {shown(prediction)}:"
            f" only schedulers with betas and one of {', '.join(PREDICTIONS)} are supported"
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
        with _quietly(f"{where}: the scheduler cannot be built"):
            return DDPMScheduler(**{key: config[key] for key in known if key in config})
    except InputError as error:
        if isinstance(error.__cause__, NotImplementedError):
            name = shown(config["beta_schedule"])
            raise InputError(f"{where}: diffusers does not know the betas {name}") from error
        raise


def forget_place(config: Path) -> None:
    """Remove the path that diffusers read a network from out of its config.json, if it has one.

    A folder that is passed on would tell the name of its user, and of folders.

    >>> Path("config.json").write_text('{"_name_or_path": "/home/me/unet", "in_channels": 1}')
    52
    >>> forget_place(Path("config.json"))
    >>> read_object(Path("config.json"))
    {'in_channels': 1}
    """
    values = read_object(config)
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2) + "\n")


def hub_name(text: str) -> bool:
    """Whether a text can be the name of a model on the Hub, and is no path on this machine.

    >>> hub_name("google/ddpm-cifar10-32"), hub_name("digits")
    (True, False)
    """
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)) and not os.path.exists(
        os.path.dirname(text)
    )


def download(name: str) -> Path:
    """Return the folder of the Hub model `owner/name` in the local cache; fetch it if needed.

    Raises:
        InputError: The model cannot be fetched, or is not an unconditional model of images.
    """
    folder = _fetch(name, "*.json")
    # another kind of model is refused before gigabytes are fetched
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
            f"no folder '{name}' here, and the Hub does not deliver it: {reason(error)} "
            "(check the name, connect or log in, or copy the model and give its folder)"
        ) from error


def _unconditional(index: dict[str, Any], where: object) -> None:
    """Raise InputError unless a pipeline is an image network and its scheduler, nothing else."""
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
    """Raise InputError unless a network takes only images and time, and states their shape."""
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
        "does not state the size of its images": config.get("sample_size") is None,
    }
    for what, so in wrong.items():
        if so:
            raise InputError(f"the network in {where} {what}: it cannot serve as a prior")


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder
