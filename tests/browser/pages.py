"""The written pages in headless Chromium: of a run, of the demonstration, and of this site.

`make browser-test` runs it, `make test` not. Every page has to look right at two widths and in two
schemes, and axe-core must find no serious fault.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser.looks import accessible, look, reachable
from unmurk.cli import demo
from unmurk.cli.main import main
from unmurk.cli.run_page import unfinished
from unmurk.training import Recipe

ROOT = Path(__file__).parents[2]
SITE = ["index", "guide/app", "guide/choosing", "theory/notation"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The pages of a small demonstration, of its run, of the same unfinished, and of a check."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = Recipe(buffer=32)
    options = {"train": 64, "held_out": 36, "kimg": 0.3, "recipe": recipe, "steps": 4}
    demo.run(folder / "demo", nuclei=0.1, **options)
    run = folder / "demo" / "run"
    assert main(["report", str(run)]) == 0
    part = folder / "part"
    shutil.copytree(run, part)
    return {
        "demo": folder / "demo" / "report.html",
        "run": run / "report.html",
        "unfinished": unfinished(part, 0.4),
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A few pages of the documentation, with its settings, theme and styles."""
    folder = tmp_path_factory.mktemp("site")
    few = "index.md,guide/*.md,results/index.md,theory/notation.md"
    settings = ["-D", "extensions=accessible,mathml,myst_nb", "-D", f"include_patterns={few}"]
    words = [sys.executable, "-m", "sphinx", "-q", "-b", "html", *settings]
    subprocess.run([*words, str(ROOT / "docs"), str(folder)], check=True, capture_output=True)
    return {name: folder / f"{name}.html" for name in SITE}


@pytest.fixture
def tab(chromium):
    """A page of a browser; nothing may be asked of other places, or fail."""
    wrong: list[str] = []
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    own = ("file://", "data:")
    page.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield page
    context.close()
    assert not wrong, wrong


SOUND = "<!doctype html><html lang=en><title>t</title><main><h1>A page</h1>{}</main>"


@pytest.mark.parametrize(
    ("check", "body", "fault"),
    [
        (None, "<p style='width:2000px'>wide", "scrolls sideways"),
        (None, "<p style='width:2em;overflow:hidden;white-space:nowrap'>too long", "is cut off"),
        (
            None,
            "<textarea rows=1 cols=5 placeholder='one two three four'></textarea>",
            "is cut off",
        ),
        (
            None,
            "<input role=listbox aria-label=a size=9 value='one two three four'>",
            "is cut off",
        ),
        (None, "<p>first<p style='margin-top:-2.2em'>second", "lie on each other"),
        (None, "<p>Noise: NaN", "says Noise: NaN"),
        (accessible, "<button></button>", "button-name"),
        (accessible, "<p style='color:#bbb;background:#fff'>pale", "color-contrast"),
        (reachable, "<a href='#'>one</a><button tabindex=-1>two</button>", ">two<"),
    ],
)
def test_the_checks_see_faults(tab, check, body, fault):
    """Each finds what is wrong with a page, and nothing on the same page without it."""
    check = check or (lambda page: look(page, "fault"))
    tab.set_content(SOUND.format("<a href='#'>one</a>"))
    check(tab)
    tab.set_content(SOUND.format(body))
    with pytest.raises(AssertionError, match=fault):
        check(tab)


@pytest.mark.parametrize("name", ["demo", "run", "unfinished"])
def test_a_written_page_looks_right_and_is_accessible(written, tab, name):
    tab.goto(written[name].as_uri())
    look(tab, f"page-{name}")
    accessible(tab)
    reachable(tab)


@pytest.mark.parametrize("name", ["demo", "run"])
def test_sliders_and_magnification_work(written, tab, name):
    """By keyboard, as by mouse; magnified images scroll inside of their windows."""
    tab.goto(written[name].as_uri())
    slider = tab.locator(".compare input").first
    slider.focus()
    tab.keyboard.press("PageDown")
    share = "e => getComputedStyle(e).getPropertyValue('--share')"
    assert tab.locator(".compare").first.evaluate(share) == f"{slider.input_value()}%" != "50%"
    before = tab.locator(".compare").first.bounding_box()["width"]
    tab.click(".zoom button:has-text('4×')")
    assert tab.locator(".compare").first.bounding_box()["width"] == pytest.approx(4 * before, 0.01)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator(".zoom button[aria-pressed=true]").inner_text() == "4×"


def test_a_page_reloads_itself_as_long_as_its_reader_lets_it(written, tab):
    """The page of an unfinished run, with a clock that is moved on."""
    tab.clock.install()
    loads = []
    tab.on("load", lambda page: loads.append(page.url))
    tab.goto(written["unfinished"].as_uri())
    box = tab.get_by_label("reload this page every 60 seconds")
    box.uncheck()
    tab.clock.run_for(121_000)
    assert len(loads) == 1
    box.check()
    with tab.expect_event("load"):
        tab.clock.run_for(61_000)


@pytest.mark.parametrize("name", SITE)
def test_a_page_of_the_site_looks_right_and_is_accessible(site, tab, name):
    tab.goto(site[name].as_uri())
    look(tab, f"site-{name.replace('/', '-')}")
    accessible(tab)
    reachable(tab)
