"""The app in headless Chromium, as a user meets it; `make browser-test` runs it, `make test` not.

Playwright drives the Chromium of the system. Pictures go into the folder `looks.SHOTS`.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from playwright.sync_api import Page

import unmurk
from tests.browser.looks import accessible, look, picture, reachable, settled

PAINT = (213, 94, 0)  # color of the brush
GRADIO = [
    # the button beside the names of uploaded files holds a field that the keyboard reaches too
    ("nested-interactive", "common.upload"),
    # the name of the field for files is not the text in it
    ("label-content-name-mismatch", ".upload-container"),
]
"""Serious faults of gradio's own controls, which its options and style sheets cannot mend."""


def until(page: Page, condition, what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, f"in vain: {what}"
        page.wait_for_timeout(100)


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


def give(page: Page, path: Path) -> None:
    """Upload a file, and wait for the estimate of its noise."""
    page.set_input_files("input[type=file]", path)
    page.wait_for_selector("ul.estimate")


def fetched(page: Page, name: str, folder: Path) -> Path:
    """Download a file of a result."""
    with page.expect_download() as download:
        page.click(f"a.file:text-is('{name}')")
    download.value.save_as(folder / name)
    return folder / name


def restore(page: Page) -> None:
    """Restore with the digits of the package, and wait for the page of the result."""
    choose(page, "digits, in the package")
    page.click("button.primary:has-text('Restore')")
    page.wait_for_selector("iframe.page >> visible=true")


def drag(page: Page, share: float) -> float:
    """Drag the slider of the first image; return how much of the image it shows as measured."""
    result = page.frame_locator("iframe.page >> visible=true")
    slider = result.locator(".compare input").first
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * share, middle, steps=5)
    page.mouse.up()
    shown = result.locator(".compare").first.evaluate("e => e.style.getPropertyValue('--share')")
    return float(shown.rstrip("%"))


def test_upload_restore_drag_and_download(page, tmp_path):
    """The downloaded bytes are those that the command on the page writes."""
    pixels = noisy(4)
    tifffile.imwrite(
        tmp_path / "y.tif", pixels, photometric="minisblack", metadata={"axes": "ZYX"}
    )
    span(page)
    give(page, tmp_path / "y.tif")
    noise = page.inner_text("#noise")
    assert "standard deviation 0.3" in noise and "dn of the files" in noise
    look(page, "noise")
    picture(page, "images", page.locator("h1"), page.locator("#noise"))
    restore(page)
    result = page.frame_locator("iframe.page")
    assert "rust" in result.locator("body").inner_text()  # trusted, or not
    slider = result.locator(".compare input").first
    assert slider.input_value() == "50"
    assert drag(page, 0.1) < 20
    slider.press("End")  # the keyboard moves it too
    shown = result.locator(".compare").first
    assert shown.evaluate("e => e.style.getPropertyValue('--share')") == "100%"
    slider.press("Home")
    assert shown.evaluate("e => getComputedStyle(e.lastElementChild).opacity") == "0"
    drag(page, 0.5)
    look(page, "restored")
    tabs = page.locator("[role=tablist]")
    picture(page, "restore", tabs, result.locator(".comparison").first)
    picture(page, "phone", tabs, result.locator(".comparison").first, 400)
    accessible(page, GRADIO)
    reachable(page)
    with page.context.expect_page() as opened:
        page.click("text=Open the page alone")
    alone = opened.value
    alone.set_viewport_size({"width": 400, "height": 900})
    assert alone.locator(".compare").count() == 4
    assert alone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    alone.close()
    found = fetched(page, "y.tif", tmp_path / "downloaded")
    restored = tifffile.imread(found)
    assert restored.dtype == pixels.dtype and restored.shape == pixels.shape
    command = page.inner_text("pre.command >> visible=true >> nth=1").replace("\n", " ")
    words = [sys.executable, "-m", *command.split()]
    assert subprocess.run(words, cwd=tmp_path, check=False).returncode == 0
    assert found.read_bytes() == (tmp_path / "restored" / "y.tif").read_bytes()


