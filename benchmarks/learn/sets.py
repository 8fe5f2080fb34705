"""Image sets of the comparison of learning methods, their problems, and downstream tasks.

A folder DIR holds the original files; the files of a set that does not run may be absent:

    DIR/mnist/train-images-idx3-ubyte.gz     60,000 digits 28 x 28, and
    DIR/mnist/t10k-images-idx3-ubyte.gz      10,000 for testing, as MNIST is published
    DIR/cifar10/cifar10_dogs.npz             arrays train_x (5000, 32, 32, 3) and test_x (1000, 32,
                                             32, 3), bytes: class 5 of CIFAR-10
                                             (https://www.cs.toronto.edu/~kriz/cifar.html)
    DIR/microscopy/dsb2018_patches64.npz     arrays train (N, 64, 64, 1) and val (M, 64, 64, 1),
                                             bytes: fluorescence images of the 2018 Data Science
                                             Bowl (BBBC038, https://bbbc.broadinstitute.org), each
                                             stretched to its percentiles 0.5 and 99.9 and cut into
                                             patches; `val` and `train` share no image

The test images are shuffled, in the same way for every seed (the first half of MNIST's is easier
than the second), and split into three parts: the `held` images are restored; the clean `reference`
is compared with samples and has no other use; posterior samples are drawn for the y of the
`others`. So no distance compares an image with a restoration of itself.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError
from unmurk.io.images import read_idx
from unmurk.problem import Problem
from unmurk.rng import generator

__all__ = ["SETS", "TEST", "Images", "ImageSet", "SetName", "downstream_tasks", "load", "measure"]

SetName = Literal["digits", "dogs-blur", "dogs-masks", "nuclei"]
TEST = 60_000
"""Number of the first test image; noise and masks depend on (seed, number)."""
SPLIT = 1  # path of the stream that shuffles the test images


@dataclass(frozen=True)
class ImageSet:
    """Images and the problem of their measurements.

    Attributes:
        title: Description.
        shape: (C, H, W) of an image.
        operator: The operator A, as text.
        noise: Standard deviation of the noise of y.
        files: Path below DIR of the training and of the test images, and the array of each (None:
            a file in idx format).
        license: License of the images.
        shown: Whether the documentation may show pictures of them.
    """

    title: str
    shape: tuple[int, int, int]
    operator: str
    noise: float
    files: tuple[tuple[str, str | None], tuple[str, str | None]]
    license: str
    shown: bool

    @property
    def problem(self) -> Problem:
        """The problem of y."""
        return Problem(self.operator, self.noise)


_DOGS: Any = {
    "shape": (3, 32, 32),
    "noise": 0.02,
    "files": (("cifar10/cifar10_dogs.npz", "train_x"), ("cifar10/cifar10_dogs.npz", "test_x")),
    "license": "CIFAR-10 states no license",
    "shown": False,
}
SETS: dict[SetName, ImageSet] = {
    "digits": ImageSet(
        "MNIST digits, zero-padded to 32 x 32",
        *((1, 32, 32), "identity", 0.3),
        (("mnist/train-images-idx3-ubyte.gz", None), ("mnist/t10k-images-idx3-ubyte.gz", None)),
        *("MNIST: CC BY-SA 3.0", True),
    ),
    "dogs-blur": ImageSet("CIFAR-10 dogs, blurred", operator="blur:gaussian,sigma=1.5", **_DOGS),
    "dogs-masks": ImageSet(
        "CIFAR-10 dogs, 60 % of the pixels hidden, different in each image",
        operator="inpaint:random,keep=0.4",
        **_DOGS,
    ),
    "nuclei": ImageSet(
        "cell nuclei in fluorescence",
        *((1, 64, 64), "identity", 0.2),
        (
            ("microscopy/dsb2018_patches64.npz", "train"),
            ("microscopy/dsb2018_patches64.npz", "val"),
        ),
        *("DSB 2018 / BBBC038: CC0", True),
    ),
}
assert tuple(SETS) == get_args(SetName)


def downstream_tasks(name: SetName) -> dict[str, Problem]:
    """Problems on which the priors of a set are used without learning from them.

    They are those of the table of FlowDiff (arXiv 2407.11162).
    """
    hole = SETS[name].shape[-1] // 3
    return {
        "denoise": Problem("identity", 0.2),
        "deblur": Problem("blur:gaussian,sigma=1.5", 0.05),
        "inpaint": Problem(f"inpaint:box,size={hole}", 0.05),
        "denoise + deblur": Problem("blur:gaussian,sigma=1.5", 0.2),
    }


@dataclass(frozen=True)
class Images:
    """Clean images (N, C, H, W) in [0, 1]; the last three are parts of the test images."""

    train: Tensor
    held: Tensor
    reference: Tensor
    others: Tensor


def load(name: SetName, data: Path, train: int, parts: tuple[int, int, int]) -> Images:
    """Load the images of a set.

    Args:
        name: The set.
        data: The folder described above.
        train: Number of training images, the first of the file.
        parts: Numbers of the held images, of the reference, and of the others.

    Raises:
        InputError: A file is absent, malformed, or holds too few images.
    """
    training, test = (_read(name, data / path, key) for path, key in SETS[name].files)
    if len(training) < train or len(test) < sum(parts):
        raise InputError(
            f"{data} holds {len(training)} training and {len(test)} test images of {name}: "
            f"{train} and {sum(parts)} are needed"
        )
    test = test[torch.randperm(len(test), generator=generator(0, SPLIT))][: sum(parts)]
    return Images(_images(training[:train]), *map(_images, test.split(parts)))


def _read(name: SetName, file: Path, key: str | None) -> Tensor:
    """Bytes (N, H, W) or (N, H, W, C)."""
    c, h, w = SETS[name].shape
    form = "28 x 28 digits in gzipped idx" if key is None else f"bytes '{key}' (N, {h}, {w}, {c})"
    try:
        if key is None:
            array = read_idx(file)
        else:
            with np.load(file, allow_pickle=False) as arrays:
                array = arrays[key]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{name} needs {file} with {form}: see benchmarks/learn/sets.py"
        ) from error
    shape = (28, 28) if key is None else (h, w, c)
    if array.dtype != np.uint8 or array.shape[1:] != shape:
        raise InputError(
            f"{name} needs {file} with {form}, got {array.dtype} {array.shape}: see "
            "benchmarks/learn/sets.py"
        )
    return torch.from_numpy(array.copy())


def _images(array: Tensor) -> Tensor:
    """Bytes (N, 28, 28), zero-padded, or (N, H, W, C) as images (N, C, H, W)."""
    if array.ndim == 3:
        return F.pad(array[:, None].float() / 255, (2, 2, 2, 2))
    return array.permute(0, 3, 1, 2).float() / 255


def measure(problem: Problem, x: Tensor, seed: int, first: int) -> Tensor:
    """Measurements y of images with the numbers first, first + 1, ..."""
    parts, number = [], first
    for part in x.split(1000):  # there is a generator of 5 kB for every image
        parts.append(problem.simulate(part, seed, range(number, number + len(part))))
        number += len(part)
    return torch.cat(parts)
