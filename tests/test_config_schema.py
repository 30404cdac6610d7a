"Configurations against signatures: what is said to be right can be called, what is wrong is named with its place, and every form of the schema says the same."
import copy
import inspect
import json
import subprocess
import sys
import warnings

import jsonschema
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

sys.path.insert(0, str(ROOT / "tools"))
import schema as tool  # noqa: E402

warnings.simplefilter("ignore")
tool.load_all()
from visdet.core.basics import ConfigError  # noqa: E402
from visdet.core.bases import FOLDERS, PRESETS, preset_names  # noqa: E402
from visdet.core.config import build, load_config  # noqa: E402
from visdet.core.jsonschema import json_schema  # noqa: E402
from visdet.core.registry import KINDS, lookup, names  # noqa: E402
from visdet.core.schema import component_model, fill_defaults, problems, saved_catalogue, schema_folder, to_config, validate  # noqa: E402
from visdet.core.tree import Source, join_path, to_node  # noqa: E402
from visdet.core.yaml import read_yaml, write_yaml  # noqa: E402

CAT = saved_catalogue()
PARTS = [k for k in CAT if k not in ("run", "op", "loss", "metric")]  # what a configuration can hold; the others take tensors
SMALL = dict(num_classes=3, body="test_resnet", channels=32)


def tree(o):
    return to_node(o, Source("python", "test"))


# -- the saved files --------------------------------------------------------------------------------


def test_saved_files_are_up_to_date():
    "The catalogue and the schemas say what the signatures say; tools/schema.py writes them"
    assert tool.stale() == []


def test_every_component_is_described():
    "The saved catalogue holds every registered component of visdet"
    for kind in KINDS:
        mine = {n for n in names(kind) if inspect.unwrap(lookup(kind, n)).__module__.startswith("visdet.")}
        assert mine <= set(CAT[kind]), (kind, mine - set(CAT[kind]))


def bare(t):
    "Does a description say nothing somewhere, or only that no file can hold it?"
    below = t.get("of", []) + (t["items"] if isinstance(t.get("items"), list) else [t["items"]] if "items" in t else [])
    return t["type"] in ("any", "object") or any(map(bare, below))


def test_types_are_said():
    "No parameter of anything that a configuration can hold is without a type"
    said = {f"{k} {n}.{p['name']}" for k in (*PARTS, "run") for n, e in CAT[k].items() for p in e["params"] if bare(p["type"])}
    assert said == set(), said


def test_ops_take_tensors():
    "Operators, losses and metrics take data that no file can hold; whatever has a default that can stand in a file has a type, too"
    lost = [f"{k} {n}.{p['name']}" for k in ("op", "loss", "metric") for n, e in CAT[k].items() for p in e["params"] if p["type"]["type"] == "any" and p["default"] is not None]
    assert lost == [], lost


def test_defaults_are_valid():
    "Every default lies within the bounds of its own type, so that a resolved configuration is a valid one"
    for kind in (*PARTS, "run"):
        for name, e in CAT[kind].items():
            rest = {p["name"] for p in e["params"] if p["required"]}
            node = fill_defaults(tree(dict(type=name)), CAT, kind) if kind != "run" else fill_defaults(tree({}), CAT)
            bad = [o for o in problems(node, CAT, kind) if not (o.path[-1:] and o.path[-1] in rest)]
            assert not bad, (kind, name, [*map(str, bad)])


def test_check_imports_nothing_heavy(tmp_path):
    "`visdet config check` needs neither torch nor numpy, pandas or fastai, for good files and for bad ones"
    (tmp_path / "good.yaml").write_text("model: retinanet_tiny\ndataset: toy_tiny\n")
    (tmp_path / "bad.yaml").write_text("model: {type: retinanet, numconvs: 3}\ndataset: toy_tiny\n")
    code = "import sys; from visdet.cli.main import main; c = main(['config', 'check', *sys.argv[1:]]); print(sorted({'torch', 'numpy', 'pandas', 'fastai', 'matplotlib', 'PIL', 'torchvision', 'timm'} & set(sys.modules)), c)"
    for files, want in ((["good.yaml"], "[] 0"), (["good.yaml", "bad.yaml"], "[] 1")):
        p = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=tmp_path)
        assert p.stdout.splitlines()[-1] == want, p


