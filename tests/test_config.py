"""Configuration: merging, bases, variables, where values come from, and what a file can never do"""
import builtins
import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
import time
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visdet.core.bases import find_preset, load_tree, preset_names
from visdet.core.basics import ConfigError
from visdet.core.config import Config, build, import_allowed, load_config
from visdet.core.merge import merge, override, read_override, rebase, substitute
from visdet.core.registry import _table, register
from visdet.core.schema import catalogue
from visdet.core.tree import Source, find, leaves, to_node
from visdet.core.yaml import read_yaml, write_yaml

slow_ok = settings(deadline=None, max_examples=60)


def tree(o, name="t.yaml"):
    return to_node(o, Source("file", name))


# ---------------------------------------------------------------------------------------------------- a small world


class Anchors:
    "Boxes on a grid"

    def __init__(self, sizes: list[int] = (32, 64), name: str = ""):
        self.sizes, self.name = sizes, name


class Flip:
    "Mirror"

    def __init__(self, p: float = 0.5):
        self.p = p


def net(num_classes: int = None, width: int = 64, note: str = "plain", norm: Literal["bn", "frozen"] = "bn", anchors: Anchors = None, scale: float = 1.0, tags: list[str] = ()):
    return dict(num_classes=num_classes, width=width, note=note, norm=norm, anchors=anchors, scale=scale, tags=tags)


def sized(num_classes: int, width: int = 8):
    return (num_classes, width)


def sgd(lr: float = 0.01, momentum: float = 0.9):
    return ("sgd", lr, momentum)


def adam(lr: float = 0.001):
    return ("adam", lr)


def run(model, optimizer="w_sgd", epochs: int = 12, work_dir: str = "runs", seed: int = None):
    "A run"


WORLD = [("prior", "w_anchors", Anchors), ("transform", "w_flip", Flip), ("model", "w_net", net), ("model", "w_sized", sized), ("optimizer", "w_sgd", sgd), ("optimizer", "w_adam", adam)]


@pytest.fixture(scope="module")
def cat():
    "A catalogue with the components of this file, registered while the module runs"
    for kind, name, f in WORLD:
        register(kind, name)(f)
    yield catalogue(run)
    for kind, name, _ in WORLD:
        _table[kind].pop(name)


@pytest.fixture
def put(tmp_path):
    def _put(name, text):
        p = tmp_path / name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(textwrap.dedent(text))
        return p

    return _put


# ---------------------------------------------------------------------------------------------------- merge: properties

words = st.sampled_from("abcdef")
texts = st.text("xyz$ {}#:'\"-0.1e", max_size=8).filter(lambda s: "${" not in s)
scalars = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), texts)


def shapes(depth=3):
    "A shape: a scalar, a list, or a mapping of shapes; partial trees of one shape never put a mapping on a scalar"
    return st.recursive(st.sampled_from(["scalar", "list"]), lambda s: st.dictionaries(words, s, max_size=4), max_leaves=12)


@st.composite
def partial(draw, shape):
    if shape == "scalar":
        return draw(scalars)
    if shape == "list":
        return draw(st.lists(scalars, max_size=3))
    return {k: draw(partial(s)) for k, s in shape.items() if draw(st.booleans())}


@st.composite
def three(draw):
    shape = draw(st.dictionaries(words, shapes(), max_size=4))
    return [draw(partial(shape)) for _ in range(3)]


def history(node):
    "Every value and source below a node, with what it replaced"
    out = []
    for path, leaf in leaves(node):
        o = leaf
        while o is not None:
            out.append((path, repr(o.plain()), str(o.source)))
            o = o.over
    return out


@slow_ok
@given(three())
def test_merge_is_associative(abc):
    a, b, c = (tree(o, f"{n}.yaml") for o, n in zip(abc, "abc"))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert left.plain() == right.plain()
    assert repr(left.plain()) == repr(right.plain())
    assert history(left) == history(right)


@slow_ok
@given(three())
def test_merge_with_nothing_changes_nothing(abc):
    x = tree(abc[0])
    for y in (merge(x, tree({})), merge(tree({}), x), merge(x, x)):
        assert repr(y.plain()) == repr(x.plain()) or sorted(map(repr, leaves(y))) == sorted(map(repr, leaves(x)))
    assert merge(x, tree({})).plain() == x.plain()


@slow_ok
@given(three())
def test_merge_leaves_its_arguments_alone(abc):
    a, b, _ = map(tree, abc)
    before = repr(a.plain()), repr(b.plain())
    merge(a, b)
    assert (repr(a.plain()), repr(b.plain())) == before


