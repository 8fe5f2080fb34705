"""Models of a run that is still training, written about once a minute.

A preview writes the EMA weights as `prior/` and `posterior/`, so that every command takes the
unfinished run, and `progress.json`, which says of what share of the training they are. Then it
calls a function of the caller's, which may write a page. `progress.json` is removed at the end.

Previews leave the random streams as they were, so the run ends bit for bit as one without them.
All previews together take less than `COST` of the run's time.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..devices import out_of_memory
from ..errors import InputError, remark
from ..io.atomic import write
from ..io.json_files import read_object
from .run_folder import save_model

__all__ = ["Preview", "progress_of"]

FILE = "progress.json"
EVERY = 60.0  # seconds
COST = 0.02  # of the time of the run
TENTHS = 10
GUESS = 0.5  # seconds of the first preview


def progress_of(run: str | Path) -> float | None:
    """Return the share of its training that the models of an unfinished run are of.

    Args:
        run: The run folder.

    Returns:
        A number from 0 to 1; None if the run has ended, or has written no models.

    Raises:
        InputError: The file is damaged.

    >>> Path("half").mkdir()
    >>> Path("half/progress.json").write_text('{"share": 0.5}')
    14
    >>> progress_of("half"), progress_of("finished") is None
    (0.5, True)
    """
    path = Path(run) / FILE
    if not path.exists():
        return None
    share = read_object(path).get("share")
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise InputError(f"{path} has no share from 0 to 1: remove it")
    return float(share)


class Preview:
    """Write the models of an unfinished run from time to time.

    Args:
        run: The run folder.
        watch: Called with the share of the run after each preview; None: nothing is called.
        every: Seconds between two previews.
        cost: Largest share of the run's time that previews take.

    >>> from unmurk.flows.posterior import Posterior
    >>> preview = Preview(Path("previewed"), watch=lambda share: print(f"{share:.0%}"))
    >>> preview.make({"posterior": Posterior.create("tiny", (1, 8, 8), 0.1)}, 0.25)
    25%
    >>> progress_of("previewed")
    0.25
    """

    def __init__(
        self,
        run: Path,
        watch: Callable[[float], object] | None = None,
        every: float = EVERY,
        cost: float = COST,
    ) -> None:
        self.run, self.watch, self.every, self.cost = run, watch, every, cost
        self.last = self.start = time.perf_counter()
        self.spent, self.longest, self.tenth = 0.0, GUESS, 0

    def due(self, share: float) -> bool:
        """Whether a preview is due at a share of the run: for its time, or for another tenth."""
        now = time.perf_counter()
        asked = now - self.last >= self.every or int(TENTHS * share) > self.tenth
        return asked and self.spent + self.longest <= self.cost * (now - self.start)

    def after(self, step: int, steps: int, models: Mapping[str, Any]) -> None:
        """Make a preview after a step, if one is due and the run goes on."""
        if step < steps and self.due(step / steps):
            self.make(models, step / steps)

    def leave(self, step: int, steps: int, models: Mapping[str, Any]) -> None:
        """Make a last preview of a run that is interrupted, if it has lasted a while."""
        if step < steps and time.perf_counter() - self.start > self.every / 2:
            self.make(models, step / steps)

    def make(self, models: Mapping[str, Any], share: float) -> None:
        """Write the models and the progress, and call `watch`.

        Args:
            models: The EMA models by name, of which `prior` and `posterior` are written.
            share: Share of the run, 0 to 1.

        Raises:
            InputError: A file cannot be written.
        """
        begin = time.perf_counter()
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            for name in ("prior", "posterior"):
                if name in models:
                    save_model(self.run / name, models[name])
            write(self.run / FILE, (json.dumps({"share": share}) + "\n").encode())
            self._call(share)
        self.last, self.tenth = time.perf_counter(), int(TENTHS * share)
        self.spent += self.last - begin
        self.longest = max(self.longest, self.last - begin)

    def _call(self, share: float) -> None:
        """Call `watch`; if it fails, say so once and leave it: the run goes on."""
        if self.watch is None:
            return
        why = ""
        try:
            self.watch(share)
        except InputError as error:
            why = str(error)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            why = "too little memory"
        if why:
            self.watch = None
            remark(f"no more previews: {why}")

    def end(self) -> None:
        """Remove what only an unfinished run has."""
        (self.run / FILE).unlink(missing_ok=True)
