#!/usr/bin/env python3
"""Operators against the best other ways to get the same answer: same machine, same run, blocks in turns.

    python benchmarks/ops/run.py                     # everything, into benchmarks/results/ops.json
    python benchmarks/ops/run.py --filter nms        # only operators that match; the rest of the file is kept

Each file beside this one has a list CASES of dicts:

    op      name of the operator        size    what was asked of it, in words
    ours    factory of our call         others  name -> factory of another way
    same    optional: (ours, other) -> do the results agree?  Other answers are not compared.
    target  optional: the ratio to the other way called `against` (or to the fastest) that is wanted

A factory takes nothing, prepares inputs from a fixed seed, and returns a callable without arguments.
"""
import argparse
import fnmatch
import importlib.util
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from visdet.bench.environment import environment
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


def measure_case(case, budget, threads):
    "Seconds of each way and the ratios of ours to the others"
    fs = {k: with_grad(f()) for k, f in {"visdet": case["ours"], **case["others"]}.items()}
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
    return dict(op=case["op"], size=case["size"], family=case["family"], seconds={k: o.median for k, o in t.items()}, ratios=ratios, same=same, flags={k: o.flags for k, o in t.items() if o.flags}, threads=threads, **met)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--filter", default="*", help="operators that match this pattern, such as '*nms*'"), p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--budget", type=float, default=8, help="seconds for each comparison"), p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    pattern = a.filter if any(o in a.filter for o in "*?[") else f"*{a.filter}*"
    cases = [o for o in families() if fnmatch.fnmatch(o["op"], pattern)]
    old = json.loads(a.out.read_text(encoding="utf-8"))["rows"] if a.out.exists() else []
    rows, wrong, known = [], [], {(c["op"], c["size"]) for c in families()}
    for c in progress(cases, "operators"):
        try:
            rows.append(r := measure_case(c, a.budget, a.threads))
        except Exception as e:
            wrong.append(f"{c['op']}, {c['size']}: {type(e).__name__}: {str(e).splitlines()[0]}")
            continue
        wrong += [f"{r['op']}, {r['size']}: another result than {k}" for k, same in r["same"].items() if not same]
        said = ", ".join(f"{v['ratio']:.2f} x {k}" for k, v in r["ratios"].items())
        print(f"{r['op']:<22} {r['size']:<46} {1e3 * r['seconds']['visdet']:9.3f} ms  {said}" + (f"  target {r['target']}: {'met' if r['met'] else 'MISSED'}" if "met" in r else ""), flush=True)
        write(a.out, [o for o in old if (o["op"], o["size"]) in known - {(r["op"], r["size"]) for r in rows}] + rows)
    print("\n".join(wrong))
    return 1 if wrong else 0


def write(out, rows):
    "The record, whole or not at all"
    doc = dict(what="operators against other ways to the same answer; ratios of times, blocks in turns", protocol=PROTOCOL, recorded=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), kernels=kernels_missing("cpu") or "built", environment=environment().model_dump(mode="json"), rows=sorted(rows, key=lambda r: (r["family"], r["op"])))
    with atomic_write(out) as t:
        t.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
