"""Who may ask the app for what: host names, token, sessions, sizes of requests, allowed routes.

`Guard` wraps the whole app as ASGI middleware, so that no route can be forgotten: pages, API,
uploads and downloads all pass it.

- **Host names**: an app on this machine answers to the names of this machine only. Otherwise a web
  page elsewhere could reach it by a name that resolves to 127.0.0.1 (DNS rebinding).
- **Origin**: a request that another site's page makes is refused.
- **Token**: where one is set, every request needs it: in the address once (``?token=``), then in
  a cookie, or as ``Authorization: Bearer``.
- **Session**: a random cookie names the user. The app reads it from the header
  ``x-unmurk-session``, which is set here and never taken from a client.
- **Routes**: only those that the page uses. gradio has others that fetch addresses for a client.
- **Policy**: the browser is told to load nothing from elsewhere.
"""

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

__all__ = ["SESSION", "Guard", "Rules", "is_local"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

SESSION = "x-unmurk-session"
NAME = re.compile(r"[A-Za-z0-9_-]{32}")  # of a session
ORDINARY = 2**22  # bytes of a request that is no upload
FORM = 2**20  # bytes of the form around the files of an upload
WEEK = 7 * 24 * 3600
UPLOAD = "/gradio_api/upload"
GET = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|manifest\.json|(assets|static)/[^?]*|results/[^?]*|"
    r"gradio_api/(info/?|startup-events|app_id/?|upload_progress|queue/data|theme\.css|"
    r"heartbeat/[a-z0-9-]+|(call|file=/)[^?]*))"
)
POST = re.compile(
    r"/gradio_api/(upload|queue/join|reset/?|cancel|call/[a-z0-9_]+|component_server/?)"
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-src 'self'; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'"
)
HEADERS: list[Header] = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
REPLACED = {name for name, _ in HEADERS} | {b"access-control-allow-origin"}
LOCAL = {"127.0.0.1", "localhost", "::1"}


def is_local(host: str) -> bool:
    """Whether an app that is bound to this address can be reached from this machine only.

    >>> is_local("127.0.0.1"), is_local("0.0.0.0")
    (True, False)
    """
    return host in LOCAL


@dataclass(frozen=True)
class Rules:
    """What the guard allows.

    Attributes:
        local: Whether only names of this machine are answered.
        token: What every request has to bring; empty: nothing.
        upload: Largest number of bytes of the files of one upload.
        port: Port of the app. Browsers share cookies between the ports of a machine, so it is part
            of their names.
        room: Whether there is room for another upload.
    """

    local: bool = True
    token: str = ""
    upload: int = 2**30
    port: int = 0
    room: Callable[[], bool] = field(default=lambda: True)

    def cookie(self, kind: str) -> str:
        """Return the name of a cookie."""
        return f"unmurk-{self.port}-{kind}"


class Guard:
    """ASGI middleware that refuses what the rules do not allow.

    Args:
        app: The app.
        rules: The rules.
    """

    def __init__(self, app: App, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page needs no web sockets
            return await send({"type": "websocket.close", "code": 1008})
        headers = {k.lower().decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        cookies = _cookies(headers.get("cookie", ""))
        refusal = self._refusal(scope, headers, cookies)
        if refusal is not None:
            return await _answer(send, *refusal)
        given = _query(scope).pop("token", None)
        if given is not None and self.rules.token and scope["method"] == "GET":
            return await self._without_token(scope, send)
        session, known = self._session(cookies)
        scope = dict(scope)
        scope["headers"] = [h for h in scope["headers"] if h[0].lower() != SESSION.encode()]
        scope["headers"].append((SESSION.encode(), session.encode()))
        new = [] if known else [self._set_cookie("session", session)]
        await self._pass(scope, receive, send, self._limit(scope), new)

    # -- who asks ---------------------------------------------------------------------------------

    def _refusal(
        self, scope: Scope, headers: dict[str, str], cookies: dict[str, str]
    ) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal; None: the request is allowed."""
        host = headers.get("host", "")
        if self.rules.local and _name_of(f"//{host}") not in LOCAL:
            return 403, "this app answers on this machine only, as http://127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return 403, "the request comes from another site"
        if not self._has_token(scope, headers, cookies):
            return 403, "open the address with the token that `unmurk app` printed"
        routes = {"GET": GET, "HEAD": GET, "POST": POST}.get(scope["method"])
        if routes is None or not routes.fullmatch(scope["path"]):
            return 404, "there is nothing here"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limit(scope):
            return 413, self._too_large(scope)
        if scope["path"] == UPLOAD and not self.rules.room():
            return 507, "the app holds as many files as it may: try again later"
        return None

    def _has_token(self, scope: Scope, headers: dict[str, str], cookies: dict[str, str]) -> bool:
        if not self.rules.token:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = [cookies.get(self.rules.cookie("token"), ""), _query(scope).get("token", "")]
        given += [value] if kind.lower() == "bearer" else []
        wanted = self.rules.token.encode()
        return any(hmac.compare_digest(one.encode(), wanted) for one in given)

    def _session(self, cookies: dict[str, str]) -> tuple[str, bool]:
        """Return the name of the session, and whether the client knows it."""
        name = cookies.get(self.rules.cookie("session"), "")
        known = NAME.fullmatch(name) is not None
        return (name if known else secrets.token_urlsafe(24)), known

    def _set_cookie(self, kind: str, value: str) -> Header:
        text = f"{self.rules.cookie(kind)}={value}; Path=/; HttpOnly; SameSite=Strict"
        return b"set-cookie", f"{text}; Max-Age={WEEK}".encode()

    async def _without_token(self, scope: Scope, send: Send) -> None:
        """Keep the token in a cookie, and lead to the address without it."""
        rest = {key: value for key, value in _query(scope).items() if key != "token"}
        where = scope["path"] + (f"?{urlencode(rest)}" if rest else "")
        more = [(b"location", where.encode()), self._set_cookie("token", self.rules.token)]
        await _answer(send, 303, "", more)

    # -- the request itself -----------------------------------------------------------------------

    def _limit(self, scope: Scope) -> int:
        return self.rules.upload + FORM if scope["path"] == UPLOAD else ORDINARY

    def _too_large(self, scope: Scope) -> str:
        if scope["path"] != UPLOAD:
            return f"a request may have {ORDINARY / 2**20:g} MiB"
        return f"an upload may have {self.rules.upload / 2**20:g} MiB: give fewer or smaller files"

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, limit: int, new: list[Header]
    ) -> None:
        """Pass a request on, counting its bytes, and add the headers to its answer."""
        taken, stopped, started = 0, False, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken, stopped
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                stopped = True
                return {"type": "http.disconnect"}
            return message

        async def answered(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if stopped and not started:
                return
            if message["type"] == "http.response.start":
                started = True
                kept = [h for h in message.get("headers", []) if h[0].lower() not in REPLACED]
                message = {**message, "headers": [*kept, *HEADERS, *new]}
            await send(message)

        try:
            await self.app(scope, counted, answered)
        except Exception:
            if not stopped:
                raise
        if stopped and not started:
            await _answer(send, 413, self._too_large(scope))


def _cookies(text: str) -> dict[str, str]:
    try:
        return {name: part.value for name, part in SimpleCookie(text).items()}
    except CookieError:
        return {}


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))


def _name_of(address: str) -> str | None:
    """Return the host name of an address; None if it has none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def _answer(send: Send, status: int, text: str, more: list[Header] | None = None) -> None:
    body = f"unmurk: {text}\n".encode() if text else b""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS, *(more or [])]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
