#!/usr/bin/env python3
"""The peer: torchvision's Faster R-CNN trained on blood cells by a plain loop, as its own reference scripts would.

SqueezeNet 1.1 body with pretrained weights, a three-level FPN of 128 channels, short side 320, batch 4, SGD with momentum and warm-up, two steps, horizontal flips.
Prints and records AP on the test split against minutes of training; evaluation does not count as training. Needs no visdet.
"""
import argparse
import contextlib
import io
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models import squeezenet1_1
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import pil_to_tensor


class Cells(torch.utils.data.Dataset):
    "One split of the blood cell set in COCO form"

    def __init__(self, root, split, train):
        self.root, self.train = Path(root), train
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(self.root / f"annotations_coco/{split}.json"))
        self.ids = sorted(self.coco.imgs)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        info = self.coco.loadImgs(self.ids[i])[0]
        path = next(self.root.rglob(info["file_name"]))
        img = pil_to_tensor(Image.open(path).convert("RGB")).float() / 255
        anns = self.coco.loadAnns(self.coco.getAnnIds(self.ids[i]))
        bb = torch.tensor([o["bbox"] for o in anns], dtype=torch.float32).reshape(-1, 4)
        bb[:, 2:] += bb[:, :2]
        if self.train and random.random() < 0.5:
            img = img.flip(-1)
            bb[:, [0, 2]] = img.shape[-1] - bb[:, [2, 0]]
        labels = torch.tensor([o["category_id"] for o in anns], dtype=torch.int64)
        return img, dict(boxes=bb, labels=labels, image_id=self.ids[i])


def build(weights, num_classes, channels=128):
    "Faster R-CNN over SqueezeNet: a pyramid of three levels at strides 8, 16 and 32 (pooled)"
    body = squeezenet1_1(weights=None)
    if weights:
        body.load_state_dict({k: v.float() for k, v in torch.load(weights, weights_only=True).items()})
    fpn = BackboneWithFPN(body.features, {"7": "0", "12": "1"}, [256, 512], channels)
    anchors = AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3)
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    return FasterRCNN(fpn, num_classes + 1, rpn_anchor_generator=anchors, box_roi_pool=pool, min_size=320, max_size=600)


@torch.no_grad()
def evaluate(model, ds):
    "COCO AP and AP50 on a split"
    model.eval()
    rows = []
    for img, tgt in ds:
        out = model([img])[0]
        bb = out["boxes"].clone()
        bb[:, 2:] -= bb[:, :2]
        rows += [dict(image_id=tgt["image_id"], category_id=c, bbox=b, score=s) for b, s, c in zip(bb.tolist(), out["scores"].tolist(), out["labels"].tolist())]
    model.train()
    if not rows:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        e = COCOeval(ds.coco, ds.coco.loadRes(rows), "bbox")
        e.evaluate(), e.accumulate(), e.summarize()
    return float(e.stats[0]), float(e.stats[1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"), p.add_argument("--weights"), p.add_argument("--out")
    p.add_argument("--epochs", type=int, default=12), p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float, default=0.005), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--max-minutes", type=float, default=math.inf)
    a = p.parse_args()
    torch.set_num_threads(a.threads), torch.manual_seed(a.seed), random.seed(a.seed), np.random.seed(a.seed)
    train, test = Cells(a.data, "train", True), Cells(a.data, "test", False)
    dl = torch.utils.data.DataLoader(train, 4, shuffle=True, collate_fn=lambda o: tuple(zip(*o)), drop_last=True)
    model = build(a.weights, len(train.coco.cats))
    opt = torch.optim.SGD([o for o in model.parameters() if o.requires_grad], a.lr, momentum=0.9, weight_decay=1e-4)
    steps, warm = a.epochs * len(dl), 100
    rate = lambda i: min(1, (i + 1) / warm) * 0.1 ** ((i >= 0.7 * steps) + (i >= 0.9 * steps))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, rate)
    curve, minutes = [], 0.0
    for epoch in range(a.epochs):
        model.train()
        start = time.perf_counter()
        for imgs, tgts in dl:
            loss = sum(model(list(imgs), list(tgts)).values())
            opt.zero_grad(), loss.backward(), opt.step(), sched.step()
        minutes += (time.perf_counter() - start) / 60
        ap, ap50 = evaluate(model, test)
        curve.append(dict(epoch=epoch + 1, minutes=minutes, AP=ap, AP50=ap50, loss=loss.item()))
        print(json.dumps(curve[-1]), flush=True)
        if minutes > a.max_minutes:
            break
    res = dict(peer="torchvision faster_rcnn plain loop", seed=a.seed, epochs=a.epochs, lr=a.lr, threads=a.threads, torch=torch.__version__, curve=curve)
    if a.out:
        Path(a.out).write_text(json.dumps(res, indent=1))


if __name__ == "__main__":
    main()
