"""The commands: one file each, a dataclass whose fields are the options.

Nothing heavy is imported until a command runs. `run` returns the results, which `show` prints.
"""

from collections.abc import Callable

from ..options import Command
from .app import App
from .certify import Certify
from .corrupt import Corrupt
from .demo import Demo
from .evaluate import Evaluate
from .learn import Learn
from .noise import Noise
from .report import Report
from .restore import Restore
from .sample import Sample
from .solve import Solve

__all__ = [
    "COMMANDS",
    "App",
    "Certify",
    "Command",
    "Corrupt",
    "Demo",
    "Evaluate",
    "Learn",
    "Noise",
    "Report",
    "Restore",
    "Sample",
    "Solve",
]

KINDS = (Demo, Noise, Learn, Restore, Solve, Sample, Corrupt, Evaluate, Certify, Report, App)
COMMANDS: dict[str, Callable[..., Command]] = {kind.__name__.lower(): kind for kind in KINDS}
"""The commands by name, in the order of `unmurk --help`."""