# -- objects, configurations, files -----------------------------------------------------------------


def state(m):
    return {k: tuple(v.shape) for k, v in m.state_dict().items()}


ARGS = dict(
    retinanet=dict(SMALL, num_convs=1, ratios=(0.5, 1.0), delta_clip=(-4.0, 4.0)),
    fcos=dict(SMALL, num_convs=1, radius=None, norm="frozen"),
    atss=dict(SMALL, num_convs=1, kernel=1, ratios=(1.0,), ignore=0.5),
    gfl=dict(SMALL, num_convs=1, reg_max=8, ratio=1.0),
    vfnet=dict(SMALL, num_convs=1, deform=True, ranges=[(-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8)]),
    tood=dict(SMALL, num_convs=2, deform=1, kind="anchor_based", iou_power=4.0),
    faster_rcnn=dict(SMALL, hidden=32, pre=(200, 100), post=(100, 50), ratios=(1.0,), scale=8),
    mask_rcnn=dict(SMALL, hidden=32, mask_convs=1, mask_channels=16, min_size=(0.0, 1.5)),
    cascade_rcnn=dict(SMALL, hidden=32, border=None, thrs=[0.5, 0.6, 0.7], post=(100, 50)),
    cascade_mask_rcnn=dict(SMALL, hidden=32, mask_convs=1, mask_channels=16, stage_weights=[1.0, 0.5, 0.5]),
    double_head_rcnn=dict(SMALL, hidden=32, head_channels=16, head_convs=1, ignore=(None, 0.5), roi_sampler=dict(type="CombinedSampler", pos_sampler=dict(type="InstanceBalancedPosSampler"), neg_sampler=dict(type="IoUBalancedNegSampler", bins=4))),
    mask_scoring_rcnn=dict(SMALL, hidden=32, mask_convs=1, mask_channels=16, iou_channels=16, iou_hidden=16, box_head=dict(shared_convs=1, channels=16, norm="gn"), roi_sampler="OHEMSampler"),
    ssd=dict(SMALL, level_channels=[16] * 4, depthwise=True, head_norm="bn", shares=(0.2, 0.9), l2_scale=5.0, out=(16, 32)),
    yolox=dict(SMALL, size="nano", num_convs=1, max_num=20, score_thr=0.0),
    rtmdet=dict(SMALL, size="tiny", num_convs=1, reg="exp", pre=None),
    rtmdet_ins=dict(SMALL, size="tiny", num_convs=1, hidden=4, prototypes=6, min_size=None),
    deformable_detr=dict(SMALL, queries=10, enc_layers=1, dec_layers=2, heads=4, hidden=32, refine=True, two_stage=True, costs=(1.0, 5.0, 2.0)),
    dino=dict(SMALL, queries=10, enc_layers=1, dec_layers=2, heads=4, hidden=32, dn_groups=3, temperature=15.0),
)


@pytest.mark.parametrize("name", names("model"))
def test_round_trip(name, tmp_path):
    "Python object -> configuration -> YAML -> object: equal in what it was made from and in what it is"
    import torch

    assert name in ARGS, f"give small arguments for the new model {name}"
    torch.manual_seed(0)
    m = lookup("model", name)(**ARGS[name])
    cfg = to_config(m)
    write_yaml(cfg, tmp_path / "m.yaml")
    back = load_config(tmp_path / "m.yaml", root="model")
    assert back.plain() | cfg == back.plain() and read_yaml(tmp_path / "m.yaml").plain() == json.loads(json.dumps(cfg))
    torch.manual_seed(0)
    again = build(read_yaml(tmp_path / "m.yaml"), "model")
    full = build(load_config({**cfg}, root="model"), "model")
    assert to_config(again) | cfg == to_config(again) and state(m) == state(again) == state(full)
    a, b = m.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    x = torch.rand(1, 3, 64, 96)
    m.eval(), again.eval()
    with torch.no_grad():
        for p, q in zip(m.decode(m(x), torch.tensor([[64, 96]])), again.decode(again(x), torch.tensor([[64, 96]]))):
            assert torch.equal(p.boxes, q.boxes) and torch.equal(p.scores, q.scores)