@slow_ok
@given(three())
def test_child_wins(abc):
    a, b, _ = map(tree, abc)
    m = merge(a, b)
    for path, leaf in leaves(b):
        if leaf.plain() != {}:
            assert repr(find(m, path).plain()) == repr(leaf.plain())


@slow_ok
@given(three())
def test_deleted_leaves_only_the_child(abc):
    a, b, _ = abc
    m = merge(tree(a), tree({**b, "_delete_": True}))
    assert repr(m.plain()) == repr(b)


# ---------------------------------------------------------------------------------------------------- merge: rules


def test_delete_rules():
    base = tree(dict(a=dict(b=1, c=2), l=[1, 2]))
    assert merge(base, tree(dict(a=dict(_delete_=True, d=3)))).plain()["a"] == dict(d=3)
    assert merge(base, tree(dict(a=dict(_delete_=False, d=3)))).plain()["a"] == dict(b=1, c=2, d=3)
    assert "a" not in merge(base, tree(dict(a=dict(_delete_=True)))).plain()
    assert merge(base, tree(dict(l=dict(_delete_=True, x=1)))).plain()["l"] == dict(x=1)
    with pytest.raises(ConfigError, match="true or false"):
        merge(base, tree(dict(a=dict(_delete_=1))))
    with pytest.raises(ConfigError, match="no inherited 'x' to delete"):
        substitute(tree(dict(x=dict(_delete_=True))))
    assert find(merge(base, tree(dict(a=dict(_delete_=True, d=3)))), "a").over.plain() == dict(b=1, c=2)


def test_another_type_drops_the_arguments_of_the_first():
    base = tree(dict(o=dict(type="sgd", lr=0.1, momentum=0.9)))
    assert merge(base, tree(dict(o=dict(type="adam")))).plain()["o"] == dict(type="adam")
    assert merge(base, tree(dict(o=dict(type="sgd", lr=0.2)))).plain()["o"] == dict(type="sgd", lr=0.2, momentum=0.9)
    assert merge(base, tree(dict(o=dict(lr=0.2)))).plain()["o"] == dict(type="sgd", lr=0.2, momentum=0.9)


def test_lists_by_index_and_by_name():
    base = tree(dict(t=[dict(type="Resize", size=8), dict(type="Flip", p=0.5), dict(type="Flip", name="up", p=0.1), 7]))

    def edit(**e):
        return merge(base, tree(dict(t=e))).plain()["t"]

    assert edit(**{"0": dict(size=4)})[0] == dict(type="Resize", size=4)
    assert edit(**{"-1": 9})[3] == 9
    assert edit(up=dict(p=1.0))[2] == dict(type="Flip", name="up", p=1.0)
    assert edit(Resize=dict(_delete_=True), **{"-1": 3}) == [dict(type="Flip", p=0.5), dict(type="Flip", name="up", p=0.1), 3]
    assert edit(Resize=dict(type="Crop"))[0] == dict(type="Crop")
    assert merge(base, tree(dict(t=[1]))).plain()["t"] == [1]
    assert merge(base, tree(dict(t=dict(type="Compose")))).plain()["t"] == dict(type="Compose")
    for bad, why in [(dict(Flip={}), "names 2 elements"), (dict(Crop={}), "unknown element"), ({"9": {}}, "beyond a list of 4"), (dict(Flop={}), "did you mean 'Flip'")]:
        with pytest.raises(ConfigError, match=why):
            edit(**bad)


def test_overrides_are_yaml():
    t = tree(dict(a=dict(b=1), l=[dict(name="x", p=1), 2]))
    for text, path, value in [
        ("a.b=3e-4", "a.b", 3e-4),
        ("a.c=true", "a.c", True),
        ("a.c='true'", "a.c", "true"),
        ("a.c=null", "a.c", None),
        ("a.c=a=b", "a.c", "a=b"),
        ("l[1]=[1, x]", "l[1]", [1, "x"]),
        ("l.x.p=2", "l[0].p", 2),
        ("l.0.p=2", "l[0].p", 2),
        ("a={d: 1}", "a", dict(b=1, d=1)),
        ("a={_delete_: true, d: 1}", "a", dict(d=1)),
        ("['k.y']=1", ("k.y",), 1),
    ]:
        res = override(t, text)
        node = find(res, path)
        assert node.plain() == value and type(node.plain()) is type(value), text
        assert all(str(o.source) == f"command line: {text}" for p, o in leaves(node) if text != "a={d: 1}"), text
    for bad in ["a.b", "=1", "a.b=", "l[5]=1", "l.y.p=1", "a..b=1", "a=[1", "a=!!python/object:os.system x", "a=1 #2"]:
        with pytest.raises(ConfigError):
            override(t, bad)


# ---------------------------------------------------------------------------------------------------- references


