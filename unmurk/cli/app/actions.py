"""What the buttons of the app do: each is a command of `unmurk`, and a page of its result.

A generator of this module yields lines about the progress and returns its result. The module knows
nothing of gradio, so that tests and scripts can drive it. Whatever a client sends is checked here:
texts that become arguments, names of priors, paths. Paths are accepted only by an app that answers
to this machine alone (`Desk.local`).
"""

import os
import shutil
import zipfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...bounds import Real, Whole
from ...errors import InputError
from ...io.packaged import GENERIC, SETS, models
from ...progress import is_line
from ..commands.restoring import trained_problem
from ..data import problem_of, run_span
from .jobs import Job, shown
from .judgment import section_on
from .pages import examples_of, write_page
from .pictures import write_mask
from .records import PAGE, Estimate, Images, Outcome, first_of
from .runs import Runs
from .sessions import Session, Sessions
from .spare import Spare
from .wording import in_app

__all__ = ["Desk", "packaged_priors"]

ALL_FILES = "all-files.zip"
LOG = "unmurk.jsonl"
EXAMPLE = "digits:test"
NO_PATHS = "paths can be named only in an app that answers to this machine alone"
ANSWERS, KIMG = Whole(1, 16), Real(0.001, 10_000)
LONGEST = 300  # characters of a text that becomes an argument
RESTORED = "restored"
SAMPLE = 64  # images from which the noise on a page is estimated, where the user gave auto

Steps = Generator[str, None, Outcome]


