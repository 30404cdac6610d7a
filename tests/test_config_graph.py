"Graphs of configurations: laid out without overlap, true to the model, and harmless whatever a configuration says"
import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visdet.config.graph import component_graph, draft_model, inheritance_graph
from visdet.config.layout import COLOURS, Arrow, Box, Diagram
from visdet.core.config import load_config

CHROMIUM = os.environ.get("VISDET_CHROMIUM", "/usr/bin/chromium")
NS = "{http://www.w3.org/2000/svg}"
NASTY = "</title></svg></script><script>window.pwned = 1</script><img src=x onerror='window.pwned=1'>\" onload=\"window.pwned=1"


def boxes_of(svg):
    "Places of the boxes of a picture: (left, top, right, bottom)"
    for g in ET.fromstring(svg).iter(NS + "g"):
        if g.get("class") == "b":
            x, y = map(float, re.findall(r"[-\d.]+", g.get("transform")))
            r = g.find(NS + "rect")
            yield x, y, x + float(r.get("width")), y + float(r.get("height"))


texts = st.text(max_size=30)
boxes = st.builds(Box, title=texts, below=texts, rows=st.lists(st.tuples(texts, texts), max_size=3), chips=st.lists(texts, max_size=3), kind=st.sampled_from(list(COLOURS)), tip=texts)


@st.composite
def diagrams(draw):
    bs = draw(st.lists(boxes, min_size=1, max_size=9))
    ends = st.integers(0, len(bs) - 1)
    return Diagram(bs, draw(st.lists(st.builds(Arrow, src=ends, dst=ends, label=texts, dashed=st.booleans()), max_size=14)), draw(texts), draw(texts))


@settings(max_examples=60, deadline=None)
@given(diagrams())
def test_any_diagram_is_drawn(d):
    "Any graph, with circles and loops too, and any text: well-formed, all boxes inside, none upon another"
    svg = d.svg()
    w, h = (float(ET.fromstring(svg).get(o)) for o in ("width", "height"))
    places = list(boxes_of(svg))
    assert len(places) == len(d.boxes)
    assert all(x >= 0 and y >= -0.06 and u <= w and v <= h for x, y, u, v in places)
    assert not [1 for p, q in itertools.combinations(places, 2) if p[0] < q[2] - 0.1 and q[0] < p[2] - 0.1 and p[1] < q[3] - 0.1 and q[1] < p[3] - 0.1]


SMALL = dict(body="resnet18", channels=32, num_classes=3)
MODELS = dict(retinanet=dict(num_convs=1), fcos=dict(num_convs=1), atss=dict(num_convs=1), gfl=dict(num_convs=1), vfnet=dict(num_convs=1), tood=dict(num_convs=1), yolox=dict(num_convs=1), rtmdet=dict(num_convs=1), rtmdet_ins=dict(num_convs=1), faster_rcnn=dict(hidden=32, post=[50, 50]), mask_rcnn=dict(hidden=32, mask_channels=16, mask_convs=1, post=[50, 50]), deformable_detr=dict(queries=10, heads=4, hidden=32, two_stage=True, refine=True), dino=dict(queries=10, heads=4, hidden=32))


