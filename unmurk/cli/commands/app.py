"""`unmurk app`: restore, learn and solve in a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ...bounds import Real, Text, Whole
from ..options import Command

__all__ = ["App"]


@dataclass
class App(Command):
    """Restore, learn and solve in a browser, on this computer (extra `app`).

    Every action is a command of unmurk, which the page shows. Ctrl-C ends the app and removes all
    uploads and results; runs that learn go on.
    """

    json = False

    host: Annotated[str, Text(253)] = "127.0.0.1"
    """Address to answer at, a text of 1 to 253 characters. With any other than 127.0.0.1 other
    computers can reach the app: then every request needs the token that is printed."""
    port: Annotated[int, Whole(0, 65_535)] = 7860
    """Port, a whole number from 0 to 65535, where 0 takes a free one."""
    token: bool = False
    """Ask for a token at 127.0.0.1 too, on a computer that several people use."""
    runs: Path = Path("runs")
    """Folder for the runs that are learned, which stay. At 127.0.0.1 the app shows all runs in it;
    at other addresses each browser sees its own."""
    files: Annotated[int, Whole(1, 100_000)] = 500
    """Largest number of files of one upload, a whole number from 1 to 100000."""
    megabytes: Annotated[int, Whole(1, 1_000_000)] = 1024
    """Largest size of one upload in MiB, a whole number from 1 to 1000000."""
    megapixels: Annotated[int, Whole(1, 100_000)] = 134
    """Largest number of pixels of one image in millions, a whole number from 1 to 100000."""
    hours: Annotated[float, Real(0.01, 10_000)] = 12.0
    """Hours after which uploads and results of an idle browser are removed, a number from 0.01 to
    10000."""

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        from ..app.server import Place, serve
        from ..app.sessions import Limits

        limits = Limits(
            self.files, self.megabytes * 2**20, self.megapixels * 1_000_000, self.hours
        )
        serve(Place(self.host, self.port, self.token), self.runs, limits)
        return {}
