"""Files in and out: formats, the scale of intensities, atomic writing, data sets and jobs.

The modules, and the names that a program needs most, are imported on first use.
"""

import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    [module.name for module in pkgutil.iter_modules(__path__)],
    {
        "datasets": ["Source", "as_source", "open_source"],
        "images": ["ImageSet", "load_images", "load_measurements"],
        "saving": ["save_images"],
        "scale": ["Scale", "Span"],
    },
)
