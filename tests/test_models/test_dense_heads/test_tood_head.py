"""The behaviours that MMDetection states for the head of TOOD: two settings, before and after the change of assigner

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch
from heads import CLASSES, FIVE, GT, SIZE, features, losses, sound

from visdet.data.targets import make_targets
from visdet.nn.tood_head import TOODHead

BEHAVIOURS = {
    "boxes from points and from anchors; before and after the change of assigner": "FORMS",
    "no object: class > 0, box == 0": "test_no_object",
    "one object: both > 0": "test_one_object",
    "losses are scalars in the graph with finite gradients": "test_one_object",
    "the assigner changes at the epoch that is set": "test_change",
    "one forward gives losses and detections": "test_detections",
}
WITHOUT = {"a list of losses, one for each level": "a loss is the sum over levels"}
FORMS = pytest.mark.parametrize("kind,epoch", [(kind, epoch) for kind in ("anchor_free", "anchor_based") for epoch in (0, 12)])


def head(kind, epoch=0, **kw):
    torch.manual_seed(0)
    h = TOODHead(32, CLASSES, FIVE, channels=32, num_convs=1, norm=None, kind=kind, initial_epoch=4, **kw)
    h.set_epoch(epoch)
    return h


@FORMS
@pytest.mark.parametrize("boxes", [[], [[4.0 * SIZE, 4 * SIZE, 4 * SIZE + 10, 4 * SIZE + 10]]])
def test_no_object(kind, epoch, boxes):
    "An object outside of the image is like none"
    h = head(kind, epoch)
    terms = sound(h, losses(h, FIVE, boxes, channels=32))
    assert terms["cls"] > 0 and terms["box"] == 0


@FORMS
def test_one_object(kind, epoch):
    h = head(kind, epoch)
    terms = sound(h, losses(h, FIVE, GT, channels=32))
    assert set(terms) == {"cls", "box"} and all(v > 0 for v in terms.values())


def test_change():
    "Up to the fourth epoch the terms are equal, and from then on"
    at = [{k: v.item() for k, v in losses(head("anchor_free", n), FIVE, GT, channels=32).items()} for n in (0, 3, 4, 20)]
    assert at[0] == at[1] and at[2] == at[3] and at[1]["cls"] != at[2]["cls"]


@FORMS
def test_detections(kind, epoch):
    h = head(kind, epoch, score_thr=0.0).eval()
    raw, t = h(features(FIVE, channels=32), torch.zeros(1, 3, SIZE, SIZE)), make_targets([GT], [[2]], [(SIZE, SIZE)])
    assert h.loss(raw, t)["cls"] > 0
    (d,) = h.decode(raw, t.sizes)
    assert 0 < len(d) <= h.max_num and (d.boxes >= 0).all() and (d.boxes <= SIZE).all()
