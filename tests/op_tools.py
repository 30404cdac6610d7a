"What the tests of operators share: the backends an operator has here, as parameters that skip with the reason why not"
import importlib
import pkgutil

import pytest

import visdet.cv
from visdet.core.backends import BACKENDS, _ops

for _m in pkgutil.iter_modules(visdet.cv.__path__):
    importlib.import_module(f"visdet.cv.{_m.name}")


def backends_of(name, device="cpu", but=()):
    "pytest parameters: every backend that operator `name` has, marked to skip where it cannot be used here"
    op = _ops[name]
    names = [o for o in BACKENDS if o in op.impls and o not in but]
    why = {o: op.missing(o, device) for o in names}
    return [pytest.param(o, marks=[pytest.mark.skip(reason=f"{name}/{o}: {why[o]}")] if why[o] else []) for o in names]
