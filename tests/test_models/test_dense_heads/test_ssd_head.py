"""The behaviours that MMDetection states for the head of SSD

`BEHAVIOURS` names the test of each behaviour.
"""
import pytest
import torch
from heads import CLASSES, GT, features, losses, sound

from visdet.cv.anchor_kinds import SSDAnchorGenerator
from visdet.nn.ssd_head import SSDHead

BEHAVIOURS = {
    "six maps of 38, 19, 10, 5, 3 and 1 cells of an image of 300 pixels": "test_maps",
    "no object: both terms == 0, since negatives are mined from positives": "test_no_object",
    "one object: both > 0": "test_one_object",
}
SIZE, STRIDES = 300, [8, 16, 32, 64, 100, 300]


def head():
    torch.manual_seed(0)
    return SSDHead([1] * 6, CLASSES, SSDAnchorGenerator(STRIDES, [[2], [2, 3], [2, 3], [2, 3], [2], [2]], input_size=300, shares=(0.15, 0.9)))


def test_maps():
    assert [o.shape[-1] for o in features(STRIDES, SIZE)] == [38, 19, 10, 5, 3, 1]
    raw = head()(features(STRIDES, SIZE), torch.zeros(1, 3, SIZE, SIZE))
    assert [o.shape[1] for o in raw["cls"]] == [a * (CLASSES + 1) for a in (4, 6, 6, 6, 4, 4)] and [o.shape[1] for o in raw["reg"]] == [a * 4 for a in (4, 6, 6, 6, 4, 4)]


@pytest.mark.parametrize("boxes", [[], [[1200.0, 1200, 1210, 1210]]])
def test_no_object(boxes):
    h = head()
    assert set(sound(h, losses(h, STRIDES, boxes, size=SIZE)).values()) == {0}


def test_one_object():
    h = head()
    terms = sound(h, losses(h, STRIDES, GT, size=SIZE))
    assert set(terms) == {"cls", "box"} and all(v > 0 for v in terms.values())
