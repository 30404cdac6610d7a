"`visdet bench` as its users meet it, and whole runs of suites: killed, interrupted, isolated, short of time"
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("duckdb")
pytest.importorskip("psutil")

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
VERBS = "run show compare history check dashboard".split()

SUITE = """name = "few"
include = ["op/nms*n=1000*", "coder/DeltaCoder*"]
device = "cpu"
threads = 1
budget_s = 120
budget = 0.02
"""


def call(*words):
    "`main` in this process: exit code, output, error output"
    from visdet.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(o) for o in words])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    "A small suite, run twice: its file, the folder of records, their names"
    d = tmp_path_factory.mktemp("bench")
    (d / "few.toml").write_text(SUITE)
    for note in ("first", "second"):
        code, out, err = call("bench", "run", "--suite", d / "few.toml", "--out", d / "runs", "--note", note)
        assert code == 0, out + err
    return d / "few.toml", d / "runs", sorted(o.name for o in (d / "runs").glob("*.json"))


def test_help_is_light_and_examples_parse():
    "Help of each verb loads nothing heavy, and what it shows as an example can be typed"
    code = (
        "import sys; from visdet.cli.main import main\n"
        "for o in ([], *([v] for v in %r)): assert main(['bench', *o, '--help']) == 0\n"
        "assert main(['bench', 'rnu']) == 2 and main(['bench', 'run', '--suit', 'x']) == 2 and main(['bench', 'check']) == 2\n"
        "heavy = {'torch', 'fastai', 'numpy', 'pandas', 'duckdb', 'pydantic'} & set(sys.modules); assert not heavy, heavy\n" % VERBS
    )
    res = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert res.returncode == 0, res.stderr
    for words in ("did you mean 'run'", "did you mean '--suite'", "--against is needed"):
        assert words in res.stderr
    from visdet.cli.parser import parse_command

    examples = [o.split() for o in res.stdout.splitlines() if o.startswith("  visdet bench ")]
    assert len(examples) > 10
    for o in examples:
        parse_command([w.strip("'") for w in o[1:]])


def test_run_writes_one_valid_record(few):
    "A run leaves one record with figures, calibration and environment, and prints it at 100 columns"
    from visdet.bench.result import read_run

    _, runs, names = few
    assert len(names) == 2 and sorted(o.name for o in runs.iterdir() if not o.name.startswith(".")) == names
    run = read_run(runs / names[0])
    assert run.note == "first" and run.suite == "few" and run.environment.threads == 1 and not run.failed
    assert set(run.calibration) >= {"gemm_f32", "copy", "conv", "launch"}
    for r in run.results:
        assert r.wall.lo <= r.wall.median <= r.wall.hi and len(r.blocks) == r.wall.n and r.memory["peak"] >= 0 and r.score > 0 and r.flops["uncounted"] is not None
    code, out, _ = call("bench", "show", "--runs", runs)
    assert code == 0 and max(map(len, out.splitlines()[1:])) <= 100 and all(r.component in out for r in run.results)


def test_show_compare_history_dashboard(few, tmp_path):
    "The other verbs answer on the recorded runs"
    _, runs, names = few
    code, out, _ = call("bench", "show", "all", "--runs", runs)
    assert code == 0 and len(out.splitlines()) == 3
    assert call("bench", "show", names[0], "--runs", runs, "--json", "-")[1] == (runs / names[0]).read_text(encoding="utf-8")
    code, out, _ = call("bench", "compare", names[0], "last", "--runs", runs, "--junit", tmp_path / "j.xml", "--markdown", tmp_path / "c.md")
    assert code == 0 and "op/nms" in (tmp_path / "c.md").read_text() and "<testsuite" in (tmp_path / "j.xml").read_text()
    code, out, _ = call("bench", "history", "nms", "--runs", runs)
    want = {r["case"] for r in json.loads((runs / names[0]).read_text(encoding="utf-8"))["results"] if r["component"] == "nms"}
    assert code == 0 and out.count("op/nms") == len(want) > 1 and len([o for o in out.splitlines() if o.startswith("  20")]) == 2 * len(want)
    pytest.importorskip("plotly")
    code, out, err = call("bench", "dashboard", "--runs", runs, "--out", tmp_path / "d.html")
    assert code == 0 and (tmp_path / "d.html").stat().st_size > 10_000, err


