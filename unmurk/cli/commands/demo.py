"""`unmurk demo`: the demonstration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io.outputs import output
from ..options import Command, Json, Seed, job_of

__all__ = ["Demo"]


@dataclass
class Demo(Command):
    """Learn a prior from noisy digits only, and restore with it (minutes on a CPU)."""

    out: Path = Path("demo")
    """Folder for the report and the run; a killed demo continues from there."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        from .. import demo

        with output(self.out, owner=True, job=job_of(self)) as to:
            to.expect(["report.html"])
            return demo.run(to.path, seed=self.seed)

    def show(self, result: dict[str, Any]) -> None:
        """Print the scores as a table."""
        from rich.console import Console

        from .. import demo

        Console().print(demo.table(result))
        print(f"{result['seconds']:.0f} s; pictures: {result['report']}")
