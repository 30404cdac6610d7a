"The dashboard in a real browser: filter, click, hover, sort, compare; no console error, no request"
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'visdet[bench]'")
from visdet.bench.compare import compare
from visdet.bench.dashboard import dashboard
from visdet.bench.environment import environment
from visdet.bench.result import CaseResult, Run
from visdet.bench.stats import spread

CHROMIUM = os.environ.get("VISDET_CHROMIUM", "/usr/bin/chromium")
SHOTS = os.environ.get("VISDET_SHOTS")  # a folder: keep screenshots there to look at them
NASTY = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned=1'> & more"
ENV = environment()
CASES = [("neck", "FPN", dict(size=s, width=w), ("forward", "both"), t) for s, w, t in [(256, 64, 0.9e-3), (256, 256, 4.2e-3), (512, 256, 17e-3)]]
CASES += [("op", f, dict(n=n, backend=b), ("forward",), t * n / 1000) for f, b, t in [("nms", "torch", 2.1e-3), ("nms", "torchvision", 0.7e-3), ("box_iou", "torch", 0.3e-3)] for n in (1000, 5000)]
CASES += [("body", n, dict(size=s), ("forward",), t * (s / 224) ** 2) for n, t in [("resnet50", 70e-3), ("swin_tiny", 95e-3), ("mobilenetv3", 12e-3)] for s in (224, 448)]
CASES += [("model", "retinanet", dict(size=(320, 480)), ("forward",), 0.41), ("model", "fcos", dict(size=(320, 480)), ("forward",), 0.37)]


def result(kind, name, params, mode, t, rng, n=20, noise=0.02, speed=1.0):
    "One result with `n` noisy blocks around `t` seconds"
    ps = ",".join(f"{k}={params[k]}" for k in sorted(params)).replace(" ", "")
    blocks = (t * np.exp(rng.normal(0, noise, n))).tolist()
    return CaseResult(case=f"{kind}/{name}[{ps}]", kind=kind, component=name, params=params, mode=mode, device="cpu", status="ok", wall=spread(blocks), cpu=spread([1.01 * b for b in blocks]), blocks=blocks,
                      flags=["outliers 7%"] if name == "box_iou" else [], memory=dict(peak=int(t * 4e9), activations=int(t * 2e9), params=1000, buffers=0), model_params=int(t * 1e9) if kind in ("body", "model", "neck") else None,
                      flops=dict(forward=int(t * 5e10), backward=int(t * 1e11)) if kind != "op" else None, share_of_roofline=0.4, score=t / speed)


def make_run(i, seed=0, factor=lambda case: 1.0, cases=CASES, env=ENV, suite="quick", extra=(), speed=1.0):
    "A synthetic run: number `i` in time"
    rng = np.random.default_rng((seed, i))
    rows = [result(k, n, p, m, t * factor(n) * (2.9 if m == "both" else 1) * speed, rng, speed=speed) for k, n, p, ms, t in cases for m in ms]
    return Run(schema_version=1, protocol="1.0", id=f"run-{i:03}", suite=suite, started=f"2026-10-{1 + i:02}T08:30:00Z", seconds=90.0, calibration={}, results=[*rows, *extra], note="",
               environment=env.model_copy(update=dict(commit=f"{i // 2 + 0xabc0:07x}" + "0" * 33, dirty=i == 5)))


def history():
    "Fifteen runs: nms jumps at the eighth; the last is faster in one neck and slower in a body, lost a case, and has a crash with a nasty message"
    runs = [make_run(i, factor=lambda n: 1.3 if n == "nms" and i >= 8 else 1.0) for i in range(14)]
    crash = CaseResult(case="head/RPN[size=256]", kind="head", component="RPN", params=dict(size=256), mode="forward", device="cpu", status="crash", message=NASTY, blocks=[], flags=[])
    last = make_run(14, factor=lambda n: {"nms": 1.3, "FPN": 0.8, "swin_tiny": 1.25}.get(n, 1.0), cases=CASES[:-1], extra=[crash])
    return [*runs, last, make_run(15, env=ENV.model_copy(update=dict(cpu="Another 9000 Processor", cores=64)), speed=0.4)]


