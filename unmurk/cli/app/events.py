"""The stream of events of a page, which stays open between two actions of its user.

gradio (6.31) ends the stream when no event of the page is pending. A page that asks for its next
event at that moment takes the stream for open, and waits for the answer for ever. So the stream of
a browser goes on, on the same connection, when the page asks again. After a minute without a
question it ends as gradio would have ended it: a browser opens six connections to a place at most.
"""

import asyncio
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from .guard import App, Receive, Scope, Send

__all__ = ["Events"]

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
PAUSE = 60.0  # seconds without a question after which a stream ends
PAGES = 1000  # pages that are remembered
HASH = re.compile(rb'"session_hash":\s*"(\w+)"')
COMPLETED = re.compile(rb'"msg":\s*"process_completed"')  # in a string its quotes are escaped
CLOSED = re.compile(rb'"msg":\s*"close_stream"')


@dataclass
class _Page:
    """A page: how many events it has asked for that are not completed, and whether it asks."""

    pending: int = 0
    asks: asyncio.Event = field(default_factory=asyncio.Event)


class Events:
    """ASGI middleware around gradio; see the module.

    Args:
        app: The app of gradio.
        pause: Seconds without a question after which a stream ends.
    """

    def __init__(self, app: App, pause: float = PAUSE) -> None:
        self.app, self.pause = app, pause
        self.pages: dict[str, _Page] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path")
        browser = any(name.lower() == b"sec-fetch-mode" for name, _ in scope.get("headers", ()))
        if path == JOIN:
            await self._question(scope, receive, send)
        elif path == DATA and browser:
            given = parse_qs(scope["query_string"].decode("latin-1"))
            await self._stream(given.get("session_hash", [""])[0], scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _page(self, name: str) -> _Page:
        page = self.pages.pop(name, None) or _Page()
        self.pages = dict([*self.pages.items(), (name, page)][-PAGES:])
        return page

    async def _question(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a question on, and count it for its page before gradio knows of it."""
        body, page = b"", None

        async def counted() -> MutableMapping[str, Any]:
            nonlocal body, page
            message = await receive()
            body += message.get("body", b"")
            ended = page is None and not message.get("more_body")
            if ended and (found := HASH.search(body)):
                page = self._page(found[1].decode())
                page.pending += 1
                page.asks.set()
            return message

        async def answered(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] > 399 and page:
                page.pending -= 1
            await send(message)

        await self.app(scope, counted, answered)

    async def _stream(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        page, started, last = self._page(name), False, b""

        async def passed(message: MutableMapping[str, Any]) -> None:
            nonlocal started, last
            if message["type"] == "http.response.start":
                if started:
                    return
                started = True
            body = message.get("body", b"")
            page.pending -= len(COMPLETED.findall(body))
            if CLOSED.search(body):
                last = body
            elif not last:
                await send(message)

        while True:
            last = b""
            await self.app(scope, receive, passed)
            if not last:  # it has ended otherwise: the page is gone, or was refused
                break
            page.asks.clear()
            if page.pending > 0:
                continue
            page.pending = 0
            asked = await self._asked(page, receive)
            if asked is None:
                break
            if not asked:
                await send({"type": "http.response.body", "body": last, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                break

    async def _asked(self, page: _Page, receive: Receive) -> bool | None:
        """Whether the page asks before the pause is over; None: it is gone."""
        asks = asyncio.ensure_future(page.asks.wait())
        gone = asyncio.ensure_future(_left(receive))
        try:
            both = {asks, gone}
            await asyncio.wait(both, timeout=self.pause, return_when=asyncio.FIRST_COMPLETED)
            return None if gone.done() and not asks.done() else asks.done()
        finally:
            asks.cancel()
            gone.cancel()


async def _left(receive: Receive) -> None:
    """Return when the page has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
