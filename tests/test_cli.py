"The command `visdet` as its users meet it: a process with words in, lines and an exit code out."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

VISDET = shutil.which("visdet", path=str(Path(sys.executable).parent)) or "visdet"
ENV = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}


def visdet(*words, cwd=None, **kw):
    "Run the installed command"
    return subprocess.run([VISDET, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=ENV, **kw)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A small drawn data set"
    from visdet.data.toy import make_toy

    return make_toy(tmp_path_factory.mktemp("cli") / "toy", n=20)


TINY = "--size 64 --body test_resnet --set channels=16 --set num_convs=1 --set levels=3 --bs 4 --device cpu --workers 0".split()


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    "A finished run of one epoch"
    out = tmp_path_factory.mktemp("run") / "run"
    res = visdet("train", "--train", toy / "train.json", "--valid", toy / "valid.json", *TINY, "--epochs", 1, "--out", out)
    assert res.returncode == 0, res.stderr
    return out


@pytest.fixture(scope="module")
def in_process():
    "`main` called in this process: exit code, output, error output"
    import contextlib
    import io

    from visdet.cli.main import main

    def call(*words):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main([str(o) for o in words])
        return code, out.getvalue(), err.getvalue()

    return call


COMMANDS = "demo train validate predict preflight models data bench kernels config dev".split()


def test_help_and_version_are_light():
    "Help and version load neither torch nor fastai nor numpy"
    code = (
        "import sys; from visdet.cli.main import main\n"
        "for o in (['--help'], ['--version'], [], *([c, '--help'] for c in %r)): assert main(o) == 0\n"
        "assert main(['train', '--tran', 'x']) == 2\n"
        "heavy = {'torch', 'fastai', 'numpy', 'pandas'} & set(sys.modules); assert not heavy, heavy\n" % COMMANDS
    )
    res = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert res.returncode == 0, res.stderr
    import visdet as pkg

    assert f"visdet {pkg.__version__}" in res.stdout
    assert "did you mean '--train'" in res.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_help_parse(command, in_process):
    "Every example that a help page shows is understood by the parser"
    from visdet.cli.parser import parse_command
    import shlex

    code, text, _ = in_process(command, "--help")
    assert code == 0
    examples = re.findall(r"^  visdet (.+)$", text.split("example")[-1], re.M)
    assert examples
    for o in examples:
        assert parse_command(shlex.split(o)).command == command


MISTAKES = [
    (["trian"], "did you mean 'train'"),
    (["train"], "--train is needed"),
    (["train", "--train", "none.json"], "no such file"),
    (["train", "--train", "{toy}", "--data", "coc"], "did you mean 'coco'"),
    (["train", "--train", "{toy}/train.json", "--split", "train"], "--split has no meaning"),
    (["train", "--train", "{toy}/train.json", "--model", "retinanett"], "did you mean 'retinanet'"),
    (["train", "--train", "{toy}/train.json", "--body", "resnet19"], "did you mean"),
    (["train", "--train", "{toy}/train.json", "--set", "chanels=8"], "did you mean 'channels'"),
    (["train", "--train", "{toy}/train.json", "--weights", "none.pth"], "none.pth"),
    (["train", "--train", "{toy}/train.json", "--valid-pct", "2"], "from 0 to 1"),
    (["train", "--train", "{toy}/train.json", "model.chanels=8"], "did you mean 'channels'"),
    (["train", "none.yaml"], "none.yaml"),
    (["train", "{run}/config.yaml", "--images", "nowhere"], "dataset.images"),
    (["train", "--train", "{toy}/train.json", "--images", "nowhere"], "nowhere"),
    (["train", "--train", "{toy}/train.json", "--device", "gpu"], "no device 'gpu'"),
    (["train", "--train", "{toy}/train.json", "--epochs", "0"], "at least 1"),
    (["train", "--train", "{toy}/toy.json"], "not COCO"),
    (["predict", "none.safetensors", "{toy}/valid"], "none.safetensors"),
    (["predict", "{toy}/train.json", "{toy}/valid"], "train.json"),
    (["predict", "{run}/model.safetensors", "nowhere.jpg"], "nowhere.jpg"),
    (["predict", "{run}/model.safetensors", "{toy}/train.json"], "could be read"),
    (["predict", "{run}/model.safetensors", "{toy}/valid", "--score", "7"], "7"),
    (["predict", "{run}/model.safetensors", "{toy}/valid", "--classes", "cirkle", "--score", "0.05"], "did you mean 'circle'"),
    (["validate", "{run}/model.safetensors"], "--valid is needed"),
    (["validate", "{run}/model.safetensors", "--valid", "{toy}/valid.json", "--kind", "box"], "did you mean 'bbox'"),
    (["validate", "{run}/model.safetensors", "--valid", "{toy}/valid.json", "--kind", "segm"], "masks"),
    (["models", "yolo9000"], "unknown model"),
    (["models", "--bodies", "zzz*"], "no body matches"),
    (["data", "{toy}"], "--data"),
    (["data", "convert", "{toy}/train.json", "--to", "coco"], "--out is needed"),
    (["data", "convert", "{toy}/train.json", "--to", "voc", "--out", "{toy}"], "already exists"),
    (["train", "--train", "{toy}/train.json", "--out", "{run}"], "holds a finished run"),
    (["train", "--train", "{toy}/train.json", "--resume", "--out", "{toy}"], "no run to go on with"),
]


@pytest.mark.parametrize("words,said", MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_mistakes_are_one_line(words, said, toy, run, in_process, tmp_path, monkeypatch):
    "Exit code 2, one line that says what is wrong, and nothing written"
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(*[o.format(toy=toy, run=run) for o in words])
    assert code == 2
    lines = err.strip().splitlines()
    assert lines[-1].startswith("visdet: error: ") and said in lines[-1]
    assert all(o.startswith("visdet: ") for o in lines)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_mistake_from_a_process(tmp_path):
    "The installed command: code 2, one line on the error stream, no traceback; with --debug there is one"
    res = visdet("data", "nowhere.json", cwd=tmp_path)
    assert (res.returncode, res.stdout, res.stderr.count("\n")) == (2, "", 1)
    assert res.stderr.startswith("visdet: error: nowhere.json:")
    assert "Traceback" in visdet("data", "nowhere.json", "--debug", cwd=tmp_path).stderr


def test_run_folder(run):
    "A run leaves the model, its history and evaluation, and the command that made it"
    assert {"model.safetensors", "history.csv", "evaluation.json", "command.txt", "last.pth", "config.yaml", "visdet.lock", "metrics.jsonl", "environment.json"} <= {o.name for o in run.iterdir()}
    assert not list(run.glob(".*")) and not list(run.glob("*.tmp"))
    assert (run / "command.txt").read_text().startswith("visdet train --train ")
    assert json.loads((run / "evaluation.json").read_text())["images"] == 4


def test_validate_says_what_training_said(run, toy, tmp_path, in_process):
    "The numbers of a saved model are those of the last epoch"
    code, out, err = in_process("validate", run / "model.safetensors", "--valid", toy / "valid.json", "--out", tmp_path / "ev.json")
    assert code == 0, err
    a, b = (json.loads(o.read_text())["stats"] for o in (run / "evaluation.json", tmp_path / "ev.json"))
    assert all((a[k] is None) == (b[k] is None) and abs((a[k] or 0) - (b[k] or 0)) < 2e-3 for k in a)
    assert "circle" in out


def test_predict_writes_and_skips(run, toy, tmp_path, in_process):
    "Pictures and tables are written; an image that does not decode is named, and the others are used"
    imgs = tmp_path / "imgs"
    shutil.copytree(toy / "valid", imgs)
    (imgs / "broken.png").write_bytes(b"\x89PNG not really")
    code, out, err = in_process("predict", run / "model.safetensors", imgs, "--score", 0.05, "--out", tmp_path / "found")
    assert code == 0 and "4 images" in out
    assert "visdet: warning:" in err and "broken.png" in err
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert all({"image_id", "category_id", "bbox", "score", "file_name", "category"} <= o.keys() for o in rows)
    assert (tmp_path / "found" / "detections.csv").read_text().startswith("path,label,score,x1,y1,x2,y2")
    assert len(list((tmp_path / "found").glob("*.jpg"))) == 4


@pytest.mark.parametrize("to,out,how", [("coco", "a.json", []), ("df", "a.csv", []), ("yolo", "y", ["--split", "train"]), ("voc", "v", ["--split", "train"])])
def test_convert_and_read_back(to, out, how, toy, tmp_path, in_process):
    "A set that was converted is read back with the same number of boxes"
    code, said, err = in_process("data", "convert", toy / "train.json", "--to", to, "--out", tmp_path / out)
    assert code == 0, err
    images = [] if to == "yolo" else ["--images", toy / "train"]
    code, text, err = in_process("data", tmp_path / out, *images, *how)
    assert code == 0, err
    n = int(re.search(r"(\d+) boxes", said)[1]) - (int(re.search(r"(\d+) crowd regions", said)[1]) if "crowd regions" in said else 0)
    assert f"16 images, {n} boxes" in text


def test_closed_pipe():
    "Output into a program that stops reading is no error of anyone"
    res = subprocess.run(f"{VISDET} models retinanet | head -1; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", capture_output=True, text=True, env=ENV)
    assert res.returncode in (0, 141) and "Traceback" not in res.stderr


def test_interrupt_and_resume(toy, tmp_path):
    "Ctrl-C ends with code 130 and one line; --resume goes on and finishes"
    words = ["train", "--train", str(toy / "train.json"), *TINY, "--epochs", "15", "--out", str(tmp_path / "run")]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, and their children with them
    p = subprocess.Popen([VISDET, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=heed)
    end = time.time() + 120
    while not (tmp_path / "run" / "last.pth").exists() and time.time() < end and p.poll() is None:
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "an interrupted run" in visdet(*words).stderr
    res = visdet(*words, "--resume")
    assert res.returncode == 0, res.stderr
    assert "Resuming after epoch" in res.stdout and (tmp_path / "run" / "model.safetensors").exists()
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 16
