"""The image sets in the package, by name.

`digits` and `nuclei` are small sets to try things out with. A path of the same name in the working
folder comes first.
"""

from pathlib import Path

__all__ = ["SETS", "packaged"]

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
