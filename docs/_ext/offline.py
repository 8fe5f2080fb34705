"""Warn of pages that a browser would complete from the network: scripts, styles, fonts, pictures.

A warning ends the build. Links that a reader follows are not concerned.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

__all__ = ["fetched", "setup"]

SOURCE = re.compile(r"""<(?!a\b)[^>]*\b(?:src|srcset|poster|data)=["'](?:https?:)?//[^"']*""")
STYLE = re.compile(r"""<link\b[^>]*\bhref=["'](?:https?:)?//[^"']*""")


def fetched(html: str) -> list[str]:
    """Return the tags of a page that name a resource of another host."""
    found = SOURCE.findall(html) + STYLE.findall(html)
    return [tag for tag in found if 'rel="canonical"' not in tag]


def check(app: Sphinx, error: Exception | None) -> None:
    """Check every page of a finished build."""
    if error is not None or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        for tag in fetched(page.read_text(encoding="utf-8")):
            name = page.relative_to(app.outdir)
            logging.getLogger(__name__).warning("%s fetches from the network: %s", name, tag)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
