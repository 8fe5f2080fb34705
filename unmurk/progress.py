"""How far long work is: a bar on a terminal, elsewhere a line every ten seconds.

A command opens `working`. The loops inside it, however deep, say how far they are with `each` or
`Parts`: a loop divides the part of the work in which it runs. So nobody passes progress on, and in
Python, where no command has opened `working`, nothing is shown.

>>> with working("restore"):  # a line such as "restore  25%  12 s left" every ten seconds
...     for file in each(["a.tif", "b.tif"]):
...         tiles = list(each(range(4)))
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from .errors import on_terminal, remark

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["PAUSE", "Parts", "each", "is_line", "line", "working"]

FIRST, PAUSE = 5.0, 10.0  # seconds before the first line, and between lines
LEAST = 0.01  # share from which the time left is estimated
Item = TypeVar("Item")
LINE = re.compile(r"\w+ [ \d]{2}\d%  .*\bs left")


class _Work:
    """The work of a command.

    Attributes:
        span: The part of it that goes on, as shares from 0 to 1.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Progress | None = None
        self.span, self.share = (0.0, 1.0), 0.0
        self.start = time.monotonic()
        self.next = self.start + FIRST
        self.terminal = on_terminal()

    def move(self, share: float) -> None:
        """Show a share, unless more was shown before."""
        if share <= self.share:
            return
        self.share, now = share, time.monotonic()
        if self.terminal:
            self.bar = self.bar or _bar(self.label)
            self.bar.update(self.bar.task_ids[0], completed=share)
        elif now > self.next and share >= LEAST:
            self.next = now + PAUSE
            remark(line(self.label, share, now - self.start))


_current: ContextVar[_Work | None] = ContextVar("work", default=None)


@contextmanager
def working(label: str, shown: bool = True) -> Iterator[None]:
    """Show on standard error how far the work inside is.

    Args:
        label: Its name, one word.
        shown: False shows nothing, as in all processes of a job but one.

    >>> with working("restore", shown=False):
    ...     sum(each([1, 2, 3]))
    6
    """
    if not shown:
        yield
        return
    work = _Work(label)
    token = _current.set(work)
    try:
        yield
    finally:
        _current.reset(token)
        if work.bar is not None:
            work.bar.stop()


def _bar(label: str) -> "Progress":
    """A bar with one task, which has begun."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    bar.add_task(label, total=1.0)
    bar.start()
    return bar


class Parts:
    """The parts of a loop.

    >>> with Parts() as parts:
    ...     for done in (0, 3, 6):
    ...         parts.advance(done, 8, 3)  # parts done to done + 3 of 8 come next
    """

    def __init__(self) -> None:
        self.work = _current.get()
        self.span = (0.0, 1.0) if self.work is None else self.work.span

    def __enter__(self) -> "Parts":
        return self

    def advance(self, done: float, total: float, size: float = 1) -> None:
        """Say that `done` of `total` parts are done, and that `size` of them come next."""
        if self.work is None or total <= 0:
            return
        low, high = self.span
        ends = [low + (high - low) * min(1.0, part / total) for part in (done, done + size)]
        self.work.span = ends[0], ends[1]
        self.work.move(ends[0])

    def __exit__(self, *error: object) -> None:
        if self.work is not None:
            self.work.span = self.span


def each(items: Sequence[Item]) -> Iterator[Item]:
    """Iterate over items, each of which is an equal part of the work.

    >>> list(each("ab"))
    ['a', 'b']
    """
    with Parts() as parts:
        for done, item in enumerate(items):
            parts.advance(done, len(items))
            yield item
        parts.advance(len(items), len(items))


def line(label: str, share: float, seconds: float, text: str = "") -> str:
    """Return a line of progress.

    Args:
        label: The work, one word.
        share: How much of it is done, above 0.
        seconds: How long that took.
        text: What else is known.

    >>> line("restore", 0.25, 4.0), line("learning", 0.5, 9.0, "prior 0.1")
    ('restore  25%  12 s left', 'learning  50%  prior 0.1  9 s left')
    """
    parts = [f"{label} {100 * share:3.0f}%", text, f"{seconds * (1 / share - 1):.0f} s left"]
    return "  ".join(part for part in parts if part)


def is_line(text: str) -> bool:
    """Whether a line on standard error is one of progress.

    >>> is_line("restore  25%  12 s left"), is_line("noise estimated from 1 image: 0.1")
    (True, False)
    """
    return LINE.match(text) is not None
