"""The image sets and the models in the package, by name.

`digits` and `nuclei` are small sets to try things out with, and models. So are `generic`, for
images of any kind, channel by channel, and `generic-color`, for color images. A path of the same
name in the working folder comes first.
"""

from pathlib import Path
from typing import Any

from ..errors import InputError
from .json_files import read_object

__all__ = [
    "GENERIC",
    "SETS",
    "is_generic",
    "model_folder",
    "models",
    "of_any_size",
    "packaged",
]

ASSETS = Path(__file__).parents[1] / "assets"

SETS = {
    "digits": "digits/train.idx3-ubyte.gz",
    "digits:test": "digits/test.idx3-ubyte.gz",
    "nuclei": "nuclei/nuclei.npz:train",
    "nuclei:val": "nuclei/nuclei.npz:val",
}
"""Names and files of the sets: 12,000 and 1,000 digits of 28x28, 600 and 100 nuclei of 64x64."""


def packaged(path: str | Path) -> Path | None:
    """Return the file of a packaged set, unless there is a file or folder of that name.

    >>> packaged("digits:test").name
    'test.idx3-ubyte.gz'
    """
    name = str(path)
    if name not in SETS or Path(name).exists() or Path(name).is_symlink():
        return None
    return ASSETS / SETS[name]


GENERIC = "generic", "generic-color"
"""Names of the generic models: of one channel, which serves any number one by one, and of three
channels that are the colors of one light."""


def models() -> list[str]:
    """Return the names of the models in the package.

    >>> "digits" in models()
    True
    """
    return sorted(path.name.removesuffix("-model") for path in ASSETS.glob("*-model"))


def model_folder(name: str | Path) -> Path:
    """Return the folder of a model in the package, whether or not it exists.

    >>> model_folder("digits").name, model_folder("digits").is_dir()
    ('digits-model', True)
    """
    return ASSETS / f"{name}-model"


def of_any_size(folder: Path) -> bool:
    """Whether a model was trained to serve images of any size.

    A generic model was, and so was one that has learned from crops, as config.json beside it says.
    Any other model has learned images of one size, and takes larger ones in tiles.

    Args:
        folder: Its folder, `prior/` or `posterior/` of a run folder.

    >>> Path("crops").mkdir()
    >>> Path("crops/config.json").write_text('{"crop": 64}')
    12
    >>> of_any_size(Path("crops/prior")), of_any_size(model_folder("digits") / "prior")
    (True, False)
    """
    crop = _config(folder).get("crop")
    return is_generic(folder) or (isinstance(crop, int) and crop > 0)


def is_generic(folder: Path) -> bool:
    """Whether a model is one of images of any kind, as config.json beside it says.

    Args:
        folder: Its folder, `prior/` or `posterior/` of a run folder.

    >>> Path("any").mkdir()
    >>> Path("any/config.json").write_text('{"method": "generic"}')
    21
    >>> is_generic(Path("any/prior")), is_generic(model_folder("digits") / "prior")
    (True, False)
    """
    return _config(folder).get("method") == "generic"


def _config(folder: Path) -> dict[str, Any]:
    """Return config.json beside a model; empty if there is none."""
    try:
        return read_object(folder.parent / "config.json")
    except InputError:
        return {}
