#!/usr/bin/env python3
"""How often is the gate wrong? Counted on this machine, in its present state.

Each trial is one whole decision of `visdet bench check --against COMMIT` about one case: two checkouts, worker processes, blocks in turns, the sequential
rule, repetition with new processes. The checkouts are small packages with four kinds of work that detectors are made of. In a third of the trials both
packages are equal (a *slower* is a false alarm), in a third the second one does 10 % more work of the same kind, in a third 20 % more: a longer loop, not
a sleep.

    python benchmarks/gate_errors.py                       # 200 trials of each kind: half an hour on two quiet cores
    python benchmarks/gate_errors.py --planted 100         # 200 of equal code, 100 of each other kind
    python benchmarks/gate_errors.py --seconds 600         # as many as fit; run it again to go on where it stopped
    python benchmarks/gate_errors.py --merge a.json b.json --out c.json

Every trial is kept, with its ratio, its number of rounds and the load of the machine. `--out` is written after every few trials, whole or not at all.
"""
import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from visdet.bench.environment import environment
from visdet.bench.gate import Crew, judge_case
from visdet.bench.result import PROTOCOL
from visdet.bench.rule import Rule, wilson
from visdet.core.basics import ConfigError, VisdetError, atomic_write, explain

OUT = Path(__file__).resolve().parent / "results" / "gate_errors.json"
PLANTED = {0.0: 20, 0.1: 22, 0.2: 24}  # relative extra work -> length of the loop
TARGETS = {0.0: ("at most", 0.01), 0.1: ("at least", 0.95), 0.2: ("at least", 0.99)}
WORKS = "matmul", "conv", "memory", "calls"

PACKAGE = '''
import torch
N = {n}

def _make(work):
    g = torch.Generator().manual_seed(0)
    if work == "matmul": x = torch.rand(128, 128, generator=g) / 64; return lambda y: y @ x, torch.rand(128, 128, generator=g)
    if work == "conv": c = torch.nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False); return c, torch.rand(1, 16, 40, 40, generator=g)
    if work == "memory": b = torch.rand(150_000, generator=g); return lambda y: y + b, torch.zeros(150_000)
    if work == "calls": return lambda y: y.view(4, 4).t().reshape(16).abs().mul(0.5).add(0.1), torch.rand(16, generator=g)

class Case:
    modes, kind = ("forward",), "op"
    def __init__(self, component): self.component = component
    def make(self, device):
        step, x = _make(self.component)
        def f(y):
            for _ in range(N): y = step(y)
            return y
        return f, (x,)

_all = [Case(o) for o in {works!r}]
def cases(pattern="*", tier=None): return [(o, {{}}) for o in _all]
def case_id(c, p): return f"op/{{c.component}}"
'''


def checkout(folder, n):
    "A package that calls itself visdet, whose cases loop `n` times"
    for k, v in {"__init__.py": '__version__ = "0"\n', "core/__init__.py": "", "core/cases.py": PACKAGE.format(n=n, works=WORKS)}.items():
        p = Path(folder) / "visdet" / k
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(v)
    return folder


def trial(crew, rule, planted, work):
    "One decision of the gate"
    t0, load = time.time(), os.getloadavg()[0]
    d, _ = judge_case(crew, rule, case=f"op/{work}")
    return dict(planted=planted, work=work, slower=d.slower, said=list(d.said), rounds=d.rounds, ratio=round(d.effect.ratio, 5), lo=round(d.effect.lo, 5), hi=round(d.effect.hi, 5), seconds=round(time.time() - t0, 2), load=round(load, 2))


def summary(trials):
    "Rates with Wilson's 95 % intervals, over all work and by kind of work"
    out = []
    for planted, (sense, target) in TARGETS.items():
        for work in ("all", *WORKS):
            x = [t["slower"] for t in trials if t["planted"] == planted and work in ("all", t["work"])]
            if not x:
                continue
            rate, (lo, hi) = sum(x) / len(x), wilson(sum(x), len(x))
            row = dict(planted=planted, work=work, trials=len(x), slower=sum(x), rate=rate, lo=lo, hi=hi)
            out.append(row | (dict(target=f"{sense} {target:.0%}", met=rate <= target if sense == "at most" else rate >= target) if work == "all" else {}))
    return out


