"""Actions that go on without the page that started them.

A page may be closed or reloaded while its action lasts. So a `Work` follows the action in a thread
of its own, and any number of pages can watch it, from its present state on.
"""

import threading
from collections.abc import Generator, Iterator
from typing import Any

from markupsafe import Markup

from .wording import EMPTY, finished, follow

__all__ = ["Work"]


class Work:
    """An action that makes a page of its result.

    Args:
        steps: The action; it yields lines about its progress and returns its `Outcome`.

    >>> from unmurk import InputError
    >>> def steps():
    ...     yield "Reading"
    ...     raise InputError("there is no file")
    >>> [str(line) for line, _ in Work(steps()).watch()][-1]
    '<p class="note wrong" role="alert">there is no file</p>'
    """

    def __init__(self, steps: Generator[str, None, Any]) -> None:
        self._changed = threading.Condition()
        self._state: tuple[Markup, Markup] = EMPTY, EMPTY
        self._version, self._ended = 0, False
        threading.Thread(target=self._follow, args=[steps], daemon=True).start()

    def watch(self) -> Iterator[tuple[Markup, Markup]]:
        """Iterate over the line about the action and its result, until it has ended."""
        known = 0
        while True:
            with self._changed:
                while self._version == known and not self._ended:
                    self._changed.wait()
                state, known, ended = self._state, self._version, self._ended
            yield state
            if ended:
                return

    def _follow(self, steps: Generator[str, None, Any]) -> None:
        for line, outcome in follow(steps):
            with self._changed:
                self._state = line, EMPTY if outcome is None else finished(outcome)
                self._version += 1
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
