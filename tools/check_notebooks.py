#!/usr/bin/env python3
"""Check the notebooks against the laws of the house.

* every exporting notebook has a three-digit number, unique in the repository, whose hundreds digit is its room;
* its module is the one its folder and name say;
* it imports only lower numbers, anywhere in its code;
* budgets: lines of an export cell, of a notebook, of a function; depth of classes; words of prose for each line of code;
* an export cell does not mix imports with other code.

Exit code 1 if a law is broken. Warnings are printed with `--warn`.
"""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
ROOMS = dict(core=0, cv=1, data=2, nn=3, models=4, eval=5, engine=6, deploy=7, bench=8, config=9, runner=9, cli=9, cloud=9)
BUDGET = dict(cell=(25, 60), notebook=(250, 400), function=(15, 50), depth=(2, 3))  # warn above the first, fail above the second
PROSE = (2.0, 1.0)  # words of markdown for each exported line: warn below the first, fail below the second


def source(cell):
    return "".join(cell["source"])


def is_export(cell):
    return cell["cell_type"] == "code" and re.search(r"^#\|\s*exports?\b", source(cell), re.M) is not None


def code_lines(text):
    "Lines that count: neither blank nor a directive"
    return [o for o in text.splitlines() if o.strip() and not o.startswith("#|")]


def imports(tree):
    "Absolute module names imported anywhere in `tree`, functions included"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (o.name for o in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{o.name}" for o in node.names)


class Book:
    "One exporting notebook: its number, module and code"

    def __init__(self, path):
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        exp = [m[1] for c in self.cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))]
        self.module = f"visdet.{exp[0]}" if exp else None
        m = re.match(r"(\d{3})_(\w+)$", path.stem)
        self.number, self.stem = (int(m[1]), m[2]) if m else (None, path.stem)
        self.code = [c for c in self.cells if is_export(c)]

    def tree(self, cells):
        return ast.parse("\n".join(re.sub(r"^\s*[%!].*$", "pass", source(c), flags=re.M) for c in cells))


def numbers(books):
    "Numbers are there, unique, and in the room of their folder"
    seen = {}
    for b in books:
        folder = b.path.parent.name
        if b.number is None:
            yield f"{b.name}: exports a module but has no three-digit number"
            continue
        if b.number in seen:
            yield f"{b.name}: number {b.number:03} is taken by {seen[b.number]}"
        seen[b.number] = b.name
        if ROOMS.get(folder) != b.number // 100:
            yield f"{b.name}: number {b.number:03} does not belong to the folder {folder!r}"
        if b.module != f"visdet.{folder}.{b.stem}":
            yield f"{b.name}: exports {b.module}, its name says visdet.{folder}.{b.stem}"


def directions(books):
    "Imports point to lower numbers only"
    number = {b.module: b.number for b in books}
    for b in books:
        try:
            found = set(imports(b.tree([c for c in b.cells if c["cell_type"] == "code"])))
        except SyntaxError as e:
            yield f"{b.name}: does not parse: {e}"
            continue
        for m in sorted(o for o in found if o and o.startswith("visdet")):
            if m in number and number[m] >= (b.number or 0) and m != b.module:
                yield f"{b.name}: imports {m}, which is number {number[m]:03}"
            if m.endswith(".all"):
                yield f"{b.name}: imports {m}; name the notebook that is needed"


def over(what, n, key, name):
    warn, fail = BUDGET[key]
    if n > fail:
        yield "fail", f"{name}: {what} {n}, at most {fail}"
    elif n > warn:
        yield "warn", f"{name}: {what} {n}, better at most {warn}"


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[0].lineno if ast.get_docstring(node) is None or len(node.body) == 1 else node.body[1].lineno
            yield node.name, node.end_lineno - start + 1


def importing(node):
    "Is this statement an import, or an import guarded by `try`?"
    return isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(node, ast.Try) and all(map(importing, node.body))


def budgets(b):
    "Sizes and prose of one notebook"
    total = 0
    for c in b.code:
        n = len(code_lines(source(c)))
        total += n
        first = (code_lines(source(c)) or [""])[0][:40]
        yield from over(f"lines in the export cell {first!r}", n, "cell", b.name)
        body = ast.parse(source(c)).body
        if len({importing(o) for o in body}) > 1:
            yield "fail", f"{b.name}: the cell {first!r} mixes imports with other code"
    yield from over("exported lines", total, "notebook", b.name)
    for name, n in functions(b.tree(b.code)):
        yield from over(f"lines in `{name}`", n, "function", b.name)
    words = sum(len(source(c).split()) for c in b.cells if c["cell_type"] == "markdown")
    if total > 20:
        ratio = words / total
        say = f"{b.name}: {ratio:.1f} words of prose for each exported line"
        if ratio < PROSE[1]:
            yield "fail", f"{say}, at least {PROSE[1]:g}"
        elif ratio < PROSE[0]:
            yield "warn", f"{say}, better {PROSE[0]:g}"


def depths(books):
    "How many of visdet's own classes stand above each class"
    bases = {}
    for b in books:
        for node in ast.walk(b.tree(b.code)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = (b.name, [getattr(o, "id", getattr(o, "attr", "")) for o in node.bases])

    def depth(n):
        return 1 + max((depth(o) for o in bases[n][1] if o in bases and o != n), default=0)

    for n, (name, _) in bases.items():
        yield from over(f"depth of class `{n}`", depth(n), "depth", name)


def main(warn=False):
    books = [b for b in map(Book, sorted(NBS.rglob("*.ipynb"))) if b.module and ".ipynb_checkpoints" not in b.name]
    fails = [*numbers(books), *directions(books)]
    sized = [o for b in books for o in budgets(b)] + [*depths(books)]
    fails += [m for k, m in sized if k == "fail"]
    warns = [m for k, m in sized if k == "warn"]
    if warn:
        print(*(f"warning: {o}" for o in warns), sep="\n")
    print(*(f"error: {o}" for o in fails), sep="\n", end="\n" if fails else "")
    print(f"{len(books)} notebooks, {len(fails)} errors, {len(warns)} warnings{'' if warn else ' (--warn shows them)'}")
    return 1 if fails else 0


if __name__ == "__main__":
    sys.exit(main("--warn" in sys.argv))