@pytest.mark.slow
def test_learn_see_a_preview_stop_and_go_on(page, app):
    """Learning outlives the page, shows its pictures, stops, and goes on from there."""
    page.click("text=No images at hand")
    page.wait_for_selector("ul.estimate")
    page.click("button[role=tab]:has-text('Learn')")
    page.click("text=20 thousand: rough results")
    page.click("button.primary:has-text('Start learning')")
    page.wait_for_selector("text=/run-1 is learning: [1-9]/")
    page.reload()
    page.click("button[role=tab]:has-text('Learn')")
    page.wait_for_selector("text=/run-1 is learning/")
    page.wait_for_selector("iframe.page >> visible=true", timeout=600_000)
    preview = page.frame_locator("iframe.page >> visible=true")
    preview.locator("text=Still learning").wait_for()
    assert preview.locator(".compare").count() == 4
    page.click("text=Stop, and keep what is learned")
    stopped = page.wait_for_selector("text=/run-1 has stopped at/")
    before = int(stopped.inner_text().partition("stopped at ")[2].partition("%")[0])
    look(page, "learning")
    accessible(page, GRADIO)
    reachable(page)
    page.click("button[role=tab]:has-text('Restore')")
    page.click("input[aria-label='Prior'] >> visible=true")
    page.wait_for_selector("[role=option]:has-text('run-1, learned to') >> visible=true")
    page.keyboard.press("Escape")
    page.click("button[role=tab]:has-text('Learn')")
    page.click("button:has-text('Go on')")

    def share() -> int:
        text = page.locator(".note:has-text('run-1 is learning: ') >> visible=true")
        words = text.all_inner_texts()
        return int(words[0].partition("learning: ")[2].partition("%")[0]) if words else 0

    until(page, lambda: share() > before, "the run goes on")
    page.click("text=Stop, and keep what is learned")
    page.wait_for_selector("text=/run-1 has stopped at/")
    assert (app.folder / "runs" / "run-1.images").exists()  # until the run is finished


@pytest.mark.slow
def test_learn_to_the_end(page, app):
    """A finished run has its verdict, is a prior, and keeps no uploaded image."""
    page.click("text=No images at hand")
    page.wait_for_selector("ul.estimate")
    page.click("button[role=tab]:has-text('Learn')")
    page.fill(
        "label:has-text('Name of the run') input, label:has-text('Name of the run') textarea",
        "run-2",
    )
    page.click("text=2 thousand images: a first look")
    page.click("button.primary:has-text('Start learning')")
    page.wait_for_selector("text=/run-2 is finished/", timeout=600_000)
    result = page.frame_locator("iframe.page >> visible=true")
    result.locator("text=Can the result be trusted?").wait_for()
    assert not (app.folder / "runs" / "run-2.images").exists()
    page.click("button[role=tab]:has-text('Restore')")
    page.click("input[aria-label='Prior'] >> visible=true")
    page.wait_for_selector("[role=option]:has-text('run-2, learned here') >> visible=true")


