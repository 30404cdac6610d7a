"""The behaviours that MMDetection states for Deformable DETR as a whole: plain, with refined boxes, with two stages"""
import pytest
import torch

from visdet.core.testing import rand_boxes
from visdet.data.targets import make_targets
from visdet.models.zoo import create_model

BEHAVIOURS = {
    "three forms are built": "test_forward",
    "raw outputs have a class and a box for each query of each layer": "test_forward",
    "terms of the loss with and without objects": "test_loss",
    "predictions are boxes in pixels of each image, no more than asked for": "test_predict",
}
SMALL = dict(body="resnet18", channels=32, queries=15, enc_layers=1, dec_layers=2, heads=4, hidden=32)
FORMS = [dict(), dict(refine=True), dict(refine=True, two_stage=True)]
SIZES = [(96, 128), (64, 96)]


@pytest.fixture(scope="module", params=FORMS, ids=["plain", "refined", "two stages"])
def model(request):
    torch.manual_seed(0)
    return create_model("deformable_detr", 3, **SMALL, **request.param)


def batch(n):
    torch.manual_seed(0)
    return torch.randn(2, 3, 96, 128), make_targets([rand_boxes(n, s, 0, 16) for s in SIZES], [torch.arange(n) % 3] * 2, SIZES)


def test_forward(model):
    x, t = batch(2)
    raw = model.eval()(x, t)
    assert [tuple(o.shape) for o in raw["cls"]] == [(2, 15, 3)] * 2 and [tuple(o.shape) for o in raw["reg"]] == [(2, 15, 4)] * 2
    assert ("enc_cls" in raw) == model.head.two_stage
    assert all((o >= 0).all() and (o <= 1).all() for o in raw["reg"])


@pytest.mark.parametrize("n", [0, 3])
def test_loss(model, n):
    x, t = batch(n)
    terms = model.train().loss(model(x, t), t)
    assert len(terms) == 6 + 3 * model.head.two_stage
    assert all((v > 0) == (n > 0 or "cls" in k) for k, v in terms.items())


def test_predict(model):
    x, t = batch(0)
    model.head.max_num = 20
    with torch.no_grad():
        dets = model.eval().decode(model(x, sizes=t.sizes), t.sizes)
    for d, (h, w) in zip(dets, SIZES):
        assert len(d) == 20 and d.size == (h, w) and (d.scores.diff() <= 0).all()
        assert (d.boxes >= 0).all() and (d.boxes[:, ::2] <= w).all() and (d.boxes[:, 1::2] <= h).all()
