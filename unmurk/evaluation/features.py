"""Features for metrics of image sets: the packaged digit classifier, and Inception."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, reason

__all__ = [
    "DigitClassifier",
    "FeatureExtractor",
    "check_finite",
    "inception_features",
    "load_digit_classifier",
    "three_channels",
    "unavailable",
]

FeatureExtractor = Callable[[Tensor], Tensor]
"""A map of images (B, C, H, W) in [0, 1] to features (B, d)."""


class DigitClassifier(nn.Module):
    """A small convolutional classifier of digits, whose features serve `frechet` and `kid`.

    No layer depends on the mode or on the batch, so the features of an image depend on that image
    only. The input is gray images (B, 1, 28, 28) or (B, 1, 32, 32) in [0, 1]; 28 is zero-padded to
    32. The features are scaled so that their mean variance over the training digits is 1.

    >>> DigitClassifier().features(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 128])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.penultimate = nn.Linear(48 * 4 * 4, 128)
        self.head = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        """Compute non-negative features, shape (B, 128).

        Args:
            x: Images, shape (B, 1, 28, 28) or (B, 1, 32, 32).

        Raises:
            InputError: The images have another shape.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) not in ((1, 28, 28), (1, 32, 32)):
            raise InputError(
                "the digit classifier needs images (B, 1, 28, 28) or (B, 1, 32, 32), got "
                f"{tuple(x.shape)}: pass features= for other images"
            )
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return F.relu(self.penultimate(x.flatten(1)))

    def logits(self, x: Tensor) -> Tensor:
        """Compute unnormalized log probabilities of the ten digits, shape (B, 10)."""
        return self.head(self.features(x))

    forward = logits


def load_digit_classifier(folder: str | Path | None = None) -> DigitClassifier:
    """Load a digit classifier with frozen weights, in evaluation mode.

    Args:
        folder: Folder with `model.safetensors`; None takes the packaged one.

    Raises:
        InputError: The file is missing, or belongs to another network.

    >>> load_digit_classifier().logits(torch.zeros(1, 1, 28, 28)).shape
    torch.Size([1, 10])
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
    """Return the 2,048 pooled features of the Inception network behind published FIDs.

    Pass them as `frechet(..., features=inception_features())`. They need the extra `inception`:
    torch-fidelity downloads the weights once into torch's hub folder. The protocol of that network
    applies: images are rounded to 8 bits, gray ones are repeated to three channels, and the
    network resizes them to 299 x 299.

    Raises:
        InputError: The package or its weights are missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except (ImportError, RuntimeError, OSError) as error:
        raise unavailable("inception features", error) from error

    def features(x: Tensor) -> Tensor:
        rounded = (three_channels(x, "inception features") * 255).round()
        return net.to(x.device)(rounded.to(torch.uint8))[0]

    return features


def three_channels(x: Tensor, name: str) -> Tensor:
    """Repeat gray images to three channels. Raises InputError for other than 1 or 3.

    >>> three_channels(torch.zeros(2, 1, 4, 4), "lpips").shape
    torch.Size([2, 3, 4, 4])
    """
    if x.shape[1] not in (1, 3):
        raise InputError(f"{name} needs images of 1 or 3 channels, got {x.shape[1]}: convert them")
    return x.expand(-1, 3, -1, -1)


def unavailable(what: str, error: Exception) -> InputError:
    """Build the error for weights that cannot be fetched, or a package that is missing.

    >>> unavailable("lpips", ImportError("no lpips"))
    InputError("lpips: a package is missing (no lpips): pip install 'unmurk[inception]'")
    """
    why = reason(error)
    if isinstance(error, OSError):
        return InputError(f"{what}: no weights ({why}): connect once to fetch them")
    return InputError(f"{what}: a package is missing ({why}): pip install 'unmurk[inception]'")


def check_finite(images: Tensor, what: str) -> None:
    """Raise InputError that names the first image (N, ...) with a value that is not finite.

    >>> check_finite(torch.tensor([[0.0], [float("nan")]]), "samples")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: samples: number 1 has values that are not finite: ...
    """
    fine = images.isfinite().flatten(1).all(1)
    if not fine.all():
        raise InputError(
            f"{what}: number {int(fine.int().argmin())} has values that are not finite: leave it"
            " out, or replace them"
        )
