"""The app in headless Chromium, as a user meets it; `make browser-test` runs it, `make test` not.

Playwright drives the Chromium of the system (Debian: `apt install chromium`). Screenshots go into
the folder SHOTS, and the picture of docs/guide/app.md is one of them.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from playwright.sync_api import Page, sync_playwright

import unmurk

SHOTS = Path(os.environ.get("UNMURK_SHOTS", "build/browser")).absolute()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GUIDE = {"x": 0, "y": 0, "width": 1400, "height": 1750}  # picture of the guide
WAIT = 120_000  # milliseconds for an action on a busy machine


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Address and folder of an app in a process of its own."""
    folder = tmp_path_factory.mktemp("app")
    words = [sys.executable, "-m", "unmurk", "app", "--port", "0"]
    with subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the app has ended"
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        try:
            yield found[0], folder
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait() == 0 and "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def chromium():
    """The browser."""
    assert CHROMIUM, "there is no Chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(app, chromium):
    """The app in a browser of its own; nothing may be asked of other places, or fail."""
    asked: list[str] = []
    failed: list[str] = []
    context = chromium.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    own = (app[0], "data:", "blob:")
    tab.on("request", lambda r: None if r.url.startswith(own) else asked.append(r.url))
    tab.on("response", lambda r: failed.append(f"{r.status} {r.url}") if r.status > 399 else None)
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.goto(app[0])
    tab.wait_for_selector("text=No images at hand")
    yield tab
    context.close()
    assert not asked and not failed, (asked, failed)


def noisy(count: int, tile: int = 1) -> np.ndarray:
    """Noisy digits (count, 28 tile, 28 tile), as a camera of 16 bits writes them."""
    clean = unmurk.load_images("digits:test", limit=count * tile**2).images
    clean = clean.view(count, tile, tile, 28, 28).transpose(2, 3).reshape(count, 1, 28 * tile, -1)
    y = unmurk.Problem("identity", 0.3).simulate(clean)[:, 0].numpy()
    return (20000 + 20000 * y).clip(0, 65535).astype(np.uint16)


def span(page: Page) -> None:
    """Give the numbers of black and white."""
    page.click("text=Black and white of the files")
    page.fill("input[aria-label='Black']", "20000")
    page.fill("input[aria-label='White']", "40000")
    page.keyboard.press("Tab")


def choose(page: Page, label: str) -> None:
    """Choose a prior in the tab that is open."""
    page.click("input[aria-label='Prior'] >> visible=true")
    page.click(f"[role=option]:has-text('{label}') >> visible=true")


