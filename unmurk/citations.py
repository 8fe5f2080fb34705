r"""BibTeX entries of what a result or a run was made with.

Every solver and every learner carries the BibTeX entry of its paper in the class attribute
`citation`. This module collects the entries that belong to one result or to one run folder, with
the entry of unmurk itself first.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import __version__
from .errors import InputError

__all__ = ["UNMURK", "citation"]

UNMURK = f"""@software{{unmurk,
  title   = {{unmurk: learn what clean images look like from corrupted images only, and restore
             any corruption of them}},
  author  = {{{{The unmurk developers}}}},
  version = {{{__version__}}}
}}"""
"""The BibTeX entry of unmurk itself."""


def citation(of: Any = None) -> str:
    """Return the BibTeX entries of what a result or a run was made with.

    A class without an entry of its own is passed over, so the text always parses as BibTeX.

    Args:
        of: A `Result` of `solve`; a run folder of `learn` (its config.json names the method); a
            solver or a learner, or the class of one; or the name of a solver or of a method of
            learning. None: unmurk alone.

    Returns:
        The entries, with an empty line between two: unmurk, then the paper of the solver or of the
        learning method, then those of its options.

    Raises:
        InputError: The argument is none of these, or the folder holds no run.

    >>> import unmurk
    >>> print(unmurk.citation().splitlines()[0])
    @software{unmurk,
    """
    entries = [UNMURK, *(() if of is None else _entries(of))]
    return "\n\n".join(dict.fromkeys(entries))


def _entries(of: Any) -> Iterator[str]:
    kind = _class_of(of)
    options = _options_of(of)
    more = getattr(kind, "option_citations", {})
    chosen = (text for (name, value), text in more.items() if options(name) == value)
    for text in (getattr(kind, "citation", None), *chosen):
        if isinstance(text, str) and text.strip():
            yield text.strip()


def _options_of(of: Any) -> Callable[[str], Any]:
    """Return what gives the options of a learner, or of the learner of a run, by name."""
    if isinstance(of, Path) or (isinstance(of, str) and (Path(of) / "config.json").is_file()):
        from .io.json_files import read_object

        kept = read_object(Path(of) / "config.json").get("options")
        return kept.get if isinstance(kept, dict) else lambda name: None
    return lambda name: getattr(of, name, None)


def _class_of(of: Any) -> Any:
    """The class of a solver or of a learner that an object stands for."""
    if isinstance(of, type):
        return of
    solver = getattr(of, "solver", None)  # of a result
    if solver is not None:
        return type(solver)
    if hasattr(of, "trace") and hasattr(of, "method"):  # a result that kept only the name
        return _named(of.method)
    if isinstance(of, Path):
        return _learner_of(of)
    if isinstance(of, str):
        return _learner_of(Path(of)) if (Path(of) / "config.json").is_file() else _named(of)
    if any(callable(getattr(of, name, None)) for name in ("iterate", "run", "losses")):
        return type(of)
    raise InputError(
        f"expected a result, a run folder, a solver, a learner or a name, got {type(of).__name__}:"
        " see help(unmurk.citation)"
    )


def _learner_of(run: Path) -> Any:
    """The class that a run folder was learned with; None for one that is not installed here."""
    from .io.json_files import read_object
    from .training import METHODS

    config = run / "config.json"
    method = read_object(config).get("method")
    if not isinstance(method, str):
        raise InputError(f"{config} does not name a method of learning: give a run folder")
    return METHODS.get(method)


def _named(name: str) -> Any:
    """The class of the solver or of the learner with this name."""
    from .solvers import METHODS as SOLVERS
    from .training import METHODS as LEARNERS

    known: dict[str, Any] = {**LEARNERS, **SOLVERS}
    if name not in known:
        raise InputError(
            f"'{name}' is neither a run folder, a solver nor a method of learning: choose one of "
            f"{', '.join(known)}"
        )
    return known[name]
