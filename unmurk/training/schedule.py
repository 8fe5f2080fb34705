"""Which parameters are trained when, and at which learning rate."""

import math
from dataclasses import dataclass

from torch import nn

__all__ = ["ParamGroup", "LRPhase"]


@dataclass(frozen=True)
class LRPhase:
    """A part of the run in which a group is trained.

    Attributes:
        start: Share of the run at which the rate begins to rise.
        end: Share at which it has fallen to its least.
        peak: Highest rate, relative to that of the settings.
    """

    start: float = 0.0
    end: float = 1.0
    peak: float = 1.0


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: What is trained.
        spans: When, in order.
    """

    parameters: list[nn.Parameter]
    spans: tuple[LRPhase, ...] = (LRPhase(),)

    def span(self, progress: float) -> LRPhase:
        """The last span begun, or the first."""
        return [s for s in self.spans if s.start <= progress or s is self.spans[0]][-1]

    def rate(self, progress: float) -> float:
        """The relative rate: up to the peak over 2 % of the span, then down as a cosine."""
        span = self.span(progress)
        place = (progress - span.start) / max(span.end - span.start, 1e-9)
        place = min(max(place, 0.0), 1.0)
        warm = min(1.0, (place + 1e-3) / 0.02)
        return span.peak * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * place)) / 2)
