"""The verdict on a restoration, for the page of the app.

`unmurk.evaluation.verdict` judges draws of a posterior. Here a few images of the result go to it:
whole ones, or of images that are only noisy the part that varies most.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...evaluation.verdict import Verdict, examine
from ...flows.posterior import Posterior
from ...tiling import posterior_for
from ..commands.restoring import Models
from ..data import place
from ..report import Judgement, Section, Text
from .pictures import busiest
from .wording import in_app

if TYPE_CHECKING:
    from ...problem import Problem
    from .pages import Example

__all__ = ["section_of", "section_on"]

SIDE = 256  # pixels of a part of an image
MOST = 2**18  # pixels of a whole image
IMAGES = 32
TITLE = "Can this be trusted?"
NO_VERDICT = Text(
    TITLE, "There is no verdict: the images are too large, or pixels of all of them are missing."
)


def section_on(run: str, examples: Sequence["Example"], problem: "Problem") -> Section:
    """Return the section with the verdict on images that the posterior of a run has restored.

    Args:
        run: The run folder, or the name of a model in the package.
        examples: Images of the result.
        problem: How they were measured.
    """
    if not examples:
        return NO_VERDICT
    model = Models(Posterior.load, run).of(examples[0].x.shape[0])
    if problem.operator.spec == "identity" and examples[0].y.shape != model.shape:
        side = min([SIDE, *(min(one.y.shape[-2:]) for one in examples)])
        examples = [_part(one, side) for one in examples]
    first = examples[0]
    same = [one for one in examples if one.y.shape == first.y.shape == one.x.shape][:IMAGES]
    finite = [one for one in same if bool(one.y.isfinite().all())]
    if not finite or first.x[0].numel() > MOST:
        return NO_VERDICT
    bars = getattr(model, "error_bars", None)
    y = place(torch.stack([one.y for one in finite]))[0]
    verdict = examine(
        posterior_for(model, first.x.shape),
        y,
        problem,
        [one.number for one in finite],
        calibrated=bars is not None and bars.trusted,
    )
    return section_of(verdict)


def _part(one: "Example", side: int) -> "Example":
    row, column = busiest(one.y.nan_to_num(0.0), side)
    y, x = (image[:, row : row + side, column : column + side] for image in (one.y, one.x))
    return replace(one, y=y, x=x)


def section_of(verdict: Verdict) -> Section:
    """Return the section of a page that shows a verdict."""
    sentence, advice = in_app(verdict.sentence), in_app(verdict.advice)
    return Judgement(TITLE, replace(verdict, sentence=sentence, advice=advice))
