"""The app as browsers and scripts meet it: over HTTP, with gradio's own client."""

import asyncio
import gc
import os
import re
import signal
import sys
import threading

import numpy as np
import pytest
import tifffile

import unmurk
from tests import programs
from tests.cli.app.processes import Popen
from unmurk.cli.app import jobs
from unmurk.cli.app.server import Opened, Place
from unmurk.cli.app.sessions import Limits
from unmurk.cli.app.spare import Spare
from unmurk.cli.main import main

# CONTRIBUTING.md: `make setup` installs gradio, so this runs wherever `make test` does. Only the
# environment of `make test-lowest` has none.
gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def app(tmp_path, monkeypatch):
    """An app with a token, whose jobs are forks (see `processes`)."""
    monkeypatch.setattr(jobs.subprocess, "Popen", Popen)
    monkeypatch.setattr(Spare, "ready", lambda spare: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.chdir(tmp_path)
    opened = Opened(Place(port=0, token=True), tmp_path / "runs", Limits(files=3, size=2**20))
    thread = threading.Thread(target=opened.answer)
    thread.start()
    yield opened
    for client in clients:
        client.close()
    clients.clear()
    opened.ended.set()
    thread.join()
    opened.close()
    asyncio.set_event_loop(None)  # gradio leaves one behind
    gc.collect()  # while warnings of its sockets and loops are ignored
    assert not list(tmp_path.glob("unmurk-app-*"))


clients = []


def browser(app):
    """A browser that has opened the address that the app printed."""
    client = httpx.Client(base_url=app.address, follow_redirects=True, timeout=60)
    clients.append(client)
    assert client.get("/", params={"token": app.token}).status_code == 200
    return client


def gradio(app, client):
    """gradio's client, with the cookies of a browser."""
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    client = gradio_client.Client(
        app.address, headers={"cookie": cookie}, verbose=False, download_files=False
    )
    clients.append(client)
    return client


def test_a_user_restores_and_another_sees_nothing(app, tmp_path, capsys):
    """Upload, noise, restoration, download: the bytes of the command line, for this user alone."""
    clean = unmurk.load_images("digits:test", limit=6).images
    pixels = unmurk.Problem("identity", 0.3).simulate(clean)[:, 0].numpy()
    pixels = (20000 + 20000 * pixels).clip(0, 65535).astype(np.uint16)
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "my digit.tif"
    tifffile.imwrite(file, pixels, photometric="minisblack", metadata={"axes": "ZYX"})
    user = browser(app)
    client = gradio(app, user)
    text = client.predict([gradio_client.handle_file(str(file))], 20000, 40000, api_name="/drop")
    assert "noise: standard deviation 0.3" in text and "my digit.tif" in text, text
    status, result = client.predict("digits", "", api_name="/restore")
    assert not status, status
    links = re.findall(r'href="(results/[^"]+)" download', result)
    found = user.get("/" + next(link for link in links if link.endswith("/my%20digit.tif")))
    argv = ["restore", "mine/my digit.tif", "--prior", "digits", "--out", "out", "--std"]
    assert main([*argv, "--range", "20000", "40000"]) == 0
    assert found.content == (tmp_path / "out" / "my digit.tif").read_bytes()
    assert found.headers["content-type"] == "application/octet-stream"
    page = re.search(r'iframe class="page" src="([^"]+)"', result)[1]
    assert "Can this be trusted?" in user.get("/" + page).text
    # another browser with the token, and one without it
    other = browser(app)
    assert other.cookies != user.cookies
    for link in (*links, page):
        assert other.get("/" + link).status_code == 404
        assert httpx.get(f"{app.address}{link}").status_code == 403
    for path in ("", "config", "gradio_api/info", f"gradio_api/file={tmp_path}/mine/my digit.tif"):
        assert httpx.get(app.address + path).status_code == 403
    assert user.get(f"/gradio_api/file={tmp_path}/mine/my digit.tif").status_code in (403, 404)
    # what the user asks to be removed is removed
    client.predict(api_name="/forget")
    assert user.get("/" + links[0]).status_code == 404
    assert not [p for p in app.sessions.folder.rglob("*.tif") if p.is_file()]


def test_what_cannot_be_read_is_told_and_leaves_nothing(app, tmp_path):
    user = browser(app)
    client = gradio(app, user)
    files = []
    for name in ("broken.tif", "b.tif", "c.tif", "d.tif"):
        (tmp_path / name).write_bytes(b"II*\0 no TIFF" + name.encode())
        files.append(gradio_client.handle_file(str(tmp_path / name)))
    text = client.predict(files[:1], None, None, api_name="/drop")
    assert "broken.tif" in text and "wrong" in text and str(app.sessions.folder) not in text
    text = client.predict(files, None, None, api_name="/drop")
    assert "4 files, at most 3" in text
    status, _ = client.predict("digits", "", api_name="/restore")
    assert "no images yet" in status or "broken.tif" in status
    upload = [("files", ("large.tif", b"x" * (2**21 + 1)))]
    assert user.post("/gradio_api/upload", files=upload).status_code == 413
    # gradio makes an empty file for each that it hands over
    assert not [p for p in app.sessions.folder.rglob("*.tif") if p.is_file()]
    assert not sum(p.stat().st_size for p in app.sessions.uploads.rglob("*") if p.is_file())


def test_ctrl_c_ends_the_app_and_removes_everything(tmp_path):
    code = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from unmurk.cli.main import main\n"
        "sys.exit(main(['app', '--port', '0', '--runs', sys.argv[1] + '/r']))"
    )
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    app = programs.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=env)
    try:
        line = app.stderr.readline()
        while "open http" not in line:
            assert line, "the app has ended"
            line = app.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert "token" not in line and httpx.get(address, timeout=60).status_code == 200
        assert httpx.get(address, headers={"host": "evil.example"}).status_code == 403
        (folder,) = tmp_path.glob("unmurk-app-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        app.send_signal(signal.SIGINT)
        out, err = app.communicate()
    finally:
        app.kill()
    assert app.returncode == 0 and not out and "Traceback" not in err, err
    assert not list(tmp_path.glob("unmurk-app-*")) and not (tmp_path / "r").exists()
