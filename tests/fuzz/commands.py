"""Run one command of `unmurk` in this process, and judge its end."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from unmurk.cli import main as cli

from .judge import Mishandled, check_message, check_output

__all__ = ["call", "captured", "contents"]

PARTS = (".part", ".partial")


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Everything that any library writes to descriptors 1 and 2; call what is yielded to read."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    room = os.memfd_create("output")
    os.dup2(room, 1)
    os.dup2(room, 2)

    def read() -> str:
        sys.stdout.flush()
        sys.stderr.flush()
        size = os.lseek(room, 0, os.SEEK_END)
        return os.pread(room, min(size, 2**20), 0).decode("utf-8", "replace")

    try:
        yield read
    finally:
        with contextlib.suppress(Exception):  # a case may have closed or replaced them
            sys.stdout.flush()
            sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, room):
            os.close(descriptor)


def call(argv: list[str], *inputs: Path) -> int:
    """Run a command, and raise `Mishandled` unless it ends as it should.

    It ends with 0, or with 2 and one line on stderr. Its inputs are as they were, and no part of
    a file is left behind.

    Args:
        argv: The arguments after the program's name.
        inputs: Files and folders that must not change.
    """
    before = {place: contents(place) for place in inputs}
    with captured() as read:
        code = cli.main(argv)
        text = read()
    check_output(text)
    if code not in (0, 2):
        raise Mishandled(f"exit code {code}: {text.strip()[-200:]!r}")
    if code == 2:
        check_refusal(text)
    for place, known in before.items():
        now = contents(place)
        changed = sorted(name for name in known if now.get(name) != known[name])
        if changed:
            raise Mishandled(f"exit code {code}, and an input changed: {changed[0]}")
    left = sorted(path.name for path in Path().rglob("*") if path.name.endswith(PARTS))
    if left:
        raise Mishandled(f"exit code {code}, and left behind: {left[0]}")
    return code


def check_refusal(text: str) -> None:
    """One line of ours says what is wrong; the lines before it are notes."""
    lines = text.strip("\n").splitlines()
    ours = [line for line in lines if line.startswith("unmurk: ")]
    if len(ours) != 1 or lines[-1] != ours[0]:
        raise Mishandled(f"exit code 2 with {len(ours)} lines that say why: {text[-200:]!r}")
    check_message(ours[0])


def contents(place: Path) -> dict[str, str]:
    """What is in a file or a folder: a hash of each file."""
    files = [place] if place.is_file() else sorted(place.rglob("*")) if place.is_dir() else []
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