@pytest.mark.parametrize("name", MODELS)
def test_components_are_those_of_the_model(name):
    "Channels and strides of the picture are those that body and neck declare; parameters add up; the model is left as it was"
    model = draft_model(load_config(dict(type=name, **SMALL, **MODELS[name]), root="model")).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    g = component_graph(model)
    box = {b.title: b for b in g.boxes}
    for part in ("body", "neck"):
        m = getattr(model, part)
        assert box[part].rows == [(f"stride {s}", f"{c} ch") for s, c in zip(m.strides, m.channels)]
    assert {k for k, _ in model.named_children() if getattr(model, k) is not None} <= set(box)
    assert sum(int(r[2].replace(",", "")) for r in g.table) == sum(p.numel() for p in model.parameters())
    pairs = {(g.boxes[a.src].title, g.boxes[a.dst].title) for a in g.arrows}
    want = {("images", "body"), ("body", "neck"), ("neck", "head"), ("head", "detections")}
    want |= {("neck", "rpn"), ("rpn", "head")} if "rcnn" in name else set()
    want |= {("neck", "mask"), ("head", "mask"), ("mask", "detections")} if name == "mask_rcnn" else set()
    assert pairs == want
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_model_is_left_as_it_was():
    "Hooks and mode are put back when the model raises"
    model = draft_model(load_config(dict(type="retinanet", **SMALL), root="model")).train()
    model.head.forward = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError):
        component_graph(model)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_value_is_counted_once(tmp_path):
    "The shares of all files add up to the values there are, and each is the number of values whose source is that file"
    from visdet.core.tree import leaves

    (tmp_path / "a.yaml").write_text("model: {_base_: retinanet_tiny, num_convs: 3}\ndataset: toy_tiny\nepochs: 3\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("_base_: a.yaml\nmodel: {num_convs: 1, channels: '${batch_size}'}\nepochs: 5\nbatch_size: 8\nwork_dir: '${env:WHERE}'\n")
    cfg = load_config(tmp_path / "b.yaml", ["seed=2"], env=dict(WHERE="runs/x"))
    g = inheritance_graph(cfg)
    decided = {b.title: int(b.chips[0].split()[1]) for b in g.boxes[:-1]}
    assert sum(decided.values()) == len(list(leaves(cfg.tree))) == len(g.table)
    for title, name in (("a.yaml", "a.yaml"), ("b.yaml", "b.yaml"), ("retinanet_tiny", "retinanet_tiny")):
        assert decided[title] == sum(Path(n.source.name).name == name for _, n in leaves(cfg.tree)), title
    assert {r[0]: r[2] for r in g.table}["seed"] == "command line: seed=2"


def test_the_picture_of_files_is_light(tmp_path):
    "Drawing which file gives what needs no torch"
    (tmp_path / "a.yaml").write_text("model: retinanet_tiny\ndataset: toy_tiny\n")
    code = f"import sys; from visdet.config.inheritance import *; from visdet.core.config import load_config; inheritance_graph(load_config({str(tmp_path / 'a.yaml')!r})).save({str(tmp_path / 'a.svg')!r}); print({{'torch', 'numpy', 'fastai', 'pandas'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
    assert (tmp_path / "a.svg").stat().st_size > 1000


@pytest.fixture(scope="module")
def browser():
    "Headless chromium, or a skip with the reason"
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}: set VISDET_CHROMIUM")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield b
        b.close()


def test_page_in_a_browser(browser, tmp_path):
    "Names and values from a hostile file stay text; nothing is fetched; the pointer and the search field work"
    (tmp_path / "evil.yaml").write_text("model: {_base_: retinanet_tiny, vocab: ['%s']}\ndataset: toy_tiny\nwork_dir: '%s'\n" % ((NASTY.replace("'", "''"),) * 2))
    out = inheritance_graph(load_config(tmp_path / "evil.yaml"), title=NASTY).save(tmp_path / "g.html")
    page, said, asked = browser.new_page(), [], []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(Path(out).as_uri())
    assert page.evaluate("window.pwned") is None and page.title() == NASTY and said == []
    assert [u for u in asked if not u.startswith(("file:", "data:"))] == []
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    page.locator(".b").first.hover()
    assert page.locator(".dim").count() > 0
    page.fill("input", "work_dir")
    assert page.locator("tbody tr:visible").count() == 1 and NASTY in page.locator("tbody tr:visible").inner_text()
    page.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.pwned=1'>`)")  # should the escaping ever fail,
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None  # the page's policy still stands
    page.close()


def test_picture_alone_in_a_browser(browser, tmp_path):
    "The SVG file opens by itself, with texts inside their boxes"
    g = component_graph(draft_model(load_config(dict(type="mask_rcnn", **SMALL, **MODELS["mask_rcnn"]), root="model")))
    page = browser.new_page()
    page.goto(Path(g.save(tmp_path / "g.svg")).as_uri())
    out = page.evaluate("""() => [...document.querySelectorAll('.b')].flatMap(b => { const r = b.querySelector('.card').getBoundingClientRect();
        return [...b.querySelectorAll('text')].filter(t => { const q = t.getBoundingClientRect(); return q.left < r.left || q.right > r.right + 1 || q.bottom > r.bottom + 1 }).map(t => t.textContent) })""")
    assert out == [] and page.locator(".b").count() == len(g.boxes)
    page.close()
