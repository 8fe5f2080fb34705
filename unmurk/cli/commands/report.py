"""`unmurk report`: the page of a run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ...io.outputs import output
from ..options import Command, Json

if TYPE_CHECKING:
    from ..report import Section

__all__ = ["Report", "page_of"]


@dataclass
class Report(Command):
    """Write the page of a run: settings, curves, pictures."""

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Run folder."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        with output(self.run_folder / "report.html", folder=False):
            return {"report": page_of(self.run_folder)}


def page_of(run: Path, data: Path | None = None) -> Path:
    """Write the page of a run: its images restored, new images, and what to run next.

    Args:
        run: The run folder.
        data: What the run learned from, for the commands on the page.

    Returns:
        The file.
    """
    from ..report import Commands
    from ..run_page import drawn, restored, run_report

    sections: list[Section] = []
    if (run / "config.json").exists():
        if (run / "posterior" / "config.json").exists():
            sections += restored(run)
        if (run / "prior" / "model_index.json").exists():
            sections += drawn(run)
        images = shlex.quote(str(data or "IMAGES"))
        folder = shlex.quote(str(run))
        lines = {
            "Restore images like these, with error bars": (
                f"unmurk restore {images} --prior {folder} --out restored --std"
            ),
            "Undo another corruption with the same prior": (
                f"unmurk solve {images} --prior {folder} --operator inpaint:box,size=10 "
                "--noise 0.05 --out solved"
            ),
            "Draw new images": f"unmurk sample --prior {folder} --out new",
        }
        sections.append(Commands("What to run next", lines))
    return run_report(run, sections=sections)
