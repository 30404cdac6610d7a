"""The behaviours that MMDetection states for overlaps of boxes, of its calculator and of its metrics

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.core.testing import rand_boxes
from visdet.cv.iou import box_iou

BEHAVIOURS = {
    "GIoU of three pairs": "test_giou_figures",
    "boxes of unequal number, pair by pair": "test_unequal",
    "batches keep their dimensions": "test_batches",
    "no boxes: shapes (0, n), (n, 0), (0,)": "test_empty",
    "unknown kinds are refused": "test_unknown",
    "GIoU lies between -1 and 1, IoU and IoF between 0 and 1": "test_ranges",
    "half precision": "test_half",
    "IoU and IoF of every pair": "test_slow",
}
WITHOUT = {
    "boxes of five columns are accepted": "boxes have four columns, a fifth is refused: test_columns",
    "coordinates that count pixels (use_legacy_coordinate)": "boxes are continuous; `LegacyDeltaCoder` and `LegacyAnchorGenerator` count pixels where old models need it",
}
KINDS = ["iou", "iof", "giou", "diou", "ciou"]
A = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [32, 32, 38, 42]])
B = torch.tensor([[0.0, 0, 10, 20], [0, 10, 10, 19], [10, 10, 20, 20]])


def test_giou_figures():
    torch.testing.assert_close(box_iou(A, B, "giou", aligned=True), torch.tensor([0.5, -0.05, -0.8214]), atol=1e-4, rtol=0)
    torch.testing.assert_close(box_iou(A, B, "giou").diagonal(), torch.tensor([0.5, -0.05, -0.8214]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal(kind):
    assert box_iou(A, B[:2], kind).shape == (3, 2)
    with pytest.raises((ConfigError, RuntimeError)):
        box_iou(A, B[:2], kind, aligned=True)


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind):
    a, b = rand_boxes(12, seed=1).view(2, 2, 3, 4), rand_boxes(20, seed=2).view(2, 2, 5, 4)
    got = box_iou(a, b, kind)
    assert got.shape == (2, 2, 3, 5) and box_iou(a, b[..., :3, :], kind, aligned=True).shape == (2, 2, 3)
    torch.testing.assert_close(got[1, 0], box_iou(a[1, 0], b[1, 0], kind))
    torch.testing.assert_close(box_iou(a[:, :1], b, kind)[1, 1], box_iou(a[1, 0], b[1, 1], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind):
    none = torch.zeros(0, 4)
    assert box_iou(none, A, kind).shape == (0, 3) and box_iou(A, none, kind).shape == (3, 0) and box_iou(none, none, kind).shape == (0, 0)
    assert box_iou(none, none, kind, aligned=True).shape == (0,)
    assert box_iou(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4), kind).shape == (2, 0, 3)


def test_unknown():
    with pytest.raises(ConfigError, match="giou"):
        box_iou(A, B, "gious")


def test_columns():
    with pytest.raises(ConfigError):
        box_iou(torch.cat([A, torch.ones(3, 1)], 1), B)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aligned", [False, True])
def test_ranges(kind, aligned):
    got = box_iou(rand_boxes(50, seed=3), rand_boxes(50, seed=4), kind, aligned)
    low = 0 if kind in ("iou", "iof") else -1 if kind in ("giou", "diou") else -2
    assert (got >= low - 1e-6).all() and (got <= 1 + 1e-6).all()
    same = box_iou(A, A, kind, aligned=True)
    torch.testing.assert_close(same, torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(kind, dtype):
    "Areas are taken in float32, so that the squares of large images do not overflow"
    a, b = (rand_boxes(20, (2000, 3000), s, 200).to(dtype) for s in (1, 2))
    got = box_iou(a, b, kind)
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), box_iou(a.float(), b.float(), kind), atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", ["iou", "iof"])
def test_slow(kind):
    a, b = rand_boxes(9, seed=5), rand_boxes(7, seed=6)
    for i, (x1, y1, x2, y2) in enumerate(a.tolist()):
        for j, (u1, v1, u2, v2) in enumerate(b.tolist()):
            both = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
            own, other = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
            assert float(box_iou(a, b, kind)[i, j]) == pytest.approx(both / (own if kind == "iof" else own + other - both), abs=1e-5)
