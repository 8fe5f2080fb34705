"""What screen readers and keyboards need of the site, and Sphinx leaves out.

Captions of the navigation have ``role="heading"``, which requires a level. Tables and code that
are wider than a narrow screen scroll in boxes of their own, which the keyboard must reach.
"""

from typing import Any

from sphinx.application import Sphinx

__all__ = ["complete", "setup"]

MENDED = {
    "furo_navigation_tree": [('role="heading"', 'role="heading" aria-level="2"')],
    "body": [
        ('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
        ("<pre>", '<pre tabindex="0">'),
    ],
}
"""Parts of a page, and the text that is replaced in each."""


def complete(
    _app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: Any
) -> None:
    """Add the missing attributes to a page."""
    for part, pairs in MENDED.items():
        for before, after in pairs:
            if context.get(part):
                context[part] = context[part].replace(before, after)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the function; it follows those of the theme."""
    app.connect("html-page-context", complete, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
