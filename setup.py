"""The description of the package: the README, with links that work outside of the repository.

Links of the README are relative, so that they work in every checkout. With an address `Source` in
[project.urls] they become addresses of the tagged version; without one they are left out.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
LINK = re.compile(r"(!?)\[([^][]*)\]\((?!\w+:|#)([^()\s]+)\)")
PICTURE = re.compile(rf"^{LINK.pattern}\n+(\*[^*]+\*\n+)?".replace("(!?)", "!"), re.MULTILINE)
ASIDE = re.compile(rf"\s*\({LINK.pattern}\)".replace("(!?)", ""))


def description(readme: str, source: str, version: str) -> str:
    """The README as text of a package: no comments, no relative links.

    Without a source, pictures go with their captions, and links in parentheses go too.
    """
    text = COMMENT.sub("", readme)
    if not source:
        return LINK.sub(r"\2", ASIDE.sub("", PICTURE.sub("", text)))

    def absolute(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({source.rstrip('/')}/{kind}/v{version}/{path})"

    return LINK.sub(absolute, text)


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    setup(
        long_description=description(
            (HERE / "README.md").read_text(),
            project.get("urls", {}).get("Source", ""),
            project["version"],
        ),
        long_description_content_type="text/markdown",
    )
