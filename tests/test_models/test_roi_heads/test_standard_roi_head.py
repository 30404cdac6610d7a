"What MMDetection's tests say of the usual second stage, on any device: every term with objects, class terms only without"
import math

import pytest
import torch
from torch import nn

from visdet.data.targets import make_targets
from visdet.models.two_stage import TwoStage
from visdet.nn.assign import MaxIoUAssigner
from visdet.nn.coarse_mask import CoarseMaskHead
from visdet.nn.conv_fc_head import ConvFCHead
from visdet.nn.mask_head import MaskHead
from visdet.nn.region_kinds import make_sampler
from visdet.nn.roi_head import BoxHead

BEHAVIOURS = {
    "box and mask heads are there": "test_parts",
    "one object: every term > 0": "test_loss_with_objects",
    "no object: classification > 0, boxes and masks == 0, still part of the graph": "test_loss_without_objects",
    "no proposals": "test_no_proposals",
    "a fresh head of 80 classes: the logarithms of 81 and of 2": "test_a_fresh_head_knows_nothing",
    "hard example mining, in the three situations of samplers": "test_every_sampler_is_fed",
}
WITHOUT = {"a shared head over the body's fourth stage (C4)": "no second stage runs a stage of the body; its plain heads with averaged maps are the kind `plain`"}

SIZE, STRIDES, BOX = 256, [4, 8, 16, 32], [23.6667, 23.8757, 238.6326, 151.8874]


class Maps(nn.Module):
    "Random features instead of a body and a pyramid"
    norm = None

    def __init__(self, channels=1, levels=4):
        super().__init__()
        self.maps = nn.ParameterList([torch.randn(1, channels, SIZE >> (i + 2), SIZE >> (i + 2)) for i in range(levels)])

    def forward(self, images):
        return [o.expand(len(images), -1, -1, -1) for o in self.maps]


class Proposals(nn.Module):
    "A first stage that always proposes the same"

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, feats, images):
        return dict(shape=torch.tensor(images.shape[-2:])[None].repeat(len(images), 1))

    def proposals(self, raw, sizes, pre, post):
        return [self.boxes for _ in sizes]

    def loss(self, raw, targets, generator=None):
        return {}


def proposals(n=100, seed=0):
    g = torch.Generator().manual_seed(seed)
    xy, wh = torch.rand(n, 2, generator=g) * 200, torch.rand(n, 2, generator=g) * 55 + 1
    return torch.cat([xy, xy + wh], 1)


def batch(boxes, images=1):
    "One object or none in each image, with a bitmap"
    masks = torch.zeros(len(boxes) * images, SIZE, SIZE, dtype=torch.uint8)
    masks[:, 24:152, 24:238] = (torch.rand(len(masks), 128, 214) > 0.3).to(torch.uint8)
    b = torch.tensor(boxes).reshape(-1, 4)
    return make_targets([b] * images, [torch.full((len(b),), 2)] * images, [(SIZE, SIZE)] * images, masks=masks)


def head(kind):
    "Box and mask heads of one input channel and four classes"
    if kind == "standard":
        return BoxHead(1, 4, STRIDES, 1, sampling_ratio=0), MaskHead(1, 4, STRIDES, 1, 1, sampling_ratio=0)
    if kind == "plain":  # the last layers read the averaged region, and masks have no convolutions
        return ConvFCHead(1, 4, STRIDES, 0, 0, avg_pool=True, sampling_ratio=0), MaskHead(1, 4, STRIDES, 1, 0, 7, sampling_ratio=0)
    return ConvFCHead(1, 4, STRIDES, channels=4, hidden=8, norm="gn"), CoarseMaskHead(1, 4, STRIDES, 4, hidden=8)


def model(kind, boxes=None, sampler="RandomSampler", low="gt"):
    torch.manual_seed(0)
    box, mask = head(kind)
    props = proposals() if boxes is None else boxes
    return TwoStage(Maps(), nn.Identity(), Proposals(props), box, mask, None, MaxIoUAssigner(0.5, 0.5, low, 0.5), make_sampler(sampler, 512, 0.25))


KINDS = pytest.mark.parametrize("kind", ["standard", "plain", "convolutions"])


@KINDS
def test_parts(kind):
    m = model(kind)
    assert m.head is not None and m.mask is not None


@KINDS
@pytest.mark.parametrize("images", [1, 2])
def test_loss_with_objects(kind, images):
    m = model(kind)
    t = batch([BOX], images)
    loss = m.loss(m(torch.zeros(images, 3, SIZE, SIZE), t), t)
    assert set(loss) == {"cls", "box", "mask"} and all(v > 0 and v.ndim == 0 and v.requires_grad for v in loss.values())
    sum(loss.values()).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