@st.composite
def with_variables(draw):
    "A tree in which text may refer to scalars by name, and whole values to anything; references point to earlier names only"
    plain = draw(st.dictionaries(st.sampled_from("abc"), st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(words, scalars, max_size=2)), min_size=1))
    out, seen, single = dict(plain), list(plain), {k for k, v in plain.items() if not isinstance(v, (dict, list))}
    for i in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(seen))
        one = name in single
        ref = draw(st.sampled_from(["whole", "ref", "text", "env", "escaped"]))
        out[f"v{i}"] = (
            {"$ref": name, "extra": i} if ref == "ref" and isinstance(out[name], dict)
            else f"x ${{{name}}} y ${{{name}}}" if ref == "text" and one
            else "${env:NONE,dflt}" if ref == "env"
            else "$${a} $" if ref == "escaped"
            else f"${{{name}}}"
        )
        seen.append(f"v{i}")
        if one or isinstance(out[f"v{i}"], str) and out[f"v{i}"] != f"${{{name}}}":
            single.add(f"v{i}")
    keys = draw(st.permutations(list(out)))
    return {k: out[k] for k in keys}


@slow_ok
@given(with_variables())
def test_substitution_leaves_no_variable(o):
    res = substitute(tree(o), env={})
    for path, leaf in leaves(res):
        if isinstance(leaf.value, str) and "${" in leaf.value:  # only what was escaped survives, as text
            assert "${a} $" in leaf.value
            assert leaf.value.replace("${a} $", "").find("${") < 0
    again = substitute(tree(escape(res.plain())), env={})
    assert repr(again.plain()) == repr(res.plain())


def escape(v):
    if isinstance(v, dict):
        return {k: escape(o) for k, o in v.items()}
    return [escape(o) for o in v] if isinstance(v, list) else v.replace("${", "$${") if isinstance(v, str) else v


@slow_ok
@given(st.dictionaries(st.sampled_from("abcdef"), st.one_of(st.sampled_from(["${%s}" % c for c in "abcdef"]), st.sampled_from(["x${%s}" % c for c in "abcdef"]),
       st.builds(lambda c, d: {d: {"$ref": c}}, words, words), st.builds(lambda c: {"$ref": c}, words), st.builds(lambda c: [f"${{{c}}}"], words), scalars), min_size=1))
def test_any_web_of_references_ends(o):
    "Whatever refers to whatever: a result or a ConfigError, soon"
    t0 = time.time()
    try:
        res = substitute(tree(o), env={}).plain()
        assert "${" not in repr(res) and "$ref" not in repr(res)
    except ConfigError as e:
        assert "t.yaml" in str(e)
    assert time.time() - t0 < 5


def test_ref_with_siblings():
    o = {"head": {"type": "h", "c": 256, "l": [{"type": "x", "k": 1}]}, "aux": {"$ref": "head", "c": 64, "l": {"0": {"k": 2}}}, "other": {"$ref": "aux", "type": "z"}}
    res = substitute(tree(o)).plain()
    assert res["aux"] == {"type": "h", "c": 64, "l": [{"type": "x", "k": 2}]}
    assert res["head"]["c"] == 256 and res["other"] == {"type": "z"}
    child = merge(tree(o), tree({"aux": {"c": 8}}))
    assert substitute(child).plain()["aux"]["c"] == 8


@pytest.mark.parametrize("o, chain", [
    ({"a": "${b}", "b": "${c}", "c": "${a}"}, ["a (", "b (", "c ("]),
    ({"a": "x${b}", "b": "y${a}"}, ["a (", "b ("]),
    ({"a": {"$ref": "b"}, "b": {"$ref": "a"}}, ["a (", "b ("]),
    ({"a": {"b": {"$ref": "c"}}, "c": {"d": {"$ref": "a"}}}, ["a.b (", "a.b.d ("]),
    ({"a": {"b": {"c": {"$ref": "a.b"}}}}, ["a.b.c ("]),
])
def test_circles_name_their_chain(o, chain):
    with pytest.raises(ConfigError, match="leads back to itself|contains itself") as e:
        substitute(tree(o))
    assert " -> " in str(e.value) and "t.yaml" in str(e.value)
    for c in chain:
        assert c in str(e.value)


