#!/usr/bin/env python3
"""What the timer costs, and whether it agrees with torch.utils.benchmark.

    python benchmarks/protocol_check.py --out benchmarks/results/protocol_check.json

Wants a quiet machine; what disturbed it is recorded with the figures. Three questions, each asked in rounds in which both sides take turns:

* overhead: a function of about one millisecond is timed by a bare loop of as many calls (longer ones would lose the processor more often on a busy machine) and by `measure`'s own block of two milliseconds.
  The relative difference of the two is what measuring adds to each call;
* agreement: the same calls timed by a block of `visdet.bench.measure` and by `torch.utils.benchmark.Timer.timeit` with the same number of calls;
* noise floor: the same call against itself, through `interleave`.

Every answer is a median of paired ratios with a bootstrap interval. Processor time is given beside wall time: on a busy machine it is the one to read.
"""
import argparse
import itertools
import json
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import nn
from torch.utils.benchmark import Timer

from visdet.bench.measure import Runner, _mhz, _waited, effect, interleave, pinned_threads, trusted_clock
from visdet.bench.stats import ratio, spread
from visdet.core.basics import atomic_write


def calls():
    "Name -> (function, arguments): a range of durations and of kinds"
    torch.manual_seed(0)
    a, x = torch.randn(256, 256), torch.randn(1, 16, 48, 48)
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)).eval()
    return dict(add=(torch.add, (torch.randn(64, 64), 1.)), matmul=(torch.mm, (a, a)), sort=(torch.sort, (torch.randn(50_000),)), convolutions=(net, (x,)))


def millisecond():
    "A function of about a millisecond on this machine: some repetitions of a small product"
    a = torch.randn(96, 96)
    def f(n):
        for _ in range(n): torch.mm(a, a)
    r = Runner(f, (20,))
    r.warm(1.)
    wall, cpu = min(r.block() for _ in range(20))
    return f, max(1, round(20*1e-3/min(wall, cpu or wall)))


def bare(f, args, n):
    "Wall and CPU seconds a call of a plain loop"
    todo = itertools.repeat(None, n)
    with torch.no_grad():
        f(*args)
        c, t = process_time(), perf_counter()
        for _ in todo: f(*args)
        return (perf_counter()-t)/n, (process_time()-c)/n


def theirs(timers, n):
    "The same by torch.utils.benchmark: one timer reads the wall clock, the other that of the processor"
    with torch.no_grad(): return tuple(t.timeit(n).median for t in timers)


def turns(a, b, rounds):
    "Take turns: ratio of a to b in wall and CPU time, and their spreads"
    got = {'a': [], 'b': []}
    for i in range(rounds):
        for k in ('ab', 'ba')[i % 2]: got[k].append(dict(a=a, b=b)[k]())
    out = {}
    for j, clock in enumerate(('wall', 'cpu')):
        x, y = ([max(o[j], 1e-12) for o in got[k]] for k in 'ab')
        out[clock] = dict(asdict(ratio(x, y)), ours=asdict(spread(x)), other=asdict(spread(y)))
    return out


def run(rounds, budget):
    "All three answers"
    f, n = millisecond()
    r = Runner(f, (n,))
    r.warm(1.)
    over = turns(r.block, lambda: bare(f, (n,), r.n), rounds)
    agree, floor = {}, {}
    for name, (g, args) in calls().items():
        r = Runner(g, args)
        r.warm(1.)
        timers = [Timer('f(*args)', globals=dict(f=g, args=args), num_threads=torch.get_num_threads(), timer=o) for o in (perf_counter, process_time)]
        agree[name] = turns(r.block, lambda: theirs(timers, r.n), rounds)
        ts = interleave(dict(first=(g, args), second=(g, args)), budget=budget, min_blocks=40)
        e = effect(ts['first'], ts['second'])
        floor[name] = dict(asdict(e), clock=trusted_clock(ts['first'], ts['second']), flags=ts['first'].flags)
    return dict(repetitions=n, overhead=over, agreement=agree, noise_floor=floor)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, help='JSON file to write; printed only without it')
    p.add_argument('--rounds', type=int, default=200, help='rounds of each comparison')
    p.add_argument('--budget', type=float, default=4., help='seconds for each self comparison')
    p.add_argument('--threads', type=int, default=1, help='torch threads')
    o = p.parse_args()
    t0, w0 = perf_counter(), _waited()
    with pinned_threads(o.threads): res = run(o.rounds, o.budget)
    seconds = perf_counter()-t0
    waited = None if w0 is None else (_waited()-w0)/1e9/seconds
    over = {c: res['overhead'][c]['ratio']-1 for c in ('wall', 'cpu')}
    worst = {c: max(abs(v[c]['ratio']-1) for v in res['agreement'].values()) for c in ('wall', 'cpu')}
    doc = dict(made=datetime.now(timezone.utc).isoformat(timespec='seconds'), seconds=round(seconds, 1), rounds=o.rounds, threads=o.threads, torch=torch.__version__, python=platform.python_version(),
               waited_share=waited, mhz=_mhz(), overhead=over, worst_disagreement=worst, wanted=dict(overhead=.02, disagreement=.03), detail=res)
    print(f"overhead on a call of 1 ms: wall {over['wall']:+.2%}, cpu {over['cpu']:+.2%} (wanted: below 2 %)")
    for k, v in res['agreement'].items():
        print(f"{k:14} visdet / torch.utils.benchmark: wall {v['wall']['ratio']-1:+.2%} [{v['wall']['lo']-1:+.2%} .. {v['wall']['hi']-1:+.2%}], cpu {v['cpu']['ratio']-1:+.2%}")
    print(f"the measuring thread waited for a core {'n/a' if waited is None else f'{waited:.0%}'} of the time")
    if o.out:
        with atomic_write(o.out) as t: t.write_text(json.dumps(doc, indent=1)+'\n')


if __name__ == '__main__': main()
