#!/usr/bin/env python3
"""Is the normalised ranking of components the same in another run, and with another number of threads?

Runs a suite several times, each with its own calibration, and correlates the ranks of the normalised figures (Spearman) between every two runs: over all measurements, and
within each kind that has at least six. Finished records given with --records are used instead of new runs.
"""
import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from visdet.bench.result import read_run, write_run
from visdet.bench.suite import run_suite


def spearman(a, b):
    "Rank correlation of two aligned columns"
    return float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])


def figures(run):
    "One row a measurement that worked: score, share of the roofline and plain seconds"
    rows = {(r.case, r.mode): dict(kind=r.kind, score=r.score, share=r.share_of_roofline, seconds=r.wall.median) for r in run.results if r.status == "ok"}
    return pd.DataFrame.from_dict(rows, orient="index")


def agree(a, b, column):
    "Rank correlation over everything and by kind, for rows that both have"
    both = a.join(b, lsuffix="_a", rsuffix="_b", how="inner").dropna(subset=[f"{column}_a", f"{column}_b"])
    if len(both) < 6:
        return None
    kinds = {k: spearman(g[f"{column}_a"], g[f"{column}_b"]) for k, g in both.groupby("kind_a") if len(g) >= 6}
    return dict(n=len(both), all=spearman(both[f"{column}_a"], both[f"{column}_b"]), kinds=kinds)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", default="quick"), p.add_argument("--threads", type=int, nargs="+", default=[2, 2, 1], help="one run for each")
    p.add_argument("--records", type=Path, nargs="+", help="finished records instead of new runs"), p.add_argument("--keep", type=Path, help="folder for the new records")
    p.add_argument("--out", type=Path, required=True), p.add_argument("--note", default="")
    a = p.parse_args()
    runs = [read_run(o) for o in a.records] if a.records else []
    for t in [] if a.records else a.threads:
        run = run_suite(a.suite, threads=t, note=f"ranking, {t} threads")
        runs.append(run)
        if a.keep:
            write_run(run, a.keep)
    names = [f"run {i + 1}, {r.environment.threads} threads" for i, r in enumerate(runs)]
    tables = [figures(r) for r in runs]
    pairs = [dict(a=names[i], b=names[j], **{c: agree(tables[i], tables[j], c) for c in ("score", "share", "seconds")}) for i, j in itertools.combinations(range(len(runs)), 2)]
    a.out.write_text(json.dumps(dict(what="rank correlation (Spearman) of normalised figures between runs", suite=a.suite, note=a.note, environment=runs[0].environment.model_dump(mode="json"), pairs=pairs), indent=1) + "\n")
    for o in pairs:
        print(f"{o['a']} against {o['b']}: " + ", ".join(f"{c} {o[c]['all']:.3f} (n={o[c]['n']})" for c in ("score", "share", "seconds") if o[c]))


if __name__ == "__main__":
    main()
