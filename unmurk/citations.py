r"""BibTeX entries of what a result or a run was made with.

Every solver and every learner carries the BibTeX entry of its paper in the class attribute
`citation`; `Learner.papers` adds those of its options. This module collects the entries that
belong to one result or to one run folder, with the entry of unmurk itself first.
"""

from collections.abc import Iterator
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
        of: A `Result` of `solve`; a run folder of `learn` (its config.json names the method and
            its options); a solver or a learner, or the class of one; or the name of a solver, of
            a method of learning or of a model in the package. "auto" stands for all solvers among
            which it selects; the result names the one that ran. None: unmurk alone.

    Returns:
        The entries, with an empty line between two: unmurk, then the paper of the solver or of the
        learning method, then those of its options, of the solver that it draws images with, and
        of the optimizer.

    Raises:
        InputError: The argument is none of these, the folder holds no run, or the method of the
            run is not installed.

    >>> import unmurk
    >>> print(unmurk.citation().splitlines()[0])
    @software{unmurk,
    """
    entries = [UNMURK, *(() if of is None else _entries(of))]
    return "\n\n".join(dict.fromkeys(entries))


def _entries(of: Any) -> Iterator[str]:
    """The entries of a solver, a learner, a run or a rule that selects solvers."""
    from .solvers import METHODS as SOLVERS
    from .solvers import Auto

    of = _run_of(of)
    if (isinstance(of, str) and of == "auto") or of is Auto or isinstance(of, Auto):
        kinds: list[Any] = [SOLVERS[name] for name in Auto.candidates]
        texts = [getattr(kind, "citation", None) for kind in kinds]
    else:
        kind = _class_of(of)
        papers = getattr(kind, "papers", None)
        texts = papers(_options_of(of)) if papers else [getattr(kind, "citation", None)]
    for text in texts:
        if isinstance(text, str) and text.strip():
            yield text.strip()


def _run_of(of: Any) -> Any:
    """The folder of a run or of a packaged model that a text names; anything else as it is."""
    from .io.packaged import model_folder, models

    if not isinstance(of, str):
        return of
    if (Path(of) / "config.json").is_file():
        return Path(of)
    return model_folder(of) if of in models() else of


def _options_of(of: Any) -> dict[str, Any]:
    """Return the options of a learner, or of the learner of a run, by name."""
    from .io.json_files import read_object
    from .training import Learner
    from .training.learner import as_dict

    if isinstance(of, Learner):
        return as_dict(of)
    if not isinstance(of, Path):
        return {}
    config = read_object(of / "config.json")
    options, problem = config.get("options"), config.get("problem")
    found = options if isinstance(options, dict) else {"objective": config.get("objective")}
    operator = problem.get("operator") if isinstance(problem, dict) else None
    return {**found, "operator": operator, "half scale": config.get("half scale", False)}


def _class_of(of: Any) -> Any:
    """The class of a solver or of a learner that an object stands for."""
    from .training import Learner

    if isinstance(of, type):
        return of
    if isinstance(of, Learner):
        return type(of)
    solver = getattr(of, "solver", None)  # of a result
    if solver is not None:
        return type(solver)
    if hasattr(of, "trace") and hasattr(of, "method"):  # a result that kept only the name
        return _named(of.method)
    if isinstance(of, Path):
        return _learner_of(of)
    if isinstance(of, str):
        return _named(of)
    if any(callable(getattr(of, name, None)) for name in ("iterate", "run", "losses")):
        return type(of)
    raise InputError(
        f"expected a result, a run folder, a solver, a learner or a name, got {type(of).__name__}:"
        " see help(unmurk.citation)"
    )


def _learner_of(run: Path) -> Any:
    """The class that a run folder was learned with."""
    from .io.json_files import read_object
    from .io.packaged import ASSETS
    from .training import METHODS, Learner, learner_class, names

    config = run / "config.json"
    method = read_object(config).get("method")
    if not isinstance(method, str):
        raise InputError(f"{config} does not name a method of learning: give a run folder")
    if method in METHODS:
        return METHODS[method]
    if method in names():
        return learner_class(method)
    if run.parent == ASSETS:  # learned from clean images by a script, with the training loop
        return Learner
    raise InputError(
        f"{run} was learned by '{method}', which is not known here: install its package, or "
        "import the module that registers it"
    )


def _named(name: str) -> Any:
    """The class of the solver or of the learner with this name."""
    from .io.packaged import models
    from .solvers import METHODS as SOLVERS
    from .training import METHODS as LEARNERS

    known: dict[str, Any] = {**LEARNERS, **SOLVERS}
    if name not in known:
        raise InputError(
            f"'{name}' is neither a run folder, a solver nor a method of learning: choose one of "
            f"{', '.join([*known, 'auto', *models()])}"
        )
    return known[name]
