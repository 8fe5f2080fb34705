"""The app in the hands of strangers: strange names, types and sizes, two users, reloads, stops.

`make browser-test` runs it, `make test` not.
"""

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.browser.app import choose, fetched, give, noisy, restore, until


def eight(pixels: np.ndarray) -> np.ndarray:
    """The same images in eight bits."""
    return ((pixels.astype(float) - 20000) / 20000 * 120 + 60).clip(0, 255).astype(np.uint8)


@pytest.mark.slow
def test_two_users_at_once_see_their_own_images_and_results(visit, tmp_path):
    """Strange names come back; what one user has, another cannot fetch."""
    names = ("Zelle ä.npy", 'it\'s "b" <i>x<i>.npy')
    kept = ("Zelle ä.npy", "it_s _22b_22 ixi.npy")  # browsers and gradio change names, too
    users = [visit(), visit()]
    data = [(noisy(4) - 20000.0) / 20000, (noisy(8)[4:] - 20000.0) / 20000]
    for user, name, y in zip(users, names, data, strict=True):
        np.save(tmp_path / name, y.astype(np.float32))
        user.set_input_files("input[type=file]", tmp_path / name)
    for user in users:
        user.wait_for_selector("ul.estimate")
        choose(user, "digits, in the package")
    for user in users:
        user.click("button.primary:has-text('Restore')")
    links = []
    for user, mine, others in zip(users, kept, reversed(kept), strict=True):
        user.wait_for_selector("iframe.page >> visible=true")
        text = user.inner_text("body")
        assert mine in text and others not in text
        assert user.locator("i:text-is('x')").count() == 0  # a name is never HTML
        links.append(user.locator("a.file").first.get_attribute("href"))
    found = [
        np.load(fetched(u, "images.npy", tmp_path / n[:2]))
        for u, n in zip(users, kept, strict=True)
    ]
    assert all(x.dtype == np.float32 and x.shape == (4, 28, 28) for x in found)
    assert np.abs(found[0] - found[1]).mean() > 0.05
    for user, mine, others in zip(users, links, reversed(links), strict=True):
        base = user.url
        assert user.request.get(f"{base}{mine}").status == 200
        assert user.request.get(f"{base}{others}").status == 404
    links = [user.locator("iframe.page").get_attribute("src") for user in users]
    users[0].click("text=Remove my files now")
    users[0].wait_for_selector("text=All your files are removed")
    assert users[0].request.get(f"{users[0].url}{links[0]}").status == 404
    assert users[1].request.get(f"{users[1].url}{links[1]}").status == 200


@pytest.mark.slow
def test_sixteen_bit_png_and_rgb_jpeg_in_one_upload(page, tmp_path):
    """Results keep the type where the format can: PNG has 16 bits; JPEG is lossy, so PNG it is."""
    Image.fromarray(noisy(1, 2)[0]).save(tmp_path / "deep.png")
    color = np.stack([eight(noisy(3, 2)[k]) for k in range(3)], -1)
    Image.fromarray(color).save(tmp_path / "color.jpg", quality=98)
    give(page, tmp_path / "deep.png")
    restore(page)
    with Image.open(fetched(page, "deep.png", tmp_path / "found")) as image:
        assert image.mode.startswith("I;16") and image.size == (56, 56)
    page.click("button[aria-label='Clear']")
    give(page, tmp_path / "color.jpg")
    page.wait_for_selector("text=unmurk noise color.jpg")
    choose(page, "generic, in the package")
    page.click("button.primary:has-text('Restore')")
    with Image.open(fetched(page, "color.png", tmp_path / "found")) as image:
        assert image.mode == "RGB" and image.size == (56, 56)


@pytest.mark.slow
def test_a_large_image_is_taken_and_the_work_on_it_stops(page, app, tmp_path):
    """The estimate comes; stopping ends the process; the upload is removed on demand."""
    rng = np.random.default_rng(0)
    base = np.add.outer(np.arange(1800), np.arange(1800)).astype(np.float32)
    base *= 20000 / base.max()
    base += rng.normal(20000, 2000, base.shape).astype(np.float32)
    tifffile.imwrite(tmp_path / "large image.tif", base.clip(0, 65535).astype(np.uint16))
    assert (tmp_path / "large image.tif").stat().st_size > 6e6
    give(page, tmp_path / "large image.tif")
    assert "standard deviation 0.03" in page.inner_text("#noise")
    choose(page, "digits, in the package")
    page.click("button.primary:has-text('Restore')")
    page.wait_for_selector(".note:has-text('Working on large image.tif') >> visible=true")
    page.click("button:has-text('Stop') >> visible=true")
    page.wait_for_selector(".note:has-text('topped') >> visible=true")
    assert any(path.stat().st_size > 6e6 for path in app.left())
    page.click("text=Remove my files now")
    page.wait_for_selector("text=All your files are removed")
    until(page, lambda: not any(p.stat().st_size > 6e6 for p in app.left()), "files are removed")


@pytest.mark.slow
def test_a_reload_in_the_middle_loses_nothing(page, tmp_path):
    """The page shows the images and their noise again, the work that goes on, and its result."""
    tifffile.imwrite(tmp_path / "many.tif", np.tile(noisy(1, 14)[0], (2, 1)))
    give(page, tmp_path / "many.tif")
    noise = page.inner_text("ul.estimate")
    choose(page, "digits, in the package")
    page.click("button.primary:has-text('Restore')")
    page.wait_for_selector(".note:has-text('Working on many.tif') >> visible=true")
    page.reload()
    page.wait_for_selector("text=Your images: many.tif")
    assert page.inner_text("ul.estimate") == noise
    page.wait_for_selector(".note:has-text('Working on many.tif') >> visible=true")
    page.wait_for_selector("iframe.page >> visible=true")
    page.reload()
    page.wait_for_selector("iframe.page >> visible=true")
    found = tifffile.imread(fetched(page, "many.tif", tmp_path / "found"))
    assert found.shape == (784, 392) and found.dtype == np.uint16


def test_files_are_added_and_removed(page, tmp_path):
    """The images are those that the list of files shows."""
    for k in range(2):
        Image.fromarray(noisy(2, 2)[k]).save(tmp_path / f"{k}.png")
    give(page, tmp_path / "0.png")
    page.wait_for_selector("#noise :text-is('1 image')")
    page.set_input_files("input[type=file]", tmp_path / "1.png")
    page.wait_for_selector("#noise :text-is('2 images')")
    page.click("button[aria-label='Remove this file'] >> nth=0")
    page.wait_for_selector("#noise :text-is('1 image')")
    assert "unmurk noise 1.png" in page.inner_text("#noise")
    page.click("button[aria-label='Clear']")
    page.wait_for_selector("#noise :text-is('No images yet.')")
