"""The package as a whole: its public names, its imports, its order, its words."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unmurk

ROOT = Path(unmurk.__file__).parent
MODULES = {
    ".".join(["unmurk", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


# -- public names ---------------------------------------------------------------------------------


def test_public_names_are_there_and_nothing_heavy_is_loaded():
    """A fresh process: every public name is listed; torch and numpy are not imported for it."""
    code = (
        "import sys, unmurk; names = dir(unmurk); "
        "heavy = {'torch', 'numpy', 'matplotlib', 'rich', 'tyro'} & set(sys.modules); "
        "import json; print(json.dumps([names, sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy = json.loads(done.stdout)
    assert heavy == []
    functions = {"citation", "learn", "load_images", "operator", "save_images", "solve"}
    classes = {"InputError", "Posterior", "Prior", "Problem"}
    modules = {
        path.stem if path.is_file() else path.name
        for path in ROOT.iterdir()
        if (path.suffix == ".py" and not path.stem.startswith("_"))
        or (path / "__init__.py").exists()
    }
    assert set(names) == functions | classes | modules


@pytest.mark.parametrize(
    "code",
    [
        "import unmurk.io.formats.readers, unmurk.io.formats.registry",
        "from unmurk.cli.main import main; main(['--help'])",
    ],
)
def test_libraries_of_formats_are_imported_for_their_files(code):
    """A fresh process: neither the registry of formats nor the help needs any of them."""
    heavy = "'torch', 'h5py', 'astropy', 'pydicom', 'nibabel', 'tifffile', 'imagecodecs', 'nd2'"
    code = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n"
        f"print(sorted({{{heavy}}} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_dotted_name_works_after_one_import():
    """A fresh process: every module of the package is an attribute of the one above it."""
    names = [name for name in MODULES if "__main__" not in name]
    code = (
        "import sys, json, types, unmurk\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    value = unmurk\n"
        "    for part in name.split('.')[1:]: value = getattr(value, part)\n"
        "    module = sys.modules[name]\n"
        "    assert isinstance(module, types.ModuleType) and not callable(module), name\n"
        "print(unmurk.training.Source.__name__, unmurk.noise.PoissonGaussian.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Source", "PoissonGaussian"]


def test_every_public_name_is_there():
    """`getattr` of every name in an ``__all__``: ``from MODULE import *`` works."""
    missing = [
        f"{name}: {part}"
        for name in MODULES
        if name != "unmurk.__main__"
        for part in getattr(importlib.import_module(name), "__all__", ())
        if not hasattr(importlib.import_module(name), part)
    ]
    assert not missing, missing


@pytest.mark.parametrize(
    "name", [n for n in unmurk.__all__ if inspect.isroutine(getattr(unmurk, n))]
)
def test_functions_show_their_parameters(name):
    function = getattr(unmurk, name)
    shown = inspect.signature(function).parameters
    assert shown and not list(shown)[0].startswith("args"), name
    assert function.__doc__


def test_there_is_no_other_name():
    with pytest.raises(AttributeError, match="smudge"):
        unmurk.smudge  # noqa: B018


# -- imports --------------------------------------------------------------------------------------


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, lazily and for typing too."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            if not base.startswith("unmurk"):
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {text for text in map(constant, node.args) if text in MODULES}
    return found - {name}


def constant(node: ast.expr) -> object:
    """The value of a literal; None for any other expression."""
    return node.value if isinstance(node, ast.Constant) else None


GRAPH = {name: imports(name) for name in MODULES}


def reachable(name: str) -> set[str]:
    """All modules that a module imports, directly or not."""
    found: set[str] = set()
    left = [name]
    while left:
        new = GRAPH[left.pop()] - found
        found |= new
        left += new
    return found


def test_no_import_is_circular():
    """Lazy imports, those under TYPE_CHECKING and `import_module("unmurk...")` count too."""
    circles = {name.removeprefix("unmurk.") for name in GRAPH if name in reachable(name)}
    assert not circles, sorted(circles)


LAYERS = [
    ["errors", "bounds", "rng", "interrupts", "plugins", "progress"],
    ["io.json_files", "io.atomic", "io.limits", "io.packaged", "io.locks", "io.ledger"],
    ["io.axes", "io.scale", "io.layouts", "io.formats", "io.folders", "io.survey", "io.streams"],
    ["io.images", "io.saving", "io.generated", "io.outputs", "io.weights", "devices"],
    ["operators"],
    ["noise_units"],
    ["noise"],
    ["patches"],
    ["noise_estimation"],
    ["noise_scale"],
    ["noise_checks"],
    ["problem"],
    ["whitening", "missing", "repeats", "checks", "gaussian"],
    ["diffusion"],
    ["flows"],
    [
        f"evaluation.{name}"
        for name in (
            "features",
            "distances",
            "metrics",
            "exact_gaussian",
            "exact",
            "unbiased",
            "calibration",
            "reference",
            "predictive",
            "verdict",
        )
    ],
    [f"evaluation.{name}" for name in ("gibbs", "scale_mixture")],
    [
        f"io.{name}"
        for name in (
            "source",
            "scenes",
            "torch_data",
            "datasets",
            "gaps",
            "frames",
            "parts",
            "capture_set",
            "captures",
            "crops",
            "noise_maps",
            "map_scale",
            "weighed",
        )
    ],
    ["solvers"],
    ["training"],
    ["evaluation.exam", "evaluation.certify"],
    ["tiling"],
    ["io.job_list"],
    ["io.jobs", "io.sets"],
    ["citations"],
    ["cli"],
    ["__main__"],
]
"""Each module imports only from its own layer and those above it."""

FACES = {"unmurk", "unmurk.io", "unmurk.evaluation"}
"""Packages whose modules lie in several layers, and which import none of them at once."""


def layer(name: str) -> int:
    short = name.removeprefix("unmurk.")
    matches = [
        (len(part), number)
        for number, parts in enumerate(LAYERS)
        for part in parts
        if short == part or short.startswith(part + ".")
    ]
    assert matches, f"{name} is in no layer: add it to LAYERS"
    return max(matches)[1]


def test_modules_import_only_from_the_layers_above():
    wrong = [
        f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"
        for name in GRAPH
        if name not in FACES
        for other in sorted(GRAPH[name] - FACES)
        if layer(other) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def loaded(name: str) -> set[str]:
    """The modules that an import of a module executes at most, with those of its packages."""
    parts = name.split(".")
    packages = {".".join(parts[:end]) for end in range(2, len(parts))}
    return {name}.union(packages, *(reachable(one) for one in {name, *packages}))


# All modules would take more than 40 seconds of CPU time, since most of those of the solvers, of
# training and of the command line execute a hundred others. So these are the modules that execute
# few, and one of each package that executes many.
FEW = 12
FIRST = [name for name in MODULES if name != "unmurk.__main__" and len(loaded(name)) <= FEW]
FIRST += ["unmurk.problem", "unmurk.io.images", "unmurk.diffusion.prior", "unmurk.solvers"]
FIRST += ["unmurk.training", "unmurk.cli.main"]


def test_a_module_is_imported_first():
    """Each in a process of its own, before any other module of the package.

    The processes are forks of one that has imported torch: that is all that they share.
    """
    code = (
        "import importlib, os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    assert not [other for other in sys.modules if other.startswith('unmurk')]\n"
        "    if not os.fork():\n"
        "        importlib.import_module(name)\n"
        "        print(name, flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0, name\n"
    )
    assert len(FIRST) == len(set(FIRST)) > 60
    done = subprocess.run(
        [sys.executable, "-c", code, *FIRST], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split() == FIRST


def test_every_module_is_imported():
    for name in MODULES:
        if name != "unmurk.__main__":
            assert not callable(importlib.import_module(name)), name


# -- words ----------------------------------------------------------------------------------------

WORDS = """
    gap evidence polish anchor averages tell divides rows top at take seen some twins begun further
    turns whole many pull mend renew trust