def document(trials, sittings, settings):
    "What is recorded"
    return dict(protocol=PROTOCOL, settings=settings, sittings=sittings, summary=summary(trials), trials=trials)


def write(path, doc):
    with atomic_write(path) as t:
        rows = ",\n".join("  " + json.dumps(o) for o in doc["trials"])
        head = json.dumps({k: v for k, v in doc.items() if k != "trials"}, indent=1)[:-2]
        t.write_text(f'{head},\n "trials": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def read(path, settings=None):
    "A record; its settings must be the wanted ones"
    d = json.loads(Path(path).read_text(encoding="utf-8"))
    if settings is not None and (d["settings"], d["protocol"]) != (settings, PROTOCOL):
        raise ConfigError(explain("the record was made with other settings", where=path, fix="Choose another --out, or delete it"))
    return d


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--trials", type=int, default=200, help="of equal code (default 200)")
    p.add_argument("--planted", type=int, help="of code with 10 %% more work, and of code with 20 %%; as many as of equal code if left out")
    p.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time; run again to go on")
    p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--renew", type=int, default=15, help="start all processes anew after so many rounds of trials (default 15)")
    p.add_argument("--merge", type=Path, nargs="+", help="only join these records into --out")
    a = p.parse_args(argv)
    rule = Rule()
    settings = json.loads(json.dumps(dict(rule=dataclasses.asdict(rule), block_s=0.02, threads=1, loops={str(k): v for k, v in PLANTED.items()}, works=WORKS)))
    if a.merge:
        docs = [read(o, settings) for o in a.merge]
        trials = [t for d in docs for t in d["trials"]]
        write(a.out, document(trials, [s for d in docs for s in d["sittings"]], settings))
        return show(trials)
    doc = read(a.out, settings) if a.out.exists() else dict(trials=[], sittings=[])
    trials, sittings = doc["trials"], doc["sittings"]
    sittings.append(dict(started=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), first=len(trials), environment=environment().model_dump(mode="json")))
    t0, count = time.time(), {k: sum(t["planted"] == k for t in trials) for k in PLANTED}
    wanted = {k: a.trials if not k or a.planted is None else a.planted for k in PLANTED}
    with tempfile.TemporaryDirectory(prefix="visdet-gate-") as d:
        base = checkout(Path(d) / "base", PLANTED[0.0])
        others = {k: checkout(Path(d) / f"plus{k}", n) for k, n in PLANTED.items()}
        crews, n = {}, 0
        try:
            while any(count[k] < wanted[k] for k in PLANTED) and time.time() - t0 < a.seconds:
                if n % a.renew == 0:
                    for c in crews.values():
                        c.close()
                    crews = {k: Crew(base, o, threads=1, block_s=0.02) for k, o in others.items()}
                for k in PLANTED:
                    if count[k] < wanted[k]:
                        trials.append(trial(crews[k], rule, k, WORKS[count[k] % len(WORKS)]))
                        count[k] += 1
                n += 1
                if n % 5 == 0:
                    write(a.out, document(trials, sittings, settings))
                    alarms = ", ".join(f"{k:.0%}: {sum(t['slower'] for t in trials if t['planted'] == k)}/{count[k]}" for k in PLANTED)
                    print(f"[{time.time() - t0:5.0f} s] slower found at {alarms}", file=sys.stderr, flush=True)
        finally:
            for c in crews.values():
                c.close()
            sittings[-1]["seconds"] = round(time.time() - t0, 1)
            if trials:
                write(a.out, document(trials, sittings, settings))
    return show(trials)


def show(trials):
    "Print the summary; 0 if all targets are met"
    rows = summary(trials)
    for o in rows:
        print(f"{o['planted']:4.0%} more work  {o['work']:7s} slower in {o['slower']:4d} of {o['trials']:4d}  {o['rate']:6.1%}  [{o['lo']:.1%} .. {o['hi']:.1%}]" + (f"  target {o['target']}: {'met' if o['met'] else 'MISSED'}" if "target" in o else ""))
    return 0 if all(o.get("met", True) for o in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VisdetError as e:
        sys.exit(f"gate_errors: {e}")
