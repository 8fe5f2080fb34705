"""`unmurk certify`: the solvers on problems with an exact posterior."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from ...io.outputs import output
from ..options import Command, Json, MaybePath, Seed

__all__ = ["Certify"]


@dataclass
class Certify(Command):
    """Test the solvers on problems whose posterior is known exactly, with noise of 0.005 to 0.5.

    The test runs on the CPU, with one process per core: the images have 60 pixels. It takes a few
    minutes on two cores.
    """

    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Solvers, such as pnp-dm or red-diff:paper (method:preset); unset: those that claim to return
    posterior samples or a point estimate, and with --thorough all."""
    thorough: bool = False
    """Use all problems instead of a dozen that cover them, and all solvers: half an hour."""
    out: MaybePath = None
    """Folder for certify.json (all figures) and certify.png (a picture of them)."""
    seed: Seed = 0
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        from .. import certificate

        with output(self.out) if self.out else nullcontext() as to:
            if to is None:
                return certificate.run(self.methods, None, seed=self.seed, thorough=self.thorough)
            to.record()
            to.expect(["certify.json", "certify.png"])
            found = certificate.run(self.methods, to.path, seed=self.seed, thorough=self.thorough)
            to.end(("certify", 0, 0, 0))
            return found

    def show(self, result: dict[str, Any]) -> None:
        """Print the figures as a table."""
        from rich.console import Console

        from .. import certificate

        wide = Console(width=max(Console().width, certificate.WIDTH))
        rows = certificate.read(result)
        wide.print(certificate.lines(rows))
        print(certificate.CAPTION)
        print(certificate.reference(rows), end="")
