#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` that it is up to date.

Quarto can do this too (`nbdev-readme`), but has to be installed for it; this needs nothing. Visible cells are kept in order: text as it stands, without the subtitle and what is meant for
the site alone; code as blocks, without outputs.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook -->"


def block(kind, src):
    "Markdown of one cell"
    if src.startswith("#| hide"):
        return ""
    if kind == "code":
        return f"```python\n{src.strip()}\n```"
    src = re.sub(r'::: \{\.content-visible when-format="html"\}.*?^:::\n*', "", src, flags=re.S | re.M)
    src = re.sub(r'::: \{\.content-visible unless-format="html"\}\n(.*?)^:::', r"\1", src, flags=re.S | re.M)
    return re.sub(r"^# (.+)\n+> .+$", rf"# \1\n\n{MARK}", src.strip(), flags=re.M)


def readme():
    "The whole text"
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [block(c["cell_type"], "".join(c["source"])) for c in cells]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(o for o in parts if o)) + "\n"


def main():
    out, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv[1:]:
        out.write_text(text, encoding="utf-8")
    elif out.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says: python tools/readme.py")


if __name__ == "__main__":
    main()
