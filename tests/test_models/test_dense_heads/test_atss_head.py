"""The behaviours that MMDetection states for the heads of ATSS and GFL

`BEHAVIOURS` names the test of each behaviour.
"""
import pytest
import torch
from heads import CLASSES, FIVE, GT, SIZE, losses, sound

from visdet.nn.atss import ATSSAssigner
from visdet.nn.atss_head import ATSSHead
from visdet.nn.gfl_head import GFLHead
from visdet.nn.vfnet_head import VFNetHead

BEHAVIOURS = {
    "ATSS: no object: class > 0, box and centre-ness == 0; one: all > 0": "test_terms[atss]",
    "GFL: no object: class > 0, box and distribution == 0; one: all > 0": "test_terms[gfl]",
    "VFNet: no object: class > 0, both boxes == 0; one: all > 0": "test_terms[vfnet]",
    "one square anchor of eight strides, nine candidates a level, terms weigh 1, 2 and 1": "test_defaults",
}
HEADS = {"atss": (ATSSHead, {"cls", "box", "ctr"}), "gfl": (GFLHead, {"cls", "box", "dfl"}), "vfnet": (VFNetHead, None)}


def head(kind):
    torch.manual_seed(0)
    return HEADS[kind][0](1, CLASSES, FIVE, channels=1, num_convs=1, norm=None)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("boxes", [[], [[4.0 * SIZE, 4 * SIZE, 4 * SIZE + 10, 4 * SIZE + 10]], GT])
def test_terms(kind, boxes):
    "An object outside of the image is like none"
    h = head(kind)
    terms = sound(h, losses(h, FIVE, boxes))
    if HEADS[kind][1]:
        assert set(terms) == HEADS[kind][1]
    cls = [k for k in terms if "cls" in k]
    rest = [v for k, v in terms.items() if k not in cls]
    assert len(cls) == 1 and len(rest) == 2 and terms[cls[0]] > 0
    assert all(v > 0 for v in rest) if boxes is GT else rest == [0, 0]


@pytest.mark.parametrize("kind", ["atss", "gfl"])
def test_defaults(kind):
    h = head(kind)
    assert h.levels.gen.num_per_cell == [1] * 5 and [o.tolist()[0][2] * 2 for o in h.levels.gen.cells] == [8 * s for s in FIVE]
    assert isinstance(h.assigner, ATSSAssigner) and h.assigner.topk == 9 and (h.cls_weight, h.reg_weight) == (1.0, 2.0)
    assert h.ctr_weight == 1.0 if kind == "atss" else (h.reg_max, h.dfl_weight) == (16, 0.25)
