"""Learn what clean images look like from corrupted images only, and restore with it.

Names and sub-modules are imported on first use (`__init__.pyi` lists them), so ``import unmurk``
loads no heavy library.

>>> import unmurk
>>> [name for name in dir(unmurk) if name in ("learn", "solve", "solvers")]
['learn', 'solve', 'solvers']
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