def test_bombs_end_quickly():
    doubling = {"a0": "lol"} | {f"a{i}": [f"${{a{i-1}}}"] * 2 for i in range(1, 40)}
    refs = {"a0": {"x": 1}} | {f"a{i}": {"p": {"$ref": f"a{i-1}"}, "q": {"$ref": f"a{i-1}"}} for i in range(1, 25)}
    text = {"a0": "lol"} | {f"a{i}": f"${{a{i-1}}}" * 10 for i in range(1, 30)}
    long = {"a0": 1} | {f"a{i}": f"${{a{i-1}}}" for i in range(500, 0, -1)}
    deep = {"a0": 1} | {f"a{i}": {"x": {"$ref": f"a{i-1}"}} if i > 1 else {"x": 1} for i in range(200, 0, -1)}
    for o in (doubling, refs, text, long, deep):
        t0 = time.time()
        with pytest.raises(ConfigError) as e:
            substitute(tree(o))
        assert " -> " in str(e.value) and len(str(e.value)) < 2000
        assert time.time() - t0 < 10


def test_environment():
    env = dict(N="8", T="text", Y="a: b", E="", V="${N}")

    def get(s):
        return substitute(tree(dict(v=s)), env=env).plain()["v"]

    assert [get(s) for s in ("${env:N}", "${env:T}", "${env:Y}", "${env:E}", "${env:V}", "${env:Q,2}", "${env:Q,}", "n${env:N}", "$${env:N}")] == [8, "text", "a: b", "", "${N}", 2, "", "n8", "${env:N}"]
    with pytest.raises(ConfigError, match="'Q' is not set"):
        get("${env:Q}")
    far = to_node(dict(v="${env:N}"), Source("url", "https://h.org/x.yaml"))
    with pytest.raises(ConfigError, match="remote file may not read the environment"):
        substitute(far, env=env)
    assert substitute(merge(far, tree(dict(v=1))), env=env).plain() == dict(v=1)


def test_rebase_means_the_same_elsewhere():
    part = {"w": 3, "h": {"c": "${w}", "t": "a${w}b$${w}"}, "k": {"$ref": "h"}, "e": "${env:X,1}"}
    alone = substitute(tree(part), env={}).plain()
    moved = substitute(tree({"m": [rebase(tree(part), ("m", 0))], "w": 99}), env={}).plain()
    assert moved["m"][0] == alone


# ---------------------------------------------------------------------------------------------------- bases


def test_bases_and_presets(put, tmp_path):
    put("presets/models/small.yaml", "type: w_net\nwidth: 16\nnote: w${width}\n")
    put("presets/models/tiny.yaml", "_base_: small\nwidth: 8\n")
    put("presets/optimizers/small.yaml", "type: w_adam\n")
    put("base/a.yaml", "epochs: 1\nseed: 1\nmodel: {type: w_net, width: 4, norm: frozen}\n")
    put("base/b.yaml", "epochs: 2\n")
    top = put("run.yaml", "_base_: [base/a.yaml, base/b.yaml]\nmodel: {_base_: tiny, num_classes: 3}\noptimizer: small\n")
    node, files = load_tree(top, [tmp_path / "presets"])
    plain = substitute(node).plain()
    assert plain == dict(epochs=2, seed=1, model=dict(type="w_net", width=8, note="w8", num_classes=3), optimizer=dict(type="w_adam"))
    assert [o.kind for o in files] == ["file", "file", "file", "preset", "preset", "preset"]
    assert files[0].digest == hashlib.sha256(top.read_bytes()).hexdigest() and all(len(o.digest) == 64 for o in files)
    assert [(p, n.split("/")[-1]) for p, n in files[0].bases] == [("", "a.yaml"), ("", "b.yaml"), ("model", "tiny"), ("optimizer", "small")]
    assert find(node, "model").over is not None
    assert preset_names("model", [tmp_path / "presets"]) == ["small", "tiny"]
    assert find_preset("../models/small", "model", [tmp_path / "presets"]) is None
    mine = dict(model=dict(small=dict(type="w_sized")))
    assert load_tree("small", [mine, tmp_path / "presets"], kind="model")[0].plain() == dict(type="w_sized")


def test_base_errors_name_the_chain(put, tmp_path):
    for i in range(3):
        put(f"x{i}.yaml", f"_base_: x{(i + 1) % 3}.yaml\n")
    with pytest.raises(ConfigError) as e:
        load_tree(tmp_path / "x0.yaml")
    assert str(e.value).count("->") == 3 and "x2.yaml:1:9" in str(e.value)
    for i in range(50):
        put(f"c{i}.yaml", f"_base_: c{i + 1}.yaml\n")
    with pytest.raises(ConfigError, match="more than 32 files.*->"):
        load_tree(tmp_path / "c0.yaml")
    for i in range(25):
        put(f"b{i}.yaml", f"p: {{_base_: b{i + 1}.yaml}}\nq: {{_base_: b{i + 1}.yaml}}\n")
    put("b25.yaml", "a: 1\n")
    with pytest.raises(ConfigError, match="100000 entries.*->"):
        load_tree(tmp_path / "b0.yaml")
    put("many.yaml", "_base_: [" + ", ".join(f"m{i}.yaml" for i in range(300)) + "]\n")
    for i in range(300):
        put(f"m{i}.yaml", "a: 1\n")
    with pytest.raises(ConfigError, match="more than 256 files"):
        load_tree(tmp_path / "many.yaml")
    link = tmp_path / "link.yaml"
    link.symlink_to(put("self.yaml", "_base_: link.yaml\n"))
    with pytest.raises(ConfigError, match="its own base"):
        load_tree(tmp_path / "self.yaml")


