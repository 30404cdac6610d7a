#!/usr/bin/env python3
"""Check that the notebooks are clean and that `visdet/` is what they export.

Works on a copy in a temporary folder, so the tree itself is never touched. Exit code 1 with the list of files that differ.
"""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEEP = ["nbs", "visdet", "pyproject.toml", "settings.ini", "setup.py", "README.md", "LICENSE"]


def files(root):
    "Notebooks and modules below `root`, relative"
    found = [*(root / "nbs").rglob("*.ipynb"), *(root / "visdet").rglob("*.py")]
    return {o.relative_to(root) for o in found if ".ipynb_checkpoints" not in o.parts}


def run(cmd, cwd):
    res = subprocess.run([str(Path(sys.executable).parent / cmd[0]), *cmd[1:]], cwd=cwd, capture_output=True, text=True)
    if res.returncode:
        sys.exit(f"{' '.join(cmd)} failed:\n{res.stdout}{res.stderr}")


def main():
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d) / "visdet"
        copy.mkdir()
        for o in KEEP:
            src = ROOT / o
            if src.is_dir():
                shutil.copytree(src, copy / o, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
            elif src.exists():
                shutil.copy(src, copy / o)
        subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
        run(["nbdev-clean"], copy)
        run(["nbdev-export"], copy)
        here, there = files(ROOT), files(copy)
        bad = sorted(map(str, here ^ there)) + sorted(str(o) for o in here & there if not filecmp.cmp(ROOT / o, copy / o, shallow=False))
    if bad:
        print("Not clean, or not in sync with the notebooks (run nbdev-export, then nbdev-clean):", *bad, sep="\n  ")
        return 1
    print(f"{len(here)} notebooks and modules clean and in sync")
    return 0


if __name__ == "__main__":
    sys.exit(main())
