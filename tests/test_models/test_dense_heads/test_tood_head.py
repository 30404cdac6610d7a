"""The behaviours that MMDetection states for the head of TOOD

`BEHAVIOURS` names the test of each behaviour.
"""
import pytest
import torch
from heads import CLASSES, FIVE, GT, SIZE, losses, sound

from visdet.nn.tood_head import TOODHead

BEHAVIOURS = {
    "boxes from points and from anchors; before and after the change of assigner": "FORMS",
    "no object: class > 0, box == 0": "test_terms",
    "one object: both > 0": "test_terms",
}
FORMS = [(kind, epoch) for kind in ("anchor_free", "anchor_based") for epoch in (0, 12)]


@pytest.mark.parametrize("kind,epoch", FORMS)
@pytest.mark.parametrize("boxes", [[], [[4.0 * SIZE, 4 * SIZE, 4 * SIZE + 10, 4 * SIZE + 10]], GT])
def test_terms(kind, epoch, boxes):
    torch.manual_seed(0)
    h = TOODHead(32, CLASSES, FIVE, channels=32, num_convs=1, norm=None, kind=kind, initial_epoch=4)
    h.epoch = epoch
    terms = sound(h, losses(h, FIVE, boxes, channels=32))
    assert set(terms) == {"cls", "box"} and terms["cls"] > 0
    assert terms["box"] > 0 if boxes is GT else terms["box"] == 0
