#!/usr/bin/env python3
"""Blood cells: torchvision's loop and visdet, seed by seed, one after the other on the same machine; one JSON with both curves.

Run it on a quiet machine: minutes are wall-clock minutes of training, evaluation left out. The summary is the median over seeds, with the spread.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def run(script, args):
    "The result of one training run in a process of its own"
    with tempfile.TemporaryDirectory() as d:
        out = Path(d) / "res.json"
        subprocess.run([sys.executable, HERE / script, *map(str, args), "--out", out], check=True)
        return json.loads(out.read_text())


def at(curve, minutes):
    "AP of the last evaluation that was trained for at most `minutes`"
    done = [o["AP"] for o in curve if o["minutes"] <= minutes]
    return done[-1] if done else 0.0


def first(curve, ap):
    "Minutes until AP reaches `ap`, or None"
    return next((o["minutes"] for o in curve if o["AP"] >= ap), None)


def spread(xs):
    xs = [o for o in xs if o is not None]
    return dict(median=statistics.median(xs), min=min(xs), max=max(xs), n=len(xs)) if xs else None


def summary(runs, minutes):
    "AP of both at equal minutes, and visdet's minutes to the peer's final AP"
    pairs = [(o["torchvision"]["curve"], o["visdet"]["curve"]) for o in runs]
    return dict(
        at={m: dict(torchvision=spread([at(a, m) for a, _ in pairs]), visdet=spread([at(b, m) for _, b in pairs]), lead=spread([at(b, m) - at(a, m) for a, b in pairs])) for m in minutes},
        peer_final=spread([a[-1]["AP"] for a, _ in pairs]),
        peer_minutes=spread([a[-1]["minutes"] for a, _ in pairs]),
        visdet_minutes_to_peer_final=spread([first(b, a[-1]["AP"]) for a, b in pairs]),
        visdet_share_of_peer_minutes=spread([m / a[-1]["minutes"] for a, b in pairs if (m := first(b, a[-1]["AP"]))]),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"), p.add_argument("--weights", required=True), p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2]), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--peer-epochs", type=int, default=7), p.add_argument("--epochs", type=int, default=10), p.add_argument("--note", default="")
    a = p.parse_args()
    runs = []
    for seed in a.seeds:
        common = [a.data, "--weights", a.weights, "--seed", seed, "--threads", a.threads]
        runs.append(dict(seed=seed, visdet=run("visdet_bccd.py", [*common, "--epochs", a.epochs]), torchvision=run("torchvision_bccd.py", [*common, "--epochs", a.peer_epochs])))
        env = dict(python=platform.python_version(), torch=torch.__version__, threads=a.threads, machine=platform.machine(), cpu_capability=torch.backends.cpu.get_cpu_capability(), amx=torch.cpu._is_amx_tile_supported())
        res = dict(what="AP on the test split of BCCD against minutes of training", note=a.note, env=env, summary=summary(runs, (1, 2, 3, 4, 5, 6, 8, 10)), runs=runs)
        a.out.write_text(json.dumps(res, indent=1) + "\n")
        print(json.dumps(res["summary"]), flush=True)


if __name__ == "__main__":
    main()