@pytest.mark.parametrize("kind,name", [(k, n) for k in FOLDERS if k != "run" for n in preset_names(k)])
def test_presets_are_valid(kind, name):
    "Every preset that ships is right, names its schema, and comes to the same after it has been written out in full"
    path = PRESETS / FOLDERS[kind] / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    ref = text.splitlines()[0].partition("$schema=")[2]
    assert (path.parent / ref).resolve() == (schema_folder() / f"{kind}.json").resolve()
    cfg = load_config(name, root=kind)
    flat = read_yaml(text=cfg.resolved())
    assert flat.plain() == cfg.plain() and problems(flat, CAT, kind) == []


# -- every problem, with its place ------------------------------------------------------------------

FAULTS = """\
model:
  type: retinanet
  num_clases: 3
  body: 50
  norm: frozn
  channels: 256.0
  ratios: [0.5, -1, two]
  delta_clip: [1, 2, 3]
  score_thr: 1.5
  pretrained: yes please
dataset:
  type: coco
  bs: 0
  on_missing: eror
optimizer: {type: torch.AdamV, lr: 1e-3}
scheduler: {type: step, steps: 8, gama: 0.1}
epochs: -1
epoch: 3
precision: bf61
"""
PLACES = {
    "model.num_clases": (3, 3, "did you mean 'num_classes'"),
    "model.body": (4, 9, "must be text, not 50"),
    "model.norm": (5, 9, "did you mean 'frozen'"),
    "model.channels": (6, 13, "a whole number of at least 1"),
    "model.ratios[1]": (7, 17, "above 0"),
    "model.ratios[2]": (7, 21, "above 0"),
    "model.delta_clip": (8, 15, "a list of 2"),
    "model.score_thr": (9, 14, "from 0 to 1"),
    "model.pretrained": (10, 15, "true or false"),
    "dataset.train": (11, 1, "coco needs `train`"),
    "dataset.bs": (13, 7, "of at least 1"),
    "dataset.on_missing": (14, 15, "did you mean 'error'"),
    "optimizer": (15, 12, "did you mean 'torch.Adam"),
    "scheduler.steps": (16, 32, "must be a list"),
    "scheduler.gama": (16, 35, "did you mean 'gamma'"),
    "epochs": (17, 9, "of at least 1"),
    "epoch": (18, 1, "did you mean 'epochs'"),
    "precision": (19, 12, "did you mean 'bf16'"),
}


def test_all_faults_at_once(tmp_path):
    "One error lists every fault with file, line, column, dotted path and the nearest valid name"
    path = tmp_path / "bad.yaml"
    path.write_text(FAULTS)
    found = {join_path(o.path): o for o in problems(read_yaml(path), CAT)}
    assert set(found) == set(PLACES)
    for k, (line, col, words) in PLACES.items():
        o = found[k]
        assert words in o.message, (k, o.message)
        if k != "optimizer":
            assert (o.source.line, o.source.col) == (line, col), (k, str(o))
    with pytest.raises(ConfigError) as e:
        validate(read_yaml(path), CAT)
    text = str(e.value)
    assert text.startswith(f"{len(PLACES)} problems") and all(f"{path}:{line}:" in text and f" {k}: " in text for k, (line, _, _) in PLACES.items())


