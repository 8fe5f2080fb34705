"""Settings of the documentation site.

``make docs`` builds the pages without executing anything. ``make docs-full`` sets UNMURK_DOCS_FULL
and executes every tutorial and every script of the gallery. Neither reaches for the network.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
FULL = bool(os.environ.get("UNMURK_DOCS_FULL"))

project = "unmurk"
author = "The unmurk developers"
copyright = "The unmurk developers"
html_title = "unmurk"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"] if FULL else ["site.css", "not-executed.css"]
html_show_sphinx = False
html_copy_source = False

extensions = [
    "accessible",
    "apipages",
    "mathml",
    "myst_nb",
    "offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
# two links of CONTRIBUTING leave the site
suppress_warnings = ["myst.xref_missing"]
exclude_patterns = [
    "_build",
    "_ext",
    "gallery/*.ipynb",
    "gallery/*.py",
    "gallery/*.zip",
    "gallery/*.json",
    "images/README.md",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force" if FULL else "off"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
html_math_renderer = "mathml"

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "code"
python_use_unqualified_type_names = True
toc_object_entries = False

sphinx_gallery_conf = {
    "examples_dirs": [str(HERE.parent / "examples" / "gallery")],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/plot_",
    "within_subsection_order": "gallery_order.Order",
    "ignore_pattern": r"^pictures\.py$",
    "plot_gallery": FULL,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "abort_on_example_error": True,
    "min_reported_time": 10_000,
    "write_computation_times": False,
    "capture_repr": (),
    "matplotlib_animations": False,
}