def colored(page: Page, clip: dict[str, float], folder: Path) -> np.ndarray:
    """Which pixels of a part of the screen have the color of the brush."""
    page.screenshot(path=folder / "part.png", clip=clip)  # type: ignore[arg-type]
    with Image.open(folder / "part.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return np.abs(pixels - PAINT).max(-1) < 30


def paint(page: Page, data: np.ndarray, folder: Path) -> None:
    """Load an image, paint a short line in its middle, and start to solve."""
    tifffile.imwrite(folder / "y.tif", data)
    span(page)
    give(page, folder / "y.tif")
    page.click("button[role=tab]:has-text('Other corruptions')")
    page.click("text=Show the first image to paint on")
    canvas = page.locator("canvas").first
    canvas.wait_for()
    settled(page)
    canvas.scroll_into_view_if_needed()

    def middle() -> tuple[float, float, dict[str, float]]:
        box = canvas.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        return x, y, {"x": x - 60, "y": y - 40, "width": 120, "height": 80}

    def varied() -> bool:
        page.screenshot(path=folder / "part.png", clip=middle()[2])  # type: ignore[arg-type]
        with Image.open(folder / "part.png") as image:
            return float(np.asarray(image.convert("L")).std()) > 5

    def painted() -> bool:
        """As users do: a stroke that the editor was not ready for is made again."""
        x, y, clip = middle()
        page.mouse.move(x - 20, y)
        page.mouse.down()
        page.mouse.move(x + 20, y, steps=10)
        page.mouse.up()
        page.wait_for_timeout(500)
        return bool(colored(page, clip, folder).mean() > 0.02)

    until(page, varied, "the image appears on the canvas")
    until(page, painted, "the paint appears")
    choose(page, "digits, in the package")
    page.click("input[aria-label='Solver']")
    page.click("[role=option]:has-text('ddrm')")
    page.click("button.primary:has-text('Solve')")
    page.wait_for_selector(".note:has-text('Working on y.tif') >> visible=true")


def test_paint_a_hole_and_fill_it(page, tmp_path):
    """The mask has the pixels of the image, and hides what was painted; the rest stays near y."""
    data = noisy(1, 2)[0]
    page.set_viewport_size({"width": 1000, "height": 1000})  # that of the picture
    paint(page, data, tmp_path)
    page.wait_for_selector("iframe.page >> visible=true")
    result = page.frame_locator("iframe.page >> visible=true")
    tabs = page.locator("[role=tablist]")
    picture(page, "hole", tabs, result.locator(".comparison").first)
    look(page, "hole")
    accessible(page, GRADIO)
    reachable(page)
    mask = unmurk.load_images(fetched(page, "mask.png", tmp_path / "found")).images[0, 0]
    assert mask.shape == (56, 56)
    assert 0.0005 < float((mask == 0).float().mean()) < 0.5
    assert bool((mask[-1] == 1).all() and (mask[0] == 1).all() and (mask[28] == 0).any())
    filled = tifffile.imread(fetched(page, "y.tif", tmp_path / "found"))
    assert filled.dtype == data.dtype and filled.shape == data.shape
    clean = unmurk.load_images("digits:test", limit=4).images.view(2, 2, 28, 28)
    clean = clean.transpose(1, 2).reshape(56, 56).numpy()
    errors = [np.abs((x.astype(float) - 20000) / 20000 - clean).mean() for x in (data, filled)]
    assert errors[1] < 0.4 * errors[0], errors


@pytest.mark.slow
def test_paint_on_an_image_that_is_larger_than_the_canvas(page, tmp_path):
    """Its mask is accepted, as its size is that of the image; then the work is stopped."""
    paint(page, noisy(1, 31)[0], tmp_path)  # 868 pixels to a side
    page.click("button:has-text('Stop') >> visible=true")
    page.wait_for_selector(".note:has-text('topped') >> visible=true")


def test_a_broken_file_is_told_and_leaves_nothing(page, app, tmp_path):
    """One message, no trace of the program, nothing to restore, and no file of it is left."""
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no TIFF")
    before = set(app.left())
    page.set_input_files("input[type=file]", tmp_path / "broken.tif")
    page.wait_for_selector(".note.wrong")
    text = page.inner_text(".note.wrong")
    assert "broken.tif" in text and "Traceback" not in text and "/tmp" not in text
    assert page.locator(".note.wrong").count() == 1
    look(page, "broken")
    choose(page, "digits, in the package")
    page.click("button.primary:has-text('Restore')")
    page.wait_for_selector("text=there are no images yet")
    left = [path for path in set(app.left()) - before if path.read_bytes().startswith(b"II*")]
    assert not left, left
    assert page.locator("iframe.page").count() == 0
