"""`python -m unmurk`: the same as the command `unmurk`."""

import sys

from .cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
