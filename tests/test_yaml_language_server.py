"What an editor shows while a configuration is written: completions, hover texts and errors of a real YAML language server"
import json
import os
import sys

import pytest
from lsp_tools import Client, ServerError, find_server

HEADER = "# yaml-language-server: $schema=../schema/run.json\n"


def component(name, doc, **props):
    "The schema of one component, in the form that `json_schema` writes"
    return {"title": name, "description": doc, "type": "object", "additionalProperties": False, "required": ["type"], "properties": {"type": {"const": name, "description": doc}, **props}}


MODELS = {
    "retinanet": component("retinanet", "RetinaNet over any body", num_convs=dict(type="integer", description="Convolutions of each tower", default=4), reg_loss=dict(enum=["l1", "giou"], description="Box term", default="l1")),
    "fcos": component("fcos", "FCOS over any body", radius=dict(type="number", description="Greatest distance of a positive point")),
}
SMALL = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {"model": {"anyOf": [{"type": "string"}, *MODELS.values()]}, "epochs": dict(type="integer", minimum=1, default=12, description="Passes over the data")},
}


def test_client_reports_a_dead_server(tmp_path):
    "A server that cannot start is an error with its own words, not a wait"
    with pytest.raises(ServerError, match="(?s)ended|gone"):
        with Client([sys.executable, "-c", "import sys; sys.exit('no such schema')"], tmp_path):
            pass


@pytest.fixture(scope="module")
def command():
    "The server's command line, or a skip with the reason; CI installs it and wants no skip"
    found = find_server()
    if found is None:
        (pytest.fail if os.environ.get("VISDET_YAML_SERVER") == "required" else pytest.skip)("no YAML language server here: `make editor` installs it (needs node and npm)")
    return found


@pytest.fixture(scope="module")
def small(command, tmp_path_factory):
    "A server on a folder with a small schema, and a file there"
    root = tmp_path_factory.mktemp("editor")
    (root / "schema").mkdir()
    (root / "schema/run.json").write_text(json.dumps(SMALL))
    (root / "presets").mkdir()
    with Client(command, root) as c:
        yield c, root / "presets/run.yaml"


def test_header_finds_the_schema(small):
    "The first line leads the server to the schema, relative to the file: without it there is nothing to check"
    c, f = small
    bad = "model:\n  type: retinanet\n  num_conv: 2\n  reg_loss: l3\nepochs: many\nepoch: 3\n"
    assert [o[:2] for o in c.problems(f, HEADER + bad)] == [(4, "num_conv"), (5, "l3"), (6, "many"), (7, "epoch")]
    assert c.problems(f, bad) == []
    assert c.problems(f, HEADER + "model:\n  type: fcos\n  radius: 1.5\nepochs: 3\n") == []


def test_completions_and_hover_of_the_small_schema(small):
    "Keys of the component that `type` names, values of an enumeration, and the sentence of a parameter"
    c, f = small
    assert set(c.complete(f, HEADER + "model:\n  type: retinanet\n  |\n")) == {"num_convs", "reg_loss"}
    assert set(c.complete(f, HEADER + "model:\n  type: fcos\n  |\n")) == {"radius"}
    assert set(c.complete(f, HEADER + "model:\n  type: retinanet\n  reg_loss: |\n")) == {"l1", "giou"}
    assert "Convolutions of each tower" in c.hover(f, HEADER + "model:\n  type: retinanet\n  num_c|onvs: 2\n")