class Desk:
    """What an app offers its users.

    Args:
        sessions: The files of its users.
        runs: Folder of the learned runs.
        local: Whether the app answers to this machine alone, so that users may name paths.
        spare: Where a process may wait for the next command.
    """

    def __init__(
        self, sessions: Sessions, runs: Path, local: bool, spare: Spare | None = None
    ) -> None:
        self.sessions, self.local, self.spare = sessions, local, spare
        self.root = Path(os.path.abspath(runs))
        self._runs: dict[str, Runs] = {}

    def session(self, name: str) -> Session:
        """Return the session of a name that `guard` has given."""
        return self.sessions.of(name)

    def runs(self, session: Session) -> Runs:
        """Return the runs that a user sees: all of this machine, or those of the session."""
        folder = self.root if self.local else self.root / f"user-{session.folder.name}"
        return self._runs.setdefault(str(folder), Runs(folder, self.spare))

    # -- images -----------------------------------------------------------------------------------

    def upload(self, session: Session, files: Sequence[str | Path]) -> Images:
        """Take uploaded files into the session.

        Raises:
            InputError: They are too many or too large.
        """
        uploads = self.sessions.uploads.resolve()
        if not all(Path(file).resolve().is_relative_to(uploads) for file in files):
            raise InputError("the files were not uploaded here")
        data = session.keep(files)
        return Images(data, data.name if len(files) == 1 else "IMAGES")

    def discard(self, session: Session, images: Images | None) -> None:
        """Remove uploaded images that others take the place of.

        Images that a reloaded page has taken over stay: another page may show them, too.
        """
        session.kept.pop("images", None)
        if images is not None and images.uploaded and images.data not in session.shared:
            folder = images.data if images.data.is_dir() else images.data.parent
            if folder.parent == session.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def readable(self, images: Images) -> bool:
        """Whether the first of the images can be read, with whatever black and white."""
        try:
            first_of(replace(images, span=images.span or (0.0, 1.0)))
        except InputError:
            return False
        return True

    def named(self, path: str) -> Images:
        """Return the images at a path of this machine.

        Raises:
            InputError: The app answers to other machines too, or there is nothing there.
        """
        if not self.local:
            raise InputError(NO_PATHS)
        text = path.strip()
        if not text or "\0" in text:
            raise InputError("there is no path: give a folder or a file")
        if text in SETS:
            return Images(Path(text), text, False)
        where = Path(os.path.abspath(Path(text).expanduser()))
        if not where.exists():
            raise InputError(f"there is nothing at {where}: give a folder or a file")
        return Images(where, text, False)

    def example(self, session: Session) -> Generator[str, None, Images]:
        """Make an example: digits of the package with noise.

        Raises:
            InputError: There is no room for them.
        """
        folder = session.new_folder("images")
        out = folder / "noisy-digits.npy"
        argv = ["corrupt", EXAMPLE, "--noise", "0.3", "--out", str(out)]
        yield from self._run(session, self._job(session, argv), "Making noisy digits")
        few = out.with_name("digits.npy")
        np.save(few, np.load(out, allow_pickle=False)[:64])
        out.unlink()
        return Images(few, few.name)

    def forget(self, session: Session) -> None:
        """Stop the commands of a session, and remove its files."""
        session.close()

    # -- commands ---------------------------------------------------------------------------------

    def measure(self, session: Session, images: Images) -> Generator[str, None, Estimate]:
        """Estimate the noise of images.

        Raises:
            InputError: They cannot be read.
        """
        argv = ["noise", str(images.data), *_span(images)]
        job = self._job(session, argv)
        yield from self._run(session, job, f"Reading {images.label} and estimating the noise")
        figures = job.result()
        return Estimate(str(figures["noise"]), figures, shown(argv, _names(images)))

    def priors(self, session: Session) -> list[tuple[str, str]]:
        """List the priors that a user can choose, as label and value."""
        runs = self.runs(session)
        known = [runs.progress(name) for name in runs.names()]
        found = [(f"{one.name}, {one.learned}", f"run:{one.name}") for one in known if one.usable]
        return found + packaged_priors()

    def prior(self, session: Session, value: str | None) -> str:
        """Return the prior of a choice: a name of the package, or the folder of a run.

        Raises:
            InputError: It is none of those that can be chosen.
        """
        choices = {choice for _, choice in self.priors(session)}
        if not value:
            raise InputError("choose a prior, or learn one from these images first")
        if value not in choices:
            raise InputError("this prior is none of those here: choose another")
        if value.startswith("run:"):
            return str(self.runs(session).path(value.removeprefix("run:")))
        return value

    def restore(
        self,
        session: Session,
        images: Images,
        prior: str | None,
        noise: str = "",
        estimated: str = "",
        samples: int = 16,
    ) -> Steps:
        """Restore images with the posterior of a run.

        Args:
            session: The user.
            images: The images.
            prior: One of `priors`.
            noise: Text form of the noise; empty: that of the run, or with generic the estimate.
            estimated: The estimate of the noise.
            samples: Posterior samples for each mean and standard deviation.

        Raises:
            InputError: The command refuses its input, or was stopped.
        """
        model = self.prior(session, prior)
        noise = _argument("noise", noise) or (estimated if model in GENERIC else "")
        folder = session.new_folder("result")
        argv = ["restore", str(images.data), "--prior", model, "--out", str(folder / RESTORED)]
        argv += ["--std", "--samples", str(samples), *_span(images)]
        argv += ["--noise", noise] if noise else []
        outcome = yield from self._result(
            session, folder, argv, images, model, (None, noise or None), "restored"
        )
        return outcome

    def solve(
        self,
        session: Session,
        images: Images,
        prior: str | None,
        operator: str,
        noise: str,
        method: str = "red-diff",
        samples: int = 1,
        layers: Sequence[np.ndarray] | None = None,
    ) -> Steps:
        """Solve another corruption with a prior.

        Args:
            session: The user.
            images: The images.
            prior: One of `priors`.
            operator: Text form of the forward model; "hole": what `layers` paint is missing.
            noise: Text form of the noise.
            method: Name of the solver.
            samples: Solutions for each image.
            layers: What was painted, each (H, W, 4).

        Raises:
            InputError: The command refuses its input, or was stopped.
        """
        from ...solvers import METHODS

        model = self.prior(session, prior)
        if method != "auto" and method not in METHODS:
            raise InputError(f"unknown solver: choose one of {', '.join(METHODS)}")
        samples = ANSWERS.check("answers", samples)
        folder = session.new_folder("result")
        if operator == "hole":
            size = first_of(images).shape[-2:]
            write_mask(list(layers or []), (size[0], size[1]), folder / "mask.png")
            operator = f"inpaint:file,path={folder / 'mask.png'}"
        else:
            operator = self._operator(operator)
        argv = ["solve", str(images.data), "--prior", model, "--operator", operator]
        noise = _argument("noise", noise) or "auto"
        argv += ["--noise", noise, "--method", method]
        argv += ["--samples", str(samples), "--out", str(folder / RESTORED), *_span(images)]
        outcome = yield from self._result(
            session, folder, argv, images, model, (operator, noise), "solved"
        )
        return outcome

    def learn(
        self,
        session: Session,
        images: Images,
        name: str,
        noise: str,
        kimg: float = 20.0,
        operator: str = "identity",
    ) -> str:
        """Start to learn from images; the run goes on without the page.

        Returns:
            The command.

        Raises:
            InputError: The name is taken, or a text is not usable.
        """
        operator = self._operator(operator)
        rest = ["--noise", _argument("noise", noise) or "auto"]
        rest += ["--kimg", f"{KIMG.check('the length', kimg):g}"]
        if operator not in ("", "identity"):
            rest += ["--operator", operator]
        rest += _span(images)

        def command(data: Path, out: Path) -> list[str]:
            return ["learn", str(data), "--out", str(out), *rest]

        runs = self.runs(session)
        if not self.local and any(runs.progress(one).running for one in runs.names()):
            raise InputError("you are learning already: stop that run first, or wait for it")
        runs.start(name.strip(), images.data, command, images.uploaded)
        place = str(runs.path(name.strip()))
        return shown(command(Path(images.label), Path(place)), _relative(place))

    def _operator(self, text: str) -> str:
        """Return the text form of an operator that the user gave."""
        if not self.local and "path" in text:
            raise InputError(NO_PATHS)
        return _argument("operator", text)

    # -- the work ---------------------------------------------------------------------------------

    def _job(self, session: Session, argv: Sequence[str], folder: Path | None = None) -> Job:
        folder = folder or session.new_folder("log")
        job = Job(argv, folder, session.limits.pixels, self.spare)
        session.jobs = [one for one in session.jobs if one.running] + [job]
        return job

    def _run(self, session: Session, job: Job, what: str = "") -> Generator[str, None, None]:
        """Wait for a job and yield how it goes; errors do not name folders of the session."""
        try:
            last = ""
            for remarks in job.wait():
                line = what + (f": {session.said(remarks[-1])}" if remarks else "")
                if line != last:  # each line is sent to the browser
                    yield line
                last = line
            job.result()
        except InputError as error:
            raise InputError(session.said(str(error))) from None
        finally:
            if job.running:  # the user has left
                job.stop()
            if self.spare is not None:  # not before: its imports would slow the job
                self.spare.ready()

    def _result(
        self,
        session: Session,
        folder: Path,
        argv: list[str],
        images: Images,
        model: str,
        known: tuple[str | None, str | None],
        done: str,
    ) -> Steps:
        """Run a command that writes images, and offer its files and its page.

        Args:
            known: Text forms of the operator and of the noise; None: those of the run.
        """
        job = self._job(session, argv, folder)
        yield from self._run(session, job, f"Working on {images.label}")
        yield "Drawing the page"
        out = folder / RESTORED
        names = _names(images) | {str(out): RESTORED, str(folder / "mask.png"): "mask.png"}
        command = shown(argv, names | _relative(model))
        lines = [line for line in job.remarks() if line.strip() and not is_line(line)]
        remarks = [in_app(session.said(line)) for line in lines]
        span: Any = images.span or run_span(model)
        sample = _sample(images, span)
        if argv[0] == "restore":
            problem = trained_problem(model, *known, *sample, ranged=bool(images.span))
        else:
            problem = problem_of(str(known[0]), str(known[1]), *sample)
        examples = examples_of(images.data, job.result(), out, span)
        commands = {"The files of this page": command}
        more: list[Any] = []
        if argv[0] == "restore":
            yield "Judging the result"
            more = [section_on(model, examples, problem)]
        title = f"{images.label}, {done}"
        page = write_page(folder / PAGE, title, examples, problem, commands, remarks, more)
        made = [*sorted(out.iterdir()), folder / "mask.png"]
        files = {
            path.name: path
            for path in made
            if path.is_file() and path.name != LOG and not path.name.startswith(".")
        }
        if len(files) > 1:
            archive = folder / ALL_FILES
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
                for name, path in files.items():
                    packed.write(path, name)
            files = {ALL_FILES: archive, **files}
        key = session.offer({PAGE: page, **files})
        return Outcome(key, list(files), command, remarks)


