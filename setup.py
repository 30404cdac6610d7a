"Packaging for visdet: every fact comes from settings.ini, the version from `visdet/__init__.py`."
import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(root / "settings.ini", encoding="utf-8")
facts = cfg["DEFAULT"]


def lines(key):
    "The non-empty lines of a multi-line setting"
    return [o.strip() for o in facts.get(key, "").splitlines() if o.strip()]


def version():
    "The version string, read without importing the package"
    return re.search(r'__version__\s*=\s*"([^"]+)"', (root / "visdet/__init__.py").read_text(encoding="utf-8"))[1]


def extras():
    "Extra name -> list of requirements"
    pairs = (o.split(":", 1) for o in lines("extras"))
    return {k.strip(): v.split() for k, v in pairs}


def files(pattern):
    "Files of the repository that match, relative to it"
    return sorted(o.relative_to(root).as_posix() for o in root.glob(pattern))


def shared():
    "Data that installs beside the package: benchmark suites and the sources of the kernels"
    folders = sorted({Path(o).parent.as_posix() for o in files("kernels/*/*") if not Path(o).name.startswith(".")})
    kernels = [(f"share/visdet/{o}", [f for ext in ("h", "cpp", "cu") for f in files(f"{o}/*.{ext}")]) for o in ("kernels", *folders)]
    return [("share/visdet/suites", files("benchmarks/suites/*.toml")), *kernels]


KERNELS = os.environ.get("VISDET_BUILD_KERNELS", "").replace(",", " ").split()  # "cpu", or "cpu cuda": compile them into the wheel


class BuildPy(build_py):
    "Copies the package and, where asked for, compiles the kernels into it (needs torch: `--no-build-isolation`)"

    def run(self):
        super().run()
        if KERNELS:
            try:
                import torch  # noqa: F401
            except ImportError as e:
                raise SystemExit("VISDET_BUILD_KERNELS needs torch at build time: install torch first, then pip install --no-build-isolation") from e
            sys.path.insert(0, str(root))
            from visdet.core.kernels import build_kernels
        for device in KERNELS:
            build_kernels(device, Path(self.build_lib) / "visdet/_kernels")


class Dist(Distribution):
    "A wheel with kernels belongs to one platform"

    def has_ext_modules(self):
        return bool(KERNELS)


setup(
    name=facts["lib_name"],
    version=version(),
    description=facts["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=facts["author"],
    license=facts["license"],
    keywords=facts["keywords"],
    packages=find_packages(include=["visdet", "visdet.*"]),
    include_package_data=True,
    data_files=shared(),
    python_requires=f">={facts['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras(),
    entry_points={"console_scripts": lines("scripts"), "nbdev": ["visdet = visdet._modidx:d"]},
    zip_safe=False,
    cmdclass={"build_py": BuildPy},
    distclass=Dist,
)
