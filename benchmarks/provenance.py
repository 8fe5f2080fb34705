"""Where figures come from: the code and the hardware that made them."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from unmurk.learn.loop import write_atomically

__all__ = ["ROOT", "commit", "cpu", "machine", "write_json"]

ROOT = Path(__file__).parent.parent


def machine() -> dict[str, Any]:
    """The code and the hardware of this process."""
    return {
        "commit": commit(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of this code, "-dirty" if it was changed since; None outside a repository."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu() -> str:
    """The processor's model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
