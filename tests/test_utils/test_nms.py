"""The behaviours that MMDetection and MMCV state for suppression: figures and shapes from the recorded facts

Refusals are a `VisdetError` where they are an assertion there. `BEHAVIOURS` names the test of each of them,
`WITHOUT` what has no counterpart.
"""
import numpy as np
import pytest
import torch

from visdet.core.basics import VisdetError
from visdet.cv.fusion import nms_match
from visdet.cv.nms import batched_nms, nms
from visdet.cv.roi import roi_align
from visdet.cv.soft import matrix_nms, soft_nms

BEHAVIOURS = {
    "matrix NMS: lengths of masks, labels and scores must agree": "TestMatrixNmsOfMasks::test_lengths",
    "matrix NMS: an unknown kernel is refused": "TestMatrixNmsOfMasks::test_unknown_kernel",
    "matrix NMS: no masks give empty results": "TestMatrixNmsOfMasks::test_none",
    "matrix NMS: a thousand masks, nms_pre, max_num": "TestMatrixNmsOfMasks::test_counts",
    "matrix NMS: equal masks leave one": "TestMatrixNmsOfMasks::test_equal_masks",
    "NMS keeps [1, 0, 3]": "test_nms",
    "boxes and scores of unequal length are refused": "test_scores_of_another_length",
    "soft NMS, linear and gaussian, with its scores": "test_soft_nms",
    "NMS match: groups, first of each is what NMS keeps, wrong shape": "test_nms_match",
    "batched NMS: split and whole agree, ids can be ignored": "test_batched_nms_forms",
    "arrays of numpy": "test_from_numpy",
    "RoIAlign of 2 x 2 and 4 x 4 maps": "test_roi_align",
}
WITHOUT = {
    "matrix NMS: mask_area of another length is refused": "areas are counted from the masks, there is no such argument",
    "matrix NMS: four results": "indices and new scores; masks and labels are taken by index",
    "soft NMS 'naive' is hard NMS": "hard NMS is `nms`; `soft_nms` refuses the word, see test_soft_nms_naive",
    "batched NMS with nms_cfg=None sorts by score": "that is `scores.argsort(descending=True)`",
}

BOXES = torch.tensor([[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]])
SCORES = torch.tensor([0.6, 0.9, 0.7, 0.2])


def test_nms():
    assert nms(BOXES, SCORES, 0.3).tolist() == [1, 0, 3]


@pytest.mark.parametrize("n", [3, 5])
def test_scores_of_another_length(n):
    with pytest.raises(VisdetError):
        nms(BOXES, torch.rand(n), 0.3)
    with pytest.raises(VisdetError):
        soft_nms(BOXES, torch.rand(n))


@pytest.mark.parametrize("how,scores", [("linear", [0.9, 0.6, 0.290244, 0.2]), ("gaussian", [0.9, 0.596308, 0.352755, 0.186505])])
def test_soft_nms(how, scores):
    keep, new = soft_nms(BOXES, SCORES, None, how, 0.3, sigma=0.5, min_score=0.01)
    assert keep.tolist() == [1, 0, 2, 3]
    torch.testing.assert_close(new, torch.tensor(scores), atol=1e-5, rtol=0)


def test_soft_nms_naive():
    with pytest.raises(VisdetError, match="gaussian"):
        soft_nms(BOXES, SCORES, None, "naive", 0.3)


def test_from_numpy():
    "Arrays become tensors without a copy; the answer is an array again"
    boxes, scores = BOXES.numpy(), SCORES.numpy()
    keep = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3).numpy()
    assert isinstance(keep, np.ndarray) and boxes[keep].tolist() == BOXES[[1, 0, 3]].tolist()


@pytest.mark.parametrize("side,cells,want", [(1, [[1, 2], [3, 4]], [[1, 1.25], [1.5, 1.75]]), (3, [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]], [[1.9375, 4.75], [7.5625, 10.375]])])
def test_roi_align(side, cells, want):
    "The region from (0, 0) to (side, side) in four cells of four samples"
    res = roi_align(torch.tensor([[cells]], dtype=torch.float32), torch.tensor([[0.0, 0, 0, side, side]]), 2, 1.0, 2, True)
    assert res[0, 0].tolist() == want


def test_nms_match():
    dets = torch.tensor([[49.1, 32.4, 51, 35.9, 0.9], [49.3, 32.9, 51, 35.3, 0.9], [35.3, 11.5, 39.9, 14.5, 0.4], [35.2, 11.7, 39.7, 15.7, 0.3]])
    groups = nms_match(dets[:, :4], dets[:, 4], iou_thr=0.6)
    assert [g.tolist() for g in groups] == [[0, 1], [2, 3]]
    assert [int(g[0]) for g in groups] == nms(dets[:, :4], dets[:, 4], 0.6).tolist()
    with pytest.raises(VisdetError):
        nms_match(dets, dets[:, 4])


def test_batched_nms_forms():
    "Few and many boxes take different ways to the same answer; one class is plain suppression"
    g = torch.Generator().manual_seed(0)
    boxes, scores, labels = torch.rand(3000, 4, generator=g) * 500, torch.rand(3000, generator=g), torch.randint(0, 4, (3000,), generator=g)
    boxes[:, 2:] += boxes[:, :2]
    whole = batched_nms(boxes, scores, labels, 0.5)
    parts = torch.cat([(labels == c).nonzero()[:, 0][nms(boxes[labels == c], scores[labels == c], 0.5)] for c in range(4)])
    assert sorted(whole.tolist()) == sorted(parts.tolist())
    assert (scores[whole].diff() <= 0).all()
    assert batched_nms(boxes, scores, torch.zeros_like(labels), 0.5).tolist() == nms(boxes, scores, 0.5).tolist()


class TestMatrixNmsOfMasks:
    "Masks of 28 x 28"

    @pytest.mark.parametrize("masks,scores,labels", [(5, 6, 6), (6, 5, 6), (6, 6, 5)])
    def test_lengths(self, masks, scores, labels):
        with pytest.raises(VisdetError):
            matrix_nms(None, torch.rand(scores), torch.zeros(labels, dtype=torch.int64), masks=torch.rand(masks, 28, 28) > 0.5)

    def test_unknown_kernel(self):
        with pytest.raises(VisdetError, match="gaussian"):
            matrix_nms(None, torch.rand(2), torch.zeros(2, dtype=torch.int64), how="unknown", masks=torch.rand(2, 28, 28) > 0.5)

    def test_none(self):
        keep, scores = matrix_nms(None, torch.rand(0), torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 28, 28))
        assert keep.shape == scores.shape == (0,)

    @pytest.mark.parametrize("pre,max_num,left", [(None, None, 1000), (500, None, 500), (500, 100, 100)])
    def test_counts(self, pre, max_num, left):
        g = torch.Generator().manual_seed(0)
        masks, scores, labels = torch.rand(1000, 28, 28, generator=g) > 0.5, torch.rand(1000, generator=g), torch.randint(0, 80, (1000,), generator=g)
        keep, new = matrix_nms(None, scores, labels, pre=pre, max_num=max_num, masks=masks)
        assert len(keep) == len(new) == left and len(set(keep.tolist())) == left

    def test_equal_masks(self):
        "Of a thousand equal masks of one class with score 1, one survives with its score"
        masks = torch.ones(1000, 28, 28, dtype=torch.bool)
        keep, new = matrix_nms(None, torch.ones(1000), torch.zeros(1000, dtype=torch.int64), "gaussian", 2.0, min_score=0.5, masks=masks)
        assert keep.shape == (1,) and new.tolist() == [1.0]
