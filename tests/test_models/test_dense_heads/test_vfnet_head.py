"""The behaviours that MMDetection states for the head of VFNet: losses with and without objects, by both rules for positives and both losses

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import itertools

import pytest
import torch

from visdet.core.testing import close
from visdet.data.targets import make_targets
from visdet.nn.assign import PointAssigner
from visdet.nn.vfnet_head import VFNetHead, star_offsets

BEHAVIOURS = {
    "no object: classification > 0, boxes == 0, refined boxes == 0": "test_no_object",
    "one object: all > 0": "test_one_object",
    "losses are scalars in the graph with finite gradients": "test_gradients",
    "positives by ATSS or by FCOS (use_atss), varifocal or focal loss (use_vfl)": "test_one_object",
    "the star of a box": "test_star",
    "one forward gives losses and detections": "test_detections",
}
WITHOUT = {
    "two maps in evaluation, three in training": "raw output is the same in both modes and holds first and refined distances",
    "sync_num_pos": "positives are those of the process's own batch",
}

SIZE, STRIDES, CLASSES = 256, [8, 16, 32, 64, 128], 4
GT = [[23.6667, 23.8757, 238.6326, 151.8874]]
forms = pytest.mark.parametrize("form", list(itertools.product([True, False], [True, False], ["range", "stride"])))


def scene(form, *objects):
    "A head, what it says of random maps of images with these objects, and the objects"
    torch.manual_seed(0)
    use_atss, use_vfl, unit = form
    h = VFNetHead(1, CLASSES, STRIDES, channels=1, num_convs=1, assigner=None if use_atss else PointAssigner(None), use_vfl=use_vfl, unit=unit)
    g, n = torch.Generator().manual_seed(1), len(objects)
    raw = h([torch.rand(n, 1, SIZE // s, SIZE // s, generator=g) for s in STRIDES], torch.zeros(n, 3, SIZE, SIZE))
    return h, raw, make_targets(list(objects), [[2] * len(o) for o in objects], [(SIZE, SIZE)] * n)


@forms
def test_no_object(form):
    h, raw, t = scene(form, [])
    terms = h.loss(raw, t)
    assert terms["cls"] > 0 and terms["box"] == 0 and terms["fine"] == 0


@forms
def test_one_object(form):
    h, raw, t = scene(form, GT)
    terms = h.loss(raw, t)
    assert list(terms) == ["cls", "box", "fine"] and all(v > 0 for v in terms.values())


@forms
@pytest.mark.parametrize("objects", [[], GT])
def test_gradients(form, objects):
    h, raw, t = scene(form, objects)
    terms = h.loss(raw, t)
    assert all(v.ndim == 0 and v.requires_grad for v in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())


def test_star():
    "Taps read the corners, the middles of the sides and the centre of the box around a cell"
    l, t, r, b = 3.0, 1.5, 0.5, 4.0
    o = star_offsets(torch.tensor([l, t, r, b]).view(1, 4, 1, 1)).view(9, 2)
    base = torch.tensor([[y, x] for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)])
    close(o + base, torch.tensor([[y, x] for y in (-t, 0, b) for x in (-l, 0, r)]), 1e-6)


@forms
def test_detections(form):
    h, raw, t = scene(form, GT, [])
    d = h.decode(h.oracle(raw, t), t.sizes)
    assert [len(o) for o in d] == [1, 0] and d[0].labels.tolist() == [2]
    assert (d[0].boxes - torch.tensor(GT)).abs().max() < 1e-2
