"""The behaviours that MMDetection states for the head of FCOS, which is `PointHead` here

`BEHAVIOURS` names the test of each behaviour.
"""
import pytest
import torch
from heads import CLASSES, FIVE, GT, SIZE, losses, sound

from visdet.nn.assign import PointAssigner
from visdet.nn.point_head import PointHead

BEHAVIOURS = {
    "no object: class > 0, box and centre-ness == 0": "test_no_object",
    "one object: all > 0": "test_one_object",
    "the same with centre sampling and distances in strides": "FORMS",
}
# norm_on_bbox is act='relu' with unit='stride'; without it distances are an exponential in pixels
FORMS = {
    "plain": dict(act="exp", unit="pixel", assigner=PointAssigner(None)),
    "centre": dict(act="exp", unit="pixel", assigner=PointAssigner(1.5)),
    "strides": dict(act="relu", unit="stride", assigner=PointAssigner(1.5)),
    "whole boxes in strides": dict(act="relu", unit="stride", assigner=PointAssigner(None)),
}


def head(kind):
    torch.manual_seed(0)
    return PointHead(1, CLASSES, FIVE, channels=1, num_convs=1, norm=None, **FORMS[kind])


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("boxes", [[], [[4.0 * SIZE, 4 * SIZE, 4 * SIZE + 10, 4 * SIZE + 10]]])
def test_no_object(kind, boxes):
    "Neither an empty image nor one whose object lies outside teaches boxes"
    h = head(kind)
    terms = sound(h, losses(h, FIVE, boxes))
    assert terms["cls"] > 0 and terms["box"] == terms["ctr"] == 0


@pytest.mark.parametrize("kind", FORMS)
def test_one_object(kind):
    h = head(kind)
    terms = sound(h, losses(h, FIVE, GT))
    assert set(terms) == {"cls", "box", "ctr"} and all(v > 0 for v in terms.values())
