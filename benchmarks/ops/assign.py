"Best object of each anchor, overlaps of all pairs, optimal assignment"
import numpy as np
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torchvision.models.detection._utils import Matcher

from visdet.core.testing import rand_boxes
from visdet.cv.best_iou import best_iou
from visdet.cv.hungarian import hungarian
from visdet.cv.iou import box_iou
from visdet.cv.priors import AnchorGenerator, octave_sizes
from visdet.nn.assign import MaxIoUAssigner

SIZE, STRIDES = (800, 1216), (8, 16, 32, 64, 128)


def scene(n, m, images):
    "n anchors of a pyramid, evenly taken in their order, and m objects in each image"
    gen = AnchorGenerator(list(STRIDES), octave_sizes(list(STRIDES)))
    a = torch.cat(gen.grid([(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in STRIDES], torch.device("cpu")))
    start = max(0, (len(a) - n) // 2)
    return a[start : start + n], rand_boxes(images * m, SIZE, 1, 8).view(images, m, 4)


def equal(a, b):
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b))


def agrees(a, b):
    "With another BestIoU in everything; with a list of (iou, index, top, box), one an image, in the overlaps"
    return equal(a, b) if len(b) == 5 else all(torch.allclose(a[k][i], o[k], atol=1e-6) for i, o in enumerate(b) for k in (0, 2))


def best(backend, n, m, images):
    def make():
        a, g = scene(n, m, images)
        return lambda: best_iou(a, g, None, 0.0, backend=backend)

    return make


def table(n, m, images):
    "The whole table of overlaps of each image, and torch.max along both axes"

    def make():
        a, g = scene(n, m, images)

        def f():
            t = [torchvision.ops.box_iou(o, a) for o in g]
            return [(*x.max(0), *x.max(1)) for x in t]

        return f

    return make


def assigner(n, m, images):
    def make():
        a, g = scene(n, m, images)
        f, v = MaxIoUAssigner(low="own"), torch.ones(images, m, dtype=torch.bool)
        return lambda: f(a, g, v)

    return make


def matcher(n, m, images):
    def make():
        a, g = scene(n, m, images)
        f = Matcher(0.5, 0.4, True)
        return lambda: torch.stack([f(torchvision.ops.box_iou(o, a)) for o in g])

    return make


def pairs(f, n, m, kind):
    def make():
        a, b = rand_boxes(n, SIZE, 1), rand_boxes(m, SIZE, 2)
        return lambda: f(a, b, kind)

    return make


TV = dict(iou=torchvision.ops.box_iou, giou=torchvision.ops.generalized_box_iou, diou=torchvision.ops.distance_box_iou, ciou=torchvision.ops.complete_box_iou)


def costs(images, n, m):
    return torch.randn(images, n, m, generator=torch.Generator().manual_seed(0))


def solve(images, n, m, backend=None):
    def make():
        c = costs(images, n, m)
        return lambda: hungarian(c, backend=backend)

    return make


def solve_scipy(images, n, m):
    def make():
        c = costs(images, n, m)

        def f():
            r = [linear_sum_assignment(o.numpy()) for o in c]
            return torch.from_numpy(np.stack([o[0] for o in r])), torch.from_numpy(np.stack([o[1] for o in r]))

        return f

    return make


CASES = [
    *(dict(op="best_iou", size=f"{n} anchors x 50 objects x 4 images", target=0.3 if n >= 100_000 else None, against="torch", same=agrees,
           ours=best(None, n, 50, 4), others={"torch": best("torch", n, 50, 4), "table of torchvision": table(n, 50, 4)}) for n in (100, 1000, 10_000, 100_000, 200_000)),
    dict(op="MaxIoUAssigner", size="200000 anchors x 50 objects x 4 images", target=0.3, same=torch.equal, ours=assigner(200_000, 50, 4), others={"Matcher of torchvision": matcher(200_000, 50, 4)}),
    *(dict(op="box_iou", size=f"{n} x {m}, {k}", target=1.0, same=lambda a, b: torch.allclose(a, b, atol=1e-5), ours=pairs(box_iou, n, m, k),
           others={"torch": pairs(lambda a, b, k: box_iou(a, b, k, backend="torch"), n, m, k), "torchvision": pairs(lambda a, b, k: TV[k](a, b), n, m, k)})
      for n, m in ((1000, 1000), (100_000, 50)) for k in ("iou", "giou", "ciou")),
    *(dict(op="hungarian", size=f"{b} tables of {n} x {m}", target=1.0, same=equal, ours=solve(b, n, m), others={"scipy": solve_scipy(b, n, m)}) for b, n, m in ((8, 100, 10), (8, 900, 50), (1, 1000, 1000))),
]
