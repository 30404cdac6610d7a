#!/usr/bin/env python3
"""Operators against the best other ways to get the same answer: same machine, same run, blocks in turns.

    python benchmarks/ops/run.py                     # everything, into benchmarks/results/ops.json
    python benchmarks/ops/run.py --filter nms        # only operators that match; the rest of the file is kept
    python benchmarks/ops/run.py --memory            # only peak memory, into the rows that are there; needs no quiet machine

Each file beside this one has a list CASES of dicts:

    op      name of the operator        size    what was asked of it, in words
    ours    factory of our call         others  name -> factory of another way
    same    optional: (ours, other) -> do the results agree?  Other answers are not compared.
    target  optional: the ratio to the other way called `against` (or to the fastest) that is wanted
    memory  optional: measure the memory each way adds at its peak; the ratio to `against` that is wanted

A factory takes nothing, prepares inputs from a fixed seed, and returns a callable without arguments.
"""
import argparse
import fnmatch
import gc
import importlib.util
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from visdet.bench.environment import environment
from visdet.bench.isolate import _rss_of, run_isolated
from visdet.bench.measure import effect, interleave
from visdet.bench.result import PROTOCOL
from visdet.core.basics import atomic_write, progress
from visdet.core.kernels import kernels_missing

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "results" / "ops.json"


def families():
    "All cases of the files beside this one"
    for f in sorted(HERE.glob("*.py")):
        if f.name == "run.py":
            continue
        spec = importlib.util.spec_from_file_location(f"ops_{f.stem}", f)
        m = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(m)
        yield from (dict(o, family=f.stem) for o in m.CASES)


def with_grad(f):
    "`f`, with gradients on if it needs them: the clock runs with gradients off"
    try:
        with torch.no_grad():
            f()
        return f
    except RuntimeError:
        return torch.enable_grad()(f)


def ways(case):
    "Name -> factory"
    return {"visdet": case["ours"], **case["others"]}


def rise(op, size, way):
    "Resident bytes that a call adds at its peak; libraries are loaded and threads started by a call before"
    case = next(c for c in families() if (c["op"], c["size"]) == (op, size))
    f = with_grad(ways(case)[way]())
    f(), gc.collect()
    return _rss_of(f)["rise"]


def measure_memory(case, threads):
    "What each way adds at its peak, each in a process of its own"
    res = {k: run_isolated("run:rise", dict(op=case["op"], size=case["size"], way=k), threads=threads, timeout=600) for k in ways(case)}
    for k, o in res.items():
        if o["status"] != "ok":
            raise RuntimeError(f"memory of {k}: {o['message']}")
    rises = {k: o["result"] for k, o in res.items()}
    ratios = {k: rises["visdet"] / o for k, o in rises.items() if k != "visdet" and o}
    against = case.get("against") or min(ratios, key=lambda k: rises[k])
    return dict(bytes=rises, ratios=ratios, target=case["memory"], against=against, met=ratios[against] <= case["memory"])


def measure_case(case, budget, threads):
    "Seconds of each way and the ratios of ours to the others"
    fs = {k: with_grad(f()) for k, f in ways(case).items()}
    results = {k: f() for k, f in fs.items()}
    same = {k: bool(case["same"](results["visdet"], o)) for k, o in results.items() if k != "visdet"} if case.get("same") else {}
    del results
    t = interleave({k: (f,) for k, f in fs.items()}, budget=budget, min_blocks=6, threads=threads)
    ratios = {}
    for k in case["others"]:
        e = effect(t["visdet"], t[k])
        ratios[k] = dict(ratio=e.ratio, lo=e.lo, hi=e.hi)
    against = case.get("against") or min(ratios, key=lambda k: t[k].median, default=None)
    met = dict(target=case["target"], against=against, met=ratios[against]["ratio"] <= case["target"]) if case.get("target") and against else {}
    return dict(op=case["op"], size=case["size"], family=case["family"], seconds={k: o.median for k, o in t.items()}, ratios=ratios, same=same, flags={k: o.flags for k, o in t.items() if o.flags}, threads=threads, **met, **(dict(memory=measure_memory(case, threads)) if case.get("memory") else {}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--filter", default="*", help="operators that match this pattern, such as '*nms*'"), p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--budget", type=float, default=8, help="seconds for each comparison"), p.add_argument("--threads", type=int, default=2), p.add_argument("--memory", action="store_true", help="measure memory alone")
    a = p.parse_args()
    pattern = a.filter if any(o in a.filter for o in "*?[") else f"*{a.filter}*"
    cases = [o for o in families() if fnmatch.fnmatch(o["op"], pattern)]
    doc = json.loads(a.out.read_text(encoding="utf-8")) if a.out.exists() else dict(rows=[])
    old = doc["rows"]
    rows, wrong, known = [], [], {(c["op"], c["size"]) for c in families()}
    if a.memory:
        cases = [c for c in cases if c.get("memory")]
    for c in progress(cases, "operators"):
        try:
            if a.memory:
                row = next(o for o in old if (o["op"], o["size"]) == (c["op"], c["size"]))
                rows.append(r := dict(row, memory=measure_memory(c, a.threads)))
            else:
                rows.append(r := measure_case(c, a.budget, a.threads))
        except StopIteration:
            wrong.append(f"{c['op']}, {c['size']}: no row yet; run without --memory")
            continue
        except Exception as e:
            wrong.append(f"{c['op']}, {c['size']}: {type(e).__name__}: {str(e).splitlines()[0]}")
            continue
        wrong += [f"{r['op']}, {r['size']}: another result than {k}" for k, same in r["same"].items() if not same]
        said = ", ".join(f"{v['ratio']:.2f} x {k}" for k, v in r["ratios"].items())
        said += "".join(f", memory {1e-6 * r['memory']['bytes']['visdet']:.0f} MB, {v:.2f} x {k}" for k, v in r["memory"]["ratios"].items()) if "memory" in r else ""
        print(f"{r['op']:<22} {r['size']:<46} {1e3 * r['seconds']['visdet']:9.3f} ms  {said}" + (f"  target {r['target']}: {'met' if r['met'] else 'MISSED'}" if "met" in r else ""), flush=True)
        write(a.out, [o for o in old if (o["op"], o["size"]) in known - {(r["op"], r["size"]) for r in rows}] + rows, doc if a.memory else None)
    print("\n".join(wrong))
    return 1 if wrong else 0


def write(out, rows, old=None):
    "The record, whole or not at all; what it says of the run stays as in `old` where times are"
    doc = dict(old, rows=sorted(rows, key=lambda r: (r["family"], r["op"]))) if old else dict(what="operators against other ways to the same answer; ratios of times, blocks in turns", protocol=PROTOCOL, recorded=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), kernels=kernels_missing("cpu") or "built", environment=environment().model_dump(mode="json"), rows=sorted(rows, key=lambda r: (r["family"], r["op"])))
    with atomic_write(out) as t:
        t.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
