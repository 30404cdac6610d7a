"Assigners against figures recorded from MMDetection, and against slow loops"
import math

import numpy as np
import pytest
import torch

from golden import cases
from test_golden_priors import build as prior
from visdet.core.basics import ConfigError
from visdet.core.testing import noise, rand_boxes
from visdet.cv.best_iou import best_iou
from visdet.cv.iou import box_iou
from visdet.cv.priors import PointGenerator
from visdet.nn.assign import MaxIoUAssigner
from visdet.nn.atss import ATSSAssigner
from visdet.nn.dynamic import DynamicSoftLabelAssigner, SimOTAAssigner


def share(x):
    "MMDetection writes -1 where a rule is off"
    return x if x > 0 else None


def max_iou(a):
    neg = a["neg_iou_thr"]
    return MaxIoUAssigner(a["pos_iou_thr"], tuple(neg) if isinstance(neg, list) else neg, "gt" if a.get("match_low_quality", True) else None, a.get("min_pos_iou", 0.0), a.get("gt_max_assign_all", True),
                          share(a.get("ignore_iof_thr", -1)), "prior" if a.get("ignore_wrt_candidates", True) else "region", share(a.get("gpu_assign_thr", -1)))


PARTS = {
    "MaxIoUAssigner": max_iou,
    "ATSSAssigner": lambda a: ATSSAssigner(a["topk"], share(a.get("ignore_iof_thr", -1))),
    "SimOTAAssigner": lambda a: SimOTAAssigner(a.get("center_radius", 2.5), a.get("candidate_topk", 10), a.get("iou_weight", 3.0), a.get("cls_weight", 1.0)),
    "DynamicSoftLabelAssigner": lambda a: DynamicSoftLabelAssigner(a.get("soft_center_radius", 3.0), a.get("topk", 13), a.get("iou_weight", 3.0)),
}


def build(args):
    "An assigner from MMDetection's dict"
    return PARTS[args["type"]](args)


class Scene:
    "A recorded case as a batch: two images padded with junk, of which the first is the recorded one"

    def __init__(self, case):
        self.case, gt, lab = case, case.array("in.gt_bboxes").reshape(-1, 4), case.array("in.gt_labels")
        crowd = case.array("in.ignore_bboxes") if case.has("in.ignore_bboxes") else gt[:0]
        m, k = len(gt), len(crowd)
        junk = torch.tensor([[3.0, 4, 200, 150]])
        self.boxes = torch.stack([torch.cat([junk, gt, crowd]), rand_boxes(m + k + 1, (200, 300), 7, 9)])
        self.valid = torch.tensor([[False] + [True] * m + [False] * k, [True] * (m + k) + [False]])
        self.labels = torch.stack([torch.cat([torch.tensor([-1]), lab, torch.full((k,), -1)]), torch.zeros(m + k + 1, dtype=torch.long)])
        self.crowd = torch.tensor([[False] * (m + 1) + [True] * k, [False] * (m + k + 1)])
        self.gt = gt

    def priors(self):
        "The recorded priors, or those of the generator the case names, and how many a level has"
        if self.case.has("in.priors"):
            return self.case.array("in.priors"), None
        d, (h, w) = self.case.settings["priors_from"], self.case.settings["image"]
        grid = prior(d).grid([(math.ceil(h / s), math.ceil(w / s)) for s in d["strides"]])
        return torch.cat(grid), [len(o) for o in grid]

    def twice(self, name):
        x = self.case.array(f"in.{name}")
        return torch.stack([x, x.flip(0)])

    def check(self, index):
        "Compare the first image with what was recorded"
        index = index[0]
        self.case.check("gt_inds", torch.where(index == -1, 0, torch.where(index == -2, -1, index)))
        self.case.check("labels", torch.where(index >= 0, self.labels[0][index.clamp(min=0)], -1))

    def check_iou(self, m):
        "Overlaps where something was recorded for a match"
        want = self.case.array("out.max_overlaps")
        self.case.check("max_overlaps", torch.where(want < -1, want, m.iou[0]))
        assert ((want > -1) == (m.index[0] >= 0)).all() or self.case.array("in.gt_labels").numel() == 0


@pytest.mark.parametrize("case", cases("assigners", "MaxIoUAssigner"))
def test_max_iou(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    m = a.match(s.priors()[0], s.boxes, s.valid, s.crowd)
    s.check(m.index)
    case.check("max_overlaps", m.iou[0])
    for i in range(2):
        assert torch.equal(m.index[i], a(s.priors()[0], s.boxes[i : i + 1], s.valid[i : i + 1], s.crowd[i : i + 1])[0])


@pytest.mark.parametrize("case", cases("assigners", "ATSSAssigner"))
def test_atss(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    p, counts = s.priors()
    assert counts == case.settings["num_level_priors"]
    m = a.match(p, counts, s.boxes, s.valid, s.crowd)
    s.check(m.index)
    s.check_iou(m)


@pytest.mark.parametrize("case", cases("assigners", "SimOTAAssigner", "DynamicSoftLabelAssigner"))
def test_dynamic(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    m = a.match(s.priors()[0], s.twice("pred_bboxes"), s.twice("pred_scores"), s.boxes, s.labels, s.valid)
    s.check(m.index)
    s.check_iou(m)
