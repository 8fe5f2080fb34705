"""`unmurk report`: the page of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ...io.outputs import output
from ..data import place
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
        with output(self.run_folder / "report.html", folder=False) as to:
            return {"report": page_of(to.path.parent)}


def page_of(run: Path) -> Path:
    """Write the page of a run, with new images from its prior if there is one.

    Returns:
        The file.
    """
    from ..report import Images
    from ..run_page import run_report

    sections: list[Section] = []
    if (run / "config.json").exists() and (run / "prior" / "model_index.json").exists():
        from ...diffusion.prior import Prior

        new = place(Prior.load(run))[0].sample(16).cpu()
        sections.append(Images("Drawn from the prior", [list(new[:8]), list(new[8:])], tile=84))
    return run_report(run, sections=sections)
