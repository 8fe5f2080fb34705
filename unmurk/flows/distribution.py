"""The posterior q(x | y) as a distribution of torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..errors import InputError
from .layers import Context, Flow

__all__ = ["FlowDistribution"]

MOMENTS = 16  # draws of `FlowDistribution.stddev`, in antithetic pairs


class FlowDistribution(Distribution):
    r"""The posterior q(x | y) of a batch of measurements, as a distribution of torch.

    `Posterior` returns it when it is called with y and problem. Everything the flow depends on is
    computed once, with gradients unless `torch.no_grad()` is on.

    Args:
        flow: The posterior.
        context: What the flow depends on, for B measurements.
        index: The numbers of the images, for the random streams of `stddev`.

    Attributes:
        batch_shape: (B,).
        event_shape: (C, H, W).

    >>> from unmurk import Posterior, Problem
    >>> posterior = Posterior.create("tiny", (1, 8, 8))
    >>> q = posterior(torch.rand(2, 1, 8, 8), Problem("identity", 0.1))
    >>> q.batch_shape, q.event_shape
    (torch.Size([2]), torch.Size([1, 8, 8]))
    >>> x = q.sample((5,))
    >>> x.shape, q.log_prob(x).shape, q.stddev.shape
    (torch.Size([5, 2, 1, 8, 8]), torch.Size([5, 2]), torch.Size([2, 1, 8, 8]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, flow: Flow, context: Context, index: Sequence[int]) -> None:
        self.flow, self.context, self.index = flow, context, index
        shape = context.mean.shape
        super().__init__(shape[:1], shape[1:], validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw reparametrized samples x(z, y) with z from torch's global random stream.

        Gradients reach the flow and y. `sample` draws the same without gradients. Draws that
        depend on a seed and the image's number alone come from `Posterior.sample`.

        Args:
            sample_shape: Shape of the draws for each measurement.

        Returns:
            Images, shape ``(*sample_shape, B, C, H, W)``.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.randn(shape, dtype=self.context.mean.dtype, device=self.context.mean.device)
        each = z.reshape(-1, *self.context.mean.shape)
        drawn = [self.flow.transform(one, self.context)[0] for one in each]
        return torch.stack(drawn).reshape(shape) if drawn else z

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the exact log density of images.

        Args:
            value: Images x, shape (..., B, C, H, W) or one that broadcasts to it.

        Returns:
            log q(x | y) in nats of density per unit of intensity, shape (..., B).

        Raises:
            InputError: The images have another shape.
        """
        shape = self.context.mean.shape
        try:
            x = value.expand(torch.broadcast_shapes(value.shape, shape))
        except RuntimeError:
            x = value.new_empty(0)
        if x.shape[-4:] != shape:
            raise InputError(
                f"expected images of shape (..., {', '.join(map(str, shape))}), got"
                f" {tuple(value.shape)}: give one image for each measurement"
            )
        each = x.reshape(-1, *shape)
        found = [self.flow.log_density(one, self.context) for one in each]
        return torch.stack(found).reshape(x.shape[:-3]) if found else x.new_empty(x.shape[:-3])

    @property
    def mean(self) -> Tensor:
        """The mean image m(y) of the mean network, shape (B, C, H, W).

        It is the center of the flow, and the estimate that training fits to E[x | y]. The mean of
        the draws differs from it as far as the mean of g(z; y) differs from 0.
        """
        return self.context.mean

    @property
    def stddev(self) -> Tensor:
        """The standard deviation of every pixel, shape (B, C, H, W), from 16 draws.

        The draws are those of `Posterior.mean_std` with seed 0, in the orientation of the
        measurements: eight antithetic pairs (z, -z), one random stream for each image. The value
        is the same at every call.
        """
        return self._deviation()

    @property
    def variance(self) -> Tensor:
        """The square of `stddev`, shape (B, C, H, W)."""
        return self._deviation().square()

    @torch.no_grad()
    def _deviation(self) -> Tensor:
        """Estimate the standard deviation from draws of the per-image streams of seed 0."""
        noise = self.flow.noise(self.index, 0, self.context.mean.device)
        return self.flow.moments(self.context, MOMENTS, noise)[1]