def packaged_priors() -> list[tuple[str, str]]:
    """List the priors in the package, as label and value.

    >>> packaged_priors()[0]
    ('generic, in the package', 'generic')
    """
    known = [*GENERIC, *(name for name in models() if name not in GENERIC)]
    return [(f"{name}, in the package", name) for name in known]


def _sample(images: Images, span: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return functions that read the first images and their scale, for the noise of the page."""

    @cache
    def read() -> Any:
        from ...io.images import read_images

        return read_images(images.data, limit=SAMPLE, span=span, nan="mask", skip_bad=True)

    return lambda: read().images, lambda: read().scale


def _argument(name: str, text: str) -> str:
    """Return a text of the user that becomes an argument of a command.

    Raises:
        InputError: It is too long, has control characters, or would be read as an option.
    """
    text = text.strip()
    if len(text) > LONGEST or not text.isprintable():
        raise InputError(f"{name}: give a text of at most {LONGEST} printable characters")
    if text.startswith("-"):
        raise InputError(f"{name}: it cannot begin with a minus sign")
    return text


def _span(images: Images) -> list[str]:
    return ["--range", *(f"{v:.15g}" for v in images.span)] if images.span else []


def _names(images: Images) -> dict[str, str]:
    return {str(images.data): images.label}


def _relative(model: str) -> dict[str, str]:
    """Return how a user names the folder of a run from where the app was started."""
    path = Path(model)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return {model: str(path.relative_to(Path.cwd()))}
    return {}
