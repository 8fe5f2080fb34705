"""Image formats: one reader a family, behind one registry (see `registry`).

A reader of one's own is one line:

    @unmurk.io.formats.register("cube", suffixes=(".cube",))
    class Cube(unmurk.io.formats.Pages): ...
"""

import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    [module.name for module in pkgutil.iter_modules(__path__)],
    {"registry": ["Pages", "Reader", "register"], "pictures": ["open_pages"]},
)
