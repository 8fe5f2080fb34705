"""Write one page of the API reference for each module that declares public names, and their list.

The names come from the modules' ``__all__``, so a public object can neither be forgotten nor be
listed after it is gone. The pages lie in ``docs/api/generated`` and are not kept under version
control.
"""

import ast
from itertools import pairwise
from pathlib import Path

from sphinx.application import Sphinx

__all__ = ["setup"]

ROOT = Path(__file__).parents[2]
PLACE = Path("api", "generated")


def public(path: Path) -> list[str]:
    """Return the names in the ``__all__`` of a source file, in their order; none without it."""
    for node in ast.parse(path.read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            value = getattr(node, "value", None)
            if isinstance(value, (ast.List, ast.Tuple)):
                return [e.value for e in value.elts if isinstance(e, ast.Constant)]
    return []


def defined(path: Path, names: list[str]) -> dict[str, str]:
    """Return those of the names that the source file itself defines, with the directive of each.

    A constant counts if a docstring follows it.
    """
    kinds = {ast.ClassDef: "autoclass", ast.FunctionDef: "autofunction"}
    body = ast.parse(path.read_text()).body
    here = {n.name: kinds[type(n)] for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    for node, after in pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            here |= {
                t.id: "autodata" for t in targets if isinstance(t, ast.Name) and t.id.isupper()
            }
    return {name: here[name] for name in names if name in here}


def page(module: str, names: dict[str, str]) -> str:
    """Return the source of a module's page: its theory, a table of its names, then each name."""
    lines = [module, "=" * len(module), "", f".. automodule:: {module}", ""]
    if names:
        lines += [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
    options = {
        "autoclass": ["   :members:", "   :show-inheritance:"],
        "autodata": ["   :no-value:"],
    }
    for name, kind in names.items():
        lines += [f".. {kind}:: {name}", *options.get(kind, []), ""]
    return "\n".join(lines)


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, as a cell of a Markdown table."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|").replace("``", "`")


def contents(summaries: dict[str, str]) -> str:
    """Return the list of the modules, as Markdown: a table for each package."""
    packages: dict[str, list[str]] = {}
    for module in summaries:
        parts = module.split(".")
        packages.setdefault(parts[1] if len(parts) > 2 else "", []).append(module)
    lines = []
    for package, modules in sorted(packages.items()):
        title = f"`unmurk.{package}`" if package else "Modules of `unmurk`"
        lines += [f"## {title}", "", "| module | what it is |", "|---|---|"]
        for module in modules:
            name = ".".join(module.split(".")[2 if package else 1 :])
            lines += [f"| {{doc}}`{name} <generated/{module}>` | {summaries[module]} |"]
        lines += [""]
    return "\n".join(lines)


def write(app: Sphinx) -> None:
    """Write the pages; leave alone those that have not changed, so that a rebuild is short."""
    place = Path(app.srcdir) / PLACE
    place.mkdir(parents=True, exist_ok=True)
    pages, summaries = {}, {}
    for path in sorted((ROOT / "unmurk").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] == "cli" or parts[-1].startswith("_") and parts[-1] != "__init__":
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        names = defined(path, public(path))
        if names:
            pages[f"{module}.rst"], summaries[module] = page(module, names), summary(path)
    pages["modules.txt"] = contents(summaries)
    for old in place.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        if not (place / name).exists() or (place / name).read_text() != text:
            (place / name).write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for sources."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
