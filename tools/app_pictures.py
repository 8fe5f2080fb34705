"""Take the pictures of docs/guide/app.md: `.venv/bin/python tools/app_pictures.py`.

The browser tests of the app take them while they use it (`make browser-test`). This script runs
these tests and writes their pictures as docs/images/app-*.png, with few colors and thus small.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
COLORS = 256  # of each picture: its file is small
PREFIX = "guide-"


def main() -> int:
    """Run the tests, and write the pictures. Return the exit code of the tests."""
    words = ["-m", "pytest", "-q", "-m", "not slow", "tests/browser/app.py"]
    code = subprocess.call([sys.executable, *words], cwd=ROOT)
    if code:
        return code
    for path in sorted((ROOT / "build" / "browser").glob(f"{PREFIX}*.png")):
        out = ROOT / "docs" / "images" / f"app-{path.stem.removeprefix(PREFIX)}.png"
        with Image.open(path) as image:
            image.convert("RGB").quantize(COLORS).save(out, optimize=True)
        print(f"{out.relative_to(ROOT)}: {out.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
