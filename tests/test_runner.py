"SimpleRunner and what it is made of: one road from names, files and options to a run that can be repeated"
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visdet
from visdet.core.basics import CheckpointError, ConfigError
from visdet.core.bases import FOLDERS, PRESETS, preset_names
from visdet.core.config import load_config
from visdet.core.registry import lookup, names
from visdet.core.schema import catalogue
from visdet.data.datasets import toy
from visdet.runner.presets import list_presets, show_preset
from visdet.runner.rundir import next_folder, read_metrics
from visdet.runner.simple import SimpleRunner

MINI = {"_base_": "retinanet_tiny", "channels": 16}
PARTS = [k for k in FOLDERS if k != "run"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runner")


@pytest.fixture(scope="module")
def data(home):
    "A configuration of twenty drawn images"
    return {"type": "toy", "n": 20, "path": str(home / "toy"), "resize": 64, "bs": 4, "num_workers": 0}


def quiet(r, **kw):
    "Train without a table"
    with r.learner.no_bar(), r.learner.no_logging():
        return r.train(**kw)


def lines(folder):
    "Metrics of a run without the clock"
    return [{k: v for k, v in o.items() if k != "seconds"} for o in read_metrics(Path(folder) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(home, data):
    "A finished run of two epochs"
    r = SimpleRunner(MINI, data, epochs=2, work_dir=home / "run", device="cpu")
    quiet(r)
    return r


@pytest.fixture(scope="module")
def cat():
    return catalogue(SimpleRunner)


def test_every_preset_is_valid_and_stands_in_the_lists(cat):
    for kind in PARTS:
        shipped = preset_names(kind, (PRESETS,))
        assert shipped and set(shipped) | set(names(kind)) <= set(list_presets(kind))
        for n in shipped:
            cfg = load_config(n, root=kind, cat=cat)
            assert cfg.type in names(kind)
            assert show_preset(n, kind).startswith("# yaml-language-server: $schema=../../schema/")
    assert {"1x", "2x", "1cycle", "finetune"} <= set(SimpleRunner.list_schedulers())
    assert {"adamw", "sgd", "lamb", "adamw8bit", "torch.RMSprop"} <= set(SimpleRunner.list_optimizers())
    assert {"coco", "voc", "yolo", "table", "toy"} <= set(SimpleRunner.list_datasets())
    entries = {load_config(n, root="model", cat=cat).type for n in preset_names("model", (PRESETS,))}
    assert {"retinanet", "fcos", "faster_rcnn", "mask_rcnn"} <= entries


@pytest.mark.parametrize("name", ["fcos_tiny", "faster_rcnn_tiny", "mask_rcnn_tiny", "retinanet_mobile", "yolox_nano", "yolox_tiny", "rtmdet_tiny", "rtmdet_ins_tiny"])
def test_small_presets_build(name):
    from visdet.core.config import build

    m = build(load_config(name, root="model", cat=catalogue()), "model", num_classes=3)
    assert m.num_classes == 3 and sum(p.numel() for p in m.parameters()) < 8e6


def test_simple_runner_is_offered_lazily():
    assert visdet.SimpleRunner is SimpleRunner and "SimpleRunner" in dir(visdet)
    code = "import sys, visdet; assert 'SimpleRunner' in visdet.__all__; assert not {'torch', 'fastai', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_keywords_are_type_errors():
    with pytest.raises(TypeError, match="'epoch'; did you mean 'epochs'"):
        SimpleRunner("retinanet_tiny", "toy", epoch=3)
    with pytest.raises(TypeError, match="did you mean 'work_dir'"):
        SimpleRunner.from_config({"model": "retinanet_tiny", "dataset": "toy"}, workdir="x")


@pytest.mark.parametrize("kw,said", [
    (dict(model="retinanet_tini"), "did you mean 'retinanet_tiny'"),
    (dict(dataset="toyy"), "did you mean 'toy"),
    (dict(optimizer="RMSprop"), "torch.RMSprop"),
    (dict(scheduler="1cycl"), "1cycle"),
    (dict(model={"_base_": "retinanet_tiny", "chanels": 8}), "did you mean 'channels'"),
    (dict(epochs=0), "at least 1"),
    (dict(precision="fp8"), "'fp16'"),
    (dict(overrides={"model.num_conv": 2}), "did you mean 'num_convs'"),
    (dict(overrides=["model.num_convs"]), "path=value"),
    (dict(train_ann_file="a.json"), "'train'"),
    (dict(scheduler={"type": "1cycle", "lr": 0.1}, optimizer={"type": "sgd", "lr": 0.2}), "they mean the same"),
    (dict(scheduler={"type": "step", "epochs": 3}, epochs=4), "they mean the same"),
])
def test_mistakes(kw, said):
    "Each is an error at once, before anything is read or built"
    with pytest.raises(ConfigError) as e:
        SimpleRunner(**{"model": "retinanet_tiny", "dataset": "toy_tiny", **kw})
    assert said in str(e.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError, match="3 problems"):
        SimpleRunner({"_base_": "retinanet_tiny", "chanels": 8}, {"type": "toy", "n": 0}, val_interval=0)


def test_sources_are_known(run):
    assert run.cfg.why("model.body").source.kind == "preset"
    assert run.cfg.why("model.channels").source.kind == "python"
    assert run.cfg.why("model.vocab").source.kind == "data"
    assert run.cfg.why("scheduler.epochs").value == 2 and run.cfg.why("model.levels").value == 3


def test_a_run_folder_is_whole(run, home):
    out = home / "run"
    assert {"config.yaml", "visdet.lock", "metrics.jsonl", "environment.json", "command.txt", "model.safetensors", "last.pth", "best.pth", "history.csv", "evaluation.json"} <= {o.name for o in out.iterdir()}
    assert [o["epoch"] for o in lines(out)] == [0, 1] and lines(out)[0]["train_loss"] > 0
    facts = json.loads((out / "environment.json").read_text())
    assert facts["torch"] and any(o["name"] == "retinanet_tiny" and len(o["sha256"]) == 64 for o in facts["files"])
    assert not list(out.glob(".*"))


def test_a_run_repeats_to_the_same_numbers(run, home):
    "From its config.yaml by the command line, and again after looking at batches"
    from visdet.cli.main import main

    assert main(["train", str(home / "run" / "config.yaml"), "--out", str(home / "cli")]) == 0
    assert (home / "cli" / "command.txt").read_text().startswith("visdet train ")
    assert lines(home / "cli") == lines(home / "run")
    r = SimpleRunner.from_config(home / "run" / "config.yaml", work_dir=home / "looked")
    r.learner.dls.one_batch()
    r.learner.dls.show_batch()
    assert r.preflight(limit=8) is not None
    quiet(r)
    assert lines(home / "looked") == lines(home / "run")
    a, b = (torch.load(home / o / "last.pth", weights_only=True)["model"] for o in ("run", "looked"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_seed_is_another_run(run, home):
    r = SimpleRunner.from_config(home / "run" / "config.yaml", seed=7, work_dir=home / "seed")
    assert r.cfg.dataset.seed == 7
    quiet(r)
    assert lines(home / "seed") != lines(home / "run")


def test_interrupted_and_resumed_is_the_same(run, home, data):
    from fastai.callback.core import Callback

    class Stop(Callback):
        order = 300

        def after_epoch(self):
            if self.epoch == 0:
                raise KeyboardInterrupt

    r = SimpleRunner(MINI, data, epochs=2, work_dir=home / "cut", device="cpu")
    with pytest.raises(KeyboardInterrupt), r.learner.added_cbs(Stop()):
        quiet(r)
    assert len(lines(home / "cut")) == 1
    with pytest.raises(ConfigError, match="an interrupted run"):
        quiet(r)
    r = SimpleRunner.from_checkpoint(home / "cut")
    with r.learner.no_bar(), r.learner.no_logging():
        r.resume()
    assert lines(home / "cut") == lines(home / "run")


def test_one_road(run, home, data):
    "Names, a file and options of the command give the same configuration"
    from visdet.cli.parser import parse_command
    from visdet.cli.train import runner_of

    (home / "run.yaml").write_text("model: {_base_: retinanet_tiny, channels: 16}\ndataset: toy_tiny\nepochs: 3\noptimizer: {_base_: sgd, lr: 1e-3}\n")
    a = SimpleRunner(MINI, "toy_tiny", {"_base_": "sgd", "lr": 1e-3}, epochs=3)
    b = SimpleRunner.from_config(home / "run.yaml")
    words = parse_command(["train", str(home / "run.yaml"), "model.channels=16"])
    words.argv = ["train"]
    c = runner_of(words)
    assert a.cfg == b.cfg == c.cfg
    assert c.cfg.why("model.channels").source.kind == "command" and b.cfg.why("epochs").source.line == 3


def test_from_checkpoint(run, home, data):
    ev = SimpleRunner.from_checkpoint(home / "run").validate()
    assert ev.stats.keys() >= {"AP", "AP50"}
    other = SimpleRunner.from_checkpoint(home / "run" / "best.pth")
    assert other.work_dir == home / "run" and len(other.predict(sorted((home / "toy" / "valid").glob("*.png"))[:1], score=0.05)) == 1
    with pytest.raises(CheckpointError, match="no run here"):
        SimpleRunner.from_checkpoint(home / "nothing")
    file = run.export(home / "m.safetensors")
    (home / "alone").mkdir()
    lone = file.rename(home / "alone" / "m.safetensors")
    with pytest.raises(ConfigError, match="dataset="):
        SimpleRunner.from_checkpoint(lone)
    assert SimpleRunner.from_checkpoint(lone, dataset=data).cfg.model.channels == 16
    with pytest.raises(ConfigError, match="safetensors"):
        run.export(format="onnx")


def test_untrained_models_are_not_used(data):
    r = SimpleRunner(MINI, data)
    for f in (r.validate, r.export, lambda: r.predict("x.png")):
        with pytest.raises(ConfigError, match="has not been trained"):
            f()


def test_folders_are_not_shared(run, tmp_path):
    with pytest.raises(ConfigError, match="a finished run"):
        run.train()
    (tmp_path / "3").mkdir()
    assert next_folder(tmp_path).name == "4"


@pytest.mark.parametrize("opt", ["torch.RMSprop", "torch.Adagrad", {"type": "torch.SGD", "lr": 1e-3, "momentum": 0.9, "nesterov": True}, "lamb", torch.optim.NAdam])
def test_any_optimizer_trains_and_resumes(opt, home, data, tmp_path):
    "The state of every optimizer can be written and read back"
    r = SimpleRunner(MINI, data, opt, epochs=1, work_dir=tmp_path / "r", device="cpu", ema=False, overrides={"dataset.n": 10, "dataset.path": str(home / "toy10")})
    quiet(r)
    (tmp_path / "r" / "model.safetensors").unlink()
    with r.learner.no_bar(), r.learner.no_logging():
        r.train(resume=True)
    assert len(lines(tmp_path / "r")) == 1


def test_bitsandbytes_is_asked_for_by_name():

    import importlib.util

    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed here")
    with pytest.raises(ImportError, match=r"visdet\[8bit\]"):
        lookup("optimizer", "adamw8bit")()


def test_step_schedule_says_when_the_rise_is_too_long(data):
    r = SimpleRunner(MINI, data, scheduler="1x", device="cpu")
    with pytest.raises(ConfigError, match="scheduler.warmup"):
        r.preflight()


def test_validation_can_be_left_out(home, data, tmp_path):
    r = SimpleRunner(MINI, data, epochs=3, val_interval=2, work_dir=tmp_path / "r", device="cpu")
    quiet(r)
    assert [o["valid_loss"] is None for o in lines(tmp_path / "r")] == [True, False, False]


def test_objects(home, data, tmp_path):
    "Each of the four may be the thing itself; what cannot be written is left out of the file"
    from visdet.models.retinanet import retinanet

    dls = toy(20, home / "toy", resize=64, bs=4, num_workers=0, device="cpu")
    m = retinanet(vocab=dls.vocab, body="test_resnet", channels=16, num_convs=1, levels=3)
    m.norm = dls.norm
    r = SimpleRunner(m, dls, torch.optim.Adam, lambda learn: learn.fit(1, 1e-4), work_dir=tmp_path / "o")
    quiet(r)
    text = (tmp_path / "o" / "config.yaml").read_text()
    assert "type: retinanet" in text and "dataset:" not in text and "optimizer:" not in text
    with pytest.raises(ConfigError):
        SimpleRunner.from_config(tmp_path / "o" / "config.yaml")
    with pytest.raises(ConfigError, match="passed as an object"):
        SimpleRunner(m, dls, batch_size=2)


def test_own_presets_and_components():
    SimpleRunner.register_dataset("my_shapes", {"_base_": "toy_tiny", "n": 30})
    assert SimpleRunner("retinanet_tiny", "my_shapes").cfg.dataset.n == 30
    with pytest.raises(ConfigError, match="did you mean 'resize'"):
        SimpleRunner.register_dataset("bad", {"_base_": "toy_tiny", "resise": 30})

    def quick(epochs: int = 1):
        "One rate throughout"
        return lambda learn: learn.fit(epochs, 1e-3)

    SimpleRunner.register_scheduler("quick", quick)
    assert SimpleRunner("retinanet_tiny", "toy_tiny", scheduler="quick", epochs=2).cfg.scheduler.epochs == 2


def test_only_a_named_package_is_imported(tmp_path, monkeypatch):
    "A component of a user's package exists for `visdet train` once the package is named, and not before"
    from visdet.cli.parser import parse_command
    from visdet.cli.train import runner_of

    (tmp_path / "my_detectors.py").write_text(
        "from visdet.core.registry import entry\nfrom visdet.models.retinanet import retinanet\n\n\n@entry()\ndef my_detector(num_classes=None, vocab: list = None, depth: int = 1):\n"
        '    "Mine"\n    return retinanet(num_classes, vocab, body="test_resnet", channels=16, num_convs=depth, levels=3)\n'
    )
    (tmp_path / "run.yaml").write_text("model: {type: my_detector, depth: 2}\ndataset: toy_tiny\nbatch_size: 4\ndevice: cpu\n")
    monkeypatch.syspath_prepend(tmp_path)

    def runner(*words):
        a = parse_command(["train", str(tmp_path / "run.yaml"), *words])
        a.argv = []
        return runner_of(a)

    with pytest.raises(ConfigError, match="unknown model 'my_detector'"):
        runner()
    assert "my_detectors" not in sys.modules
    try:
        assert runner("--allow-import", "my_detectors").cfg.model.depth == 2
    finally:
        from visdet.core import registry

        registry._table["model"].pop("my_detector", None)
        sys.modules.pop("my_detectors", None)
