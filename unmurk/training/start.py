"""Networks that a run starts from: another run, a pretrained prior, or the packaged `generic`.

A start brings its own networks. They are built for the images of the run, which may be of another
size and number of channels, and the weights are copied:

- All weights, if the number of channels is the same.
- With another number of channels, the first and the last layer of each network are converted. A
  kernel of a network of C channels becomes the mean over its C input channels, times C / C' for
  each of the C' new ones, so that an image of equal channels causes the same features as before;
  each new output channel is the mean of the old ones. The couplings of the flow, whose sizes
  depend on C, start anew.
- The posterior is copied only if it was learned for the same operator, since its mean network
  corrects what that operator leaves. Otherwise only the prior is.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.prior import Prior, locate
from ..errors import InputError, size_text
from ..flows.posterior import Posterior
from ..gaussian import Wiener
from ..io.json_files import read_object
from ..io.packaged import GENERIC
from ..io.weights import digest
from ..problem import Problem

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """The prior, and at times the posterior, whose weights a run starts from.

    Attributes:
        name: What the user calls it: a name of the package, or the name of a folder.
        prior: The prior.
        posterior: The posterior; None if the run starts with a new one.

    >>> prior = Prior.create("tiny", (1, 16, 16))
    >>> start = Start("mine", prior, None)
    >>> start.prior_for((3, 32, 24)).shape, start.changes((3, 32, 24))
    ((3, 32, 24), 'prior: first and last layer converted from 1 to 3 channels')
    """

    name: str
    prior: Prior
    posterior: Posterior | None

    @classmethod
    def default(
        cls, name: str, problem: Problem, shape: tuple[int, int, int]
    ) -> "tuple[Start | None, str]":
        """Load the start of a run that names none.

        Args:
            name: What the method prefers: a model of the package, or "none". `generic` stands for
                `generic-color` where the images have three channels.
            problem: How the measurements of the run were made.
            shape: Shape (C, H, W) of its images.

        Returns:
            The start, and ""; or None, and why the run starts from random weights if its method
            prefers another start.
        """
        gray, color = GENERIC
        name = color if name == gray and shape[0] == 3 else name
        found = cls.of(name, problem, shape[0])
        if found is None:
            return None, ""
        # elsewhere it gains nothing in minutes (the experiments page)
        before, after = found.prior.shape[0], shape[0]
        why = found.misfit(shape)
        if before != after:
            kind = "gray images" if before == 1 else f"images of {before} channels"
            why = f"'{name}' is a model of {kind}, and these have {after} channels"
        elif found.posterior is None:
            why = f"the posterior of '{name}' was learned for another operator"
        return (None, why) if why else (found, "")

    @classmethod
    def of(cls, start: Any, problem: Problem, channels: int) -> "Start | None":
        """Load a start.

        Args:
            start: None or "none"; a name, a folder or whatever else `Prior.load` reads; a prior;
                or a pair of a prior and a posterior.
            problem: How the measurements of the run were made.
            channels: Channels of its images.

        Returns:
            The start; None for none.

        Raises:
            InputError: It cannot be loaded, or is none of these.
        """
        if start is None or (isinstance(start, str) and start == "none"):
            return None
        if isinstance(start, Prior):
            return cls("own", start, None)
        if isinstance(start, tuple) and list(map(type, start)) == [Prior, Posterior]:
            return cls("own", *start)
        if not isinstance(start, str | Path):
            raise InputError(
                f"start is a {type(start).__name__}: give a name, a run folder, a Prior, or a pair"
                " (Prior, Posterior)"
            )
        name = str(start)
        prior = Prior.load(name)
        return cls(Path(name).name, prior, _posterior_of(name, problem))

    def misfit(self, shape: tuple[int, int, int]) -> str:
        """Say why the network does not fit images of a shape (C, H, W); "" if it does.

        >>> Start("mine", Prior.create("tiny", (1, 16, 16)), None).misfit((1, 10, 16))
        "images of 10x16 pixels do not fit the network of the start 'mine': crop or pad them so
        that both sides are multiples of 4"
        """
        from diffusers import UNet2DModel

        old, (c, h, w) = self.prior, shape
        if not isinstance(old.network, UNet2DModel):
            if c == old.shape[0]:
                return ""
            return (
                f"the network of the start '{self.name}' is one of {old.shape[0]} channels,"
                f" and the images have {c}: start from another, or from none"
            )
        factor = 2 ** (len(old.network.config["block_out_channels"]) - 1)
        if h % factor == w % factor == 0:
            return ""
        return (
            f"images of {size_text((h, w))} pixels do not fit the network of the start"
            f" '{self.name}': crop"
            f" or pad them so that both sides are multiples of {factor}"
        )

    def prior_for(self, shape: tuple[int, int, int]) -> Prior:
        """Return a copy of the prior for images of a shape (C, H, W), in training mode.

        Raises:
            InputError: The network does not fit such images.
        """
        from diffusers import UNet2DModel

        why = self.misfit(shape)
        if why:
            raise InputError(why)
        old = self.prior
        scheduler = copy.deepcopy(old.scheduler)
        if not isinstance(old.network, UNet2DModel):
            return Prior(copy.deepcopy(old.network), shape, scheduler).train()
        c, h, w = shape
        changes = {"sample_size": (h, w) if h != w else h, "in_channels": c, "out_channels": c}
        network: Any = UNet2DModel.from_config({**old.network.config, **changes})
        weights = {key: value.clone() for key, value in old.network.state_dict().items()}
        weights["conv_in.weight"] = _inputs(weights["conv_in.weight"], c)
        for key in ("conv_out.weight", "conv_out.bias"):
            weights[key] = _outputs(weights[key][: old.shape[0]], c)
        network.load_state_dict(weights)
        return Prior(network, shape, scheduler).train()

    def posterior_for(self, shape: tuple[int, int, int], start: Wiener | None) -> Posterior:
        """Return a copy of the posterior for images of a shape, in training mode.

        Args:
            shape: Shape (C, H, W) of the images.
            start: Gaussian prior whose Wiener solution is the start image of m(y), or None.
        """
        assert self.posterior is not None
        c, height, width = shape
        old, before = self.posterior, self.posterior.config.channels
        new = Posterior(replace(old.config, channels=c, height=height, width=width), start=start)
        held = dict(old.named_parameters()) | dict(old.named_buffers())
        with torch.no_grad():
            for name, value in (*new.named_parameters(), *new.named_buffers()):
                if name.startswith("start."):
                    continue
                found = held[name] if before == c else _converted(name, held[name], value, c)
                if found is not None:
                    value.copy_(found)
        return new.train()

    def changes(self, shape: tuple[int, int, int]) -> str:
        """Say what is copied into the networks of images of a shape (C, H, W)."""
        before, after = self.prior.shape[0], shape[0]
        parts = "prior" if self.posterior is None else "prior and posterior"
        if before == after:
            return f"{parts}: all weights"
        text = f"{parts}: first and last layer converted from {before} to {after} channels"
        return text if self.posterior is None else f"{text}, new couplings of the flow"

    def to_dict(self, shape: tuple[int, int, int]) -> dict[str, str]:
        """Return what config.json says of the start: its name, what is copied, and hashes."""
        found = {"name": self.name, "copied": self.changes(shape), "prior": digest(self.prior)}
        return found if self.posterior is None else found | {"posterior": digest(self.posterior)}


def _posterior_of(name: str, problem: Problem) -> Posterior | None:
    """Return the posterior of a run or a packaged model, if it was learned for the operator."""
    try:
        folder = locate(name, "posterior", "model.safetensors")
    except InputError:  # a prior alone
        return None
    config: Mapping[str, Any] = {}
    if (folder.parent / "config.json").is_file():
        config = read_object(folder.parent / "config.json")
    learned = config.get("problem")
    operator = learned.get("operator") if isinstance(learned, dict) else "identity"
    return Posterior.load(name) if operator == problem.operator.spec else None


def _inputs(kernel: Tensor, channels: int) -> Tensor:
    """Convert a kernel (out, C, ...) to other input channels, for the same features of gray."""
    before = kernel.shape[1]
    if before == channels:
        return kernel
    mean = kernel.mean(1, keepdim=True) * (before / channels)
    return mean.repeat_interleave(channels, 1)


def _outputs(values: Tensor, channels: int) -> Tensor:
    """Convert a kernel or a bias (C, ...) to other output channels, each the mean of the old."""
    if len(values) == channels:
        return values
    return values.mean(0, keepdim=True).repeat_interleave(channels, 0)


def _converted(name: str, old: Tensor, new: Tensor, channels: int) -> Tensor | None:
    """Convert a parameter of a posterior to images of other channels; None: it starts anew."""
    if name.startswith(("fine.", "coarse.")):
        return None
    if name == "log_spread":
        return _outputs(old, channels)
    if name.endswith("stem.weight"):  # the channels of 2 x 2 blocks: image, mask, level[, mean]
        blocks = old.unflatten(1, (-1, 4))
        before = blocks.shape[1] - 2 if name.startswith("mean_net") else blocks.shape[1] // 2 - 1
        parts = [_inputs(blocks[:, :before], channels), blocks[:, before : before + 2]]
        if not name.startswith("mean_net"):
            parts.append(_inputs(blocks[:, before + 2 :], channels))
        return torch.cat(parts, 1).flatten(1, 2)
    if name.endswith(("head.weight", "head.bias")):
        return _outputs(old.unflatten(0, (-1, 4)), channels).flatten(0, 1)
    return old


def own_network(start: "Start | None", network: str | nn.Module | None) -> None:
    """Raise InputError if a network is given beside a start, which brings its own."""
    if start is not None and network is not None:
        what = f"'{network}'" if isinstance(network, str) else "of your own"
        raise InputError(
            f"the start '{start.name}' brings its own networks, and a network {what} is given:"
            " leave the network out, or start from none"
        )