def test_check_against_a_record(few, tmp_path):
    "check measures the suite and judges it against a record; a threshold of 900 % lets any noise pass"
    suite, runs, names = few
    words = ["--against", runs / names[0], "--suite", suite, "--filter", "decode", "--device", "cpu", "--runs", runs]
    code, out, err = call("bench", "check", *words, "--threshold", 9, "--markdown", tmp_path / "c.md", "--junit", tmp_path / "j.xml")
    assert code == 0 and out.startswith("OK"), out + err
    assert "DeltaCoder" in (tmp_path / "j.xml").read_text() and (tmp_path / "c.md").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "--suite", "quik"], "did you mean 'quick'"),
        (["run", "--suite", "few.toml", "--filter", "nsm"], "did you mean"),
        (["run", "--suite", "few.toml", "--device", "cuda:77"], "cuda:77"),
        (["run", "--suite", "bad.toml"], "unknown key 'budgets_s'; did you mean 'budget_s'"),
        (["run", "--budget", "0"], "at least"),
        (["show", "zzz"], "unknown run"),
        (["show", "future.json"], "schema version 99; this visdet reads versions up to 1. Upgrade"),
        (["show", "cut.json"], "cut off"),
        (["show", "--runs", "nowhere"], "no such folder"),
        (["history", "fpnn"], "unknown case"),
        (["compare", "last", "nothing"], "unknown run"),
        (["check", "--against", "no-such-branch", "--suite", "few.toml"], "no-such-branch"),
    ],
)
def test_mistakes_end_with_one_line(words, said, few, tmp_path, monkeypatch):
    "A mistake is one line on the error stream and exit code 2"
    suite, runs, names = few
    monkeypatch.chdir(tmp_path)
    text = (runs / names[0]).read_text(encoding="utf-8")
    (tmp_path / "few.toml").write_text(SUITE)
    (tmp_path / "bad.toml").write_text('name = "bad"\nbudgets_s = 3\n')
    (tmp_path / "future.json").write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    where = ["--runs", runs] if words[0] != "run" and "--runs" not in words else []
    code, out, err = call("bench", *words, *where)
    assert code == 2 and err.startswith("visdet: error: ") and err.count("\n") == 1 and said in err, err


SLOW = """
import sys, time, torch
from visdet.core.cases import bench_case
from visdet.bench.suite import Suite, run_suite
def fast(device): return torch.relu, (torch.rand(10),)
def slow(device): print('slow', flush=True); return (lambda: time.sleep(60)), ()
bench_case('op', 'zz_a', fast); bench_case('op', 'zz_b', slow)
run_suite(Suite(name='slow', include=['op/zz_*'], budget=.02, calibrate=False), out=sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_run_leaves_what_it_had(how, tmp_path):
    "kill -9 leaves a valid partial record that no history counts; Ctrl-C leaves a finished one with a note"
    from visdet.bench.result import read_run
    from visdet.bench.store import Store

    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, and their children with them
    p = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENV, preexec_fn=heed)
    assert p.stdout.readline() == "slow\n"
    time.sleep(0.3)
    p.send_signal(how)
    p.communicate()
    left = [o for o in tmp_path.iterdir() if not o.name.startswith(".")]
    assert len(left) == 1 and p.returncode != 0
    run = read_run(left[0])
    assert [r.case for r in run.results] == ["op/zz_a"] and run.results[0].status == "ok"
    assert left[0].name.endswith(".partial" if how == signal.SIGKILL else ".json") and len(Store(tmp_path)) == (how == signal.SIGINT)
    assert how == signal.SIGKILL or run.note == "interrupted: 1 of 2 measurements made"


CRASHES = """
import os, torch
from visdet.core.cases import bench_case
def fine(device, n=3): return torch.relu, (torch.rand(n),)
def crash(device): return os.abort, ()
def fails(device): return (lambda: 1/0), ()
for n,f in (('yy_fine', fine), ('yy_crash', crash), ('yy_fails', fails)): bench_case('op', n, f)
"""


def test_isolated_crash_is_a_result(tmp_path, monkeypatch):
    "With isolate, an abort in one case is recorded, and the cases behind it are measured"
    (tmp_path / "yy_cases.py").write_text(CRASHES)
    monkeypatch.syspath_prepend(tmp_path)
    import yy_cases  # noqa: F401

    from visdet.bench.suite import Suite, run_suite

    run = run_suite(Suite(name="iso", include=["op/yy_*"], isolate=True, budget=0.02, calibrate=False, budget_s=300, device="cpu", memory=False), progress=False)
    got = {r.component: r for r in run.results}
    assert {k: r.status for k, r in got.items()} == dict(yy_fine="ok", yy_crash="crash", yy_fails="error")
    assert "SIGABRT" in got["yy_crash"].message and "ZeroDivisionError" in got["yy_fails"].message and got["yy_fine"].wall.median > 0


def test_suites_of_the_repository_load_and_plan():
    "Every suite file is valid, named like its file, and each of its patterns finds cases; quick and full leave nothing out"
    from visdet.bench.suite import list_suites, load_cases, load_suite, plan
    from visdet.core.cases import cases

    load_cases()
    found = list_suites()
    assert {"quick", "full"} <= set(found)
    for name in found:
        s = load_suite(name)
        assert s.name == name and s.doc and plan(s)
    assert len(plan(load_suite("quick"))) == len([c for c in cases(tier="quick") if not c[0].missing]) and len(plan(load_suite("full"))) == len([c for c in cases(tier="full") if not c[0].missing])
    assert load_suite("quick").budget_s <= 170 and load_suite("full").budget_s <= 3500
    for o in (ROOT / "benchmarks/suites").glob("*.toml"):
        assert o.stem in found
