"Suppression after a head, all classes at once, against figures recorded from MMDetection; single operators are in test_op_nms.py"
import pytest
import torch

from golden import cases
from visdet.cv.nms import batched_nms, nms
from visdet.cv.soft import soft_nms


def survivors(boxes, scores, score_thr, cfg, max_num, factors=None):
    "Boxes (n,4) or (n,4K) and scores (n,K+1), background last: detections, labels, and places in the flat (n*K)"
    n, K = len(scores), scores.shape[1] - 1
    boxes = boxes.view(n, -1, 4).expand(n, K, 4).reshape(-1, 4)
    scores, labels = scores[:, :-1].flatten(), torch.arange(K).repeat(n)
    live = (scores > score_thr).nonzero()[:, 0]
    if factors is not None:
        scores = scores * factors.repeat_interleave(K)
    b, s, c = boxes[live], scores[live], labels[live]
    if cfg["type"] == "soft_nms":
        k, s = soft_nms(b, s, c, "linear", cfg["iou_threshold"], min_score=cfg["min_score"], max_num=max_num)
    else:
        k = batched_nms(b, s, c, cfg["iou_threshold"], max_num)
        s = s[k]
    return torch.cat([b[k], s[:, None]], 1), c[k], live[k]


@pytest.mark.parametrize("case", cases("nms", "multiclass_nms"))
def test_multiclass(case):
    a, factors = case.args, case.array("in.score_factors") if case.has("in.score_factors") else None
    dets, labels, keep = survivors(case.array("in.boxes"), case.array("in.scores"), a["score_thr"], a["nms"], a["max_num"], factors)
    case.check("dets", dets)
    assert labels.equal(case.array("out.labels")) and keep.equal(case.array("out.keep"))


@pytest.mark.parametrize("case", cases("nms", "nms", "batched_nms"))
def test_hard(case):
    a, boxes, scores = case.args, case.array("in.boxes"), case.array("in.scores")
    cfg = a.get("nms_cfg", dict(a, type="nms"))
    if cfg["type"] != "nms":
        pytest.skip("soft suppression is in test_op_nms.py")
    if cfg.get("offset"):  # sides one pixel longer, as in MMDetection 1
        wide = boxes.clone()
        wide[:, 2:] += 1
        keep = nms(wide, scores, cfg["iou_threshold"])
    elif case.has("in.ids"):
        keep = batched_nms(boxes, scores, case.array("in.ids") * (not (a["class_agnostic"] or cfg.get("class_agnostic"))), cfg["iou_threshold"], cfg.get("max_num"))
    else:
        keep = nms(boxes, scores, cfg["iou_threshold"])
        keep = keep[scores[keep] > cfg.get("score_threshold", -1)][: cfg.get("max_num")]
    assert keep.equal(case.array("out.keep"))
    case.check("dets", torch.cat([boxes[keep], scores[keep, None]], 1))


@pytest.mark.parametrize("case", cases("nms", "soft_nms"))
def test_soft(case):
    a, boxes, scores = case.args, case.array("in.boxes"), case.array("in.scores")
    if a["method"] == "naive":
        keep = nms(boxes, scores, a["iou_threshold"])
        s = scores[keep]
    else:
        keep, s = soft_nms(boxes, scores, None, a["method"], a["iou_threshold"], a["sigma"], a["min_score"])
    assert keep.equal(case.array("out.keep"))
    case.check("dets", torch.cat([boxes[keep], s[:, None]], 1))
