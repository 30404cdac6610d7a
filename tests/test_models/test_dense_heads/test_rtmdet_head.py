"""The behaviours of a dense head that MMDetection states for all its heads, for those of RTMDet, which it leaves untested

A head of four classes over one channel sees random features of an image of 256 x 256, once without objects and once with one.
"""
import pytest
import torch
from torch import nn

from visdet.core.basics import DataError
from visdet.core.testing import close
from visdet.data.targets import make_targets
from visdet.nn.dynamic_mask import RTMDetInsHead
from visdet.nn.rtmdet_head import RTMDetHead

BEHAVIOURS = {
    "without objects: class term above 0, box term 0": "test_empty",
    "with one object: every term above 0": "test_one_object",
    "terms are scalars with finite gradients": "test_one_object",
    "objects outside of the image are not learned": "test_outside",
    "class logits start at a probability of one per cent, boxes at one stride": "test_start",
    "convolutions are shared by the levels, norms are not": "test_sharing",
    "forward and prediction run; no more detections than asked for": "test_predict",
    "masks: the term is 0 without objects and above 0 with one": "test_masks",
}
S, STRIDES = 256, [8, 16, 32]
FORMS = [
    (RTMDetHead, dict()),
    (RTMDetHead, dict(reg="exp", own_convs=True)),
    (RTMDetHead, dict(reg="exp", own_norms=False, scales=True, objectness=True, ks=3)),
    (RTMDetInsHead, dict()),
    (RTMDetInsHead, dict(reg="exp", own_norms=False, scales=True, split=True, objectness=True)),
]


def head(kind, kw, n=1):
    torch.manual_seed(0)
    return kind(1, 4, STRIDES, 1, n, **kw)


def run(h, boxes, labels, seed=0):
    "The terms of the loss for an image, on random features"
    g = torch.Generator().manual_seed(seed)
    feats = [torch.rand(1, 1, S // s, S // s, generator=g) for s in STRIDES]
    masks = torch.zeros(len(labels), S, S, dtype=torch.uint8)
    for m, (x1, y1, x2, y2) in zip(masks, boxes):
        m[int(y1) : int(y2), int(x1) : int(x2)] = 1
    raw = h(feats, torch.zeros(1, 3, S, S))
    return raw, h.loss(raw, make_targets([boxes], [labels], [(S, S)], masks=masks))


@pytest.mark.parametrize("kind,kw", FORMS)
def test_empty(kind, kw):
    h = head(kind, kw)
    _, terms = run(h, [], [])
    assert terms["cls"] > 0 and terms["box"] == 0
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())


@pytest.mark.parametrize("kind,kw", FORMS)
def test_one_object(kind, kw):
    h = head(kind, dict(kw, reg="exp"))
    _, terms = run(h, [[23.6667, 23.8757, 238.6326, 151.8874]], [2])
    assert set(terms) == {"cls", "box"} | ({"mask"} if kind is RTMDetInsHead else set())
    assert all(v > 0 and v.ndim == 0 and v.requires_grad for v in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())


@pytest.mark.parametrize("kind,kw", FORMS)
def test_outside(kind, kw):
    _, terms = run(head(kind, kw), [[4.0 * S, 4.0 * S, 4.0 * S + 10, 4.0 * S + 10]], [1])
    assert terms["cls"] > 0 and terms["box"] == 0 and terms.get("mask", 0) == 0


def test_start():
    for kind, kw in FORMS:
        h = head(kind, kw)
        for m in (*h.cls, *(h.obj or ())):
            assert m.bias.detach().allclose(torch.tensor(-4.59512), atol=1e-5)
        raw, _ = run(h.eval(), [], [])
        for r, s in zip(raw["reg"], STRIDES):
            assert ((r - s).abs() < 0.2 * s).all()  # One stride to each side


def test_sharing():
    h = head(RTMDetHead, {}, 2)
    assert len(h.cls_tower.convs) == 1 and len(h.cls_tower.norms) == len(h.cls) == 3
    assert sum(isinstance(m, nn.Conv2d) for m in h.modules()) == 2 * 2 + 2 * 3
    h = head(RTMDetHead, dict(own_convs=True), 2)
    assert len(h.cls_tower.convs) == 3 and sum(isinstance(m, nn.Conv2d) for m in h.modules()) == 2 * 2 * 3 + 2 * 3
    h = head(RTMDetInsHead, {}, 2)
    assert h.reg_tower is None and len(h.kernel_tower.convs) == 3


@pytest.mark.parametrize("kind,kw", FORMS)
def test_predict(kind, kw):
    h = head(kind, dict(kw, max_num=7, score_thr=0.0)).eval()
    with torch.no_grad():
        raw, _ = run(h, [], [])
    d = h.decode(raw, [(S, S - 3)])[0]
    assert len(d) <= 7 and (d.boxes[:, 2] <= S - 3).all() and (d.boxes[:, 2:] > d.boxes[:, :2]).all()
    if kind is RTMDetInsHead:
        assert d.masks.shape == (len(d), S, S - 3)
    h.score_thr = 1.0
    assert len(h.decode(raw, [(S, S)])[0]) == 0


def test_masks():
    h = head(RTMDetInsHead, {})
    assert run(h, [], [])[1]["mask"] == 0
    assert 0 < run(h, [[23.6667, 23.8757, 238.6326, 151.8874]], [2])[1]["mask"] <= 2
    raw, _ = run(h, [], [])
    with pytest.raises(DataError, match="no masks"):
        h.loss(raw, make_targets([[[9.0, 9, 50, 60]]], [[0]], [(S, S)]))


def test_several_images_are_their_sum():
    "The terms of a batch are those of its images, by the overlaps of all"
    h = head(RTMDetHead, dict(reg="exp"))
    feats = [torch.rand(2, 1, S // s, S // s) for s in STRIDES]
    h.eval()
    t = make_targets([[[9.0, 9, 150, 160]], [[30.0, 50, 99, 222], [120.0, 3, 200, 90]]], [[0], [1, 2]], [(S, S)] * 2)
    raw = h(feats, torch.zeros(2, 3, S, S))
    both, weights, sums = h.loss(raw, t), [], dict(cls=0.0, box=0.0)
    for i, n in enumerate((1, 2)):
        one = {k: [o[i : i + 1] for o in v] if isinstance(v, list) else v[i : i + 1] for k, v in raw.items()}
        ti = make_targets([t.boxes[i, :n]], [t.labels[i, :n]], [(S, S)])
        w = h.assign(one, ti).iou.sum()
        weights.append(w)
        for k, v in h.loss(one, ti).items():
            sums[k] = sums[k] + v * w.clamp(min=1)
    for k in sums:
        close(both[k], sums[k] / sum(weights).clamp(min=1), 1e-4)
