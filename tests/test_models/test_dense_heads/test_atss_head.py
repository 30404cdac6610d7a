"""The behaviours that MMDetection states for the head of ATSS: losses with and without objects

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch
from heads import CLASSES, FIVE, GT, SIZE, features, losses, sound

from visdet.data.targets import make_targets
from visdet.nn.atss import ATSSAssigner
from visdet.nn.atss_head import ATSSHead

BEHAVIOURS = {
    "no object: class > 0, box and centre-ness == 0": "test_no_object",
    "one object: all > 0": "test_one_object",
    "one square anchor of eight strides, nine candidates a level, terms weigh 1, 2 and 1": "test_defaults",
    "losses are scalars in the graph with finite gradients": "test_one_object",
    "one forward gives losses and detections": "test_detections",
}
WITHOUT = {"a list of losses, one for each level": "a loss is the sum over levels"}


def head(**kw):
    torch.manual_seed(0)
    return ATSSHead(1, CLASSES, FIVE, channels=1, num_convs=1, norm=None, **kw)


@pytest.mark.parametrize("boxes", [[], [[4.0 * SIZE, 4 * SIZE, 4 * SIZE + 10, 4 * SIZE + 10]]])
def test_no_object(boxes):
    "An object outside of the image is like none"
    h = head()
    terms = sound(h, losses(h, FIVE, boxes))
    assert terms["cls"] > 0 and terms["box"] == terms["ctr"] == 0


@pytest.mark.parametrize("boxes", [GT, GT * 3])
def test_one_object(boxes):
    h = head()
    terms = sound(h, losses(h, FIVE, boxes))
    assert set(terms) == {"cls", "box", "ctr"} and all(v > 0 for v in terms.values())


def test_defaults():
    h = head()
    assert h.levels.gen.num_per_cell == [1] * 5 and [o.tolist()[0][2] * 2 for o in h.levels.gen.cells] == [8 * s for s in FIVE]
    assert isinstance(h.assigner, ATSSAssigner) and h.assigner.topk == 9 and h.assigner.ignore is None
    assert (h.cls_weight, h.reg_weight, h.ctr_weight) == (1.0, 2.0, 1.0)


def test_detections():
    h = head(score_thr=0.0).eval()
    raw, t = h(features(FIVE), torch.zeros(1, 3, SIZE, SIZE)), make_targets([GT], [[2]], [(SIZE, SIZE)])
    assert h.loss(raw, t)["cls"] > 0
    (d,) = h.decode(raw, t.sizes)
    assert 0 < len(d) <= h.max_num and (d.boxes >= 0).all() and (d.boxes <= SIZE).all() and set(d.labels.tolist()) <= set(range(CLASSES))
