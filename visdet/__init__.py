"""Modules:

- `visdet.all`: Everything for a notebook: `from visdet.all import *` gives what `from fastai.vision.all import *` gives, and visdet's own names."""

__version__ = "0.0.1"

_lazy = {
    "SimpleRunner": "visdet.runner.simple",
    "create_model": "visdet.models.zoo",
    "list_models": "visdet.models.zoo",
    "load": "visdet.deploy.predict",
    "load_mmdet": "visdet.config.mmdet_load",
}
__all__ = ["__version__", *_lazy]


def __getattr__(name):
    "Fetch a public name from the module that defines it, the first time it is asked for"
    if name not in _lazy:
        raise AttributeError(f"module 'visdet' has no attribute {name!r}; it offers {', '.join(_lazy)}, and `from visdet.all import *` the rest")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(_lazy[name]), name)
    return value


def __dir__():
    return sorted([*globals(), *_lazy])
