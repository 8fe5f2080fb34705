r"""Images at half scale: what a blurred set knows of sharp images.

A blur removes what is finer than itself from every measurement, and flips and turns do not bring
it back: nothing on one scale tells what was there. But many scenes look alike on several scales.
So a restoration :math:`f(y)` that is reduced by a factor of two, where little is left of the blur,
stands for a sharp image, and its measurement is simulated:

.. math::

    x_2 = S f(y), \qquad y_2 = A x_2 + n, \qquad \mathcal L = E\, \lVert f(y_2) - x_2 \rVert^2,

without a gradient through :math:`x_2` (scale-equivariant imaging: Scanvic, Davies, Abry and
Tachella, 2023, arXiv 2312.11232). Here f is the Wiener solution of a Gaussian prior that is fitted
to the measurements, S the mean of 2 x 2 pixels, and the images :math:`x_2` join the batches of the
mean network, the flow and the prior. A reduced image has a quarter of the pixels; it is continued
by its mirror images. The prior sees them at the low noise levels alone, where fine detail counts:
at the high ones it would learn scenes that are half as large, and mirrored.

This assumes that the set looks alike on both scales, as photographs do. Where all objects have one
size, as digits have, what is learned from is half as large as what is seen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rng import integers

__all__ = ["continued", "detailed", "halve"]

DETAIL = 0.3  # noise level above which little is seen of fine detail


def continued(x: Tensor, height: int, width: int, noise: torch.Generator) -> Tensor:
    """Continue images by their mirror images, and cut a part of another size out at random.

    Args:
        x: Images (B, C, h, w).
        height: Height of the part.
        width: Width of the part.
        noise: Generator on the CPU: the position of each part, one for all channels.

    Returns:
        Images (B, C, height, width).

    >>> x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    >>> continued(x, 1, 5, torch.Generator().manual_seed(3)).tolist()  # of 0 1 1 0 0 1 1 0 ...
    [[[[0.0, 1.0, 1.0, 0.0, 0.0]]]]
    """
    rows = _places(len(x), x.shape[-2], height, noise).to(x.device)
    columns = _places(len(x), x.shape[-1], width, noise).to(x.device)
    images = torch.arange(len(x), device=x.device)[:, None, None]
    found = x.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]]
    return found.movedim(-1, 1)


def detailed(x: Tensor, half: Tensor, sigma: Tensor) -> Tensor:
    """Put images at half scale in place of the first ones, at the noise levels of fine detail.

    Args:
        x: Images (B, C, H, W).
        half: Images at half scale (N, C, H, W), N at most B.
        sigma: The noise levels that a prior sees the images at, (B,) or more.

    Returns:
        Images (B, C, H, W): those at half scale at levels below `DETAIL`.

    >>> x, half = torch.zeros(3, 1, 1, 1), torch.ones(2, 1, 1, 1)
    >>> detailed(x, half, torch.tensor([0.1, 0.5, 0.1])).flatten()
    tensor([1., 0., 0.])
    """
    low = (sigma[: len(half)] < DETAIL).view(-1, 1, 1, 1)
    return torch.cat([torch.where(low, half, x[: len(half)]), x[len(half) :]])


def halve(x: Tensor) -> Tensor:
    """Reduce images by a factor of two, by means of 2 x 2 pixels.

    Args:
        x: Images (B, C, H, W), H and W at least 2. An odd last row or column is left out.

    Returns:
        Images (B, C, H // 2, W // 2).

    >>> halve(torch.arange(8.0).view(1, 1, 2, 4)).tolist()
    [[[[2.5, 4.5]]]]
    """
    return F.avg_pool2d(x, 2)


def _places(count: int, size: int, wanted: int, noise: torch.Generator) -> Tensor:
    """Return positions (count, wanted) in the row 0 ... size - 1 size - 1 ... 0 0 ..., from a
    random one on."""
    first = integers(2 * size, (count, 1), noise)
    place = (first + torch.arange(wanted)) % (2 * size)
    return torch.minimum(place, 2 * size - 1 - place)
