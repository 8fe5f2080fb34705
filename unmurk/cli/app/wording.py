"""Pieces of the page of the app: lines, links, commands.

Everything that depends on a file or a user goes through `markupsafe`: a file name is never HTML.
Messages come from code that the command line shares, and name its options. `in_app` names the
fields of the app in their place; only commands to copy keep their options.
"""

import re
import sys
import traceback
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ...errors import InputError
from .records import Estimate, Outcome

__all__ = [
    "EMPTY",
    "LABELS",
    "busy",
    "command",
    "failed",
    "finished",
    "follow",
    "frame",
    "in_app",
    "measured",
    "noted",
]

EMPTY = Markup("")
LABELS = {
    "range": "Black and white of the files",
    "noise": "Noise",
    "operator": "Operator",
    "prior": "Prior",
    "method": "Solver",
    "samples": "Answers",
    "kimg": "Length",
}
"""Labels of the fields of the app, by the option of the command line that each stands for."""
RANGE = f"“{LABELS['range']}”"
LIMIT = r"(BLACK|WHITE|-?[0-9][0-9.e+-]*)"
PHRASES = [
    (r"--range BLACK WHITE", RANGE),
    (rf"--range {LIMIT} {LIMIT}", rf"\1 and \2 in {RANGE}"),
    (r"the same command with a larger --kimg, or in the app ", ""),
    (r" \(unmurk noise IMAGES\)", ""),
    (r" with --skip-bad| \(--skip-bad\)", ""),  # after "leave these images out"
]
"""Parts of messages that the app says in other words."""
OPTION = re.compile(r"(?<![\w/.-])--([a-z]+(?:-[a-z]+)*)(?![\w.-]*\.\w)")  # no file name


def in_app(text: str) -> str:
    """Return a message in the words of the app: its fields in place of options.

    Args:
        text: A message that may name options of the command line.

    >>> in_app("give --noise a number")
    'give “Noise” a number'
    >>> in_app("name the axes, such as --axes TZCYX")
    'name the axes, such as the command-line option axes TZCYX'
    """
    for pattern, words in PHRASES:
        text = re.sub(pattern, words, text)

    def named(found: re.Match[str]) -> str:
        name = found[1]
        if name in LABELS:
            return f"“{LABELS[name]}”"
        return f"the command-line option {name}"

    return OPTION.sub(named, text)


def busy(text: str) -> Markup:
    """Return a line about work in progress."""
    return Markup('<p class="note busy" role="status">{}</p>').format(in_app(text) + " …")


def failed(text: str) -> Markup:
    """Return a line about what went wrong."""
    return Markup('<p class="note wrong" role="alert">{}</p>').format(in_app(text))


def noted(text: str) -> Markup:
    """Return a line about a result."""
    return Markup('<p class="note" role="status">{}</p>').format(in_app(text))


def command(text: str) -> Markup:
    """Return a command to copy."""
    return Markup(
        '<p class="soft">The same on the command line:</p>'
        '<pre class="command"><code>{}</code></pre>'
    ).format(text)


def measured(found: Estimate) -> Markup:
    """Return the estimate of the noise."""
    kind = Markup('<li class="{}">{}</li>')
    items = Markup("").join(
        kind.format("wrong" if line.startswith("warning") else "", in_app(line))
        for line in found.lines()
    )
    return Markup('<ul class="estimate">{}</ul>{}').format(items, command(found.command))


def finished(outcome: Outcome) -> Markup:
    """Return the downloads and the page of a result."""
    link = Markup('<a class="file" href="results/{}/{}" download>{}</a>')
    files = Markup(" ").join(link.format(outcome.key, quote(n), n) for n in outcome.files[:40])
    rest = len(outcome.files) - 40
    if rest > 0:
        files += Markup(" and {} more in the archive").format(rest)
    said = Markup("").join(noted(line) for line in outcome.remarks)
    return Markup(
        '<p class="soft">Download, in the format and the range that came in:</p>'
        '<p class="files">{}</p>{}{}{}'
    ).format(files, said, command(outcome.command), frame(outcome.page))


def frame(page: str) -> Markup:
    """Return a page of a result in a frame, which grows with it."""
    return Markup(
        '<iframe class="page" src="{}" title="The images, before and after"></iframe>'
        '<p class="soft"><a href="{}" target="_blank">Open the page alone</a></p>'
    ).format(page, page)


def follow(steps: Generator[str, None, Any]) -> Iterator[tuple[Markup, Any]]:
    """Iterate over lines about an action, each with None; the last one comes with its result.

    >>> def steps():
    ...     yield "Reading"
    ...     return 3
    >>> [result for _, result in follow(steps())]
    [None, 3]
    """
    try:
        while True:
            yield busy(next(steps)), None
    except StopIteration as end:
        yield EMPTY, end.value
    except InputError as error:
        yield failed(str(error)), None
    except Exception as error:  # a mistake of the app: its terminal has the details
        traceback.print_exc(file=sys.stderr)
        yield failed(f"the app failed ({type(error).__name__}): see its terminal"), None
