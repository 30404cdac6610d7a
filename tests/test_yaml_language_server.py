"What an editor shows while a configuration is written: completions, hover texts and errors of a real YAML language server"
import json
import os
import re
import sys
from pathlib import Path

import pytest
import visdet
from lsp_tools import Client, ServerError, find_server

SHIPPED = Path(visdet.__file__).resolve().parent / "config"
PRESETS = sorted((SHIPPED / "presets").rglob("*.yaml"))
MODEL, RUN = (f"# yaml-language-server: $schema=../../schema/{o}.json\n" for o in ("model", "run"))
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


# -- what ships ----------------------------------------------------------------------------------------
BROKEN = """\
model:
  type: retinanet
  num_conv: 2
  reg_loss: l3
  score_thr: many
  nms_thr: 3
dataset: {type: coco, train: train.json, resize: 512}
optimizer:
  type: sgdd
epochs: twelve
epoch: 12
"""
SOUND = """\
model: {_base_: retinanet_r50, num_convs: 2, channels: "${width}"}
dataset: {type: coco, train: train.json, valid: val.json, resize: 512}
optimizer: adamw
scheduler: {type: 1cycle, lr: 3e-4}
epochs: 12
work_dir: runs/${env:NAME,cells}
"""


@pytest.fixture(scope="module")
def shipped(command):
    "A server on the folder of shipped configurations, and a preset there"
    with Client(command, SHIPPED) as c:
        yield c, SHIPPED / "presets/models/retinanet_r50.yaml"


def test_every_shipped_file_is_sound(shipped):
    "Each begins with a header whose schema is a file, and the editor finds nothing wrong"
    c, _ = shipped
    assert len(PRESETS) > 20
    for f in PRESETS:
        head = re.match(r"# yaml-language-server: \$schema=(\S+)\n", f.read_text(encoding="utf-8"))
        assert head and (f.parent / head[1]).is_file(), f
    uris = {f: c.open(f) for f in PRESETS}
    bad = {f.name: p for f, u in uris.items() if (p := c.diagnosed(u, f.read_text(encoding="utf-8")))}
    assert not bad


def test_errors_at_the_right_lines(shipped, tmp_path):
    "Unknown key, value outside an enumeration, wrong type, out of bounds, unknown component: each underlined, at the lines that `load_config` names"
    from visdet.core.basics import ConfigError
    from visdet.core.config import load_config

    c, f = shipped
    got = c.problems(f, RUN + BROKEN)
    assert [o[:2] for o in got] == [(4, "num_conv"), (5, "l3"), (6, "many"), (7, "3"), (10, "sgdd"), (11, "twelve"), (12, "epoch")]
    said = {line: text for line, _, text in got}
    assert "not allowed" in said[4] and "giou" in said[5] and "number" in said[6] and "maximum of 1" in said[7] and "adamw" in said[10] and "whole number" in said[11]
    (tmp_path / "run.yaml").write_text(RUN + BROKEN)
    with pytest.raises(ConfigError) as e:
        load_config(tmp_path / "run.yaml")
    assert {int(o) for o in re.findall(r"run\.yaml:(\d+):", str(e.value))} == {o[0] for o in got}


def test_what_visdet_adds_to_yaml_is_not_an_error(shipped):
    "Bases, variables and numbers such as 3e-4, and a file that is only an addition to its base"
    c, f = shipped
    assert c.problems(f, RUN + SOUND) == []
    assert c.problems(f, RUN + "_base_: [common.yaml, more.yaml]\nmodel: {num_convs: 2}\nscheduler: {_delete_: true, type: step}\n") == []
    assert [o[:2] for o in c.problems(f, RUN + "_base_: common.yaml\nmodel:\n  num_convs: 2\n  num_conv: 2\n")] == [(5, "num_conv")]
    assert [o[:2] for o in c.problems(f, RUN + "model: {_base_: retinanet_r50, nms_thr: high}\ndataset: toy\n")] == [(2, "high")]


def test_completions(shipped):
    "Keys of the component that is named, and no others; its choices; the names of components and presets"
    from visdet.core.schema import saved_catalogue

    c, f = shipped
    rows = {o["name"] for o in saved_catalogue()["model"]["retinanet"]["params"]}
    adds = {"_base_", "_delete_", "$ref"}
    assert set(c.complete(f, MODEL + "type: retinanet\n|\n")) - adds == rows
    assert set(c.complete(f, RUN + "model:\n  type: retinanet\n  |\nepochs: 3\n")) - adds == rows
    assert set(c.complete(f, RUN + "model:\n  type: retinanet\n  num_convs: 2\n  |\n")) - adds == rows - {"num_convs"}
    assert "radius" not in rows and "radius" in c.complete(f, MODEL + "type: fcos\n|\n")
    assert set(c.complete(f, RUN + "model:\n  type: retinanet\n  reg_loss: |\n")) == {"l1", "smooth_l1", "iou", "giou", "diou", "ciou", "log_iou"}
    assert set(c.complete(f, RUN + "model:\n  type: |\n")) == set(saved_catalogue()["model"])
    assert {"retinanet", "retinanet_r50"} <= set(c.complete(f, RUN + "model: |\n"))
    assert {"model", "dataset", "optimizer", "scheduler", "epochs", "seed", "work_dir"} <= set(c.complete(f, RUN + "|\n"))


def test_completions_explain_themselves(shipped):
    "The sentence beside a parameter in its signature stands beside it in the list, and under the pointer"
    from visdet.core.schema import saved_catalogue

    c, f = shipped
    doc = {o["name"]: o["doc"] for o in saved_catalogue()["model"]["retinanet"]["params"]}
    items = c.complete(f, MODEL + "type: retinanet\n|\n")
    text = lambda o: o["value"] if isinstance(o, dict) else o or ""
    assert doc["num_convs"] in text(items["num_convs"].get("documentation"))
    assert doc["num_convs"] in c.hover(f, MODEL + "type: retinanet\nnum_c|onvs: 2\n")
    assert doc["score_thr"] in c.hover(f, RUN + "model:\n  type: retinanet\n  score|_thr: 0.1\n")
    assert "mask_rcnn" in c.hover(f, RUN + "model:\n  type: fc|os\n")  # the others there are
