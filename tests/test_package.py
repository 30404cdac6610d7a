"What only an installed package can show: facts stated once, a whole wheel, a light import, a README that runs."
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from configparser import ConfigParser

import pytest
from conftest import ROOT


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def test_facts_stand_once():
    "pyproject.toml declares every fact dynamic; name and version agree everywhere"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == settings()["lib_name"] == "visdet"
    assert set(project) == {"name", "dynamic"}
    assert {"version", "dependencies", "optional-dependencies", "scripts", "requires-python"} <= set(project["dynamic"])
    assert re.match(r"\d+\.\d+\.\d+", __import__("visdet").__version__)


def test_import_is_light():
    "`import visdet` brings in nothing heavy, and an unknown name says what there is"
    code = (
        "import sys, visdet; heavy = {'torch', 'numpy', 'fastai', 'fastcore', 'pandas', 'matplotlib', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy\n"
        "try: visdet.lod\nexcept AttributeError as e: assert 'load' in str(e)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


def test_import_time():
    "Well under half a second: the best of five fresh interpreters, so that a busy machine does not count"
    code = "import time; t = time.perf_counter(); import visdet; print(time.perf_counter() - t)"
    took = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    assert min(took) < 0.5


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from the tree"
    out = tmp_path_factory.mktemp("wheel")
    cmd = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    subprocess.run(cmd, check=True)
    return next(out.glob("visdet-*.whl"))


def test_wheel_holds_everything(wheel):
    "Every module of every subpackage is in the wheel, and nothing that belongs elsewhere"
    names = zipfile.ZipFile(wheel).namelist()
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "visdet").rglob("*.py")}
    assert here <= set(names), sorted(here - set(names))
    files = {p.relative_to(ROOT).as_posix() for d in ("schema", "presets") for p in (ROOT / "visdet/config" / d).rglob("*") if p.suffix in (".json", ".yaml")}
    assert {"visdet/config/schema/catalogue.json", "visdet/config/presets/models/retinanet_r50.yaml"} <= files <= set(names), sorted(files - set(names))
    strangers = {n.split("/")[0] for n in names} - {"visdet"}
    assert all(re.fullmatch(r"visdet-.*\.(dist-info|data)", o) for o in strangers), strangers
    data = {n.split("/", 1)[1] for n in names if ".data/" in n}
    suites = {f"data/share/visdet/suites/{o.name}" for o in (ROOT / "benchmarks/suites").glob("*.toml")}
    sources = {f"data/share/visdet/{o.relative_to(ROOT).as_posix()}" for o in (ROOT / "kernels").rglob("*") if o.suffix in (".h", ".cpp", ".cu")}
    assert data == suites | sources and any(o.endswith("nms.cpp") for o in data), data ^ (suites | sources)


def readme_python():
    "The Python blocks of README.md, joined"
    return "\n".join(re.findall(r"```\s*python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    "A fresh environment with the wheel installed; third-party packages come from this one, the editable visdet does not"
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home / "env", with_pip=False)
    py = home / "env" / "bin" / "python"
    site = subprocess.run([py, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, str(wheel)], check=True)
    (ROOT.__class__(site) / "zz_deps.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home, py


def test_readme_runs_from_the_wheel(fresh):
    "What the README tells a newcomer to type works from the installed wheel"
    home, py = fresh
    code = "import visdet, json; print(json.dumps(visdet.__file__))"
    where = json.loads(subprocess.run([py, "-c", code], capture_output=True, text=True, check=True, cwd=home).stdout)
    assert str(home) in where
    (home / "readme.py").write_text("if __name__ == '__main__':\n" + "".join(f"    {o}\n" for o in readme_python().splitlines()))
    env = {**os.environ, "MPLBACKEND": "agg"}
    res = subprocess.run([py, "readme.py"], capture_output=True, text=True, cwd=home, env=env)
    assert res.returncode == 0, res.stderr[-3000:]