def test_a_diamond_is_read_once(put, tmp_path):
    for i in range(30):
        put(f"d{i}.yaml", f"_base_: [d{i + 1}.yaml, d{i + 1}.yaml]\nk{i}: {i}\n")
    put("d30.yaml", "a: 1\n")
    node, files = load_tree(tmp_path / "d0.yaml")
    assert len(files) == 31 and len(node.value) == 31


# ---------------------------------------------------------------------------------------------------- the whole


def test_why_for_every_source(cat, put, tmp_path):
    put("presets/models/small.yaml", "type: w_net\nwidth: 16\nnote: ${env:NOTE}\n")
    put("base.yaml", "epochs: 24\noptimizer: {type: w_sgd, lr: 0.5}\n")
    top = put("run.yaml", "_base_: base.yaml\nmodel: {_base_: small, scale: 2.0}\noptimizer: w_adam\nseed: ${epochs}\nwork_dir: r/${epochs}\n")
    cfg = load_config(top, ["epochs=3", "model.norm=frozen"], cat=cat, presets=[tmp_path / "presets"], env=dict(NOTE="hi"))

    def says(path):
        return [(o.how, o.value, o.source.kind) for o in cfg.why(path).links]

    assert says("epochs") == [("from", 3, "command"), ("over", 24, "file"), ("over", 12, "default")]
    assert says("model.width") == [("from", 16, "preset"), ("over", 64, "default")]
    assert says("model.scale") == [("from", 2.0, "file"), ("over", 1.0, "default")]
    assert says("model.norm") == [("from", "frozen", "command"), ("over", "bn", "default")]
    assert says("model.note") == [("from", "hi", "env"), ("through", "${env:NOTE}", "preset"), ("over", "plain", "default")]
    assert says("model.num_classes") == [("from", None, "default")]
    assert says("seed")[:2] == [("from", 3, "command"), ("through", "${epochs}", "file")]
    assert says("work_dir")[:2] == [("from", "r/3", "file"), ("through", "r/${epochs}", "file")]
    assert says("optimizer.lr") == [("from", 0.001, "default"), ("dropped", 0.5, "file")]
    assert says("optimizer.type")[:2] == [("from", "w_adam", "file"), ("dropped", "w_sgd", "file")]
    cfg.set("model.num_classes", 7, Source("data", "train.json"))
    assert says("model.num_classes") == [("from", 7, "data"), ("over", None, "default")]
    text = str(cfg.why("model.num_classes"))
    assert text.splitlines() == ["model.num_classes: 7", "  data: train.json", "  over null from default of w_net"]
    assert f"{top}:2:31" in str(cfg.why("model.scale")) and "command line: epochs=3" in str(cfg.why("epochs"))
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        cfg.why("model.widht")


def test_all_problems_at_once(cat, put):
    top = put("run.yaml", "model:\n  type: w_net\n  widht: 3\n  norm: frozn\nepochs: many\nopimizer: w_sgd\n")
    with pytest.raises(ConfigError) as e:
        load_config(top, ["model.scale=wide"], cat=cat)
    msg = str(e.value)
    for part in ("run.yaml:3:3: model.widht", "did you mean 'width'", "run.yaml:4:9: model.norm", "'frozen'", "run.yaml:5:9: epochs", "did you mean 'optimizer'", "command line: model.scale=wide: model.scale"):
        assert part in msg, (part, msg)


def test_misspelt_preset_is_compared_with_presets_and_components(cat, put, tmp_path):
    put("presets/models/resnet_small.yaml", "type: w_net\n")
    for name, near in [("resnet_smal", "resnet_small"), ("w_nett", "w_net")]:
        with pytest.raises(ConfigError, match=f"unknown model '{name}'; did you mean.*'{near}'"):
            load_config(dict(model=name), cat=cat, presets=[tmp_path / "presets"])


