"""The server of the app: gradio's controls, the results, and the guard around both."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..console import escape
from .actions import Desk
from .events import Events
from .guard import SESSION, Guard, Rules, is_local
from .jobs import environment
from .sessions import Limits, Sessions
from .spare import Spare

__all__ = ["Opened", "Place", "serve"]

TYPES = {".html": "text/html; charset=utf-8"}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
TIDY = 600.0  # seconds between two removals of idle sessions


@dataclass(frozen=True)
class Place:
    """Where an app answers.

    Attributes:
        host: Address that it is bound to.
        port: Port; 0: a free one.
        token: Whether a token is needed on this machine too.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: bool = False


class Opened:
    """An app that is bound to its address.

    Args:
        place: Where it answers.
        runs: Folder of the learned runs.
        limits: What users may leave with the app.

    Attributes:
        sessions: The files of its users.
        token: What every request needs; empty: nothing.
        address: What to open in a browser.
        ended: Set it to end the app.

    Raises:
        InputError: gradio is not installed, or the address is in use.
    """

    def __init__(self, place: Place, runs: Path, limits: Limits) -> None:
        _need_gradio()
        self.place, self.ended = place, threading.Event()
        self._listener = _bound(place)
        local = is_local(place.host)
        self.token = "" if local and not place.token else secrets.token_urlsafe(24)
        port = self._listener.getsockname()[1]
        host = f"[{place.host}]" if ":" in place.host else place.host
        self.address = f"http://{host}:{port}/"
        self.sessions = Sessions(limits)
        self.spare = Spare(environment())
        try:
            os.environ["GRADIO_TEMP_DIR"] = str(self.sessions.uploads)
            rules = Rules(local, self.token, limits.size, port, self.sessions.room)
            desk = Desk(self.sessions, runs, local, self.spare)
            self._app = Guard(Events(_gradio(desk, limits)), rules)
            self.spare.ready()
        except BaseException:
            self.close()
            raise

    def announce(self) -> None:
        """Print the address, and who can reach it."""
        address = self.address + (f"?token={self.token}" if self.token else "")
        lines = [f"open {address} in a browser; Ctrl-C ends the app"]
        if not is_local(self.place.host):
            lines.append(
                "other computers can reach it, with the token in this address; the connection is "
                "not encrypted"
            )
        for line in lines:
            print(f"unmurk: {line}", file=sys.stderr, flush=True)

    def answer(self) -> None:
        """Answer requests until `ended` is set or a signal asks the process to end."""
        import uvicorn

        config = uvicorn.Config(
            self._app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            ws="none",
        )
        server = uvicorn.Server(config)
        server.capture_signals = lambda: _signals(self.ended)

        def watch() -> None:
            tidied = time.monotonic()
            while not self.ended.wait(0.1):
                if time.monotonic() > tidied + TIDY:
                    self.sessions.tidy()
                    tidied = time.monotonic()
            # browsers keep connections open, and ending them would be reported as errors
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server.should_exit = True

        threading.Thread(target=watch, daemon=True).start()
        try:
            server.run(sockets=[self._listener])
        finally:
            self.ended.set()

    def close(self) -> None:
        """Remove the files of all users."""
        self._listener.close()
        self.spare.close()
        self.sessions.close()


def serve(place: Place, runs: Path, limits: Limits) -> None:
    """Answer until the process is asked to end; then remove the files of all users.

    Args:
        place: Where.
        runs: Folder of the learned runs.
        limits: What users may leave with the app.

    Raises:
        InputError: See `Opened`.
    """
    app = Opened(place, runs, limits)
    try:
        app.announce()
        app.answer()
    finally:
        app.close()


@contextmanager
def _signals(ended: threading.Event) -> Iterator[None]:
    """Let the signals that ask to end set an event, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bound(place: Place) -> socket.socket:
    """Return a socket that is bound to the address."""
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((place.host, place.port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot answer at {escape(place.host)}, port {place.port}: {why}: give another --port"
            " or --host"
        ) from error
    listener.listen(64)  # before the address is printed
    return listener


def _need_gradio() -> None:
    """Import gradio without its statistics of use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError("the app needs gradio: pip install 'unmurk[app]'") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _gradio(desk: Desk, limits: Limits) -> Any:
    """Return the app without its guard."""
    import fastapi
    import gradio

    from .layout import build

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/results/{key}/{name}")
    def result(key: str, name: str, request: fastapi.Request) -> Any:
        path = desk.session(request.headers.get(SESSION, "")).find(key, name)
        if path is None:
            raise fastapi.HTTPException(404, "there is no such file; reload the page")
        kind = TYPES.get(path.suffix)
        if kind is not None:
            return fastapi.Response(path.read_bytes(), media_type=kind)
        return fastapi.responses.FileResponse(
            path, media_type="application/octet-stream", filename=name
        )

    style = Path(__file__).with_name("style.css").read_text()
    script = Path(__file__).with_name("frames.html").read_text()
    fonts = ["system-ui", "sans-serif"]
    theme = gradio.themes.Default(
        primary_hue=gradio.themes.colors.blue,
        font=fonts,
        font_mono=["ui-monospace", "monospace"],
    ).set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
    )
    return gradio.mount_gradio_app(
        app,
        build(desk, gradio).queue(default_concurrency_limit=8, max_size=64),
        path="",
        allowed_paths=[],
        show_error=False,
        max_file_size=limits.size,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=style,
        head=script,
    )
