"""How a page looks: its pictures at two widths and in two schemes, and what is wrong with them.

`look` takes the pictures and asserts that nothing scrolls sideways, that no two pieces of text or
images lie on each other, that no text is cut off, and that every image has loaded. `accessible`
asserts that axe-core finds no serious or critical fault, `reachable` that the keyboard reaches
every control.
"""

import os
from collections.abc import Collection
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from playwright.sync_api import Frame, Locator, Page

__all__ = ["SHOTS", "accessible", "look", "picture", "reachable", "settled"]

SHOTS = Path(os.environ.get("UNMURK_SHOTS", "build/browser")).absolute()
WIDTHS, SCHEMES, HEIGHT = (1400, 400), ("light", "dark"), 1000
EDGE = 12  # pixels around a picture for the guide

LAYOUT = """() => {
  const found = [], root = document.documentElement, boxes = [];
  if (root.scrollWidth > innerWidth) found.push(`scrolls sideways: ${root.scrollWidth} pixels`);
  const shown = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const clips = (e) => getComputedStyle(e).overflowX !== "visible";
  // the part of a rectangle that the ancestors of its element leave to be seen
  const seen = (element, rect) => {
    const words = element.textContent.trim().slice(0, 60);
    let box = { left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom };
    for (let e = element; e && e !== document.body; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.position === "fixed" && (rect.right <= 0 || rect.left >= innerWidth)) return null;
      if (!clips(e)) continue;
      const edge = e.getBoundingClientRect();
      if (edge.width <= 1 || edge.height <= 1) return null;  // for screen readers alone
      const scrolls = style.overflowX !== "hidden" && style.overflowX !== "clip";
      const cut = Math.max(edge.left - box.left, box.right - edge.right);
      if (!scrolls && cut > 2) found.push(`is cut off: ${words}`);
      box = { left: Math.max(box.left, edge.left), top: Math.max(box.top, edge.top),
              right: Math.min(box.right, edge.right), bottom: Math.min(box.bottom, edge.bottom) };
      if (box.right <= box.left || box.bottom <= box.top) return null;
    }
    if (box.right > innerWidth + 1) found.push(`leaves the page: ${words}`);
    return box;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.textContent.trim(), parent = node.parentElement;
    if (!text || parent.closest("script, style, noscript, option") || !shown(parent)) continue;
    if (/\\bundefined\\b|\\bNaN\\b|\\[object /.test(text)) found.push(`says ${text.slice(0, 60)}`);
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      const box = rect.width < 1 || rect.height < 1 ? null : seen(parent, rect);
      if (!box) continue;
      const lead = (box.bottom - box.top) / 4;  // of lines whose height is that of the letters
      boxes.push({ ...box, top: box.top + lead, bottom: box.bottom - lead, node, text });
    }
  }
  for (const field of document.querySelectorAll("textarea"))
    if (shown(field) && field.placeholder && !field.value
        && field.scrollHeight > field.clientHeight + 2)
      found.push(`is cut off: ${field.placeholder}`);
  const pen = document.createElement("canvas").getContext("2d");
  for (const field of document.querySelectorAll("input[role=listbox]")) {
    const style = getComputedStyle(field);
    pen.font = style.font;  // the text of a menu may lie in its padding, below its arrow
    const edges = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
    if (shown(field) && pen.measureText(field.value).width > field.clientWidth - edges + 1)
      found.push(`is cut off: ${field.value}`);
  }
  for (const image of document.querySelectorAll("img")) {
    if (!shown(image)) continue;
    if (image.complete && !image.naturalWidth) found.push(`no image: ${image.alt || image.src}`);
    const box = seen(image, image.getBoundingClientRect());
    if (box && !image.closest(".compare"))
      boxes.push({ ...box, node: image, text: `image ${image.alt.slice(0, 40)}` });
  }
  boxes.sort((a, b) => a.top - b.top);
  for (let i = 0; i < boxes.length; i++)
    for (let j = i + 1; j < boxes.length && boxes[j].top < boxes[i].bottom - 2; j++) {
      const a = boxes[i], b = boxes[j];
      if (a.node === b.node) continue;
      if (a.node.parentElement.closest("math") && b.node.parentElement.closest("math")) continue;
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - b.top;
      if (width > 2 && height > 2)
        found.push(`lie on each other: ${a.text.slice(0, 50)} | ${b.text.slice(0, 50)}`);
    }
  return found;
}"""

STILL = """() => new Promise((done) => {
  const state = () => JSON.stringify([
    document.documentElement.scrollHeight, innerWidth, document.fonts.status,
    ...[...document.querySelectorAll("iframe.page")].map((frame) => {
      const page = frame.contentDocument;
      return [frame.clientHeight >= (page?.body?.getBoundingClientRect().height ?? 1e9),
              page?.readyState];
    }),
  ]);
  let last = "", same = 0;
  const check = () => {
    const now = state();
    same = now === last && !now.includes("false") ? same + 1 : 0;
    last = now;
    same > 8 ? done(true) : setTimeout(check, 30);
  };
  check();
})"""

