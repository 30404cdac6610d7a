#!/usr/bin/env python3
"""visdet beside torchvision: the same ResNet-50 FPN detectors, weights, settings and image, in one process, taking turns.

For Faster R-CNN and RetinaNet at 800x1216: inference and a training step (forward, loss, backward, optimizer), each as the median of interleaved rounds and their
ratio; the peak memory of a training step, each side alone in a process of its own; and the share of visdet's step that is not convolution.
Frozen batch norms and a frozen first stage on both sides, random weights, torchvision's settings. Absolute times are only recorded; the ratio is the result.
"""
import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from visdet.data.targets import make_targets
from visdet.models.torchvision import load_torchvision, torchvision_args
from visdet.models.zoo import create_model

SIZE = 800, 1216
KINDS = "faster_rcnn", "retinanet"


class Ready(nn.Module):
    "In place of torchvision's transform: the image has its size already, so both sides start from the same tensor"

    def forward(self, x, t=None):
        return ImageList(torch.stack(list(x)), [SIZE] * len(x)), t

    def postprocess(self, r, *_):
        return r


def peer(kind):
    "torchvision's detector with random weights that keep activations in range"
    torch.manual_seed(0)
    kw = dict(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=4)
    if kind == "retinanet":
        tv = detection.RetinaNet(resnet_fpn_backbone(**kw, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)), 91)
    else:
        tv = detection.FasterRCNN(resnet_fpn_backbone(**kw), 91)
    for n, m in tv.backbone.body.named_modules():
        if isinstance(m, FrozenBatchNorm2d):
            m.weight.fill_(0.2 if n.endswith("bn3") else 1.0)
    return tv


def pair(kind):
    "Both detectors, with the same weights and the same frozen layers"
    tv = peer(kind)
    name, kw = torchvision_args(tv)
    vd = load_torchvision(create_model(name, **{**kw, "frozen_stages": 1}), tv)
    frozen = {k.removeprefix("net.") for k in vd.body.frozen}
    for k, p in tv.backbone.body.named_parameters():
        p.requires_grad_(k not in frozen)
    tv.transform = Ready()
    return tv, vd


def scene(kind, n=12):
    "One image and its objects in both dialects"
    g = torch.Generator().manual_seed(1)
    xy = torch.rand(n, 2, generator=g) * torch.tensor([900.0, 500.0])
    boxes = torch.cat([xy, xy + torch.rand(n, 2, generator=g) * 250 + 20], 1)
    labels = torch.randint(1, 91, (n,), generator=g)
    x = torch.rand(1, 3, *SIZE, generator=g)
    return x, [dict(boxes=boxes, labels=labels)], make_targets([boxes], [labels - int(kind == "faster_rcnn")], [SIZE])


def steps(kind, mode, sides=(0, 1)):
    "Functions without arguments, one for each of `sides`: 0 is torchvision's work, 1 is visdet's"
    (tv, vd), (x, tt, t) = pair(kind), scene(kind)
    models = [m for i, m in enumerate((tv, vd)) if i in sides]
    if mode == "infer":
        work = lambda: tv(list(x)), lambda: vd.decode(vd(x, sizes=t.sizes) if vd.needs_targets else vd(x), t.sizes)
        [m.eval() for m in models]
        return [torch.inference_mode()(work[i]) for i in sides]
    work = lambda: tv(list(x), tt), lambda: vd.loss(vd(x, t), t)
    opts = {i: torch.optim.SGD([p for p in m.train().parameters() if p.requires_grad], 1e-6, momentum=0.9) for i, m in zip(sides, models)}
    if len(sides) == 1:
        tv, vd = (tv, None) if sides[0] == 0 else (None, vd)

    def step(i):
        loss = sum(work[i]().values())
        opts[i].zero_grad()
        loss.backward()
        opts[i].step()

    return [partial(step, i) for i in sides]


def clock(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(kind, mode, rounds):
    "Seconds of both sides, taking turns and changing who goes first"
    sides = steps(kind, mode)
    times = [[], []]
    for f in sides:
        f(), f()
    for i in range(rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            times[j].append(clock(sides[j]))
    ratios = [b / a for a, b in zip(*times)]
    med = [statistics.median(o) for o in times]
    return dict(torchvision_s=times[0], visdet_s=times[1], ratio=med[1] / med[0], ratio_min=min(ratios), ratio_max=max(ratios))


def beside_convolution(kind, mode):
    "Share of visdet's own operator time that is neither convolution nor the linear layers of the head"
    f = steps(kind, mode, (1,))[0]
    f()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        f()
    rows = p.key_averages()
    total = sum(o.self_cpu_time_total for o in rows)
    conv = sum(o.self_cpu_time_total for o in rows if "conv" in o.key)
    linear = sum(o.self_cpu_time_total for o in rows if o.key in ("aten::addmm", "aten::mm", "aten::bmm"))
    return dict(not_convolution=1 - conv / total, neither_convolution_nor_linear=1 - (conv + linear) / total)


class Peak:
    "The largest resident size of this process inside the block, read every 2 ms: the lifetime maximum would include building the models"

    def now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __enter__(self):
        self.before = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, self.now())


def peak(kind, side, rounds=3):
    "Peak resident MB of `rounds` training steps of one side alone in this process; the other side's model is gone before they begin"
    f = steps(kind, "train", (side,))[0]
    gc.collect()
    with Peak() as mem:
        for _ in range(rounds):
            f()
    return dict(before=mem.before, peak=mem.peak)


def alone(kind, side, threads):
    cmd = [sys.executable, __file__, "--peak", kind, str(side), "--threads", str(threads)]
    return json.loads(subprocess.run(cmd, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=7), p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path), p.add_argument("--peak", nargs=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak:
        print(json.dumps(peak(a.peak[0], int(a.peak[1]))))
        return
    env = dict(python=platform.python_version(), torch=torch.__version__, torchvision=__import__("torchvision").__version__, threads=a.threads, machine=platform.machine(), cpu_capability=torch.backends.cpu.get_cpu_capability())
    res = dict(what="visdet / torchvision, R50-FPN, 1 image of 800x1216, float32", rounds=a.rounds, env=env, cases={})
    for kind in KINDS:
        for mode in ("infer", "train"):
            row = measure(kind, mode, a.rounds)
            row.update(beside_convolution(kind, mode))
            if mode == "train":
                mem = [alone(kind, side, a.threads) for side in (0, 1)]
                row.update(torchvision_mb=mem[0], visdet_mb=mem[1], memory_ratio=mem[1]["peak"] / mem[0]["peak"])
            res["cases"][f"{kind} {mode}"] = row
            print(f"{kind} {mode}", {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)
    if a.out:
        a.out.write_text(json.dumps(res, indent=1) + "\n")


if __name__ == "__main__":
    main()