leaf = st.one_of(texts, st.sampled_from(["${", "a ${b} c", "$${x}", "$", "null", "1e3", "0x1", "yes", "- a", "#", "", "é\n\tx"]))
configs = st.fixed_dictionaries(
    dict(model=st.fixed_dictionaries(dict(type=st.just("w_net")), optional=dict(width=st.integers(-9, 9**9), note=leaf, norm=st.sampled_from(["bn", "frozen"]), tags=st.lists(leaf, max_size=3),
         num_classes=st.none() | st.integers(1, 99), scale=st.floats(allow_nan=False), anchors=st.none() | st.fixed_dictionaries(dict(type=st.just("w_anchors")), optional=dict(sizes=st.lists(st.integers(0, 9)), name=leaf))))),
    optional=dict(epochs=st.integers(0, 99), work_dir=leaf, seed=st.none() | st.integers(0, 9), optimizer=st.sampled_from(["w_sgd", dict(type="w_adam", lr=3e-4), dict(type="w_sgd", momentum=0.0)])),
)


@settings(deadline=None, max_examples=40)
@given(o=configs)
def test_resolved_reads_back_equal(cat, o):
    cfg = load_config(escape(o), cat=cat)
    again = load_config(read_yaml(text=cfg.resolved()), cat=cat)
    assert repr(again.plain()) == repr(cfg.plain())
    assert cfg.diff(again) == [] and again.resolved() == cfg.resolved()
    assert repr(cfg["model"].plain().get("note", "plain")) == repr(o["model"].get("note", "plain"))


def test_resolved_needs_nothing_else(cat, put, tmp_path):
    put("presets/models/small.yaml", "type: w_net\nwidth: 16\nnote: ${env:NOTE}\nanchors: {type: w_anchors, sizes: ['${width}']}\n")
    put("base.yaml", "epochs: 24\n")
    cfg = load_config(put("run.yaml", "_base_: base.yaml\nmodel: small\nwork_dir: $${HOME}/${epochs}\n"), cat=cat, presets=[tmp_path / "presets"], env=dict(NOTE="${x}"))
    text = cfg.resolved(tmp_path / "out/resolved.yaml", header="resolved")
    assert "_base_" not in text and text.startswith("# resolved\n")
    again = load_config(tmp_path / "out/resolved.yaml", cat=cat, presets=[], env={})
    assert again == cfg and again.work_dir == "${HOME}/24" and again.model.note == "${x}"
    assert [o.kind for o in again.files] == ["file"]


def test_diff(cat):
    a = load_config(dict(model=dict(type="w_net", width=1, scale=1.0)), cat=cat)
    b = load_config(dict(model=dict(type="w_net", width=2)), ["optimizer=w_adam"], cat=cat)
    d = {o.path: (o.before and o.before.plain(), o.after and o.after.plain()) for o in a.diff(b)}
    assert d == {"model.width": (1, 2), "optimizer.type": ("w_sgd", "w_adam"), "optimizer.lr": (0.01, 0.001), "optimizer.momentum": (0.9, None)}
    assert a.diff(a) == [] and str(a.diff(a)) == "no difference"
    assert "~ model.width: 1 (python) -> 2 (python)" in str(a.diff(b)) and "- optimizer.momentum: 0.9" in str(a.diff(b))


def test_config_is_a_mapping_that_is_not_assigned_to(cat):
    cfg = load_config(dict(model="w_net"), cat=cat)
    assert cfg.model.width == cfg["model.width"] == cfg["model"]["width"] == 64
    assert dict(cfg.items())["epochs"] == 12 and "model.widht" not in cfg and cfg.get("nope") is None
    with pytest.raises(AttributeError, match="did you mean 'width'"):
        cfg.model.widht
    with pytest.raises(AttributeError, match="has a source"):
        cfg.epochs = 3
    with pytest.raises(TypeError):
        cfg["epochs"] = 3
    with pytest.raises(TypeError):
        hash(cfg)
    again = pickle.loads(pickle.dumps(cfg))
    assert isinstance(again, Config) and again == cfg and again.why("epochs").source == cfg.why("epochs").source


def test_set_from_the_data(cat):
    cfg = load_config(dict(model=dict(type="w_net", width=3)), cat=cat)
    cfg.set("model.num_classes", 4).set("model.num_classes", 5)
    assert cfg.why("model.num_classes").source.kind == "data"
    assert cfg.set("model.width", 3).why("model.width").source.kind == "python"
    with pytest.raises(ConfigError, match="3 contradicts 9"):
        cfg.set("model.width", 9)
    assert cfg.set("model.width", 9, Source("command", "width")).model.width == 9
    before = cfg.plain()
    for path, v in [("model.widht", 1), ("model.width", "x"), ("epochs", None)]:
        with pytest.raises(ConfigError):
            cfg.set(path, v, Source("python"))
    assert cfg.plain() == before
    cfg.set("optimizer", dict(type="w_adam"), Source("python"))
    assert cfg.optimizer == dict(type="w_adam", lr=0.001)