"""
"""Identifiers, in any case, for which the field has other names: the left column of the table of
words."""

CLASSES = ["Group", "Streams", "Share", "Mix", "Features", "Record"]
"""Classes for which the field has other names."""

ALLOWED = {
    "rows": "rows of a table, of pixels or of a matrix",
    "bounds: Whole": "a whole number",
    "io.formats.dicom: Rows": "an attribute of DICOM",
    "operators.masks: top": "the upper edge of a box",
    "operators.crops: top": "the upper edge of a crop",
    "tiling: top": "the upper edge of a tile",
}
"""Identifiers, or "module: identifier", that stand for something else."""


def identifiers(name: str) -> dict[str, int]:
    """Names that a module defines: functions, classes, arguments, variables, attributes."""
    found: dict[str, int] = {}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.arg):
            found.setdefault(node.arg, node.lineno)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, node.lineno)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, node.lineno)
    return found


def test_identifiers_are_the_words_of_the_field():
    found = {
        f"{name.removeprefix('unmurk.')}: {word}": line
        for name in MODULES
        for word, line in identifiers(name).items()
        if (word.strip("_").lower() in WORDS.split() or word in CLASSES) and word not in ALLOWED
    }
    wrong = [f"{what} (line {line})" for what, line in found.items() if what not in ALLOWED]
    assert not wrong, "\n".join(wrong)


def public(name: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """The public functions, classes and methods that a module defines."""
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += [
                    part
                    for part in node.body
                    if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
                ]
    return found


def test_modules_and_public_objects_have_docstrings():
    """A method that overrides one of a base class may inherit its docstring."""
    wrong = []
    for name in MODULES:
        if not ast.get_docstring(tree(name)):
            wrong.append(name)
        module = None if name == "unmurk.__main__" else importlib.import_module(name)
        for node in public(name):
            if ast.get_docstring(node) is None and not inherited(module, node.name):
                wrong.append(f"{name.removeprefix('unmurk.')}: {node.name}")
    assert not wrong, "\n".join(wrong)


def inherited(module, method: str) -> bool:
    """Whether a class of the module gets the docstring of this method from a base class."""
    kinds = [k for k in vars(module).values() if inspect.isclass(k) and method in vars(k)]
    return any(
        getattr(getattr(base, method, None), "__doc__", None)
        for kind in kinds
        for base in kind.__mro__[1:]
    )


# -- citations ------------------------------------------------------------------------------------


def test_citation_of_nothing_is_unmurk(tmp_path):
    assert unmurk.citation().startswith("@software{unmurk,")
    assert unmurk.__version__ in unmurk.citation()


class Cited:
    """A solver with a paper."""

    citation = "@article{key,\n}"

    def run(self):
        """Nothing."""


class Uncited:
    """A solver without one."""

    def run(self):
        """Nothing."""


def test_citation_of_results_runs_solvers_and_names(tmp_path, monkeypatch):
    """The entry of unmurk, then that of the class; none for a class without."""
    both = f"{unmurk.citation()}\n\n@article{{key,\n}}"
    result = type("Result", (), {"solver": Cited()})()
    for given in (result, Cited(), Cited):
        assert unmurk.citation(given) == both
    for given in (Uncited(), Uncited):
        assert unmurk.citation(given) == unmurk.citation()
    import unmurk.training as training

    monkeypatch.setattr(training, "METHODS", {"mine": Cited})
    (tmp_path / "config.json").write_text('{"method": "mine"}')
    assert unmurk.citation(tmp_path) == unmurk.citation(str(tmp_path)) == both
    assert unmurk.citation("mine") == both


@pytest.mark.parametrize("e_step", ["prior", "conditional"])
def test_citation_of_an_option(e_step, tmp_path):
    """The conditional E-step of em has a paper of its own: of the learner and of a run."""
    from unmurk.training.em import Em
    from unmurk.training.learner import as_dict

    config = {"method": "em", "options": as_dict(Em(e_step=e_step))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for given in (Em(e_step=e_step), tmp_path, str(tmp_path)):
        found = unmurk.citation(given)
        assert "2405.13712" in found and ("2510.12691" in found) == (e_step == "conditional")
    assert "2510.12691" not in unmurk.citation("em") + unmurk.citation(Em)


DEFAULT = [
    "wang2024integrating",
    "pang2021recorrupted",
    "daras2024consistent",
    "rozet2024learning",
]


def learner(name, **options):
    """A learner with options."""
    from unmurk import training

    return vars(training)[name](**options)


KEYS = [
    ("flowdiff", [*DEFAULT, "jordan2024muon"]),
    ("digits", [*DEFAULT, "jordan2024muon"]),
    ("nuclei", [*DEFAULT, "jordan2024muon"]),
    ("generic", ["jordan2024muon"]),
    ("clean", ["jordan2024muon"]),
    ("ambient", ["daras2023ambient", "daras2024consistent", "jordan2024muon"]),
    ("em", ["rozet2024learning", "jordan2024muon"]),
    ("auto", ["mardani2024reddiff", "kawar2021snips", "zhang2025daps", "kim2026ddiff"]),
    ("dps", ["chung2023dps"]),
]


@pytest.mark.parametrize("given, keys", KEYS)
def test_citation_names_all_papers(given, keys):
    """Methods of learning, models in the package, solvers, and the rule that selects solvers."""
    assert re.findall(r"^@\w+\{(.+),$", unmurk.citation(given), re.M) == ["unmurk", *keys]


@pytest.mark.parametrize(
    "given, keys",
    [
        (("FlowDiff", {"objective": "elbo"}), DEFAULT[:1]),
        (("FlowDiff", {"solver": "mmps"}), [*DEFAULT[:2], DEFAULT[3]]),
        (("Em", {"solver": "dps"}), ["rozet2024learning", "chung2023dps", "bai2024expectation"]),
        (("Em", {"solver": "mmps"}), ["rozet2024learning"]),
        (("Em", {"e_step": "conditional"}), ["rozet2024learning", "hosseintabar2025diffem"]),
    ],
)
def test_citation_follows_the_options(given, keys, tmp_path):
    """Of a learner, and of its run."""
    from unmurk.solvers import Draws
    from unmurk.training.learner import as_dict

    name, options = given
    own = {key: Draws(value) if key == "solver" else value for key, value in options.items()}
    config = {"method": name.lower(), "options": as_dict(learner(name, **own))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for of in (learner(name, **own), learner(name, **options), tmp_path):
        found = re.findall(r"^@\w+\{(.+),$", unmurk.citation(of), re.M)
        assert found[0] == "unmurk" and found[1] == keys[0]
        assert sorted(found[2:]) == sorted([*keys[1:], "jordan2024muon"])


def test_citation_refuses_a_run_whose_method_is_not_known(tmp_path):
    (tmp_path / "config.json").write_text('{"method": "elsewhere.Mine"}')
    with pytest.raises(unmurk.InputError, match="learned by 'elsewhere.Mine', .* not known here"):
        unmurk.citation(tmp_path)


def test_citation_refuses_other_things(tmp_path):
    for given, part in (("magic", "choose one of"), (3, "got int"), (tmp_path, "no file")):
        with pytest.raises(unmurk.InputError, match=part):
            unmurk.citation(given)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(unmurk.InputError, match="give a run folder"):
        unmurk.citation(tmp_path)
