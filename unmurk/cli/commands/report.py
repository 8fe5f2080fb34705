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

__all__ = ["Report", "page_of", "verdict_of"]


@dataclass
class Report(Command):
    """Write the page of a run: settings, curves, pictures."""

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Run folder."""
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        with output(self.run_folder / "report.html", folder=False):
            return {"report": page_of(self.run_folder), **verdict_of(self.run_folder)}


def verdict_of(run: Path) -> dict[str, Any]:
    """Return the verdict on a run for the result of a command; nothing if it has none."""
    from ...evaluation.verdict import Verdict

    found = Verdict.load(run)
    return {} if found is None else {"trusted": found.trusted, "verdict": found.text}


def page_of(run: Path, data: Path | None = None) -> Path:
    """Write the page of a run: its images restored, new images, and what to run next.

    Args:
        run: The run folder.
        data: What the run learned from, for the commands on the page.

    Returns:
        The file.
    """
    from ...training.preview import progress_of
    from ..report import Commands
    from ..run_page import drawn, restored, run_report, unfinished
    from ..unfinished import course

    share = progress_of(run) if (run / "config.json").exists() else None
    if share is not None:
        return unfinished(run, share)
    sections: list[Section] = []
    if (run / "config.json").exists():
        if (run / "posterior" / "config.json").exists():
            first = restored(run)
            if first is not None:
                sections += [first, *course(run, first.items)]
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
