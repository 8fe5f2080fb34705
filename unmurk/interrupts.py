"""Interrupts of long work: noted when they come, heeded where nothing is half done.

A training run must not end between two changes of its state. So while it runs, Ctrl-C and SIGTERM,
which schedulers send, are only noted (`interruptible`). Everything long that changes no state
calls `heed_interrupt` again and again: the evaluations of a prior's network, the iterations of
conjugate gradients, the chunks of an E-step. There the noted signal becomes a `KeyboardInterrupt`,
seconds after it came. Outside `interruptible` the function does nothing.

Short work that must be done as a whole, such as making a file and noting that it was made, stands
in a function marked `uninterrupted`: the command line delivers a signal when it has returned.

Libraries turn an exception that reaches them into errors of their own, so that an interrupt would
look like a damaged file. So no `errors.InputError` can be made between `deliver_interrupt` and
`forget_interrupt`.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any, NoReturn, TypeVar, cast

__all__ = [
    "deliver_interrupt",
    "forget_interrupt",
    "heed_interrupt",
    "interruptible",
    "is_uninterrupted",
    "repeat_interrupt",
    "uninterrupted",
]

F = TypeVar("F", bound=Callable[..., Any])

_UNINTERRUPTED: set[CodeType] = set()


class _Noted(threading.local):
    """What became of a signal; only the main thread receives signals."""

    came = False
    heeded = False
    delivered = False


_NOTED = _Noted()


def uninterrupted(function: F) -> F:
    """Mark a function that a signal does not interrupt (under the command line).

    Context managers made by `contextlib.contextmanager` are entered and left as a whole without
    this mark; what they enclose can be interrupted.

    >>> @uninterrupted
    ... def both() -> str:
    ...     return "made and noted"
    >>> both()
    'made and noted'
    """
    _UNINTERRUPTED.add(cast(FunctionType, function).__code__)
    return function


def is_uninterrupted(code: CodeType) -> bool:
    """Whether code belongs to a function marked `uninterrupted`.

    >>> @uninterrupted
    ... def marked() -> None: ...
    >>> def other() -> None: ...
    >>> is_uninterrupted(marked.__code__), is_uninterrupted(other.__code__)
    (True, False)
    """
    return code in _UNINTERRUPTED


def deliver_interrupt() -> NoReturn:
    """Raise KeyboardInterrupt for a signal, and remember it until `forget_interrupt`.

    >>> try:
    ...     deliver_interrupt()
    ... except KeyboardInterrupt:
    ...     print("interrupted")
    interrupted
    >>> forget_interrupt()
    """
    _NOTED.delivered = True
    raise KeyboardInterrupt


def repeat_interrupt() -> None:
    """Raise KeyboardInterrupt again if one was delivered and has not ended what it should end.

    >>> repeat_interrupt()
    """
    if _NOTED.delivered:
        raise KeyboardInterrupt


def forget_interrupt() -> None:
    """End what `deliver_interrupt` began: the command has ended.

    >>> forget_interrupt()
    """
    _NOTED.delivered = False


def heed_interrupt() -> None:
    """Raise KeyboardInterrupt, once, if `interruptible` has noted a signal in this thread.

    What follows the exception, such as writing the models so far, is not interrupted again.

    >>> heed_interrupt()
    """
    if _NOTED.came and not _NOTED.heeded:
        _NOTED.heeded = True
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Note Ctrl-C and SIGTERM, and let `heed_interrupt` raise them where work may end.

    A second Ctrl-C raises KeyboardInterrupt at once. A signal that nothing has heeded raises it at
    the end of the context.

    Yields:
        A function that raises KeyboardInterrupt if a signal has come, to be called between steps.

    >>> done = []
    >>> try:
    ...     with interruptible() as check:
    ...         signal.raise_signal(signal.SIGTERM)
    ...         done.append("what was begun")
    ...         check()
    ... except KeyboardInterrupt:
    ...     print("interrupted after", *done)
    interrupted after what was begun
    """

    def check() -> None:
        if _NOTED.came:
            _NOTED.heeded = True
            raise KeyboardInterrupt

    def note(number: int, _frame: FrameType | None) -> None:
        if _NOTED.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        _NOTED.came = True

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _NOTED.came = _NOTED.heeded = False


for _step in ("__enter__", "__exit__"):  # an interrupt in them would leave the generator suspended
    uninterrupted(getattr(type(interruptible()), _step))