def test_build(cat):
    made = build(dict(type="w_net", anchors=dict(type="w_anchors", sizes=[1])), "model", cat)
    assert isinstance(made["anchors"], Anchors) and made["anchors"].sizes == [1] and made["width"] == 64
    assert build("w_sized", "model", cat, num_classes=3) == (3, 8)
    assert build(dict(type="w_sized", num_classes=2), "model", cat, num_classes=3, width=1) == (2, 1)
    with pytest.raises(ConfigError, match="needs `num_classes`"):
        build("w_sized", "model", cat)
    with pytest.raises(ConfigError, match="did you mean 'num_classes'"):
        build("w_sized", "model", cat, num_classes=1, num_class=1)
    cfg = load_config(dict(model=dict(type="w_net", width=7), optimizer=dict(type="w_sgd", lr=1.0)), cat=cat)
    assert build(cfg.optimizer, "optimizer") == ("sgd", 1.0, 0.9)
    cat2 = {**cat, "model": {**cat["model"], "w_gone": {**cat["model"]["w_net"], "module": "some.where"}}}
    with pytest.raises(ConfigError, match="some.where is not imported"):
        build("w_gone", "model", cat2)


def test_an_error_while_building_says_where(cat, put):
    def broken(x: int = 0):
        raise ValueError("no")

    register("model", "w_broken")(broken)
    try:
        with pytest.raises(ValueError) as e:
            build(dict(type="w_broken"), "model")
        assert "while building the model 'w_broken'" in "".join(e.value.__notes__)
    finally:
        _table["model"].pop("w_broken")


