"""The behaviours that MMDetection states for the head of GFL: losses with and without objects

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.testing import close
from visdet.data.targets import make_targets
from visdet.nn.gfl_head import GFLHead, Integral

BEHAVIOURS = {
    "no object: classification > 0, boxes == 0, distributions == 0": "test_no_object",
    "one object: all > 0": "test_one_object",
    "reg_max is 16 by default: 68 numbers a box": "test_width",
    "losses are scalars in the graph with finite gradients": "test_gradients",
    "the mean of a distribution": "test_integral",
    "one forward gives losses and detections": "test_detections",
}
WITHOUT = {"a list of losses, one for each level": "a loss is the sum over levels; see test_gradients for its shape"}

SIZE, STRIDES, CLASSES = 256, [8, 16, 32, 64, 128], 4
GT = [[23.6667, 23.8757, 238.6326, 151.8874]]


def scene(*objects, **kw):
    "A head, what it says of random maps of images with these objects, and the objects"
    torch.manual_seed(0)
    h = GFLHead(1, CLASSES, STRIDES, channels=1, num_convs=1, **kw)
    g, n = torch.Generator().manual_seed(1), len(objects)
    raw = h([torch.rand(n, 1, SIZE // s, SIZE // s, generator=g) for s in STRIDES], torch.zeros(n, 3, SIZE, SIZE))
    return h, raw, make_targets(list(objects), [[2] * len(o) for o in objects], [(SIZE, SIZE)] * n)


def test_no_object():
    h, raw, t = scene([])
    terms = h.loss(raw, t)
    assert terms["cls"] > 0 and terms["box"] == 0 and terms["dfl"] == 0


def test_one_object():
    h, raw, t = scene(GT)
    terms = h.loss(raw, t)
    assert list(terms) == ["cls", "box", "dfl"] and all(v > 0 for v in terms.values())


@pytest.mark.parametrize("n,width", [(16, 68), (7, 32)])
def test_width(n, width):
    h, raw, _ = scene([], reg_max=n)
    assert raw["reg"][0].shape == (1, width, 32, 32) and (n != 16 or GFLHead(1, 4, STRIDES).reg_max == n)


@pytest.mark.parametrize("objects", [[], GT])
def test_gradients(objects):
    h, raw, t = scene(objects)
    terms = h.loss(raw, t)
    assert all(v.ndim == 0 and v.requires_grad for v in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())


def test_integral():
    x = torch.randn(5, 4 * 17)
    close(Integral(16)(x), (x.view(5, 4, 17).softmax(-1) * torch.arange(17.0)).sum(-1), 1e-5)


def test_detections():
    h, raw, t = scene(GT, [])
    d = h.decode(h.oracle(raw, t), t.sizes)
    assert [len(o) for o in d] == [1, 0] and d[0].labels.tolist() == [2]
    assert (d[0].boxes - torch.tensor(GT)).abs().max() < 1e-2