def test_the_command_prints_them_all(tmp_path, capsys):
    from visdet.cli.main import main

    (tmp_path / "bad.yaml").write_text(FAULTS)
    (tmp_path / "torn.yaml").write_text("model: [\n")
    (tmp_path / "good.yaml").write_text("model: fcos_tiny\ndataset: toy_tiny\n")
    assert main(["config", "check", *(str(tmp_path / o) for o in ("bad.yaml", "torn.yaml", "good.yaml"))]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(PLACES) + 1 and f"3 files: {len(PLACES) + 1} problems" in err
    assert main(["config", "check", str(tmp_path / "good.yaml")]) == 0


# -- random mutations -------------------------------------------------------------------------------

TRANSFORMS = dict(type="Compose", tfms=[dict(type="Resize", scale=[64, 96], how="letterbox"), dict(type="Compose", tfms=["RandomFlip", dict(type="RandomCrop", size=[0.5, 1.0], p=0.25)])])
GOOD = [
    ("model", dict(type="retinanet", num_classes=3, body="test_resnet", channels=32, ratios=[0.5, 1.0], sizes=[[16.0, 20.0], 32], norm="bn", weights=None)),
    ("model", dict(type="mask_rcnn", vocab=["a", "b"], body="test_resnet", min_size=[0.0, 1.5], pre=[200, 100], aligned=False)),
    ("head", dict(type="AnchorHead", ni=16, num_classes=3, strides=[8, 16], channels=16, num_convs=1, anchors=dict(type="AnchorGenerator", strides=[8, 16], sizes=[[32], [64]]), assigner=dict(type="MaxIoUAssigner", low=None), coder=dict(type="DeltaCoder", clip=[-4, 4]))),
    ("transform", TRANSFORMS),
    ("optimizer", dict(type="sgd", lr=0.01, wd=0.0)),
    ("optimizer", dict(type="torch.AdamW", lr=0.001, betas=[0.9, 0.99], foreach=None)),
    ("scheduler", dict(type="step", steps=[3, 5], epochs=6)),
    ("dataset", dict(type="toy", n=8, classes=["circle", "square"])),
]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(-2, 2, allow_nan=False), st.sampled_from(["bn", "frozen", "gt", "retinanet", "RandomFlip", "Compose", "adamw", "1cycle", "", "coco", "x"]),
    st.lists(st.integers(-1, 9), max_size=3), st.lists(st.floats(0, 1), max_size=2), st.just({}), st.just(dict(type="RandomFlip")), st.just(dict(type="AnchorGenerator", strides=[8], sizes=[8])), st.just([dict(type="Resize")]),
)


def places(o, path=()):
    "Every place in plain data"
    yield path
    for k, v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ():
        yield from places(v, (*path, k))


@st.composite
def mutated(draw):
    "A kind, and a valid configuration with a few changes: values replaced, keys added, renamed or taken away"
    kind, o = draw(st.sampled_from(GOOD))
    o = copy.deepcopy(o)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(o) if p]))
        at = o
        for k in path[:-1]:
            at = at[k]
        how = draw(st.sampled_from(["set", "drop", "rename", "add"]))
        if how == "set":
            at[path[-1]] = copy.deepcopy(draw(VALUES))
        elif how == "drop":
            del at[path[-1]]
        elif isinstance(at, dict):
            name = draw(st.sampled_from(["num_convs", "p", "how", "lr", "typ", "strides", "tfms", "channels", "x"]))
            at[name] = at.pop(path[-1]) if how == "rename" else copy.deepcopy(draw(VALUES))
        if not o:
            break
    return kind, o


def binds(kind, o):
    "Do the real signatures take this, at every level?"
    if isinstance(o, str):
        o = dict(type=o)
    entry = {p["name"]: p["type"] for p in CAT[kind][o["type"]]["params"]}
    inspect.signature(lookup(kind, o["type"])).bind(**{k: v for k, v in o.items() if k != "type"})

    def below(t, v):
        if t["type"] == "part" and v is not None:
            binds(t["kind"], v)
        elif t["type"] == "list" and isinstance(v, list):
            for x in v:
                below(t["items"], x)

    for k, v in o.items():
        if k != "type":
            below(entry[k], v)


def model_takes(kind, o):
    "The verdict of the pydantic model alone"
    if not isinstance(o, dict) or not isinstance(o.get("type"), str) or o["type"] not in CAT[kind]:
        return False
    try:
        MODELS.setdefault((kind, o["type"]), component_model(kind, o["type"], CAT)).model_validate(o)
    except ValidationError:
        return False
    return True


MODELS, SCHEMAS = {}, {}


def schema_takes(kind, o):
    "The verdict of the JSON Schema alone"
    if kind not in SCHEMAS:
        SCHEMAS[kind] = jsonschema.Draft202012Validator(json_schema(CAT, kind))
    return SCHEMAS[kind].is_valid(o)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_a_mutation_is_right_for_all_or_for_none(case):
    "`problems`, the pydantic model and the JSON Schema agree, and what they take, the real signatures take; every complaint has words and a place"
    kind, o = case
    found = problems(tree(o), CAT, kind)
    assert (not found) == model_takes(kind, o), [*map(str, found)]
    if schema_takes(kind, o):
        assert not [p for p in found if not lenient(p, o)], [*map(str, found)]
    else:
        assert found
    if not found:
        binds(kind, o)
        full = fill_defaults(tree(o), CAT, kind)
        assert problems(full, CAT, kind) == []
        binds(kind, full.plain())
    for p in found:
        assert p.message and str(p)


