"""Results as JSON values, and as lines for a person."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import escape

__all__ = ["escape", "lines", "plain"]


def plain(value: Any) -> Any:
    """Convert a value to types of JSON; a number that is not finite becomes None.

    >>> plain({"psnr": float("inf"), "out": Path("x.npy")})
    {'psnr': None, 'out': 'x.npy'}
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def lines(result: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Iterate over lines for the entries of a result, without control characters.

    Entries that are None, and empty dicts, are left out.

    >>> list(lines({"images": 5, "ssim": 0.91234}))
    ['images     5', 'ssim       0.9123']
    """
    for key, value in result.items():
        name = escape(key)
        if isinstance(value, dict):
            if value:
                yield f"{indent}{name}"
                yield from lines(value, indent + "  ")
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else escape(value)
            yield f"{indent}{name:<10} {text}"
