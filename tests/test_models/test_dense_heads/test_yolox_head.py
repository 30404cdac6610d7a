"""The behaviours that MMDetection states for the head of YOLOX

`BEHAVIOURS` names the test of each behaviour.
"""
import math

import pytest
import torch
from heads import CLASSES, GT, SIZE, losses, sound
from torch import nn

from visdet.nn.dynamic import SimOTAAssigner
from visdet.nn.yolox_head import YOLOXHead

BEHAVIOURS = {
    "no object: class and box == 0, objectness > 0": "test_no_object",
    "one object: all > 0": "test_one_object",
    "the distance term is off by default, and > 0 where it is on": "test_l1",
    "biases of class and objectness start at a probability of one per cent": "test_biases",
    "depthwise convolutions": "test_depthwise",
    "an object outside of the image": "test_no_object",
}
STRIDES = [8, 16, 32]


def head(**kw):
    torch.manual_seed(0)
    return YOLOXHead(1, CLASSES, STRIDES, channels=1, num_convs=1, assigner=SimOTAAssigner(2.5), **kw)


@pytest.mark.parametrize("l1", [False, True])
@pytest.mark.parametrize("boxes", [[], [[4.0 * SIZE, 4 * SIZE, 4 * SIZE + 10, 4 * SIZE + 10]]])
def test_no_object(boxes, l1):
    h = head(use_l1=l1)
    terms = sound(h, losses(h, STRIDES, boxes))
    assert terms["obj"] > 0 and all(v == 0 for k, v in terms.items() if k != "obj")


def test_one_object():
    h = head()
    terms = sound(h, losses(h, STRIDES, GT))
    assert set(terms) == {"cls", "box", "obj"} and all(v > 0 for v in terms.values())


def test_l1():
    assert head().use_l1 is False and "l1" not in losses(head(), STRIDES, GT)
    h = head(use_l1=True)
    terms = sound(h, losses(h, STRIDES, GT))
    assert terms["l1"] > 0 and all(v > 0 for v in terms.values())


def test_biases():
    h = head()
    for m in (*h.cls, *h.obj):
        torch.testing.assert_close(m.bias, torch.full_like(m.bias, -math.log((1 - 0.01) / 0.01)))
    assert -math.log((1 - 0.01) / 0.01) == pytest.approx(-4.59512, abs=1e-5)


def test_depthwise():
    "A convolution by channel, then one across; plain ones have neither"
    def kinds(**kw):
        torch.manual_seed(0)
        h = YOLOXHead(4, CLASSES, STRIDES, channels=4, num_convs=1, **kw)
        return h, [m for m in h.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    plain, convs = kinds()
    assert convs and all(m.groups == 1 for m in convs)
    deep, convs = kinds(depthwise=True)
    assert convs and all(m.groups == m.in_channels == 4 for m in convs)
    assert all(v > 0 for v in losses(deep, STRIDES, GT, channels=4).values())
