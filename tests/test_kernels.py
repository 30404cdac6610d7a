"Building and loading compiled operators: each in a process of its own, because a library once loaded stays"
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from visdet.core import kernels as K

needs_cxx = pytest.mark.skipif(not any(shutil.which(o) for o in ("g++", "clang++", "c++")), reason="no C++ compiler")
ROOT = Path(__file__).resolve().parents[1]


def python(code, **env):
    "The output of a program"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the CPU library, built by the command line"
    out = tmp_path_factory.mktemp("kernels")
    p = subprocess.run([sys.executable, "-c", f"from visdet.cli.main import main; raise SystemExit(main(['kernels', 'build', '--out', {str(out)!r}]))"], capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    assert "Written to" in p.stdout and [o.name for o in out.iterdir()] == [K.kernel_name("cpu")], p.stdout
    return out


ASK = "from visdet.core.kernels import kernels_missing; print(kernels_missing('cpu'))"


@needs_cxx
def test_a_built_library_is_found_and_used(built):
    assert python(ASK, VISDET_KERNELS=str(built)) == "None"
    code = (
        "import torch; from visdet.cv.nms import batched_nms; from visdet.core.backends import _ops, pick; from visdet.core.testing import crowded_boxes\n"
        "b, s = crowded_boxes(500); l = torch.arange(500) % 7\n"
        "print(pick(_ops['batched_nms'], None, 'cpu', 500), all(torch.equal(batched_nms(b, s, l, .5, backend='kernels'), batched_nms(b, s, l, .5, backend=o)) for o in ('torch', 'torchvision')))"
    )
    assert python(code, VISDET_KERNELS=str(built)) == "kernels True"


def test_without_a_library_the_reason_is_said_and_everything_works(tmp_path):
    assert python(ASK, VISDET_KERNELS=str(tmp_path)) == "not built: `visdet kernels build --device cpu`"
    assert "switched off" in python(ASK, VISDET_KERNELS="off")
    code = "import torch; from visdet.cv.nms import nms; print(nms(torch.tensor([[0., 0, 4, 4], [0, 0, 4, 3.9]]), torch.tensor([.5, .6]), .5).tolist())"
    assert python(code, VISDET_KERNELS="off") == "[1]"
    asked = "from visdet.cv.nms import nms; import torch\ntry: nms(torch.zeros(0, 4), torch.zeros(0), .5, backend='kernels')\nexcept ValueError as e: print(e)"
    said = python(asked, VISDET_KERNELS="off")
    assert "VISDET_KERNELS=off" in said and "visdet kernels" in said


@needs_cxx
def test_a_library_of_other_sources_is_not_loaded(built, tmp_path, monkeypatch):
    "The name holds a digest: one changed character, and the old library does not exist any more"
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    real = K.kernel_sources
    monkeypatch.setattr(K, "kernel_sources", lambda device=None: (tmp_path / "kernels") if device is None else sorted((tmp_path / "kernels").glob(f"*/*{K._SUFFIX[device]}")))
    assert K.kernel_name("cpu") == (built / K.kernel_name("cpu")).name and (built / K.kernel_name("cpu")).exists()
    src = next((tmp_path / "kernels").glob("*/*.cpp"))
    src.write_text(src.read_text() + "\n")
    assert not (built / K.kernel_name("cpu")).exists()
    assert real() == ROOT / "kernels"


def test_a_damaged_library_is_a_reason_and_not_a_crash(tmp_path):
    (tmp_path / K.kernel_name("cpu")).write_bytes(b"\x7fELF no library")
    assert "does not load" in python(ASK, VISDET_KERNELS=str(tmp_path))


@needs_cxx
def test_a_failed_build_leaves_nothing_and_quotes_the_compiler(tmp_path, monkeypatch):
    src = tmp_path / "src"
    (src / "bad").mkdir(parents=True)
    (src / "common.h").write_text("")
    (src / "bad/bad.cpp").write_text("int f() { return unheard_of; }\n")
    monkeypatch.setattr(K, "kernel_sources", lambda device=None: src if device is None else sorted(src.glob(f"*/*{K._SUFFIX[device]}")))
    with pytest.raises(Exception, match="unheard_of"):
        K.build_kernels("cpu", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_the_table_and_the_messages_of_the_command(tmp_path):
    run = lambda *a, **env: subprocess.run([sys.executable, "-c", f"from visdet.cli.main import main; raise SystemExit(main({['kernels', *a]!r}))"], capture_output=True, text=True, env={**os.environ, **env})
    p = run(VISDET_KERNELS="off")
    assert p.returncode == 0 and "batched_nms" in p.stdout and "switched off" in p.stdout and "* used" in p.stdout, p.stdout + p.stderr
    p = run("build", "--out", str(tmp_path), PATH="/nonexistent", CXX="")
    assert p.returncode == 2 and "no C++ compiler" in p.stderr and len(p.stderr.strip().splitlines()) == 1, p.stderr


@pytest.mark.skipif(K._cuda_home() is None, reason="no nvcc")
@pytest.mark.skipif(os.environ.get("VISDET_TEST_NVCC", "1") == "0", reason="VISDET_TEST_NVCC=0")
def test_cuda_sources_compile(tmp_path):
    "For sm_80 and sm_90; they run where there is a GPU"
    if not K.kernel_sources("cuda"):
        pytest.skip("no CUDA sources")
    assert K.build_kernels("cuda", tmp_path).stat().st_size > 10_000
