#!/usr/bin/env python3
"""visdet on blood cells, with its own defaults and verbs: the counterpart of `torchvision_bccd.py`.

Same body and weights, same short side, batch and split. Validation after each epoch is on the test split and does not count as training.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback

from visdet.core.basics import seed_everything
from visdet.data.loaders import DetDataLoaders
from visdet.engine.learner import det_learner


class Clock(Callback):
    "Minutes of training, and the table's AP after each epoch"

    order = 90

    def __init__(self):
        self.minutes, self.curve = 0.0, []

    def before_train(self):
        self.start = time.perf_counter()

    def after_train(self):
        self.minutes += (time.perf_counter() - self.start) / 60

    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1]))
        self.curve.append(dict(epoch=self.epoch + 1, minutes=self.minutes, AP=float(row["AP"]), AP50=float(row["AP50"]), loss=float(row["train_loss"])))
        print(json.dumps(self.curve[-1]), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"), p.add_argument("--weights"), p.add_argument("--out")
    p.add_argument("--model", default="faster_rcnn"), p.add_argument("--epochs", type=int, default=10), p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--kw", type=json.loads, default={}, help="JSON: more arguments for the entry point")
    p.add_argument("--dl", type=json.loads, default={}, help="JSON: more arguments for the loaders")
    p.add_argument("--learn", type=json.loads, default={}, help="JSON: more arguments for det_learner")
    a = p.parse_args()
    torch.set_num_threads(a.threads), seed_everything(a.seed)
    root = Path(a.data)
    dls = DetDataLoaders.from_coco(root / "annotations_coco/train.json", root / "images", root / "annotations_coco/test.json", bs=4, resize=320, seed=a.seed, **a.dl)
    learn = det_learner(dls, a.model, body="tv:squeezenet1_1", weights=a.weights, **a.learn, **a.kw)
    clock = Clock()
    with learn.no_bar():
        learn.fit_one_cycle(a.epochs, *([a.lr] if a.lr else []), cbs=clock)
    res = dict(model=a.model, seed=a.seed, epochs=a.epochs, lr=a.lr, threads=a.threads, kw=a.kw, dl=a.dl, learn=a.learn, torch=torch.__version__, curve=clock.curve)
    if a.out:
        Path(a.out).write_text(json.dumps(res, indent=1))


if __name__ == "__main__":
    main()
