"""method="auto": which solver, with which settings, for an operator and a budget.

The rule, and the measurement behind each line:

    one image, linear A          red-diff with budget / 2 levels: the highest PSNR with a hundred
                                 evaluations (docs/benchmark_solve.md)
    one image, another A         the same: 0.3 to 0.5 dB above dps (hdr, nonlinear blur) at a
                                 tenth of its evaluations; 0.4 dB below it for jpeg
    several images, linear A     a sampler of the posterior if the budget reaches for one (snips,
                                 from 310 evaluations on), else red-diff's preset "spread"
                                 (docs/certification.md)
    several images, another A    daps with as many levels as evaluations
    one image, an ambiguous A    ddiff, two runs (phase retrieval): median 30 dB, red-diff 26; of
                                 other digits 34 and 24 dB; more runs bring no gain that was seen

The budget is a number of network evaluations for one run, none of which takes a gradient.
"""

from dataclasses import dataclass, fields
from typing import Any

from ..errors import InputError
from ..problem import Problem
from .snips import Snips

__all__ = ["Auto"]

RESTARTS = 2  # where local minima are many
LEAST = 10  # evaluations below which no solver here returns more than a guess


@dataclass(frozen=True)
class Auto:
    """What is asked of the choice.

    Raises:
        InputError: The budget is below 10.
    """

    budget: int = 100
    """Network evaluations that a sample may cost, at most; with restarts, each of its runs."""

    def __post_init__(self) -> None:
        if self.budget < LEAST:
            raise InputError(
                f"budget is {self.budget}: at least {LEAST} network evaluations are needed"
            )

    @classmethod
    def read(cls, options: dict[str, Any]) -> "Auto":
        """From options by name. Raises InputError for one that auto does not have."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InputError(f"auto has no option '{unknown[0]}': it takes {', '.join(known)}")
        return cls(**options)

    def choose(self, problem: Problem, samples: int) -> tuple[str, dict[str, Any], int]:
        """A name in `METHODS`, its options, and the number of restarts.

        Args:
            problem: Operator and noise.
            samples: How many images are wanted for each measurement; several: for their spread.
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
