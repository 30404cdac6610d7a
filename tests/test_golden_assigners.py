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
from visdet.nn.by_place import CenterRegionAssigner, GridAssigner, NearestPointAssigner, UniformAssigner
from visdet.nn.dynamic import DynamicSoftLabelAssigner, SimOTAAssigner
from visdet.nn.hungarian_match import BoxL1Cost, ClassCost, DiceCost, FocalCost, HungarianAssigner, IoUCost, MaskCrossEntropyCost, MaskFocalCost
from visdet.nn.task_aligned import TaskAlignedAssigner


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


def focal(a):
    kw = {k: a[k] for k in ("alpha", "gamma", "eps") if k in a}
    return (MaskFocalCost if a.get("binary_input") else FocalCost)(a.get("weight", 1.0), **kw)


COSTS = {
    "ClassificationCost": lambda a: ClassCost(a.get("weight", 1.0)),
    "FocalLossCost": focal,
    "BBoxL1Cost": lambda a: BoxL1Cost(a.get("weight", 1.0), {"xyxy": "xyxy", "xywh": "cxcywh"}[a.get("box_format", "xyxy")]),
    "IoUCost": lambda a: IoUCost(a.get("weight", 1.0), a.get("iou_mode", "giou")),
    "DiceCost": lambda a: DiceCost(a.get("weight", 1.0), a.get("pred_act", False), a.get("eps", 1e-3), a.get("naive_dice", True)),
    "CrossEntropyLossCost": lambda a: MaskCrossEntropyCost(a.get("weight", 1.0)),
}


def cost(args):
    "A cost from MMDetection's dict"
    return COSTS[args["type"]](args)


PARTS |= {
    "TaskAlignedAssigner": lambda a: TaskAlignedAssigner(a["topk"], a.get("alpha", 1), a.get("beta", 6)),
    "HungarianAssigner": lambda a: HungarianAssigner([cost(c) for c in a["match_costs"]]),
    "PointAssigner": lambda a: NearestPointAssigner(a.get("scale", 4), a.get("pos_num", 3)),
    "GridAssigner": lambda a: GridAssigner(a["pos_iou_thr"], tuple(a["neg_iou_thr"]) if isinstance(a["neg_iou_thr"], list) else a["neg_iou_thr"], a.get("min_pos_iou", 0.0), a.get("gt_max_assign_all", True)),
    "CenterRegionAssigner": lambda a: CenterRegionAssigner(a["pos_scale"], a["neg_scale"], a.get("min_pos_iof", 0.01), a.get("ignore_gt_scale", 0.5), a.get("foreground_dominate", False)),
    "UniformAssigner": lambda a: UniformAssigner(a["pos_ignore_thr"], a["neg_ignore_thr"], a.get("match_times", 4)),
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


@pytest.mark.parametrize("case", cases("assigners", "TaskAlignedAssigner"))
def test_task_aligned(case):
    s = Scene(case)
    a = build({"type": case.component, **case.args, "alpha": case.settings["alpha"], "beta": case.settings["beta"]})
    m = a.match(s.priors()[0], s.twice("pred_bboxes"), s.twice("pred_scores"), s.boxes, s.labels, s.valid)
    s.check(m.index)
    s.check_iou(m)
    case.check("assign_metrics", m.metric[0])


@pytest.mark.parametrize("case", cases("assigners", "HungarianAssigner"))
def test_hungarian(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    pred = dict(boxes=s.twice("pred_bboxes"), scores=s.twice("pred_scores"))
    gt = dict(boxes=s.boxes, labels=s.labels, sizes=torch.tensor([case.settings["img_shape"]] * 2))
    s.check(a(pred, gt, s.valid))
    for i, c in enumerate(a.costs):
        if case.has(f"out.cost.{i}"):
            case.check(f"cost.{i}", c(pred, gt)[0][:, s.valid[0]])


@pytest.mark.parametrize("case", cases("assigners", "DiceCost", "CrossEntropyLossCost", "FocalLossCost"))
def test_mask_costs(case):
    c = cost({"type": case.component, **case.args})
    case.check("cost", c(dict(masks=case.array("in.pred_masks")[None]), dict(masks=case.array("in.gt_masks")[None]))[0])


@pytest.mark.parametrize("case", cases("assigners", "PointAssigner"))
def test_nearest_point(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    s.check(a(case.array("in.points_xys"), s.boxes, s.valid))


@pytest.mark.parametrize("case", cases("assigners", "GridAssigner"))
def test_grid(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    sizes = [(8, 10), (16, 20), (32, 40)]
    gen = prior(dict(type="YOLOAnchorGenerator", base_sizes=[[[116, 90], [156, 198], [373, 326]], [[30, 61], [62, 45], [59, 119]], [[10, 13], [16, 30], [33, 23]]], strides=[32, 16, 8]))
    flags = gen.responsible(sizes, s.boxes, s.valid)
    case.check("responsible_flags_bits", torch.from_numpy(np.packbits(flags[0].numpy())))
    m = a.match(torch.cat(gen.grid(sizes)), flags, s.boxes, s.valid)
    s.check(m.index)
    case.check("max_overlaps", m.iou[0])


@pytest.mark.parametrize("case", cases("assigners", "CenterRegionAssigner"))
def test_center_region(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    m = a.match(s.priors()[0], s.boxes, s.labels, s.valid, s.crowd)
    pairs = sorted((n, int(s.labels[0, j])) for j, n in m.shadow[0].nonzero().tolist())
    assert pairs == sorted(map(tuple, case.array("out.shadowed_labels").reshape(-1, 2).tolist()))
    s.check(m.index)


@pytest.mark.parametrize("case", cases("assigners", "UniformAssigner"))
def test_uniform(case):
    s, a = Scene(case), build({"type": case.component, **case.args})
    p = s.priors()[0]
    m = a.match(p, s.twice("pred_bboxes"), s.boxes, s.valid)
    s.check(m.index)
    there = s.valid[0][m.cols[0]]
    case.check("pos_idx", m.ok[0][there].long())
    case.check("pos_predicted_boxes", s.twice("pred_bboxes")[0][m.rows[0][there]])
    case.check("target_boxes", s.boxes[0][m.cols[0][there]])
    case.check("max_overlaps", best_iou(p, s.gt).top)
