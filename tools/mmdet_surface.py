#!/usr/bin/env python
"""Records what MMDetection offers, from its source alone: python tools/mmdet_surface.py FOLDER

FOLDER is the package (the folder with `__init__.py`), of an installation or of a wheel unpacked:
    pip download mmdet==3.3.0 --no-deps --no-binary=:none: && unzip mmdet-3.3.0-*.whl
Nothing of it is imported. Written are names, registries, parameters and defaults; no code and no sentences.
A wheel has no tests, so the paths of its test files are kept from the file that is there.
"""
import argparse
import json
from pathlib import Path

from visdet.config.surface import read_surface, write_surface

OUT = Path(__file__).resolve().parent.parent / "tests" / "mmdet_surface.json"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", help="the package, such as site-packages/mmdet")
    p.add_argument("--out", default=OUT, help=f"file to write (default {OUT.name} in tests)")
    p.add_argument("--tests", help="a text file with one path of a test file a line; those of the file that is there if left out")
    a = p.parse_args()
    if a.tests:
        tests = Path(a.tests).read_text(encoding="utf-8").split()
    else:
        tests = json.loads(Path(a.out).read_text(encoding="utf-8"))["tests"] if Path(a.out).is_file() else []
    s = read_surface(a.folder)
    write_surface(s, a.out, tests)
    n = sum(bool(o["registry"]) for o in s["parts"])
    print(f"{s['package']} {s['version']}: {n} registered, {len(s['parts']) - n} more that are public, {len(tests)} test files -> {a.out}")


if __name__ == "__main__":
    main()
