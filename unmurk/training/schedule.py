r"""Learning rate schedules of groups of parameters.

Within a phase from progress :math:`a` to :math:`b`, with :math:`u = (p - a) / (b - a)`, the
relative rate rises linearly over the first 2 % and then falls as a cosine to 2 % of its peak,

.. math::

    \rho(u) = \text{peak} \cdot \min\Bigl(1, \frac{u + 10^{-3}}{0.02}\Bigr)
        \Bigl(0.02 + 0.98\, \frac{1 + \cos \pi u}{2}\Bigr).
"""

import math
from dataclasses import dataclass

from torch import nn

__all__ = ["LRPhase", "ParamGroup"]


@dataclass(frozen=True)
class LRPhase:
    """A phase of the run in which a group of parameters is trained.

    Attributes:
        start: Fraction of the run at which the rate begins to rise.
        end: Fraction of the run at which the rate has fallen to its minimum.
        peak: Highest rate, relative to that of the settings.
        pretraining: Whether the next phase goes on with what this one trains. Alone it leaves no
            module that is ready for use, and the EMA weights count from its start in both.

    >>> late = ParamGroup([], (LRPhase(0.4, 0.8, peak=0.5),))
    >>> [round(late.rate(progress), 2) for progress in (0.41, 0.6, 0.8, 1.0)]
    [0.5, 0.26, 0.01, 0.01]
    """

    start: float = 0.0
    end: float = 1.0
    peak: float = 1.0
    pretraining: bool = False


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate schedule.

    Attributes:
        parameters: The parameters.
        phases: The phases in which they are trained, in order.

    >>> group = ParamGroup([], (LRPhase(0.5, 1.0, peak=0.4),))
    >>> round(group.rate(0.51), 3), round(group.rate(1.0), 3)
    (0.4, 0.008)
    """

    parameters: list[nn.Parameter]
    phases: tuple[LRPhase, ...] = (LRPhase(),)

    def phase(self, progress: float) -> LRPhase:
        """Return the last phase that has begun, or the first one."""
        return [s for s in self.phases if s.start <= progress or s is self.phases[0]][-1]

    def training_start(self, progress: float) -> float:
        """Return where the phase of a progress began, or the pre-training before it.

        >>> phases = LRPhase(0.1, 0.4, pretraining=True), LRPhase(0.4, 0.6), LRPhase(0.6)
        >>> [ParamGroup([], phases).training_start(progress) for progress in (0.5, 0.9)]
        [0.1, 0.6]
        """
        place = self.phases.index(self.phase(progress))
        while place and self.phases[place - 1].pretraining:
            place -= 1
        return self.phases[place].start

    def rate(self, progress: float) -> float:
        """Return the learning rate relative to that of the settings; see the module."""
        phase = self.phase(progress)
        place = (progress - phase.start) / max(phase.end - phase.start, 1e-9)
        place = min(max(place, 0.0), 1.0)
        warm = min(1.0, (place + 1e-3) / 0.02)
        return phase.peak * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * place)) / 2)
