"""Local operators: forward models in which a measured pixel depends on pixels near it only."""

from collections.abc import Sequence

from torch import Tensor

from .base import Operator
from .compose import masked
from .crops import Crop

__all__ = ["Local"]


class Local(Operator):
    """Base class of local operators. A subclass also defines `_crop`; see `Operator.on_crops`."""

    def on_crops(
        self,
        crops: Sequence[Crop],
        side: int | tuple[int, int],
        hidden: Tensor | None = None,
        channels: int | None = None,
    ) -> Operator:
        """Return the operator of a batch of crops; see `Operator.on_crops`."""
        window = self._window(crops, side, channels)
        operator, after = self._crop(window)
        return masked(operator, after.measured(hidden), channels, window.size)
