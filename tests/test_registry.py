"Every registered component is documented, taught in its notebook, and buildable from its name"
import importlib
import inspect
import json
import pkgutil
import re

import pytest
import visdet
from conftest import ROOT
from visdet.core.registry import KINDS, lookup, names, params


def load_all():
    "Import every module, so that everything that registers itself has done so"
    for o in pkgutil.walk_packages(visdet.__path__, "visdet."):
        if not o.name.endswith((".all", "_modidx")):
            importlib.import_module(o.name)


load_all()
COMPONENTS = [(k, n) for k in KINDS for n in names(k)]


def lessons():
    "Module name -> the text of the cells of its notebook that are not exported"
    found = {}
    for path in (ROOT / "nbs").rglob("[0-9]*.ipynb"):
        cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        exp = [m[1] for c in cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c, re.M))]
        if exp:
            found[f"visdet.{exp[0]}"] = "\n".join(c for c in cells if not re.search(r"^#\|\s*exports?\b", c, re.M))
    return found


LESSONS = lessons()


def test_there_are_some():
    assert {("model", "retinanet"), ("model", "fcos"), ("model", "faster_rcnn"), ("model", "mask_rcnn"), ("body", "create_body")} <= set(COMPONENTS)


@pytest.mark.parametrize("kind,name", COMPONENTS)
def test_documented(kind, name):
    "A docstring, and a meaning for every parameter"
    f = lookup(kind, name)
    assert inspect.getdoc(f), f"{kind} {name} has no docstring"
    bare = [o["name"] for o in params(f) if not o["doc"] and o["name"] != "self"]
    assert not bare, f"{kind} {name}: no meaning given for {bare}"


@pytest.mark.parametrize("kind,name", COMPONENTS)
def test_taught(kind, name):
    "Its own notebook calls it in a lesson; a family, such as torch's optimizers, may be gone through as a whole"
    f = lookup(kind, name)
    text = LESSONS[inspect.unwrap(f).__module__]
    family = "." in name and f"names('{kind}', '{name.split('.')[0]}.*')" in text
    assert family or re.search(rf"\b{f.__name__}\(", text), f"{kind} {name} is not called in any lesson of its notebook"


@pytest.mark.parametrize("name", names("model"))
def test_rebuilt_from_spec(name):
    "A model's `spec` is plain data, and building from it gives the same parameters"
    m = lookup("model", name)(vocab=["a", "b"], body="resnet18")
    entry, kw = json.loads(json.dumps(m.spec))
    again = lookup("model", entry)(**kw)
    assert {k: v.shape for k, v in m.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
