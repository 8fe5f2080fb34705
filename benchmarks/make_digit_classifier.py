"""Train the digit classifier whose features the Frechet distance of digits is measured with.

    python benchmarks/make_digit_classifier.py --mnist DIR --out unmurk/assets/classifier

DIR holds the four MNIST files (`train-images-idx3-ubyte.gz`, ...). The network minimises the cross
entropy on the 60,000 labelled training digits, moved by up to two pixels;
AdamW, one cycle of the learning rate, a fixed number of images, no selection. The test digits are
read once, at the end. Some minutes on one core.

The penultimate layer's weights are divided by s, the root mean variance of its features over the
training digits, and the head's multiplied by s: the rectifier is homogeneous, so the logits stay
and the features come in a unit of their own (mean variance 1).
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unmurk.evaluation.metrics import DigitClassifier, frechet

__all__: list[str] = []


def read_idx(path: Path) -> Tensor:
    """An idx.gz file of bytes as a uint8 tensor."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4).tolist()
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape).copy())


def read_digits(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in [0, 1], zero-padded, and labels (N,)."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None].float() / 255
    return F.pad(images, (2, 2, 2, 2)), read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()


def moved(images: Tensor, by: int = 2) -> Tensor:
    """Every image moved by its own whole number of pixels, at most `by` along each axis."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (by,) * 4)[:, 0]
    down, right = torch.randint(0, 2 * by + 1, (2, batch))
    rows = (down[:, None] + torch.arange(height))[:, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, :]
    return padded[torch.arange(batch)[:, None, None], rows, columns][:, None]


def train(images: Tensor, labels: Tensor, epochs: int, batch: int, rate: float) -> DigitClassifier:
    model = DigitClassifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images))[: steps // epochs * batch].view(-1, batch):
            loss = F.cross_entropy(model(moved(images[rows])), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: cross entropy {total * epochs / steps:.4f}", flush=True)
    return model.eval().requires_grad_(False)


def rescale(model: DigitClassifier, images: Tensor) -> None:
    """Bring the features to mean variance 1 over the images; the logits stay."""
    features = torch.cat([model.features(part) for part in images.split(1000)])
    scale = features.var(dim=0).mean().sqrt()
    model.penultimate.weight /= scale
    model.penultimate.bias /= scale
    model.head.weight *= scale


def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    guess = torch.cat([model(part).argmax(dim=1) for part in images.split(1000)])
    return (guess == labels).double().mean().item()


def reference_values(model: DigitClassifier, images: Tensor) -> dict[str, float]:
    """Frechet distances of the test digits that tell how to read the scale."""

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True, help="folder of the MNIST files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    start = time.monotonic()
    images, labels = read_digits(options.mnist, "train")
    model = train(images, labels, options.epochs, options.batch, options.rate)
    rescale(model, images)
    seconds = time.monotonic() - start

    test, test_labels = read_digits(options.mnist, "t10k")
    config = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": 128,
        "data": "MNIST, 60,000 training digits, moved by up to 2 pixels",
        "epochs": options.epochs,
        "batch": options.batch,
        "rate": options.rate,
        "seed": options.seed,
        "torch": torch.__version__,
        "train_accuracy": round(accuracy(model, images, labels), 5),
        "test_accuracy": round(accuracy(model, test, test_labels), 5),
        "frechet_to_test_digits": reference_values(model, test),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out / "model.safetensors")
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(config, indent=2), f"\n{seconds:.0f} s of training")


if __name__ == "__main__":
    main()
