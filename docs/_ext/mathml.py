"""Render equations as MathML while the site is built.

Browsers draw MathML themselves, so the pages need neither a script nor a network. An equation that
docutils cannot translate is a warning, which ends the build: what is on a page has been parsed.

A number given by ``\\tag{1.1}`` in a displayed equation is printed at the right margin.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

__all__ = ["setup"]

TAG = re.compile(r"\\tag\{([^}]*)\}")
FRACTION = re.compile(r"\\([td]?frac)(\d)(\d)")
WORDS = {
    r"\operatorname*": r"\operatorname",
    r"\argmin": r"\operatorname{argmin}",
    r"\argmax": r"\operatorname{argmax}",
    r"\dots": r"\ldots",
}
logger = logging.getLogger(__name__)


def translate(latex: str, node: nodes.Node, block: bool) -> str:
    """Return an equation as MathML, or as its source after a warning."""
    for word, meaning in WORDS.items():
        latex = latex.replace(word, meaning)
    latex = FRACTION.sub(r"\\\1{\2}{\3}", latex)
    latex = latex.replace("{align}", "{aligned}").replace("{align*}", "{aligned}")
    if block and r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    try:
        return latex2mathml.tex2mathml(latex, as_block=block)
    except (MathError, IndexError) as error:  # the latter for an exponent without a base
        logger.warning("equation not understood: %s", error, location=node)
        return f"<code>{nodes.unescape(latex)}</code>"


def visit_inline(writer: Any, node: nodes.math) -> None:
    """Write an inline equation."""
    writer.body.append(translate(node.astext(), node, block=False))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.math_block) -> None:
    """Write a displayed equation, with its number where it has one."""
    latex = node.astext()
    numbers = TAG.findall(latex)
    body = translate(TAG.sub("", latex), node, block=True)
    anchor = "".join(f' id="eq-{number}"' for number in numbers[:1])
    number = f'<span class="equation-number">({numbers[0]})</span>' if numbers else ""
    writer.body.append(
        f'<div class="math"{anchor}><div class="equation">{body}</div>{number}</div>'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
