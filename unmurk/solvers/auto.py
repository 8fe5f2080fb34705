"""The method "auto": select a solver and its settings for an operator and a budget.

The rule, and the measurement behind each line:

============================  ===================================================================
one image, linear A           red-diff with budget / 2 levels: the highest PSNR with a hundred
                              evaluations (docs/results/solve.md)
one image, another A          the same: 0.3 to 0.5 dB above dps (hdr, nonlinear blur) at a tenth of
                              its evaluations; 0.4 dB below it for jpeg
several images, linear A      a posterior sampler if the budget suffices for one (snips, from 310
                              evaluations on), else red-diff's preset "spread"
                              (docs/results/certification.md)
several images, another A     daps with as many levels as evaluations
one image, an ambiguous A     ddiff, two runs (phase retrieval): median 30 dB, red-diff 26; on
                              other digits 34 and 24 dB; more runs show no gain
============================  ===================================================================

The budget is a number of network evaluations for one run, none of which takes a gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from ..bounds import Whole, check_fields
from ..errors import InputError
from ..problem import Problem
from .snips import Snips

__all__ = ["Auto"]

RESTARTS = 2  # where local minima are frequent


@dataclass(frozen=True)
class Auto:
    """The rule that selects a solver.

    Raises:
        InputError: The budget is out of its bounds.

    >>> Auto(budget=60).choose(Problem("blur:gaussian,sigma=1", 0.05), samples=1)
    ('red-diff', {'steps': 30}, 1)
    """

    budget: Annotated[int, Whole(10, 1_000_000)] = 100
    """Network evaluations that a sample may cost, at most; with restarts, each of its runs. With
    fewer than 10 no solver returns more than a guess."""

    candidates: ClassVar[tuple[str, ...]] = ("red-diff", "snips", "daps", "ddiff")
    """Names of the solvers among which the rule selects."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "Auto":
        """Read options by name. Raises InputError for one that auto does not have."""
        known = [option.name for option in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"auto has no option '{unknown[0]}': it takes {', '.join(known)}")
        return cls(**options)

    def choose(self, problem: Problem, samples: int) -> tuple[str, dict[str, Any], int]:
        """Return a name in `METHODS`, its options, and the number of restarts.

        Args:
            problem: Operator and noise.
            samples: Number of images for each measurement; several are wanted for their spread.
        """
        return *self._solver(problem, samples), RESTARTS if problem.operator.ambiguous else 1

    def _solver(self, problem: Problem, samples: int) -> tuple[str, dict[str, Any]]:
        if samples == 1 and problem.operator.ambiguous:
            return "ddiff", {"steps": self.budget}
        if samples == 1:
            return "red-diff", {"steps": self.budget // 2}
        if not problem.linear:
            return "daps", {"steps": self.budget}
        if self.budget >= Snips.steps + Snips.final:
            return "snips", {"steps": self.budget - Snips.final}
        return "red-diff", {"preset": "spread", "steps": self.budget // 2}
