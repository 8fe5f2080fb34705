"""Normalizing flows: the posterior q(x | y) and a prior p(x) with an exact density."""

import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, [module.name for module in pkgutil.iter_modules(__path__)]
)
