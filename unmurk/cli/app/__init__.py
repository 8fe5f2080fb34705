"""The app of `unmurk app`: restore, learn and solve in a browser.

It is a thin face over the command line. Every action (`actions`) is a command of `unmurk` in a
process of its own (`jobs`), and the page shows that command. `guard` decides who may ask for what,
`sessions` keeps the files of each user apart, `runs` watches the learning, `pages` draws the
results, `layout` is the page itself, and `server` joins them. gradio, which draws the controls, is
imported only when the app starts (extra ``app``).
"""

import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, [module.name for module in pkgutil.iter_modules(__path__)]
)
