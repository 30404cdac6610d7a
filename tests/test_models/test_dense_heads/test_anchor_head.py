"""The behaviours that MMDetection states for its anchor head: losses with and without objects

MMDetection's head samples anchors and takes a cross-entropy; here `AnchorHead` takes the focal loss of all anchors, and
the sampling with a border belongs to `RPN`, so both heads are tried on the same maps, objects and assigner.
`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.basics import DataError
from visdet.cv.priors import AnchorGenerator
from visdet.data.targets import make_targets
from visdet.nn.anchor_head import AnchorHead
from visdet.nn.assign import IGNORED, MaxIoUAssigner
from visdet.nn.rpn import RPN
from visdet.nn.sample import RandomSampler

BEHAVIOURS = {
    "no object: classification > 0, boxes == 0": "test_no_object",
    "one object: both > 0": "test_one_object",
    "the keys of the losses": "test_keys",
    "losses are scalars in the graph with finite gradients": "test_gradients",
    "assigner 0.7, 0.3, 0.3 with low overlaps and without regions to ignore": "test_assignment",
    "sampler of 256, half of them positive": "test_sampled",
    "anchors that reach beyond the image do not learn (allowed_border 0)": "test_border",
    "no anchor inside the image": "test_no_anchor_inside",
    "crowd regions teach nothing (ignore_iof -1)": "test_crowd",
    "one forward gives losses and detections": "test_detections",
}
WITHOUT = {
    "a list of losses, one for each level": "a loss is the sum over levels; see test_gradients for its shape",
    "pos_weight -1": "there is no such argument, positives weigh one",
    "no anchor inside the image is a ValueError": "losses are zero instead: one small image must not end a training",
}

SIZE, STRIDES, CLASSES = 256, [4, 8, 16, 32, 64], 4
GT = [[23.6667, 23.8757, 238.6326, 151.8874]]


def anchors():
    "Sizes of 8, 16 and 32 strides in three ratios"
    return AnchorGenerator(STRIDES, [(8 * s, 16 * s, 32 * s) for s in STRIDES], ratios=(0.5, 1.0, 2.0))


def head(kind, **kw):
    torch.manual_seed(0)
    kw = dict(anchors=anchors(), assigner=MaxIoUAssigner(0.7, 0.3, min_pos=0.3), **kw)
    if kind == "rpn":
        return RPN(1, STRIDES, channels=1, sampler=RandomSampler(256, 0.5), border=0.0, **kw)
    return AnchorHead(1, CLASSES, STRIDES, channels=1, num_convs=0, **kw)


def scene(boxes, labels=None, crowd=None, size=(SIZE, SIZE)):
    "Maps of one channel, a blank image, and its objects"
    g = torch.Generator().manual_seed(1)
    feats = [torch.rand(1, 1, SIZE // s, SIZE // s, generator=g) for s in STRIDES]
    return feats, torch.zeros(1, 3, SIZE, SIZE), make_targets([boxes], [labels or [2] * len(boxes)], [size], crowd=None if crowd is None else [crowd])


def losses(kind, *args, **kw):
    feats, image, targets = scene(*args, **kw)
    h = head(kind)
    raw = h(feats, image)
    return h.loss(raw, targets, *([torch.Generator().manual_seed(0)] if kind == "rpn" else [])), h


KEYS = {"anchor": ["cls", "box"], "rpn": ["rpn_cls", "rpn_box"]}
both = pytest.mark.parametrize("kind", KEYS)


@both
def test_no_object(kind):
    cls, box = losses(kind, [])[0].values()
    assert cls > 0 and box == 0


@both
def test_one_object(kind):
    cls, box = losses(kind, GT)[0].values()
    assert cls > 0 and box > 0


@both
@pytest.mark.parametrize("boxes", [[], GT])
def test_keys(kind, boxes):
    assert list(losses(kind, boxes)[0]) == KEYS[kind]


@both
@pytest.mark.parametrize("boxes", [[], GT, GT * 3])
def test_gradients(kind, boxes):
    res, h = losses(kind, boxes)
    assert all(o.shape == () and o.requires_grad and o.isfinite() for o in res.values())
    sum(res.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())
    assert h.reg.weight.grad.any() == bool(boxes) and h.cls.weight.grad.any()


def test_assignment():
    "An object wins its best anchors whatever their overlap from 0.3, and others from 0.7; between 0.3 and 0.7 lies nobody's ground"
    h, (feats, image, t) = head("anchor"), scene(GT)
    priors, match = h.assign(h(feats, image), t)
    m = h.assigner.match(torch.cat(priors), t.boxes, t.valid)
    best = m.iou == m.iou.max()
    assert best[0].any() and (match[best] == 0).all()
    assert ((match == 0) == (best | (m.iou >= 0.7))).all()
    assert ((match == IGNORED) == (~best & (m.iou >= 0.3) & (m.iou < 0.7))).all()
    assert ((match == -1) == (m.iou < 0.3)).all()


def test_sampled():
    "Of many positives at most 128 are drawn, and 256 in all"
    h = head("rpn")
    priors = torch.cat(h.levels([(SIZE // s, SIZE // s) for s in STRIDES], (SIZE, SIZE)))
    inside = ((priors[:, :2] >= 0) & (priors[:, 2:] < SIZE)).all(1).nonzero()[:, 0]
    t = make_targets([priors[inside[:: len(inside) // 300]]], [[0] * len(inside[:: len(inside) // 300])], [(SIZE, SIZE)])
    match = h.assigner(priors, t.boxes, t.valid)
    assert (match >= 0).sum() > 128
    idx, ok = h.sampler(match)
    got = match.gather(1, idx)[ok]
    assert len(got) == 256 and (got >= 0).sum() == 128 and (got == -1).sum() == 128


def test_border():
    "An object that only anchors beyond the border fit teaches the classes nothing but background there"
    h, (feats, image, t) = head("rpn"), scene([[-60.0, -60, 60, 60]])
    priors = torch.cat(h.priors(h(feats, image)))
    free = h.assigner(priors, t.boxes, t.valid)[0]
    out = ((priors[:, :2] < 0) | (priors[:, 2:] >= SIZE)).any(1)
    assert (free[out] >= 0).any()
    seen = []

    class Spy(RandomSampler):
        def __call__(self, match, *args, **kw):
            seen.append(match[0])
            return super().__call__(match, *args, **kw)

    h.sampler = Spy(256, 0.5)
    h.loss(h(feats, image), t)
    assert (seen[0][out] == IGNORED).all() and (seen[0][~out] != IGNORED).any()


@pytest.mark.parametrize("boxes", [[], [[1.0, 1, 7, 7]]])
def test_no_anchor_inside(boxes):
    "An image of 8 x 8 pixels, into which no anchor fits"
    res, h = losses("rpn", boxes, size=(8, 8))
    assert [o.item() for o in res.values()] == [0, 0]
    sum(res.values()).backward()
    assert all((p.grad == 0).all() for p in h.parameters())


@both
def test_crowd(kind):
    "A crowd region is no object, and without a rule for its share it is background like the rest"
    with_crowd, without = losses(kind, GT, crowd=[True])[0], losses(kind, [])[0]
    assert {k: v.item() for k, v in with_crowd.items()} == {k: v.item() for k, v in without.items()}


def test_detections():
    "What the losses were taken from also gives boxes within the image, and numbers that are not finite are refused"
    h, (feats, image, t) = head("anchor", score_thr=0.0), scene(GT)
    raw = h(feats, image)
    h.loss(raw, t)
    (d,) = h.decode(raw, t.sizes)
    assert len(d) == h.max_num and d.boxes.shape == (100, 4) and d.scores.shape == d.labels.shape == (100,)
    assert (d.boxes >= 0).all() and (d.boxes <= SIZE).all() and set(d.labels.tolist()) <= set(range(CLASSES))
    raw["cls"][-1] = raw["cls"][-1] * float("nan")
    with pytest.raises(DataError):
        h.decode(raw, t.sizes)
