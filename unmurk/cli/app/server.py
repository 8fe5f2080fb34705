"""The server of the app: gradio's controls, the results, and the guard around both."""

import logging
import os
import secrets
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..console import escape
from .actions import Desk
from .guard import SESSION, Guard, Rules, is_local
from .sessions import Limits, Sessions

__all__ = ["Place", "serve"]

TYPES = {".html": "text/html; charset=utf-8"}
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


def serve(place: Place, runs: Path, limits: Limits) -> None:
    """Answer until the process is asked to end; then remove the files of all sessions.

    Args:
        place: Where.
        runs: Folder of the learned runs.
        limits: What users may leave with the app.

    Raises:
        InputError: gradio is not installed, or the address is in use.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with _bound(place) as listener:
        sessions = Sessions(limits)
        try:
            os.environ["GRADIO_TEMP_DIR"] = str(sessions.uploads)
            local = is_local(place.host)
            token = "" if local and not place.token else secrets.token_urlsafe(24)
            port = listener.getsockname()[1]
            rules = Rules(local, token, limits.size + 2**20, port, sessions.room)
            app = Guard(_gradio(Desk(sessions, runs, local), limits), rules)
            _announce(place.host, port, token)
            _answer(app, listener, sessions)
        finally:
            sessions.close()


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


def _gradio(desk: Desk, limits: Limits) -> Any:
    """Return the app without its guard."""
    try:
        import fastapi
        import gradio
    except ImportError as error:
        raise InputError("the app needs gradio: pip install 'unmurk[app]'") from error
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


def _announce(host: str, port: int, token: str) -> None:
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    print(f"unmurk: open {address} in a browser; Ctrl-C ends the app", file=sys.stderr, flush=True)
    if not is_local(host):
        print(
            "unmurk: other computers can reach it, with the token in this address; the connection"
            " is not encrypted",
            file=sys.stderr,
            flush=True,
        )


def _answer(app: Any, listener: socket.socket, sessions: Sessions) -> None:
    """Answer requests until the process is asked to end."""
    import uvicorn

    logging.getLogger("httpx").setLevel(logging.WARNING)
    ended = threading.Event()

    def tidy() -> None:
        while not ended.wait(TIDY):
            sessions.tidy()

    threading.Thread(target=tidy, daemon=True).start()
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none"
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        ended.set()