# ---------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize("evil", [
    "model: {type: os.system}", "model: os.system", "model: {type: w_net, anchors: {type: subprocess.Popen}}", "model: {type: builtins.eval}",
    "model: {type: evil_package.run}", "model: {type: w_net, note: x, _import_: evil_package}", "custom_imports: {imports: [evil_package]}\nmodel: w_net",
    "allow_import: [evil_package]\nmodel: w_net", "model: !!python/object/apply:evil_package.run []", "model: !!python/name:os.system", "model: {type: !!python/module:evil_package x}",
    "_base_: evil_package.py\nmodel: w_net", "model: {_base_: evil_package}", "model: {_target_: evil_package.run}", "model: ${evil_package.run}", "model: ${python:evil_package}",
])
def test_a_file_imports_and_runs_nothing(cat, put, tmp_path, monkeypatch, evil):
    (tmp_path / "evil_package.py").write_text("open(__file__ + '.ran', 'w').close()\ndef run(*a): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    top, seen, real = put("run.yaml", evil + "\n"), [], builtins.__import__

    def spy(name, *a, **k):
        seen.append(name)
        return real(name, *a, **k)

    monkeypatch.setattr(builtins, "__import__", spy)
    monkeypatch.setattr("os.system", lambda *a: seen.append("evil ran"))
    with pytest.raises(ConfigError):
        cfg = load_config(top, cat=cat)
        build(cfg.model, "model")
    monkeypatch.undo()
    assert not (tmp_path / "evil_package.py.ran").exists() and not any("evil" in o for o in seen) and "evil_package" not in sys.modules


def test_allowed_packages_may_register(cat, put, tmp_path, monkeypatch):
    name = f"friendly_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text("from visdet.core.registry import register\n@register('model')\ndef w_friendly(depth:int=3): return depth\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    saved = dict(cat)
    monkeypatch.setattr("visdet.core.config.saved_catalogue", lambda: saved)
    top = put("run.yaml", "model: {type: w_friendly, depth: 5}\n")
    with pytest.raises(ConfigError, match="unknown model 'w_friendly'"):
        load_config(top)
    try:
        cfg = load_config(top, allow_import=[name])
        assert build(cfg.model, "model") == 5
    finally:
        _table["model"].pop("w_friendly", None)
        sys.modules.pop(name, None)
    for bad in ("os; import sys", "", "../x", "a b", "-c"):
        with pytest.raises(ConfigError, match="not the name of a package"):
            import_allowed([bad])


def test_a_variable_cannot_smuggle_a_file_in(cat, put, tmp_path):
    put("secret.yaml", "type: w_net\n")
    with pytest.raises(ConfigError, match="may name a preset or a component"):
        load_config(dict(model="${work_dir}", work_dir=str(tmp_path / "secret.yaml")), cat=cat)
    assert load_config(dict(model="${env:M,w_net}"), cat=cat, env={}).model.type == "w_net"


def test_remote_bases_reach_only_remote_files(put, tmp_path, monkeypatch):
    served = {}

    def fetch(url, sha256=None, **kw):
        text = served[url]
        p = tmp_path / "cache" / hashlib.sha256(text.encode()).hexdigest()
        p.parent.mkdir(exist_ok=True)
        p.write_text(text)
        return p

    monkeypatch.setattr("visdet.core.fetch.fetch", fetch)
    put("local.yaml", "epochs: 9\n")
    served["https://h.org/c/b.yaml"] = "seed: 5\n"
    served["https://h.org/c/a.yaml"] = "_base_: b.yaml\nepochs: 4\n"
    node, files = load_tree(put("run.yaml", "_base_: https://h.org/c/a.yaml\nepochs: 1\n"))
    assert node.plain() == dict(seed=5, epochs=1) and [o.name for o in files][1:] == ["https://h.org/c/a.yaml", "https://h.org/c/b.yaml"]
    assert "https://h.org/c/b.yaml#sha256=" in str(find(node, "seed").source)
    for evil in (tmp_path / "local.yaml", "/etc/passwd", "~/x.yaml", "file:///etc/passwd", "http://h.org/c/b.yaml", "C:\\x.yaml"):
        served["https://h.org/c/a.yaml"] = f"_base_: '{evil}'\n"
        with pytest.raises(ConfigError):
            load_tree(tmp_path / "run.yaml")


def test_checking_a_file_imports_nothing_heavy(put):
    code = """
        import sys
        import visdet.core.config, visdet.core.bases, visdet.core.merge
        from visdet.core.config import load_config
        cat = dict(model=dict(m=dict(doc='', module='m', params=[])), run=dict(r=dict(doc='', module='m', params=[dict(name='model', type=dict(type='part', kind='model'), default=None, required=True, doc='')])))
        assert load_config(dict(model='m'), cat=cat, presets=[]).plain() == dict(model=dict(type='m'))
        bad = sorted({o.split('.')[0] for o in sys.modules} & {'torch', 'torchvision', 'fastai', 'numpy', 'pandas', 'PIL', 'matplotlib', 'ssl'})
        assert not bad, bad
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_every_entry_point_survives_the_round_trip():
    "object -> configuration -> YAML -> object, for every model of the zoo"
    import torch

    import visdet.all  # noqa: F401  registers everything
    from visdet.core.registry import lookup, names
    from visdet.core.schema import to_config

    with torch.device("meta"):  # shapes only: nothing is initialised
        for name in (o for o in names("model") if not o.startswith("w_")):
            one = lookup("model", name)(vocab=["a", "b"], body="resnet18", channels=32)
            text = write_yaml(to_config(one))
            cfg = load_config(read_yaml(text=text), root="model")
            two = build(cfg, "model")
            assert load_config(to_config(two), root="model") == cfg and type(two) is type(one) and two.vocab == one.vocab
            a, b = one.state_dict(), two.state_dict()
            assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()} and repr(one) == repr(two), name


def test_shipped_presets_are_complete_configurations():
    for root in ("model", "dataset", "optimizer", "scheduler"):
        for name in preset_names(root):
            cfg = load_config(name, root=root, given=("path",))
            assert load_config(read_yaml(text=cfg.resolved()), root=root, given=("path",)) == cfg, name
            assert cfg.why("type").source.kind == "preset"


odd = st.sampled_from(["w_net", "w_sgd", "${model}", "${model.type}", "x${epochs}", "${", "$${a}", "${env:Q,1}", "model", "a.yaml", "https://h/x.yaml", "../x", "", ".", "~", "${a..b}", "${[}", "${model[0]}", "a['"])
words_of_power = st.sampled_from(["model", "optimizer", "epochs", "_base_", "$ref", "_delete_", "type", "anchors", "0", "-1", "lr", "work_dir", "width", "tags"])
wild = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-3, 3), odd), lambda s: st.one_of(st.lists(s, max_size=3), st.dictionaries(words_of_power, s, max_size=4)), max_leaves=14)
changes = st.sampled_from(["epochs=2", "model={type: w_sized}", "optimizer=w_adam", "model[0]=1", "model.tags={0: x}", "a", "=", "model={_delete_: true}", "model={$ref: optimizer}", "model.type=${epochs}"])


@settings(deadline=None, max_examples=150)
@given(o=st.one_of(wild, st.dictionaries(words_of_power, wild, max_size=5)), overrides=st.lists(changes, max_size=3))
def test_nonsense_is_a_config_error(cat, o, overrides):
    try:
        cfg = load_config(tree(o), overrides, cat=cat, presets=[], env={})
        assert cfg.model.type in ("w_net", "w_sized")
    except ConfigError as e:
        assert str(e)
