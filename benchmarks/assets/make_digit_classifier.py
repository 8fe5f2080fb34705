"""Train the digit classifier whose features define the Frechet distance of digits.

    python benchmarks/assets/make_digit_classifier.py --mnist DIR --out unmurk/assets/classifier

DIR holds the four MNIST files (`train-images-idx3-ubyte.gz`, ...). The network minimizes the cross
entropy on the 60,000 labeled training digits, each shifted by up to two pixels: AdamW, one cycle
of the learning rate, a fixed number of images, no selection. The test digits are read once, at the
end. It takes some minutes on one core.

The weights of the penultimate layer are divided by s, the root mean variance of its features over
the training digits, and those of the head are multiplied by s. The rectifier is homogeneous, so
the logits do not change and the features have mean variance 1.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unmurk.evaluation.metrics import DigitClassifier, frechet
from unmurk.io.images import read_idx

__all__: list[str] = []


@dataclass(frozen=True)
class Options:
    """Train the digit classifier."""

    mnist: Path
    """Folder of the MNIST files."""
    out: Path
    """Folder to write to."""
    epochs: int = 8
    """Passes over the training digits."""
    batch: int = 128
    """Digits in a step."""
    rate: float = 2e-3
    """Highest learning rate."""
    seed: int = 0
    """Seed of weights, batches and shifts."""


def read_digits(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in [0, 1], zero-padded, and labels (N,)."""
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz").copy())
    return F.pad(images[:, None].float() / 255, (2, 2, 2, 2)), labels.long()


def shift(images: Tensor, by: int = 2) -> Tensor:
    """Shift every image by a random number of pixels, at most `by` along each axis."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (by,) * 4)[:, 0]
    down, right = torch.randint(0, 2 * by + 1, (2, batch))
    rows = (down[:, None] + torch.arange(height))[:, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, :]
    return padded[torch.arange(batch)[:, None, None], rows, columns][:, None]


def train(images: Tensor, labels: Tensor, how: Options) -> DigitClassifier:
    """Minimize the cross entropy."""
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.01)
    steps = how.epochs * (len(images) // how.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=steps)
    count = steps // how.epochs * how.batch
    for epoch in range(how.epochs):
        total = 0.0
        for batch in torch.randperm(len(images))[:count].view(-1, how.batch):
            loss = F.cross_entropy(model(shift(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: cross entropy {total * how.epochs / steps:.4f}", flush=True)
    return model.eval().requires_grad_(False)


def rescale(model: DigitClassifier, images: Tensor) -> None:
    """Scale the features to mean variance 1 over the images; the logits do not change."""
    features = torch.cat([model.features(part) for part in images.split(1000)])
    scale = features.var(dim=0).mean().sqrt()
    model.penultimate.weight /= scale
    model.penultimate.bias /= scale
    model.head.weight *= scale


def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """The fraction of digits that the model reads correctly."""
    guess = torch.cat([model(part).argmax(dim=1) for part in images.split(1000)])
    return (guess == labels).double().mean().item()


def reference_values(model: DigitClassifier, images: Tensor) -> dict[str, float]:
    """Frechet distances of the test digits that show what the scale means."""

    def distance(other: Tensor, real: Tensor = images) -> float:
        return round(frechet(real, other, model.features), 3)

    noise = torch.randn(images.shape)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1)
    return {
        "two halves (5000 each)": distance(images[1::2], images[::2]),
        "noise 0.05": distance(images + 0.05 * noise),
        "noise 0.3": distance(images + 0.3 * noise),
        "3 x 3 mean": distance(blurred),
    }


def main() -> None:
    """Train, rescale, score and save the classifier."""
    how = tyro.cli(Options)
    torch.manual_seed(how.seed)
    start = time.monotonic()
    images, labels = read_digits(how.mnist, "train")
    model = train(images, labels, how)
    rescale(model, images)
    seconds = time.monotonic() - start

    test, test_labels = read_digits(how.mnist, "t10k")
    config = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": 128,
        "data": "MNIST, 60,000 training digits, moved by up to 2 pixels",
        "epochs": how.epochs,
        "batch": how.batch,
        "rate": how.rate,
        "seed": how.seed,
        "torch": torch.__version__,
        "train_accuracy": round(accuracy(model, images, labels), 5),
        "test_accuracy": round(accuracy(model, test, test_labels), 5),
        "frechet_to_test_digits": reference_values(model, test),
    }
    how.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), how.out / "model.safetensors")
    (how.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(config, indent=2), f"\n{seconds:.0f} s of training")


if __name__ == "__main__":
    main()
