"""The behaviours that MMDetection states for its region proposal network

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch
from heads import GT, SIZE, features, losses, sound
from torch import nn

from visdet.core.basics import ConfigError, DataError
from visdet.cv.priors import AnchorGenerator
from visdet.data.targets import make_targets
from visdet.nn.rpn import RPN

BEHAVIOURS = {
    "no object: classification > 0, boxes == 0": "test_no_object",
    "one object: both > 0": "test_one_object",
    "two convolutions": "test_two_convolutions",
    "an image into which no anchor fits": "test_no_anchor_inside",
    "proposals of an image: boxes, none where there are none": "test_proposals",
}
WITHOUT = {"no anchor inside the image is a ValueError": "losses are zero instead: one small image must not end a training"}

STRIDES = [4, 8, 16, 32, 64]


def rpn(**kw):
    torch.manual_seed(0)
    return RPN(1, STRIDES, channels=1, **kw)


@pytest.mark.parametrize("border", [None, 0.0])
def test_no_object(border):
    h = rpn(border=border)
    terms = sound(h, losses(h, STRIDES, []))
    assert list(terms) == ["rpn_cls", "rpn_box"] and terms["rpn_cls"] > 0 and terms["rpn_box"] == 0


@pytest.mark.parametrize("border", [None, 0.0])
@pytest.mark.parametrize("label", [0, 2])
def test_one_object(border, label):
    "The class of an object does not matter"
    h = rpn(border=border)
    terms = sound(h, losses(h, STRIDES, GT, [label], generator=torch.Generator().manual_seed(0)))
    assert terms["rpn_cls"] > 0 and terms["rpn_box"] > 0


def test_two_convolutions():
    h = rpn(num_convs=2)
    assert sum(isinstance(m, nn.Conv2d) for m in h.tower.modules()) == 2 and isinstance(h.tower, nn.Sequential)
    assert sound(h, losses(h, STRIDES, GT))["rpn_box"] > 0


def test_no_anchor_inside():
    h = rpn(border=0.0)
    h.train()
    raw = h(features(STRIDES), torch.zeros(1, 3, SIZE, SIZE))
    terms = h.loss(raw, make_targets([[[1.0, 1, 7, 7]]], [[0]], [(8, 8)]))
    assert [o.item() for o in terms.values()] == [0, 0]


def test_proposals():
    h = rpn().eval()
    raw = h(features(STRIDES), torch.zeros(1, 3, SIZE, SIZE))
    (boxes,) = h.proposals(raw, torch.tensor([[SIZE, SIZE]]), pre=100, post=20)
    assert boxes.shape == (20, 4) and (boxes >= 0).all() and (boxes <= SIZE).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    h.min_size = 1e6
    assert h.proposals(raw, torch.tensor([[SIZE, SIZE]]))[0].shape == (0, 4)
    h.min_size = 0.0
    assert h.proposals(raw, torch.tensor([[SIZE, SIZE]]), pre=0)[0].shape == (0, 4)
    raw["cls"][-1] = raw["cls"][-1] * float("inf")
    with pytest.raises(DataError):
        h.proposals(raw, torch.tensor([[SIZE, SIZE]]))


def test_uneven_anchors():
    "One convolution serves all levels, so they need the same number of anchors a cell"
    with pytest.raises(ConfigError, match="same number"):
        rpn(anchors=AnchorGenerator(STRIDES, [(8,), (8, 16), 16, 32, 64]))
