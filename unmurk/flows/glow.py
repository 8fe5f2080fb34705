r"""A prior p(x) with an exact density: an unconditional flow.

.. math::
    x = m + s \odot g(z), \qquad z \sim N(0, I), \qquad
    \log p(x) = \log N(z; 0, I)
    - \log\left|\det \frac{\partial g}{\partial z}\right| - \sum \log s,

with a mean m and a scale s for every pixel and the multi-scale coupling flow g of `layers.py`
(Kingma and Dhariwal, 2018, arXiv 1807.03039; here on two scales, with the affine map per pixel in
place of their normalization of activations). The flow has samples and a density but no denoiser.
Solvers take a `Prior`; `training/ambientflow.py` fits one to the flow.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from ..bounds import Whole
from ..diffusion.networks import preset
from ..diffusion.prior import locate
from ..io.weights import load_model, read_settings
from ..rng import PerImageGenerator
from .layers import Context, Flow, Rescale, bounded, unbounded

__all__ = ["Glow"]


@dataclass(frozen=True)
class Config:
    """The settings of a flow, which are stored beside its weights."""

    channels: Annotated[int, Whole(1, 256)]
    height: Annotated[int, Whole(4, 8192)]
    width: Annotated[int, Whole(4, 8192)]
    couplings: Annotated[int, Whole(1, 64)]
    hidden: Annotated[int, Whole(1, 4096)]


class Glow(Flow):
    """The flow p(x) for images of one shape (C, H, W), H and W multiples of 4.

    Args:
        config: Shape and sizes; `Glow.create` takes them from a preset.
        spread: Value of s before training, in units of intensity; m starts at 1/2.

    >>> flow = Glow.create("tiny", (1, 8, 8))
    >>> x = flow.sample(3)
    >>> x.shape, flow.log_prob(x).shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """

    def __init__(self, config: Config, spread: float = 0.3) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.shape = (c, config.height, config.width)
        self.fine = Rescale(4 * c, 0, config.hidden, config.couplings)
        self.coarse = Rescale(8 * c, 0, config.hidden, config.couplings)
        self.mean = nn.Parameter(torch.full(self.shape, 0.5))
        self.log_spread = nn.Parameter(torch.full(self.shape, unbounded(spread)))

    @classmethod
    def create(cls, network: str, shape: tuple[int, int, int]) -> "Glow":
        """Build an untrained flow with the sizes of a preset (weights from the global stream)."""
        size = preset(network)
        return cls(Config(*shape, size.couplings, size.hidden))

    def context(self, n: int) -> Context:
        """Return mean and scale for n images; there are no features."""
        c, h, w = self.shape
        mean, spread = (v.expand(n, c, h, w) for v in (self.mean, bounded(self.log_spread)))
        none = mean.new_zeros(n, 0, h // 2, w // 2), mean.new_zeros(n, 0, h // 4, w // 4)
        return Context(mean, spread, *none)

    def draw(self, z: Tensor) -> Tensor:
        """Map latents (B, C, H, W) to images of the same shape."""
        return self.transform(z, self.context(len(z)))[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute log p(x) of images (B, C, H, W): nats per unit of intensity, shape (B,)."""
        return self.log_density(x, self.context(len(x)))

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, batch: int = 256) -> Tensor:
        """Draw new images, shape (n, C, H, W); image i depends on (seed, i) only."""
        parts = [range(start, min(start + batch, n)) for start in range(0, n, batch)]
        device = self.mean.device
        return torch.cat(
            [
                self.draw(
                    PerImageGenerator(seed, p, device=device).randn(*self.shape).to(self.mean)
                )
                for p in parts
            ]
        )

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, source: str | Path) -> "Glow":
        """Load the flow of a run folder, or of a folder written by `save`.

        Raises:
            InputError: There is none, or its files do not fit each other.
        """
        folder = locate(source, "glow", "model.safetensors")
        config = read_settings(Config, folder / "config.json")
        return load_model(folder / "model.safetensors", lambda: cls(config), "the flow")
