#!/usr/bin/env python3
"""Can `mask_rcnn` learn masks? Train it on the 128 training images of coco_mini until it knows them, and report AP on them and on the validation images.

The first number shows that the road from polygons to mask AP is whole; the second is what 128 images are worth, and is reported for what it is.
"""
import argparse
import json
import time
from pathlib import Path

import torch

import visdet
from fastai.callback.core import Callback

from visdet.core.basics import seed_everything
from visdet.cv.iou import box_iou
from visdet.data.loaders import DetDataLoaders
from visdet.deploy.save import save_model
from visdet.engine.learner import det_learner
from visdet.eval.evaluate import evaluate


class Say(Callback):
    "One line an epoch"

    order = 90

    def after_epoch(self):
        print(self.epoch + 1, [round(float(o), 4) for o in self.recorder.values[-1]] if self.recorder.values else "", flush=True)


def scores(learn, dl):
    "Box and mask AP of the learner on one loader"
    dets = learn.get_preds(dl=dl)[0]
    res = {k: evaluate(list(dets), dl.records, kind=k).stats for k in ("bbox", "segm")}
    return {k: dict(AP=float(v["AP"]), AP50=float(v["AP50"])) for k, v in res.items()} | dict(found=found(dets, dl.records))


SIDES = 8, 16, 24, 32, 64  # pixels of the original image


def found(dets, records):
    "Share of objects, by the side of a square of their area, that have a detection of their class at IoU 0.5"
    sides, hits = [], []
    for d, o in zip(dets, (records[i] for i in range(len(records)))):
        keep = ~o.crowd
        if not keep.any():
            continue
        b, lbl = torch.as_tensor(o.boxes[keep]), torch.as_tensor(o.labels[keep])
        over = (box_iou(b, d.boxes) >= 0.5) & (lbl[:, None] == d.labels[None])
        sides += o.areas[keep].__pow__(0.5).tolist()
        hits += over.any(1).tolist()
    side, hit = torch.tensor(sides), torch.tensor(hits).float()
    edges = [0, *SIDES, float("inf")]
    return [dict(above=lo, upto=hi if hi < float("inf") else None, objects=int(k.sum()), share=float(hit[k].mean()) if k.any() else None) for lo, hi in zip(edges, edges[1:]) for k in [(side > lo) & (side <= hi)]]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"), p.add_argument("--weights"), p.add_argument("--out", type=Path), p.add_argument("--save", type=Path, help="keep the model in this file"), p.add_argument("--load", type=Path, help="do not train: evaluate this file, and put the figures into --out")
    p.add_argument("--epochs", type=int, default=60), p.add_argument("--lr", type=float), p.add_argument("--size", type=int, default=320), p.add_argument("--aug", default="none"), p.add_argument("--bs", type=int, default=2)
    p.add_argument("--limit", type=int, help="only the first images"), p.add_argument("--seed", type=int, default=0), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--kw", type=json.loads, default=dict(channels=128, mask_channels=128, roi_num=128, pre=[500, 500], post=[250, 250]), help="JSON: more arguments for mask_rcnn")
    a = p.parse_args()
    torch.set_num_threads(a.threads), seed_everything(a.seed)
    root = Path(a.data)
    ann = lambda part: (root / f"annotations/instances_{part}.json", root / part)
    (train, train_dir), (valid, valid_dir) = ann("train2017"), ann("val2017")
    dls = DetDataLoaders.from_coco(train, train_dir, valid, valid_dir, bs=a.bs, resize=a.size, aug=a.aug, seed=a.seed)
    rows = list(range(a.limit or len(dls.records)))
    few = DetDataLoaders.from_records(dls.records.subset(rows), dls.valid.records.subset(rows[:8]), bs=a.bs, resize=a.size, aug=a.aug, seed=a.seed)  # a glance at the validation loss each epoch is enough
    if a.load:
        learn = det_learner(few, visdet.load(a.load).model, metrics=None)
        res = json.loads(a.out.read_text()) | dict(train=scores(learn, few.train_eval), valid=scores(learn, dls.valid))
        return a.out.write_text(json.dumps(res, indent=1) + "\n")
    learn = det_learner(few, "mask_rcnn", body="tv:squeezenet1_1", weights=a.weights, metrics=None, **a.kw)
    start = time.perf_counter()
    with learn.no_bar():
        learn.fit_one_cycle(a.epochs, *([a.lr] if a.lr else []), cbs=Say())
    minutes = (time.perf_counter() - start) / 60
    if a.save:
        save_model(learn, a.save)
    res = dict(what="mask_rcnn, SqueezeNet 1.1, on coco_mini", epochs=a.epochs, size=a.size, bs=a.bs, limit=a.limit, seed=a.seed, aug=a.aug, lr=a.lr or learn.lr, kw=a.kw, threads=a.threads, torch=torch.__version__, minutes=minutes, train=scores(learn, few.train_eval), valid=scores(learn, dls.valid))
    print(json.dumps(res))
    if a.out:
        a.out.write_text(json.dumps(res, indent=1) + "\n")


if __name__ == "__main__":
    main()
