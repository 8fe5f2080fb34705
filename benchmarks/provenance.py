"""Where figures come from, the code and the hardware that made them; and how they are shown."""

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from unmurk.errors import InputError
from unmurk.io.atomic import write as write_atomically

__all__ = [
    "ROOT",
    "command",
    "commit",
    "cpu",
    "forget_peak",
    "held",
    "machine",
    "markdown",
    "peak",
    "write_json",
]

ROOT = Path(__file__).parent.parent


def command(action: Callable[[], None]) -> Callable[[], int]:
    """A script's action as what gives its exit status: 0, or 2 after one line that says why."""

    @wraps(action)
    def run() -> int:
        try:
            action()
        except InputError as error:
            print(f"{Path(action.__code__.co_filename).name}: {error}", file=sys.stderr)
            return 2
        return 0

    return run


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


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A table; the first line is its head, the first column its labels."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join(
        "| " + " | ".join(map(str, line)) + " |" for line in [lines[0], rule, *lines[1:]]
    )


def forget_peak() -> None:
    """Makes the present memory the peak so far, where the system can (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def held() -> float:
    """Memory in use, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return status("VmRSS")


def peak() -> float:
    """Highest memory in use since `forget_peak`, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return status("VmHWM")


def status(key: str) -> float:
    """A line of /proc/self/status in MiB; elsewhere the peak of the process."""
    file = Path("/proc/self/status")
    if not file.exists():
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    lines = (line.split() for line in file.read_text().splitlines())
    return next(int(words[1]) / 1024 for words in lines if words[0] == key + ":")
