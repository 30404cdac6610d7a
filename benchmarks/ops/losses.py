"Losses that are bound by memory or by launches: focal over all anchors, overlap of boxes; forward and backward"
import torch
import torch.nn.functional as F
import torchvision.ops as tv
from visdet.core.testing import noise, rand_boxes
from visdet.cv.box_loss import box_iou_loss
from visdet.cv.focal import quality_focal_loss, sigmoid_focal_loss, varifocal_loss

CLASSES = 80


def logits(n):
    "Logits of n anchors at the start of a training, one row in a hundred with a class"
    i = torch.arange(n)
    return noise(n, CLASSES).sub_(3), torch.where(i % 100 == 0, i % CLASSES, -1)


def hot(labels):
    "The table of targets that other losses ask for"
    y = torch.zeros(len(labels), CLASSES)
    rows = (labels >= 0).nonzero()[:, 0]
    y[rows, labels[rows]] = 1
    return y


def step(f, x):
    "Loss and gradient"
    x = x.detach().requires_grad_()
    l = f(x)
    l.backward()
    return l.detach(), x.grad


def same(a, b):
    "Values and gradients agree"
    return bool(torch.allclose(a[0], b[0], rtol=1e-4) and torch.allclose(a[1], b[1], rtol=1e-4, atol=1e-6))


def focal(n, backend=None):
    def make():
        x, labels = logits(n)
        return lambda: step(lambda o: sigmoid_focal_loss(o, labels, backend=backend), x)

    return make


def focal_torchvision(n, table_given=False):
    def make():
        x, labels = logits(n)
        given = hot(labels) if table_given else None
        return lambda: step(lambda o: tv.sigmoid_focal_loss(o, hot(labels) if given is None else given, reduction="sum"), x)

    return make


def quality(n, f, backend=None):
    def make():
        x, labels = logits(n)
        q = torch.full((n,), 0.7)
        return lambda: step(lambda o: f(o, labels, q, backend=backend), x)

    return make


def quality_plain(n, varifocal):
    def make():
        x, labels = logits(n)

        def loss(o):
            y = hot(labels) * 0.7
            bce = F.binary_cross_entropy_with_logits(o, y, reduction="none")
            p = o.sigmoid()
            return ((torch.where(y > 0, y, 0.75 * p**2) if varifocal else (p - y).abs() ** 2) * bce).sum()

        return lambda: step(loss, x)

    return make


def boxes(n, f):
    def make():
        x, y = rand_boxes(n), rand_boxes(n, seed=1)
        return lambda: step(lambda o: f(o, y), x)

    return make


TV_BOX = dict(giou=tv.generalized_box_iou_loss, diou=tv.distance_box_iou_loss, ciou=tv.complete_box_iou_loss)


def box_case(n, kind, target=None):
    "One kind of overlap loss over n pairs"
    return dict(op="box_iou_loss", size=f"{kind}, {n} pairs, forward and backward", target=target, against="torchvision", ours=boxes(n, lambda x, y: box_iou_loss(x, y, kind=kind)),
                others=dict(torchvision=boxes(n, lambda x, y: TV_BOX[kind](x, y, reduction="sum")), torch=boxes(n, lambda x, y: box_iou_loss(x, y, kind=kind, backend="torch"))), same=same)


def focal_case(n, target=None):
    "Focal loss over n anchors"
    others = dict(torchvision=focal_torchvision(n), torchvision_table_given=focal_torchvision(n, True), torch=focal(n, "torch"))
    return dict(op="sigmoid_focal_loss", size=f"{n} anchors x {CLASSES} classes, forward and backward", target=target, against="torchvision_table_given", ours=focal(n), others=others, same=same, **(dict(memory=0.5) if n >= 100_000 else {}))


CASES = [
    *(focal_case(n) for n in (100, 1000, 10_000, 100_000)),
    focal_case(800_000, target=0.6),
    *(dict(op=name, size=f"100000 anchors x {CLASSES} classes, forward and backward", ours=quality(100_000, f),
           others=dict(plain=quality_plain(100_000, f is varifocal_loss), torch=quality(100_000, f, "torch")), same=same, memory=0.5)
      for name, f in (("quality_focal_loss", quality_focal_loss), ("varifocal_loss", varifocal_loss))),
    *(box_case(n, kind) for n in (100, 1000, 100_000) for kind in ("giou", "ciou")),
]
