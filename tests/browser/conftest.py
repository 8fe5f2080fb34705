"""Chromium, the app in a process of its own, and a page that may ask nothing of other places."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")  # as in the Makefile
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 180_000  # milliseconds for an action on a busy machine


@dataclass
class App:
    """An app in a process of its own.

    Attributes:
        address: Its address.
        folder: Where it was started.
        temporary: Its folder for temporary files.
    """

    address: str
    folder: Path
    temporary: Path

    def left(self) -> list[Path]:
        """Files of its users that the app holds."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """An app; at its end it leaves no file of its users, and has reported no mistake."""
    folder, temporary = (tmp_path_factory.mktemp(name) for name in ("app", "temporary"))
    words = [sys.executable, "-m", "unmurk", "app", "--port", "0"]
    env = {**os.environ, "TMPDIR": str(temporary)}
    said = folder / "app.log"
    with (
        open(said, "w") as log,
        subprocess.Popen(words, cwd=folder, stderr=log, env=env) as process,
    ):
        try:
            yield App(_address(process, said), folder, temporary)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait()
    text = said.read_text()
    assert code == 0 and "Traceback" not in text, text
    left = [path for path in temporary.rglob("*") if path.is_file()]
    assert not left, left


def _address(process, said):
    while process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())
        if found:
            return found[0]
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(said.read_text())


@pytest.fixture(scope="session")
def chromium():
    """The browser of the system, with an empty profile."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    assert program, "there is no Chromium (Debian: apt install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(app, chromium):
    """A function that opens the app in a browser of its own.

    Nothing may be asked of other places, no request may fail, and no script.
    """
    opened, asked, failed = [], [], []
    own = (app.address, "data:", "blob:")

    def visit():
        context = chromium.new_context(
            viewport={"width": 1400, "height": 1000}, accept_downloads=True
        )
        opened.append(context)
        tab = context.new_page()
        tab.set_default_timeout(WAIT)
        tab.on("request", lambda r: None if r.url.startswith(own) else asked.append(r.url))
        tab.on("response", lambda r: failed.append((r.status, r.url)) if r.status > 399 else None)
        tab.on("pageerror", lambda error: failed.append(str(error)))
        # gradio listens, also to uploads, once its first stream of events is open
        with tab.expect_response(lambda response: "/queue/data" in response.url):
            tab.goto(app.address)
        tab.wait_for_selector("text=No images at hand")
        return tab

    yield visit
    for context in opened:
        context.close()
    assert not asked and not failed, (asked, failed)


@pytest.fixture
def page(visit):
    """The app in a browser of its own."""
    return visit()
