"What a reader is shown: the README says what the index says, links lead somewhere, commands parse, exports are there."
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

NBS = ROOT / "nbs"
PAGES = [NBS / "index.ipynb", *sorted((NBS / "tutorials").glob("*.ipynb"))]


def cells(path):
    "(type, source) of the cells of a notebook"
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def words(text):
    "Words of a text, without markup, so that line breaks and table layout do not count"
    text = re.sub(r"^:::.*$", "", text, flags=re.M)
    return re.findall(r"\w+", re.sub(r"\]\([^)]*\)", "]", text))


def test_readme_is_the_index():
    "README.md holds every visible cell of nbs/index.ipynb, in order"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    have, at = " ".join(words(readme)), 0
    for kind, src in cells(NBS / "index.ipynb"):
        if src.startswith("#| hide"):
            continue
        src = re.sub(r'::: \{\.content-visible when-format="html"\}.*?:::', "", src, flags=re.S)
        for para in src.split("\n\n"):
            if para.startswith("> "):  # the subtitle is metadata, not text
                continue
            want = " ".join(words(para))
            found = have.find(want, at)
            assert found >= 0, f"not in README.md, run tools/readme.py: {para[:200]}"
            at = found


def test_readme_is_up_to_date():
    "Word for word, not only in its words"
    p = subprocess.run([sys.executable, str(ROOT / "tools/readme.py"), "--check"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    "Every relative link and picture exists"
    text = page.read_text(encoding="utf-8") if page.suffix == ".md" else "\n".join(s for k, s in cells(page) if k == "markdown")
    for o in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if re.match(r"https?:", o):
            continue
        bases = [ROOT] if o.startswith("nbs/") or page.suffix == ".md" else [page.parent]
        names = [o, re.sub(r"\.html$", ".ipynb", o)]
        rooms = [p for b in bases for p in (b / o).parent.glob(f"[0-9][0-9][0-9]_{(b / o).stem}.ipynb")]  # the site drops the number of a notebook
        assert rooms or any((b / n).exists() for b in [*bases, NBS] for n in names), o


def commands(text):
    "Command lines of `visdet` in shell blocks and in backticks"
    for block in re.findall(r"``` *(?:sh|bash)\n(.*?)```", text, re.S):
        yield from (o.split(" #")[0] for o in block.splitlines() if o.startswith("visdet "))
    yield from (o for o in re.findall(r"`(visdet [^`]+)`", text) if "COMMAND" not in o and "..." not in o and re.search(r" --|[./]", o))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_text_parse(page):
    "Every command a page mentions is one that exists, with options that exist"
    from visdet.cli.parser import parse_command

    for o in commands("\n".join(s for k, s in cells(page) if k == "markdown")):
        assert parse_command(shlex.split(o)[1:]).command


def test_sidebar_is_whole():
    "The sidebar names every page and every room, and nothing that is not there"
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    named = re.findall(r"^\s*- ([\w/]+\.ipynb)\s*$", text, re.M)
    assert all((NBS / o).exists() for o in named)
    assert {p.relative_to(NBS).as_posix() for p in PAGES} <= set(named)
    rooms = {p.parent.name for p in NBS.glob("*/[0-9]*.ipynb")}
    assert rooms <= set(re.findall(r"contents: (\w+)/\*\.ipynb", text))


def test_all_exports():
    "`from visdet.all import *` brings fastai's names and visdet's, and visdet's win where both have one"
    code = (
        "from visdet.all import *\n"
        "import visdet.data.transforms as t, visdet.deploy.save as s, visdet.data.batch as b\n"
        "assert Resize is t.Resize and RandomCrop is t.RandomCrop and save_model is s.save_model and Normalize is b.Normalize\n"
        "for o in 'Path torch nn np pd plt L Learner Callback GradientClip GradientAccumulation MixedPrecision SaveModelCallback EarlyStoppingCallback CSVLogger test_eq'.split():\n"
        "    assert o in globals() or o == 'test_eq', o\n"
        "for o in 'det_learner DetDataLoaders Detections Records make_toy evaluate load create_model list_models retinanet fcos faster_rcnn mask_rcnn Checkpoint EMA nms box_iou'.split():\n"
        "    assert callable(globals()[o]), o\n"
        "import visdet.cv.all as cv, visdet.engine.all as engine\n"
        "assert cv.nms is nms and cv.draw_objects and engine.register and engine.det_learner is det_learner\n"
        "assert hasattr(Learner, 'preflight') and hasattr(Learner, 'plot_top_losses')\n"
    )
    res = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert res.returncode == 0, res.stderr[-2000:]


def test_every_room_is_reachable_from_the_command():
    "The models that the registry knows are those that `from visdet.all import *` offers"
    res = subprocess.run([sys.executable, "-c", "from visdet.all import *; assert all(o in globals() for o in list_models()), list_models()"], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-2000:]