def lenient(p, o):
    "Is this the sort of fault that JSON Schema cannot see? It has no integers apart from 1.0, and a mapping in place of a list may be a change of a base"
    for k in p.path:
        o = o[k] if isinstance(o, (list, dict)) and (k in o if isinstance(o, dict) else k < len(o)) else o
    def soft(v):
        return isinstance(v, float) and v.is_integer() or isinstance(v, dict) and set(v) <= {"$ref", "_delete_"} or isinstance(v, list) and any(map(soft, v))

    return soft(o)


def test_valid_ones_are_built():
    "What is right is not only accepted by signatures but built"
    for kind, o in GOOD:
        if kind not in ("dataset", "model"):
            assert build(tree(o), kind) is not None


# -- JSON Schema ------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", tool.ROOTS)
def test_schemas_are_schemas(root):
    "The saved files are valid in the eyes of their own standard, with titles and descriptions"
    s = json.loads((schema_folder() / f"{root}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(s)
    assert s["$schema"].endswith("2020-12/schema") and s["title"] and s["description"]
    refs = set()

    def walk(o):
        if isinstance(o, dict):
            refs.update({o["$ref"]} if isinstance(o.get("$ref"), str) else ())
            for v in o.values():
                walk(v)
        elif isinstance(o, list):
            for v in o:
                walk(v)

    walk(s)
    assert refs <= {f"#/$defs/{k}" for k in s["$defs"]}
    props = [p for d in s["$defs"].values() if d.get("title") in {n for k in CAT for n in CAT[k]} for p in d["properties"].values()]
    assert props and all("description" in p or "$ref" in p for p in props)


FILES_GOOD = [
    "model: retinanet_tiny\ndataset: toy_tiny\n",
    "model: {_base_: retinanet_tiny, num_convs: 2}\ndataset: {type: toy, n: 20}\noptimizer: {type: torch.SGD, lr: 3e-4}\nscheduler: {_base_: 1x, epochs: 3}\n",
    "model: {type: fcos, body: resnet18, radius: null}\ndataset: {_base_: toy_tiny, bs: 2}\nepochs: 2\nseed: 0\n",
]
FILES_BAD = [
    "dataset: toy_tiny\n", "model: retinanet_tny\ndataset: toy_tiny\n", "model: {type: retinanet, numconvs: 2}\ndataset: toy_tiny\n", "model: {_base_: retinanet_tiny, num_convs: two}\ndataset: toy_tiny\n",
    "model: {_base_: retinanet_tiny, numconvs: 2}\ndataset: toy_tiny\n", "model: fcos_tiny\ndataset: {type: toy, n: 0}\n", "model: fcos_tiny\ndataset: toy_tiny\noptimizer: {lr: 3}\n", "model: fcos_tiny\ndataset: toy_tiny\nprecision: fp8\n",
    "model: fcos_tiny\ndataset: toy_tiny\nscheduler: 3x\n", "model: fcos_tiny\ndataset: [toy]\n", "model: fcos_tiny\ndataset: toy_tiny\nepochs: 2.5\n",
]


@pytest.mark.parametrize("text,ok", [(o, True) for o in FILES_GOOD] + [(o, False) for o in FILES_BAD])
def test_editors_say_what_check_says(text, ok, tmp_path):
    "A file is right or wrong for the saved schema as it is for `visdet config check`"
    V = jsonschema.Draft202012Validator(json.loads((schema_folder() / "run.json").read_text(encoding="utf-8")))
    (tmp_path / "a.yaml").write_text(text)
    assert V.is_valid(read_yaml(tmp_path / "a.yaml").plain()) == ok
    try:
        load_config(tmp_path / "a.yaml")
        assert ok
    except ConfigError:
        assert not ok