@KINDS
def test_loss_without_objects(kind):
    m = model(kind)
    t = batch([])
    loss = m.loss(m(torch.zeros(1, 3, SIZE, SIZE), t), t)
    assert loss["cls"] > 0 and loss["box"] == 0 and loss["mask"] == 0
    sum(loss.values()).backward()  # the terms that are zero still belong to the graph
    assert all(p.grad is not None for p in m.head.parameters())


@KINDS
@pytest.mark.parametrize("boxes", [[BOX], []], ids=["object", "none"])
def test_no_proposals(kind, boxes):
    "Objects alone are regions to learn from; without them there is nothing, and no failure"
    m = model(kind, torch.zeros(0, 4))
    t = batch(boxes)
    loss = m.loss(m(torch.zeros(1, 3, SIZE, SIZE), t), t)
    assert all(v.isfinite() for v in loss.values()) and (loss["cls"] > 0) == bool(boxes)
    sum(loss.values()).backward()
    with torch.no_grad():
        assert len(m.eval().decode(m(torch.zeros(1, 3, SIZE, SIZE)), [(SIZE, SIZE)])[0]) == 0


def test_a_fresh_head_knows_nothing():
    "Of 80 classes and a background the class term is near the logarithm of 81, that of masks near the logarithm of two"
    torch.manual_seed(0)
    m = TwoStage(Maps(16), nn.Identity(), Proposals(proposals()), BoxHead(16, 80, STRIDES, 64), MaskHead(16, 80, STRIDES, 16))
    t = batch([BOX])
    loss = m.loss(m(torch.zeros(1, 3, SIZE, SIZE), t), t)
    assert float(loss["cls"]) == pytest.approx(math.log(81), rel=0.03) and float(loss["mask"]) == pytest.approx(math.log(2), rel=0.03)


@pytest.mark.parametrize("sampler", ["RandomSampler", "OHEMSampler", "IoUBalancedNegSampler", "InstanceBalancedPosSampler", "ScoreHLRSampler", "PseudoSampler"])
@pytest.mark.parametrize("boxes", [[BOX], []], ids=["object", "none"])
def test_every_sampler_is_fed(sampler, boxes):
    m = model("standard", sampler=sampler)
    t = batch(boxes)
    loss = m.loss(m(torch.zeros(1, 3, SIZE, SIZE), t), t)
    assert loss["cls"] > 0 and (loss["box"] > 0) == bool(boxes)
    m.eval()
    with torch.no_grad():
        raw = m(torch.zeros(1, 3, SIZE, SIZE), t)
    assert {k: float(v) for k, v in m.loss(raw, t).items()} == {k: float(v) for k, v in m.loss(m(torch.zeros(1, 3, SIZE, SIZE), t), t).items()}


def test_hard_regions_have_the_greatest_loss():
    "Exactly the regions of greatest class loss, positives and background apart"
    torch.manual_seed(1)
    m = model("standard", sampler=dict(type="OHEMSampler", num=16))
    nn.init.normal_(m.head.cls.weight, std=3.0)
    t = batch([BOX])
    with torch.no_grad():
        raw = m.eval()(torch.zeros(1, 3, SIZE, SIZE), t)
    rows, match = raw["rows"], torch.full((101,), -1)
    iou = (lambda a, b: (lambda i: i / ((a[:, 2:] - a[:, :2]).prod(1) + (b[2:] - b[:2]).prod() - i))((torch.minimum(a[:, 2:], b[2:]) - torch.maximum(a[:, :2], b[:2])).clamp(min=0).prod(1)))(raw["rois"][:, 1:], t.boxes[0, 0])
    match[iou >= 0.5] = 2
    losses = nn.functional.cross_entropy(raw["cls"], torch.where(match < 0, 4, match), reduction="none")
    pos, neg = (match >= 0).nonzero()[:, 0], (match < 0).nonzero()[:, 0]
    want = pos[losses[pos].argsort(descending=True)][:4].tolist()
    want += neg[losses[neg].argsort(descending=True)][: 16 - len(want)].tolist()
    assert sorted(rows["row"].tolist()) == sorted(want)


def test_crowds_silence_regions():
    "A proposal inside a crowd is not background, if the assigner says so"
    inside = torch.tensor([[100.0, 60, 140, 100]]).repeat(4, 1)
    t = batch([BOX])
    t = make_targets([torch.tensor([BOX, [90.0, 50, 150, 110]])], [torch.tensor([2, 1])], [(SIZE, SIZE)], masks=t.masks.repeat(2, 1, 1), crowd=[torch.tensor([False, True])])
    for ignore, n in ((None, 5), (0.5, 1)):
        m = model("standard", inside)
        m.assigner = MaxIoUAssigner(0.5, 0.5, None, ignore=ignore)
        assert len(m(torch.zeros(1, 3, SIZE, SIZE), t)["rows"]["row"]) == n