def test_page_alone(tmp_path):
    "Without a browser: one file, nothing fetched, data escaped and complete"
    out = dashboard(history(), tmp_path / "d.html")
    html = out.read_text(encoding="utf-8")
    assert re.findall(r'<script[^>]+src=|<link[^>]+href="(?!data:)', html) == []
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    assert len(data["runs"]) == 16 and any(r["message"] == NASTY for r in data["rows"])
    assert {c["run"] for c in data["changes"] if "nms" in c["key"]} == {8}
    assert NASTY not in html and [o.name for o in tmp_path.iterdir()] == ["d.html"]


def test_accuracy_that_matches_nothing(tmp_path):
    "A slip in the accuracy table is named"
    with pytest.warns(UserWarning, match="retinanett"):
        dashboard(history()[:1], tmp_path / "d.html", accuracy=dict(name="AP", values={"model/retinanett": 0.3}))


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


@pytest.fixture
def show(browser, tmp_path):
    "Open a dashboard; afterwards there must have been no console message and no request but for the file"
    trouble, pages = [], []

    def open_(runs, width=1280, height=900, **kw):
        path = dashboard(runs, tmp_path / f"d{len(pages)}.html", **kw)
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(60_000)
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("request", lambda r: trouble.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_
    for p in pages:
        assert p.evaluate("window.pwned") is None
        p.close()
    assert trouble == []


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def points(page, plot="scatter"):
    "Number of points drawn"
    return page.evaluate(f"document.getElementById('{plot}').data.filter(t => t.name !== 'Pareto front').reduce((n, t) => n + t.x.length, 0)")


def column(page, table, i):
    "Texts of a column"
    return page.locator(f"#{table} tbody tr td:nth-child({i})").all_inner_texts()


def test_filter_sort_click(show):
    page = show(history(), accuracy=dict(name="COCO box AP", values={"retinanet": 36.0, "resnet50": 38.0, "swin_tiny": 42.0, "mobilenetv3": 30.0}))
    page.select_option("#p-run", "14")
    page.select_option("#p-y", "peak")
    rows = page.locator("#table tbody tr")
    assert rows.count() == 20 and points(page) == 19  # the crash has no point, but a row
    shot(page, "wide")
    assert page.locator("#table td.bad").inner_text().startswith("crash: </script>")
    page.select_option("#f-kind", "op")
    assert rows.count() == 6 == points(page) and page.inner_text("#count") == "6 results shown"
    page.fill("#f-text", "nms torch n=5000")
    page.wait_for_function("document.getElementById('count').textContent == '2 results shown'")
    page.select_option("#f-size", "n=1000")
    assert "No result of this run passes" in page.inner_text("#scatter") and "No result" in page.inner_text("#table")
    page.click("text=Clear")
    page.wait_for_function("document.querySelectorAll('#table tbody tr').length == 20")
    page.click("#table th button:has-text('Time')")
    time = page.evaluate("""() => { const f = {s: 1, ms: 1e-3, 'µs': 1e-6}; return [...document.querySelectorAll('#table tbody tr td:nth-child(4)')].map(o => { const [x, u] = o.innerText.split(' '); return u ? x * f[u] : Infinity; }); }""")
    assert time == sorted(time) and len(time) == 20 and time[-1] == math.inf
    page.focus("#table th button:has-text('Time')")
    page.keyboard.press("Enter")  # sorting by keyboard, and the focus stays
    assert page.evaluate("document.activeElement.textContent") == "Time"
    assert page.get_attribute("#table th:nth-child(4)", "aria-sort") == "descending"
    assert column(page, "table", 4)[-1] == "–" and "swin_tiny[size=448]" in column(page, "table", 1)[0]  # what is missing stays last
    page.select_option("#p-y", "accuracy")
    assert points(page) == 7
    front = page.evaluate("(() => { const t = document.getElementById('scatter').data.find(t => t.name === 'Pareto front'); return t.x.map((x, i) => [x, t.y[i]]); })()")
    assert front == sorted(front) and [o[1] for o in front] == [30.0, 38.0, 42.0]
    shot(page, "accuracy")


def test_hover_and_history(show):
    page = show(history()[:15])
    page.select_option("#f-kind", "op")
    page.wait_for_function("document.getElementById('count').textContent == '6 results shown'")
    spots = page.locator("#scatter .scatterlayer .trace .points path")
    spots.first.scroll_into_view_if_needed()
    box = spots.first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 - 30, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#scatter .hoverlayer .hovertext")
    tip = page.locator("#scatter .hoverlayer .hovertext").first.text_content()
    assert "op/" in tip and "Time of a call" in tip and re.search(r"[mµ]s", tip) and "iB" in tip
    page.mouse.down()
    page.mouse.up()  # a click on a point leads to its history
    page.wait_for_function("document.getElementById('h-case').value.startsWith('op/')")
    page.select_option("#f-kind", "")
    page.click("#table button:has-text('op/nms[backend=torch,n=1000]')")
    assert page.input_value("#h-case") == "op/nms[backend=torch,n=1000] · forward · cpu"
    page.wait_for_function("document.getElementById('history').data && document.getElementById('history').data[0].x.length == 15")
    notes = page.evaluate("document.getElementById('history').layout.annotations.map(a => [a.x, a.text])")
    assert len(notes) == 1 and notes[0][0] == 7.5 and abs(float(re.search(r"\+([\d.]+) %", notes[0][1])[1]) - 30) < 4
    commits = page.evaluate("document.getElementById('history').layout.shapes.filter(s => s.line.dash == 'dot').length")
    assert commits == 7
    shot(page, "history")


def test_compare_like_python(show):
    "The page's ratios, intervals and verdicts are those of `compare`"
    runs = history()
    page = show(runs)
    page.select_option("#c-a", "13")
    page.select_option("#c-b", "14")
    want = compare(runs[13], runs[14])
    got = page.evaluate("compareRows(13, 14, 0.05).map(r => ({key: [r.case, r.mode, r.device], verdict: r.verdict, e: r.e}))")
    assert len(got) == len(want.df)
    n = 0
    for o in got:
        w = want.df[(want.df.case == o["key"][0]) & (want.df["mode"] == o["key"][1])].iloc[0]
        assert (o["e"] is None) == bool(np.isnan(w.ratio)), o
        if o["e"]:
            assert abs(o["e"]["ratio"] / w.ratio - 1) < 1e-4  # the page keeps five digits
            assert abs(o["e"]["lo"] / w.lo - 1) < 0.01 and abs(o["e"]["hi"] / w.hi - 1) < 0.01
        n += o["verdict"] == w.verdict
    assert n >= len(got) - 1  # two bootstraps may differ where an interval just touches the threshold
    cards = page.inner_text("#c-cards")
    assert "2 slower" in cards and "6 faster" in cards and "1 only before" in cards and "1 only after" in cards
    page.click("#c-table th button:has-text('Verdict')")
    assert column(page, "c-table", 4)[:2] == ["slower", "slower"]
    page.locator("#compare").scroll_into_view_if_needed()
    page.hover("#c-table")
    shot(page, "compare")
    page.click("#c-swap")
    assert "6 slower" in page.inner_text("#c-cards")
    page.select_option("#c-thr", "0.3")
    assert "6 slower" not in page.inner_text("#c-cards")
    page.select_option("#c-b", "15")
    assert "different classes of machines" in page.inner_text("#c-note") and "Normalised" in page.evaluate("document.getElementById('compare').layout.xaxis.title.text")
    page.select_option("#c-a", "15")
    page.select_option("#c-thr", "0.1")
    page.select_option("#c-a", "13")
    cards = page.inner_text("#c-cards")  # a machine 2.5 times as fast: the normalised times are the same but for the planted jump of nms
    assert cards.split("\n") == ["4 faster", "16 same"]
    page.select_option("#c-a", "15")
    assert "same run twice" in page.inner_text("#compare")


def test_nothing_and_one(show):
    "No runs, and one run, are states with a sentence each"
    page = show([])
    for o in ("#scatter", "#table", "#history", "#compare"):
        assert "No runs yet" in page.inner_text(o)
    shot(page, "none")
    page = show([make_run(0)])
    assert "needs two" in page.inner_text("#compare") and page.locator("#table tbody tr").count() == 20
    page.select_option("#p-y", "accuracy")
    assert "Pass accuracy=" in page.inner_text("#scatter")
    page.select_option("#p-y", "flops")
    assert points(page) > 5
    shot(page, "one")


def test_narrow_screen(show):
    "On a telephone nothing is wider than the screen but the insides of tables"
    page = show(history(), width=390, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "narrow")


def test_keyboard(show):
    "Every control is reached by the tabulator key, in the order of the page"
    page = show(history()[:3])
    want = page.evaluate("[...document.querySelectorAll('a[href], select:not([disabled]), input, #filters button, #c-swap')].map(e => e.id || e.textContent)")
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        if seen[-1] == "c-swap":
            break
    assert [o for o in seen if o in want] == want