def looks(page: Page, name: str) -> None:
    """Keep pictures at two widths and in two schemes; nothing scrolls sideways."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    for width in (1400, 400):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": 1000})
            time.sleep(0.5)
            sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert sizes[0] <= sizes[1], (name, sizes)
            page.screenshot(path=SHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_upload_restore_drag_and_download(page, app, tmp_path):
    """The downloaded bytes are those that the command on the page writes."""
    folder = tmp_path
    tifffile.imwrite(
        folder / "y.tif", noisy(4), photometric="minisblack", metadata={"axes": "ZYX"}
    )
    span(page)
    page.set_input_files("input[type=file]", folder / "y.tif")
    page.wait_for_selector("ul.estimate")
    assert "standard deviation" in page.inner_text("#noise")
    assert "dn of the files" in page.inner_text("#noise")
    looks(page, "noise")
    choose(page, "digits, in the package")
    page.click("button.primary:has-text('Restore')")
    page.wait_for_selector("iframe.page")
    with page.expect_download() as download:
        page.click("a.file:text-is('y.tif')")
    download.value.save_as(folder / "downloaded.tif")
    command = page.inner_text("pre.command >> visible=true >> nth=1").replace("\n", " ")
    words = [sys.executable, "-m", *command.split()]
    assert subprocess.run(words, cwd=folder, check=False).returncode == 0
    wanted = (folder / "restored" / "y.tif").read_bytes()
    assert (folder / "downloaded.tif").read_bytes() == wanted
    result = page.frame_locator("iframe.page")
    assert "rust" in result.locator("body").inner_text()  # trusted, or not
    slider = result.locator(".compare input").first
    before = slider.input_value()
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None and before == "50"
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 10, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    share = result.locator(".compare").first.evaluate("e => e.style.getPropertyValue('--share')")
    assert float(share.rstrip("%")) < 20
    looks(page, "restored")
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=SHOTS / "app.png", full_page=True, clip=GUIDE)


def test_learn_stop_and_go_on(page, app):
    """Learning goes on in another tab of the browser, stops and goes on."""
    page.click("text=No images at hand")
    page.wait_for_selector("ul.estimate")
    page.click("button[role=tab]:has-text('Learn')")
    page.click("text=2 thousand images: a first look")
    page.click("button.primary:has-text('Start learning')")
    page.wait_for_selector("text=/run-1 is learning: [1-9]/")
    looks(page, "learning")
    page.reload()
    page.click("button[role=tab]:has-text('Learn')")
    page.wait_for_selector("text=/run-1 is learning/")
    page.click("text=Stop, and keep what is learned")
    page.wait_for_selector("text=/run-1 has stopped at/")
    page.click("button:has-text('Go on')")
    page.wait_for_selector("text=/run-1 is finished/")
    page.wait_for_selector("iframe.page >> visible=true")
    assert not (app[1] / "runs" / "run-1.images").exists()
    page.click("button[role=tab]:has-text('Restore')")
    page.click("input[aria-label='Prior'] >> visible=true")
    page.wait_for_selector("[role=option]:has-text('run-1, learned here') >> visible=true")


def paint(page: Page, data: np.ndarray, folder: Path) -> None:
    """Load an image, paint a short line in its middle, and start to solve."""
    tifffile.imwrite(folder / "y.tif", data)
    span(page)
    page.set_input_files("input[type=file]", folder / "y.tif")
    page.wait_for_selector("ul.estimate")
    page.click("button[role=tab]:has-text('Other corruptions')")
    page.click("text=Show the first image to paint on")
    canvas = page.locator("canvas").first
    canvas.wait_for()
    time.sleep(3)
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=10)
    page.mouse.up()
    time.sleep(1)
    choose(page, "digits, in the package")
    page.click("input[aria-label='Solver']")
    page.click("[role=option]:has-text('ddrm')")
    page.click("button.primary:has-text('Solve')")
    page.wait_for_selector(".note:has-text('Working on y.tif') >> visible=true", timeout=60_000)


def test_paint_a_hole_and_fill_it(page, tmp_path):
    """The mask has the pixels of the image, and hides what was painted."""
    paint(page, noisy(1, 2)[0], tmp_path)
    page.wait_for_selector("iframe.page >> visible=true")
    looks(page, "hole")
    with page.expect_download() as download:
        page.click("a.file:text-is('mask.png')")
    download.value.save_as(tmp_path / "mask.png")
    mask = unmurk.load_images(tmp_path / "mask.png").images[0, 0]
    assert mask.shape == (56, 56)
    assert 0.0005 < float((mask == 0).float().mean()) < 0.5
    assert bool((mask[-1] == 1).all() and (mask[0] == 1).all() and (mask[28] == 0).any())


def test_paint_on_an_image_that_is_larger_than_the_canvas(page, tmp_path):
    """Its mask is accepted, as its size is that of the image; then the work is stopped."""
    paint(page, noisy(1, 31)[0], tmp_path)  # 868 pixels to a side
    page.click("button:has-text('Stop') >> visible=true")
    page.wait_for_selector(".note:has-text('topped') >> visible=true")


def test_a_broken_file_is_told(page, tmp_path):
    """One message, no trace of the program, and nothing to restore."""
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no TIFF")
    page.set_input_files("input[type=file]", tmp_path / "broken.tif")
    page.wait_for_selector(".note.wrong")
    text = page.inner_text(".note.wrong")
    assert "broken.tif" in text and "Traceback" not in text and "/tmp" not in text
    looks(page, "broken")
