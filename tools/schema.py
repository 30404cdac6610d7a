#!/usr/bin/env python3
"""Write what a configuration is checked against, from the signatures of everything that is registered.

visdet/config/schema/catalogue.json   every component with its parameters; `visdet config check` reads it instead of importing torch
visdet/config/schema/KIND.json        JSON Schemas for editors: run, model, dataset, optimizer, scheduler, transform

With `--check` nothing is written; the exit code is 1 if a file is not what it should be.
"""
import importlib
import inspect
import json
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "visdet" / "config" / "schema"
ROOTS = "run model dataset optimizer scheduler transform".split()
sys.path.insert(0, str(ROOT))


def load_all():
    "Import every module of visdet, so that everything that registers itself has done so"
    import visdet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for o in pkgutil.walk_packages(visdet.__path__, "visdet."):
            if not o.name.endswith((".all", "_modidx")):
                importlib.import_module(o.name)


def find_root():
    "The class whose keywords are the top level of a run's file"
    for name, m in list(sys.modules.items()):
        if name.startswith("visdet.runner") and inspect.isclass(getattr(m, "SimpleRunner", None)):
            return m.SimpleRunner
    return stand_in()


def stand_in():
    "A function with the keywords of a run, for a tree that has no runner yet"
    from visdet.core.types import Count, Whole

    def SimpleRunner(
        model: str,  # The detector: a preset, or a mapping
        dataset: str,  # The data: a preset, or a mapping
        optimizer: str = "adamw",  # A preset, or a mapping
        scheduler: str = "1cycle",  # A preset, or a mapping
        work_dir: str | Path | None = None,  # Folder of the run
        epochs: Count | None = None,  # Passes over the training set; those of the schedule if left out
        val_interval: Count = 1,  # Epochs between two validations
        batch_size: Count | None = None,  # Images in a batch
        num_workers: Whole | None = None,  # Processes that read images
        train_ann_file: str | Path | None = None,  # Annotations to train on
        val_ann_file: str | Path | None = None,  # Annotations to validate on
        seed: Whole | None = None,  # Of order, augmentation and new weights
        device: str | None = None,  # cpu, cuda, cuda:1; the best there is if left out
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",  # Of training
        ema: bool = True,  # Keep a moving average of the weights, and validate with it?
    ):
        "Train, validate and use a detector"

    return SimpleRunner


def preset_types():
    "kind -> {preset: `type` it resolves to, or None}, from the files that ship"
    from visdet.core.bases import FOLDERS

    found, kinds = {}, {v: k for k, v in FOLDERS.items()}
    for path in sorted((ROOT / "visdet" / "config" / "presets").glob("*/*.yaml")):
        text = path.read_text(encoding="utf-8")
        m = re.search(r"^type:\s*(\S+)", text, re.M)
        base = re.search(r"^_base_:\s*(\S+)", text, re.M)
        found.setdefault(kinds[path.parent.name], {})[path.stem] = (m or base) and (m[1].strip("'\"") if m else base)
    for kind, t in found.items():
        for k in list(t):
            seen = set()
            while isinstance(t[k], re.Match) and k not in seen:
                seen.add(k)
                t[k] = t.get(t[k][1].strip("'\"").removesuffix(".yaml"))
    return {k: {n: v if isinstance(v, str) else None for n, v in t.items()} for k, t in found.items()}


def make():
    "File name -> its text"
    import torch
    from visdet.core.jsonschema import json_schema
    from visdet.core.schema import catalogue

    load_all()
    cat, presets = catalogue(find_root()), preset_types()
    comment = {"$comment": f"Written by tools/schema.py with torch {'.'.join(torch.__version__.split('.')[:2])}"}
    made = {"catalogue.json": cat} | {f"{r}.json": (s := json_schema(cat, r, presets)) and {"$schema": s.pop("$schema"), **comment, **s} for r in ROOTS}
    return {k: written(v, k == "catalogue.json") for k, v in made.items()}


def written(o, deep):
    "JSON with a line for each component"
    one = lambda v: json.dumps(v, ensure_ascii=False, separators=(",", ":"))  # noqa: E731
    rows = lambda d: "{\n" + ",\n".join(f"  {one(k)}: {one(v)}" for k, v in d.items()) + "\n }"  # noqa: E731
    return "{\n" + ",\n".join(f" {one(k)}: {rows(v) if isinstance(v, dict) and (deep or k == '$defs') else one(v)}" for k, v in o.items()) + "\n}\n"


def stale():
    "Names of the files that are not what the signatures say; another torch may know other optimizers, which does not count"
    import torch

    made, bad = make(), []
    same = OUT.joinpath("run.json").exists() and f"with torch {'.'.join(torch.__version__.split('.')[:2])}" in OUT.joinpath("run.json").read_text(encoding="utf-8")
    for name, text in made.items():
        have = (OUT / name).read_text(encoding="utf-8") if (OUT / name).exists() else ""
        if not same and have and name == "catalogue.json":
            a, b = json.loads(have), json.loads(text)
            for o in (a, b):
                o["optimizer"] = {k: v for k, v in o["optimizer"].items() if not k.startswith("torch.")}
            bad += [name] if a != b else []
        elif same and have != text:
            bad.append(name)
    return bad


def main(argv):
    if "--check" in argv:
        bad = stale()
        if bad:
            print(f"not up to date: {', '.join(bad)}. Run tools/schema.py", file=sys.stderr)
        return int(bool(bad))
    OUT.mkdir(parents=True, exist_ok=True)
    for name, text in make().items():
        (OUT / name).write_text(text, encoding="utf-8")
        print(f"{OUT.relative_to(ROOT) / name}: {len(text) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