CONTROLS = """() => {
  const kinds = "a[href], button, input:not([type=hidden]), select, textarea, summary, "
    + "[role=button], [role=tab], [role=slider], [contenteditable=true]";
  const shown = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    && e.getClientRects().length && !e.disabled && !e.closest("[aria-hidden=true]");
  // arrows, not Tab, lead to the other choices of a group
  const other = (e) => e.type === "radio" && !e.checked
    && [...document.getElementsByName(e.name)].some((one) => one.checked);
  const missed = new Set(
    [...document.querySelectorAll(kinds)].filter((e) => shown(e) && !other(e)));
  document.addEventListener("focusin", ({ target }) => {
    for (const e of missed) if (e.contains(target)) missed.delete(e);
  });
  document.activeElement?.blur();
  window.missed = missed;
  return missed.size;
}"""
MISSED = "[...missed].map((e) => e.outerHTML.slice(0, 160))"

OPTIONS = {"iframes": False, "preload": False, "resultTypes": ["violations"]}
AXE = """async (options) => {
  const found = await axe.run(document, options);
  return found.violations.filter((rule) => ["serious", "critical"].includes(rule.impact))
    .flatMap((rule) => rule.nodes.map((node) => [rule.id, node.target.flat().join(" "),
      node.failureSummary.split("\\n").slice(1).join(" ")]));
}"""


@cache
def axe() -> str:
    """Return the source of axe-core, which axe-playwright-python carries (extra `browser`)."""
    return (files("axe_playwright_python") / "axe.min.js").read_text()


def settled(page: Page) -> None:
    """Wait until a page and the pages in it have stopped changing their sizes."""
    page.evaluate(STILL)


def frames_of(page: Page) -> list[Frame]:
    """Return the page and the pages of results in it that can be seen."""
    inner = [
        handle.content_frame()
        for handle in page.query_selector_all("iframe.page")
        if handle.is_visible()
    ]
    return [page.main_frame, *(frame for frame in inner if frame is not None)]


def look(page: Page, name: str) -> None:
    """Take pictures at two widths and in two schemes, and assert that each is sound."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    found: list[Any] = []
    for width in WIDTHS:
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": HEIGHT})
            settled(page)
            faults = [fault for frame in frames_of(page) for fault in frame.evaluate(LAYOUT)]
            found += [(name, width, scheme, fault) for fault in faults]
            page.screenshot(path=SHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})
    assert not found, "\n".join(map(str, found))


def picture(page: Page, name: str, first: Locator, last: Locator, width: int = 1000) -> None:
    """Take a picture for the guide, from the top of an element to the bottom of another one."""
    page.set_viewport_size({"width": width, "height": HEIGHT})
    page.evaluate("scrollTo(0, 0)")
    settled(page)
    top, bottom = first.bounding_box(), last.bounding_box()
    assert top is not None and bottom is not None
    start = max(0.0, top["y"] - EDGE)
    end = bottom["y"] + bottom["height"] + EDGE
    clip = {"x": 0, "y": start, "width": width, "height": end - start}
    page.screenshot(
        path=SHOTS / f"guide-{name}.png",
        full_page=True,
        clip=clip,  # type: ignore[arg-type]
    )
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})


def accessible(page: Page, known: Collection[tuple[str, str]] = ()) -> None:
    """Assert that axe-core finds no serious or critical fault: wide and light, narrow and dark.

    Args:
        page: The page. Pages of results in it are examined too.
        known: Faults that are not ours, as the rule and a part of the selector of the element.
    """
    found = []
    for width, scheme in zip(WIDTHS, SCHEMES, strict=True):  # two of the four looks
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": HEIGHT})
        settled(page)
        for frame in frames_of(page):
            frame.evaluate(axe())
            faults = frame.evaluate(AXE, OPTIONS)
            found += [
                (width, scheme, rule, selector, why)
                for rule, selector, why in faults
                if not any(rule == one and part in selector for one, part in known)
            ]
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})
    assert not found, "\n".join(map(str, found))


def reachable(page: Page) -> None:
    """Assert that the Tab key reaches every control that can be seen, past frames."""
    count = page.evaluate(CONTROLS)
    assert count
    inside = sum(frame.evaluate(CONTROLS) for frame in frames_of(page)[1:])
    for _ in range(2 * (count + inside) + 20):  # scrolling boxes are stops, too
        page.keyboard.press("Tab")
        if not page.evaluate("missed.size"):
            return
    missed = page.evaluate(MISSED)
    assert not missed, "\n".join(missed)
