"A run that is killed and resumed ends with the bits of a run that was not"
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = '''
import os, signal, sys
import torch
torch.set_num_threads(1); torch.use_deterministic_algorithms(True)
from fastai.callback.core import Callback
from visdet.core.basics import seed_everything
from visdet.data.loaders import DetDataLoaders
from visdet.data.toy import toy_records
from visdet.engine.checkpoint import Checkpoint
from visdet.engine.learner import det_learner

images, out, resume, die = sys.argv[1], sys.argv[2], sys.argv[3] == "resume", sys.argv[4] == "die"
seed_everything(7)

class Die(Callback):
    def after_step(self):
        if self.epoch == 1 and self.iter == 2: os.kill(os.getpid(), signal.SIGKILL)

dls = DetDataLoaders.from_records(toy_records(16, images, seed=1), resize=(96, 96), bs=3, num_workers=0, device="cpu")
learn = det_learner(dls, "retinanet", body="test_resnet", channels=16, num_convs=1, ema=0.9, path=out)
with learn.no_bar():
    learn.fit_one_cycle(3, slice(1e-3, 1e-2), cbs=[Checkpoint(out, resume=resume), *([Die()] if die else [])])
torch.save(dict(model=learn.model.state_dict(), values=[list(map(float, o)) for o in learn.recorder.values]), out + "/final.pth")
'''


def start(images, out, resume="fresh", die="live"):
    "Start the training script in a process of its own"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(images), str(out), resume, die], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(proc):
    "Its exit code and output"
    out, err = proc.communicate(timeout=300)
    return proc.returncode, out, err


def same(a, b):
    "Are two final states equal to the bit?"
    a, b = (torch.load(Path(o) / "final.pth", weights_only=True) for o in (a, b))
    assert set(a["model"]) == set(b["model"])
    odd = [k for k in a["model"] if not torch.equal(a["model"][k], b["model"][k])]
    return odd == [] and str(a["values"]) == str(b["values"])


def test_killed_run_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    a, b = start(tmp_path / "i1", whole, resume="resume"), start(tmp_path / "i2", killed, die="die")
    code, out, err = finish(a)
    assert code == 0, err
    assert "Nothing to resume" in out
    code, _, err = finish(b)
    assert code == -signal.SIGKILL, err
    assert (killed / "last.pth").exists() and not (killed / "final.pth").exists()
    state = torch.load(killed / "last.pth", weights_only=True)
    assert (state["epoch"], state["n_epoch"]) == (0, 3)
    code, out, err = finish(start(tmp_path / "i2", killed, resume="resume"))
    assert code == 0, err
    assert "Resuming after epoch 0 of 3" in out
    assert same(whole, killed)
    assert not [o for d in (whole, killed) for o in d.iterdir() if o.name.endswith(".tmp")]
