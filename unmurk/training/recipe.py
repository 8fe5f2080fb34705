"""The schedule of the default objective of FlowDiff; `flowdiff` says what its stages do."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..bounds import Real, Whole, check_fields
from ..errors import InputError

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """The schedule of the default objective. Fractions are of the whole run, numbers from 0 to 1.

    Attributes:
        r2r: Fraction at which R2R pre-training ends, of the prior if A = I and the noise is
            Gaussian, otherwise of m, after which the prior begins.
        alpha: Noise added by R2R to images of one Gaussian noise, in units of sigma_y, a number
            from 1e-06 to 1e+06. For A = I it is the least that is added.
        alpha_photons: The same for photon noise, and for noise that differs between channels, a
            number from 1e-06 to 1e+06: m is given 1 / (1 + alpha_photons^2) of the counts.
        e_step: Fraction from which the prior is trained on draws at all levels. For A other than
            the identity the replay buffer is first filled then. Keep it early there: posterior
            means lack variance, and a prior trained on them is too smooth below sigma_y.
        flow: Fraction at which the flow begins, from 0 to 1. None takes 0.8 if A = I and the noise
            is Gaussian, where new draws are made for every batch, and 0.94 otherwise. A flow that
            draws the images itself begins with the E-step.
        hide: Fraction of the observed pixels withheld from m in R2R pre-training, if A is a mask.
        ambient_target: Target of the prior above sigma_y before the E-step, for A = I: "mean", the
            posterior mean D(y, sigma_y); "image", the noisy image itself, unbiased but noisy; or
            "none", to train on the posterior mean at all levels, also below sigma_y, where the
            others train on draws. For masks "image" means the observed pixels, above the level
            `above`; otherwise m(y).
        above: The lowest level for "image" with masks, a number from 0 to 1e+06.
        refresh: Images drawn for each image seen after the first E-step, a number from 0 to 1000;
            for A = I new ones are drawn for every batch, and none are kept.
        buffer: Images kept in the replay buffer, a whole number from 1 to 1e+07, and at most as
            many as fit into 256 MiB (`replay.LIMIT`): all of them up to 128 x 128 pixels, 512 of
            512 x 512. As many at most are kept at half scale. No draws are kept for A = I.
        reverse: Weight of the paper's objective for the flow beside the forward KL, a number from
            0 to 1e+06.
        clean: Fraction of every batch that is clean images, if there are any, from 0 to 0.9.
        r2r_later: Fraction of every batch by which R2R goes on after its pre-training, if A = I
            and the noise is Gaussian, from 0 to 0.9. Without it and without clean images, the
            prior learns from its own results alone, and drifts.
        half: Fraction of every batch that is restorations at half scale, if A blurs and the noise
            is Gaussian, from 0 to 0.9. 0 does without the assumption that the scenes look alike on
            both scales. The rest of the batch, one image at least, is measured ones.

    Raises:
        InputError: A value is out of its bounds, or e_step comes before the end of r2r.

    >>> Recipe(e_step=0.8).e_step
    0.8
    """

    r2r: Annotated[float, Real(0, 1)] = 0.48
    alpha: Annotated[float, Real(1e-6, 1e6)] = 0.4
    alpha_photons: Annotated[float, Real(1e-6, 1e6)] = 0.6
    e_step: Annotated[float, Real(0, 1)] = 0.76
    flow: Annotated[float, Real(0, 1)] | None = None
    hide: Annotated[float, Real(0, 1)] = 0.2
    ambient_target: Literal["mean", "image", "none"] = "mean"
    above: Annotated[float, Real(0, 1e6)] = 0.5
    refresh: Annotated[float, Real(0, 1000)] = 0.05
    buffer: Annotated[int, Whole(1, 10_000_000)] = 8192
    reverse: Annotated[float, Real(0, 1e6)] = 0.0
    clean: Annotated[float, Real(0, 0.9)] = 0.25
    r2r_later: Annotated[float, Real(0, 0.9)] = 0.5
    half: Annotated[float, Real(0, 0.9)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self, {name: f"recipe.{name}" for name in vars(self)})
        targets = ("mean", "image", "none")
        if self.ambient_target not in targets:
            raise InputError(
                f"recipe.ambient_target must be one of {', '.join(targets)}, "
                f"got '{self.ambient_target}'"
            )
        if self.r2r > self.e_step:
            raise InputError(
                f"recipe.e_step is {self.e_step}, before the end of recipe.r2r, {self.r2r}: "
                "give a later e_step, or an earlier r2r"
            )
