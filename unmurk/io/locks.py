"""One lock per job, so that two jobs never write to the same place.

The lock is held with flock on ``.unmurk-HASH.lock`` beside the output, so the system frees it
whenever the process ends. The file names its holder and is removed at the end of the job.

The processes of one job (RANK and WORLD_SIZE, as torchrun and accelerate launch set them) share
the lock if they run the same command with the same WORLD_SIZE and, under a launcher, belong to the
same launch. Each process also holds a lock of its own RANK.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, remark
from .atomic import NoLocksError, same_file, short, try_lock, unwritable

__all__ = ["holder", "local_rank", "locked", "ranks"]

PATIENCE = 2.0  # seconds to wait for a process of the same job that is between two locks
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")  # they identify a launch

_held: dict[str, int] = {}  # how often this process holds each lock


def ranks() -> tuple[int, int]:
    """Return the number of this process, and the number of processes.

    Raises:
        InputError: RANK and WORLD_SIZE do not fit each other.

    >>> ranks()  # without RANK and WORLD_SIZE
    (0, 1)
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    rank, size = (int(text) if _is_number(text) else -1 for text in texts)
    if not 0 <= rank < size:
        raise InputError(f"RANK={texts[0]} and WORLD_SIZE={texts[1]}: give 0 <= RANK < WORLD_SIZE")
    return rank, size


def local_rank() -> int:
    """Return the number of this process on its machine, which selects its accelerator.

    Raises:
        InputError: LOCAL_RANK is not a number.

    >>> local_rank()  # without LOCAL_RANK
    0
    """
    text = os.environ.get("LOCAL_RANK", "0")
    if not _is_number(text):
        raise InputError(f"LOCAL_RANK={text}: give a number of 0 or more")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


@contextmanager
def locked(path: Path, job: Any = None) -> Iterator[None]:
    """Hold the lock of an output file or folder; a process may take it several times.

    Args:
        path: The output. Its folder must exist.
        job: What the processes of one job have in common, fit for JSON; it identifies the job.

    Raises:
        InputError: Another job holds it.

    >>> with locked(Path("result.npy")):
    ...     holder(Path("result.npy")) == os.getpid()
    True
    """
    real = Path(os.path.realpath(path))
    key = str(real)
    if _held.get(key):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    rank, size = ranks()
    files = [_lock_file(real, "")]
    if size > 1:
        files.append(_lock_file(real, f"-{rank}"))
    token = _token(job, size)
    taken: list[tuple[int, Path]] = []
    try:
        for file in files:
            try:
                taken.append((_acquire(file, path, token, size > 1 and file is files[0]), file))
            except NoLocksError:
                remark(f"unmurk: no locks on this disk for {path}: start no second job there")
        _held[key] = 1
        yield
    finally:
        _held.pop(key, None)
        for fd, file in reversed(taken):
            _release(fd, file)


def holder(path: Path) -> int | None:
    """Return the process that holds the lock of an output; None if no process does.

    Args:
        path: The output.

    >>> holder(Path("unused.npy")) is None
    True
    """
    try:
        fd = os.open(
            _lock_file(Path(os.path.realpath(path)), ""), os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        )
    except OSError:
        return None
    try:
        if try_lock(fd, shared=True):
            return None
        pid = _read(fd).get("pid")
        return pid if type(pid) is int and pid > 1 else None
    except NoLocksError:
        return None
    finally:
        os.close(fd)


def _lock_file(real: Path, suffix: str) -> Path:
    """Return the lock file: beside the output or, if nothing can be written there, in it."""
    name = f".unmurk-{short(real.name)}{suffix}.lock"
    inside = real.is_dir() and not os.access(real.parent, os.W_OK)
    return (real if inside else real.parent) / name


def _token(job: Any, size: int) -> str:
    launch = {name: os.environ.get(name) for name in LAUNCH} if size > 1 else {}
    return hashlib.sha256(json.dumps([job, size, launch], default=str).encode()).hexdigest()


def _acquire(file: Path, path: Path, token: str, shared: bool) -> int:
    """Open and lock the lock file; NoLocksError leaves none behind."""
    patience = time.monotonic() + PATIENCE
    while True:
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            got = _try(fd, token, shared)
            if got and not same_file(fd, file):  # its holder has just removed it
                got = False
            elif got:
                return fd
            elif same_file(fd, file) and not _may_come(fd, token, shared, patience):
                raise InputError(f"{path} is in use: {_holder(fd)}")
        except BaseException as error:
            if isinstance(error, NoLocksError):
                file.unlink(missing_ok=True)
            os.close(fd)
            raise
        os.close(fd)
        time.sleep(0.02)


def _try(fd: int, token: str, shared: bool) -> bool:
    if try_lock(fd):
        _sign(fd, token)
        return try_lock(fd, shared=True) if shared else True
    return shared and try_lock(fd, shared=True) and _read(fd).get("token") == token


def _may_come(fd: int, token: str, shared: bool, patience: float) -> bool:
    """Whether to try again: the holder is writing its name, or is a process of this job."""
    said = _read(fd)
    mine = shared and said.get("token") == token
    return (mine or not said) and time.monotonic() < patience


def _sign(fd: int, token: str) -> None:
    said = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:400],
        "token": token,
    }
    data = json.dumps(said).encode()
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def _read(fd: int) -> dict[str, Any]:
    try:
        said = json.loads(os.pread(fd, 1 << 16, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _holder(fd: int) -> str:
    said = _read(fd)
    who = "process {} on {} since {} ({})".format(
        *(said.get(key, "?") for key in ("pid", "host", "since", "command"))
    )
    return f"{who} writes there: wait for it, stop it, or give another --out"


def _release(fd: int, file: Path) -> None:
    """Release a lock; its last holder removes the file."""
    with contextlib.suppress(OSError):
        if try_lock(fd) and same_file(fd, file):
            file.unlink(missing_ok=True)
    os.close(fd)
