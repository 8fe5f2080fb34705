"""What counts as mishandled: messages, output and numbers."""

import re
from typing import Any

import torch

LONGEST = 1500  # characters of a message
LARGEST = 1e6  # of a number that comes of images in [0, 1]

FOREIGN = re.compile(
    r"Traceback|\w+Warning\b|^TIFF|libtiff|<?tifffile|TiffFile|TiffPage|libpng|Corrupt JPEG"
    r"|Premature end of JPEG|\.py:\d+|OMP:|oneDNN|MKL|numpy\.|torch\.|diffusers\."
)


class Mishandled(Exception):
    """What a case raises when the code under test returned, but wrongly."""


def check_message(text: str) -> None:
    """A message is one printable line that says something."""
    if len(text.splitlines()) != 1 or not text.strip():
        raise Mishandled(f"a message of {len(text.splitlines())} lines: {text[:200]!r}")
    odd = [c for c in text if not c.isprintable()]
    if odd:
        raise Mishandled(f"a message with {odd[0]!r} in it: {text[:200]!r}")
    if len(text) > LONGEST:
        raise Mishandled(f"a message of {len(text)} characters: {text[:200]!r}")


def check_output(text: str) -> None:
    """Lines that were printed are ours, and printable."""
    for line in text.splitlines():
        if FOREIGN.search(line):
            raise Mishandled(f"printed: {line[:200]!r}")
        if any(not c.isprintable() for c in line):
            raise Mishandled(f"printed unprintable characters: {line[:200]!r}")


def check_quiet(text: str) -> None:
    """Nothing was printed."""
    if text.strip():
        raise Mishandled(f"printed: {text.strip().splitlines()[0][:200]!r}")


def check_numbers(name: str, value: Any, largest: float = LARGEST) -> None:
    """A tensor is finite and within bounds."""
    value = torch.as_tensor(value)
    if value.is_complex():
        value = torch.view_as_real(value)
    if not bool(value.isfinite().all()):
        raise Mishandled(f"{name} is not finite")
    if value.numel() and float(value.abs().max()) > largest:
        raise Mishandled(f"{name} has values up to {float(value.abs().max()):.3g}")
