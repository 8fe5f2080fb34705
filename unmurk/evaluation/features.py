"""Features of images for scores of whole sets: the shipped digit classifier, and Inception."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

__all__ = [
    "DigitClassifier",
    "FeatureExtractor",
    "absent",
    "inception_features",
    "load_digit_classifier",
    "three_channels",
]

FeatureExtractor = Callable[[Tensor], Tensor]


class DigitClassifier(nn.Module):
    """A small convolutional network that reads digits; its features serve `frechet`.

    No layer depends on the mode or on the batch: an image's features are its own. Input: grey
    images (B, 1, 28, 28) or (B, 1, 32, 32) in [0, 1]; 28 is zero-padded to 32. The features are
    scaled so that their mean variance over the training digits is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.penultimate = nn.Linear(48 * 4 * 4, 128)
        self.head = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        """(B, 128) non-negative features; InputError for images of another shape."""
        if x.ndim != 4 or tuple(x.shape[1:]) not in ((1, 28, 28), (1, 32, 32)):
            raise InputError(
                "the digit classifier reads images (B, 1, 28, 28) or (B, 1, 32, 32), got "
                f"{tuple(x.shape)}; pass features= for other images"
            )
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return F.relu(self.penultimate(x.flatten(1)))

    def logits(self, x: Tensor) -> Tensor:
        """(B, 10) unnormalised log probabilities of the digits."""
        return self.head(self.features(x))

    forward = logits


def load_digit_classifier(folder: str | Path | None = None) -> DigitClassifier:
    """A digit classifier with frozen weights, in evaluation mode.

    Args:
        folder: Folder with `model.safetensors`; None means the one shipped with the package.
            InputError if it is missing or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder) if folder else Path(__file__).parents[1] / "assets" / "classifier"
    model = DigitClassifier()
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"no digit classifier in {folder}: model.safetensors is missing or of another network"
        ) from error
    return model.eval().requires_grad_(False)


def inception_features() -> FeatureExtractor:
    """The 2048 pooled features of the Inception network that published FIDs are made with.

    Pass it as `frechet(..., features=inception_features())`. Needs the extra `inception`, whose
    torch-fidelity downloads the weights once into torch's hub folder. The protocol of that network
    is kept: images are rounded to 8 bits, grey ones repeated to three channels, and resized to
    299 x 299 inside.

    Raises:
        InputError: The package or its weights are absent.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except (ImportError, RuntimeError, OSError) as error:
        raise absent("inception features", error) from error

    def features(x: Tensor) -> Tensor:
        rounded = (three_channels(x, "inception features") * 255).round()
        return net.to(x.device)(rounded.to(torch.uint8))[0]

    return features


def three_channels(x: Tensor, name: str) -> Tensor:
    """Grey images repeated to three channels; InputError for other than 1 or 3."""
    if x.shape[1] not in (1, 3):
        raise InputError(f"{name} reads images of 1 or 3 channels, got {x.shape[1]}")
    return x.expand(-1, 3, -1, -1)


def absent(what: str, error: Exception) -> InputError:
    """Of weights that cannot be fetched (OSError), or a package that is absent or does not fit."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError):
        return InputError(f"{what}: no weights ({reason}); connect once to fetch them")
    return InputError(f"{what}: a package is absent ({reason}); pip install 'unmurk[inception]'")
