"""Training settings that every method shares."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..bounds import SEED, Real, Whole

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Training settings that every method shares.

    Attributes:
        network: Preset of the networks: tiny, small or base.
        kimg: Budget in thousands of images seen, a number from 0.001 to 1e+07.
        batch: Images in a step, a whole number from 2 to 65536.
        rate: Peak learning rate, a number from 1e-12 to 10. The rate of every group rises to it
            and falls again.
        average: Half-life of the EMA weights in kimg, a number from 0 to 1e+07. It is at most 5 %
            of the images that a group has been trained on.
        seed: Seed of weights, batches and noise, a whole number from 0 to 9223372036854775807.
        precision: Precision of the networks: fp32, bf16, or auto, which takes whichever a probe of
            one second finds faster.
        compile: Whether `torch.compile` is applied to the prior's network.
        crop: Side in pixels of random crops of the images, a whole number from 0 to 65536; 0:
            whole images. None takes crops where an image has a side above 96 pixels, of 64 pixels
            or, if an image is smaller than that, of fewer.
        augment: Whether the crops are flipped and turned by quarter turns. None: if the operator
            allows it.

    >>> from unmurk.bounds import check_fields
    >>> settings = Settings(kimg=10, batch=8)
    >>> check_fields(settings)
    >>> check_fields(Settings(rate=0))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: rate must be a number from 1e-12 to 10, got 0
    """

    network: str = "tiny"
    kimg: Annotated[float, Real(0.001, 1e7)] = 100.0
    batch: Annotated[int, Whole(2, 65536)] = 32
    rate: Annotated[float, Real(1e-12, 10)] = 5e-3
    average: Annotated[float, Real(0, 1e7)] = 20.0
    seed: Annotated[int, SEED] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    crop: Annotated[int, Whole(0, 65536)] | None = None
    augment: bool | None = None
