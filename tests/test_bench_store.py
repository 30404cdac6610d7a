"Records of benchmark runs and their store under kill -9, a full disk, two processes, and arbitrary values"
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("psutil")
jsonschema = pytest.importorskip("jsonschema")
from hypothesis import given, settings, strategies as st  # noqa: E402

from visdet.bench.environment import Environment  # noqa: E402
from visdet.bench.result import SCHEMA, CaseResult, from_df, json_schema, new_run, read_csv, read_run, to_df, write_csv, write_run  # noqa: E402
from visdet.bench.stats import spread  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
HERE = Environment(cpu="Test", arch="x86_64", cores=2, usable=2.0, memory=2**30, os="Linux 6", python="3.11", torch="2", threads=1, interop_threads=1, visdet="0")

WRITER = """
import sys
from visdet.bench.result import CaseResult, new_run, write_run
from visdet.bench.environment import Environment
env = Environment(cpu="Test", arch="x86_64", cores=2, usable=2.0, memory=2**30, os="Linux 6", python="3.11", torch="2", threads=1, interop_threads=1, visdet="0")
row = CaseResult(case="op/nms", kind="op", component="nms", blocks=[i/7 for i in range(2000)])
def big(n): r = new_run("big", env=env); r.results = [row]*n; return r
"""


def python(code, *words, **kw):
    "A Python process with some words"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, **kw)


def test_kill_during_writing_never_damages_history(tmp_path):
    "A process that writes large records is killed at random moments: what is there can be read, and what was there is unchanged"
    loop = WRITER + "run = big(40)\nprint('ready', flush=True)\nwhile True:\n    r = big(40); print(write_run(r, sys.argv[1]).name, flush=True)\n"
    rng, seen, kills_inside = random.Random(0), {}, 0
    for _ in range(6):
        p = python(loop, tmp_path)
        p.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.4))
        p.send_signal(signal.SIGKILL)
        reported = p.communicate()[0].split()
        files = {o.name: o.read_bytes() for o in tmp_path.glob("*.json") if not o.name.startswith(".")}
        assert set(reported[:-1]) <= set(files), "a record that was reported is missing"
        for name, content in seen.items():
            assert files[name] == content, f"{name} was changed by a later run"
        for name in files.keys() - seen.keys():
            assert len(read_run(tmp_path / name)) == 40
        seen, kills_inside = files, kills_inside + bool(list(tmp_path.glob(".*.tmp")))
        for o in tmp_path.glob(".*.tmp"):
            o.unlink()
    assert seen, "nothing was written: the test tested nothing"
    assert kills_inside, "no kill fell into a write: the test tested nothing"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
def test_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    "Writing beyond what the system allows raises one DataError; earlier records stay, nothing half-written is left"
    first = write_run(new_run("small", env=HERE), tmp_path)
    before = first.read_bytes()
    code = WRITER + (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: write_run(big(40), sys.argv[1])\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    out, err = python(code, tmp_path).communicate()
    assert out.startswith("DataError") and "no space left" in out and out.count("\n") == 1, out + err
    assert [o.name for o in tmp_path.iterdir()] == [first.name] and first.read_bytes() == before


def test_two_processes_share_a_store(tmp_path):
    "A store answers while another process holds its index, and sees what that process wrote"
    duckdb = pytest.importorskip("duckdb")
    from visdet.bench.store import Store

    write_run(new_run("a", env=HERE), tmp_path)
    store = Store(tmp_path)
    assert len(store) == 1
    hold = python("import duckdb, sys\nc = duckdb.connect(sys.argv[1]); print(1, flush=True); sys.stdin.readline()", store.cache, stdin=subprocess.PIPE)
    hold.stdout.readline()
    try:
        with pytest.raises(duckdb.Error):
            duckdb.connect(str(store.cache))
        write_run(new_run("b", env=HERE), tmp_path)
        assert len(store) == 2
    finally:
        hold.communicate("\n")
    assert len(store) == 2


def test_published_schema_is_the_models():
    "The file in the repository is what the models say, and it accepts what they write and refuses what they refuse"
    published = json.loads((ROOT / f"benchmarks/schema/run-{SCHEMA}.json").read_text(encoding="utf-8"))
    assert published == json_schema(), "run: python -c \"import json; from visdet.bench.result import json_schema; print(json.dumps(json_schema(), indent=1))\" > benchmarks/schema/run-1.json"
    check = jsonschema.Draft202012Validator(published)
    run = new_run("quick", env=HERE)
    run.results = [CaseResult(case="op/nms", kind="op", component="nms", wall=spread([1.0, 2.0, 3.0]), blocks=[1.0, 2.0, 3.0])]
    doc = json.loads(json.dumps(run.model_dump(mode="json"), allow_nan=False))
    check.validate(doc)
    for wrong in (dict(speed=1), dict(schema_version="1"), dict(results=[dict(case="x")])):
        assert list(check.iter_errors({**doc, **wrong}))


def test_recorded_runs_are_valid():
    "Every record in the repository reads, and obeys the published schema"
    files = sorted((ROOT / "benchmarks/results/runs").glob("*.json"))
    if not files:
        pytest.skip("no records in the repository")
    check = jsonschema.Draft202012Validator(json_schema())
    for o in files:
        assert read_run(o).results, o.name
        check.validate(json.loads(o.read_text(encoding="utf-8")))


floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=4), o, max_size=3), max_leaves=6)


@st.composite
def results(draw):
    "Any result that the models accept"
    sp = st.lists(floats, min_size=1, max_size=9).map(lambda o: spread([x / 4 for x in o]))
    return CaseResult(
        case=draw(st.text(min_size=1, max_size=12)),
        kind="op",
        component=draw(st.text(min_size=1, max_size=6)),
        params=draw(st.dictionaries(st.text(max_size=4), values, max_size=3)),
        mode=draw(st.sampled_from(["forward", "backward", "both"])),
        status=draw(st.sampled_from(["ok", "error", "oom", "crash", "timeout"])),
        message=draw(st.text(max_size=20)),
        wall=draw(st.none() | sp),
        blocks=draw(st.lists(floats, max_size=4)),
        flags=draw(st.lists(st.text(max_size=5), max_size=2)),
        memory=draw(st.none() | st.dictionaries(st.sampled_from(["peak", "moved"]), st.integers(0, 2**50))),
        model_params=draw(st.none() | st.integers(0, 2**50)),
        flops=draw(st.none() | st.fixed_dictionaries(dict(forward=st.integers(0, 2**60), backward=st.none() | st.integers(0, 2**60)))),
        share_of_roofline=draw(st.none() | floats),
        score=draw(st.none() | floats),
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(results(), max_size=3), max_size=3), st.text(max_size=20))
def test_round_trips_are_exact(tmp_path_factory, rows, note):
    "JSON, pandas and CSV give back what went in, whatever it was"
    d, runs = tmp_path_factory.mktemp("trip"), []
    for o in rows:
        runs.append(new_run("quick", note=note, env=HERE))
        runs[-1].results = o
    for r in runs:
        assert read_run(write_run(r, d)) == r
    assert from_df(to_df(runs)) == runs
    write_csv(runs, d / "runs.csv")
    assert read_csv(d / "runs.csv") == runs
