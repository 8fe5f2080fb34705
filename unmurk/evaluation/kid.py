r"""The kernel distance of two image sets, which few images do not bias.

With features f of d numbers, a_i = f(real image i), b_j = f(fake image j) and the kernel

    k(u, v) = (u . v / d + 1)^3

the squared maximum mean discrepancy of the two distributions is estimated without bias by

    KID = mean_{i != i'} k(a_i, a_i') + mean_{j != j'} k(b_j, b_j') - 2 mean_{i, j} k(a_i, b_j)

(Binkowski, Sutherland, Arbel, Gretton 2018, arXiv 1801.01401, section 4). Two sets from one
distribution have KID 0 on average, whatever their sizes, so single values may be negative. Where
the fake images are not independent but come in families, as several restorations of one image do,
the second mean runs over pairs of different families: then each pair is one of independent images,
and the estimate stays without bias.
"""

import torch
from torch import Tensor

from ..errors import InputError
from .metrics import FeatureExtractor, _check_finite, load_digit_classifier

__all__ = ["kid"]


@torch.no_grad()
def kid(
    real: Tensor,
    fake: Tensor,
    features: FeatureExtractor | None = None,
    families: Tensor | None = None,
    batch: int = 500,
) -> float:
    """Kernel distance of two image sets, unbiased; see the module.

    Args:
        real: Images (N, C, H, W), N at least 2, independent of each other and of `fake`.
        fake: Images (M, C, H, W).
        features: Map of (B, C, H, W) in [0, 1] to (B, d); None means the 128 features of the
            shipped digit classifier. `inception_features()` gives the published KID (which
            averages over subsets of 1,000; here all pairs count).
        families: (M,), equal numbers for fake images that depend on each other; None: no two do.
        batch: Images per call of `features`; does not change the result.

    Raises:
        InputError: Fewer than 2 images or families, or shapes that do not fit.
    """
    for name, images in (("real", real), ("fake", fake)):
        if images.ndim != 4 or len(images) < 2:
            raise InputError(
                f"kid needs at least 2 {name} images (N, C, H, W), got {tuple(images.shape)}"
            )
        _check_finite(images, f"kid, {name} images")
    if families is None:
        families = torch.arange(len(fake))
    if families.shape != (len(fake),) or len(families.unique()) < 2:
        raise InputError(
            f"kid needs a family for each of the {len(fake)} fake images, and at least 2 of them;"
            f" got {tuple(families.shape)}"
        )
    features = features or load_digit_classifier().to(real.device).features
    a, b = (
        torch.cat([features(x.float().clamp(0, 1)).flatten(1).double() for x in part.split(batch)])
        for part in (real, fake.to(real.device))
    )
    families = families.to(real.device)
    apart = families[:, None] != families
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    within = _kernel(a, a)[others].mean() + _kernel(b, b)[apart].mean()
    return float(within - 2 * _kernel(a, b).mean())


def _kernel(u: Tensor, v: Tensor) -> Tensor:
    """k(u_i, v_j), (N, M)."""
    return (u @ v.T / u.shape[1] + 1) ** 3
