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


# Slow references and facts that MMDetection's own tests state

FOUR = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [32, 32, 38, 42]])
TWO, BOTH = torch.tensor([[[0.0, 0, 10, 9], [0, 10, 10, 19]]]), torch.ones(1, 2, dtype=torch.bool)
LABELS = torch.tensor([[2, 3]])


def scene(seed, n=90, m=7, b=3, size=(96, 128)):
    "Priors, predictions, objects and masks, of which one image has no object and one has gaps"
    boxes, pred = rand_boxes(b * m, size, seed, 6).view(b, m, 4), rand_boxes(b * n, size, seed + 50, 6).view(b, n, 4)
    valid = torch.rand(b, m, generator=torch.Generator().manual_seed(seed)) < 0.8
    valid[1] = False
    return rand_boxes(n, size, seed + 100, 6), pred, boxes, valid


def slow_max_iou(p, gts, regions, pos, neg, min_pos, low, ties, ignore, by):
    "One image by the rule of MaxIoU, prior by prior"
    n, m = len(p), len(gts)
    if m == 0:
        return [-1] * n
    iou = box_iou(gts, p)
    if ignore is not None and len(regions):
        over = (box_iou(p, regions, "iof") if by == "prior" else box_iou(regions, p, "iof").T).amax(1) > ignore
        iou[:, over] = -1
    res = []
    for k in range(n):
        best, who = iou[:, k].max(0)
        res.append(int(who) if best >= pos else -1 if neg[0] <= best < neg[1] else -2)
    for j in range(m if low else 0):
        top = iou[j].max()
        if top >= min_pos and top > 0:
            for k in (torch.nonzero(iou[j] == top)[:, 0] if ties else [iou[j].argmax()]):
                res[int(k)] = j
    return res


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("low,ties", [("gt", True), ("gt", False), (None, True)])
@pytest.mark.parametrize("ignore,by", [(None, "prior"), (0.3, "prior"), (0.3, "region")])
def test_max_iou_slow(seed, low, ties, ignore, by):
    p, _, boxes, valid = scene(seed)
    p = torch.cat([p, p[:20]])
    crowd = ~valid & (torch.arange(7) % 2 == 0)
    neg = (0.1, 0.35) if seed % 2 else 0.35
    got = MaxIoUAssigner(0.5, neg, low, 0.2, ties, ignore, by)(p, boxes, valid, crowd)
    for i in range(3):
        js = valid[i].nonzero()[:, 0].tolist()
        want = slow_max_iou(p, boxes[i][valid[i]], boxes[i][crowd[i]], 0.5, (0.1, 0.35) if seed % 2 else (0.0, 0.35), 0.2, low, ties, ignore, by)
        assert got[i].tolist() == [js[o] if o >= 0 else o for o in want]


def test_max_iou_facts():
    p = FOUR.clone()
    p[3] = torch.tensor([30.0, 32, 40, 42])
    boxes, ok, crowd = torch.cat([TWO, torch.tensor([[[30.0, 30, 40, 40]]])], 1), torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    assert MaxIoUAssigner(0.5, 0.5)(FOUR, TWO, BOTH).tolist() == [[0, -1, 1, -1]]
    assert MaxIoUAssigner(0.5, (0.0, 0.5))(FOUR, TWO, BOTH).tolist() == [[0, -1, 1, -1]]
    assert MaxIoUAssigner(0.5, 0.5, ignore=0.5, ignore_by="region")(p, boxes, ok, crowd).tolist() == [[0, -1, 1, -2]]
    assert MaxIoUAssigner()(FOUR, TWO[:, :0], BOTH[:, :0]).tolist() == [[-1] * 4]
    assert MaxIoUAssigner()(FOUR[:0], TWO, BOTH).shape == (1, 0)
    assert MaxIoUAssigner()(FOUR[:0], TWO[:, :0], BOTH[:, :0]).shape == (1, 0)


@pytest.mark.parametrize("thr,m,moves", [(None, 5, False), (3, 5, True), (5, 5, False), (0, 1, True)])
def test_cpu_above(thr, m, moves):
    "Assigned on the CPU with more objects than the limit, on a device only; the answer does not change"
    a = MaxIoUAssigner(cpu_above=thr)
    assert a._moves(torch.empty(1, m, dtype=torch.bool, device="meta")) is moves
    boxes, ok = rand_boxes(m)[None], torch.ones(1, m, dtype=torch.bool)
    assert not a._moves(ok)
    assert torch.equal(a(rand_boxes(50, seed=1), boxes, ok), MaxIoUAssigner()(rand_boxes(50, seed=1), boxes, ok))
    if torch.cuda.is_available():
        got = a(rand_boxes(50, seed=1).cuda(), boxes.cuda(), ok.cuda())
        assert got.is_cuda and torch.equal(got.cpu(), a(rand_boxes(50, seed=1), boxes, ok))


def test_atss_facts():
    a = ATSSAssigner(9)
    assert a(FOUR, [4], TWO, BOTH).tolist() == [[0, -1, -1, -1]]
    assert a(FOUR, [4], TWO[:, :0], BOTH[:, :0]).tolist() == [[-1] * 4]
    assert a(FOUR[:0], [0], TWO, BOTH).shape == (1, 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ignore", [None, 0.3])
def test_atss_slow(seed, ignore):
    "Object by object and level by level; a coarse level of four priors lacks candidates where a crowd lies"
    fine, coarse, (_, _, boxes, valid) = rand_boxes(60, (96, 128), seed + 300, 10), rand_boxes(4, (96, 128), seed + 400, 50), scene(seed)
    p, crowd = torch.cat([fine, coarse]), ~valid & (torch.arange(7) < 5)
    got = ATSSAssigner(5, ignore).match(p, [60, 4], boxes, valid, crowd)
    for i in range(3):
        js, c = valid[i].nonzero()[:, 0].tolist(), (p[:, :2] + p[:, 2:]) / 2
        regions = boxes[i][crowd[i]]
        skip = box_iou(p, regions, "iof").amax(1) > ignore if ignore and len(regions) and js else torch.zeros(64, dtype=torch.bool)
        best, who = [-1.0] * 64, [-2 if o else -1 for o in skip.tolist()]
        for j in js:
            g = boxes[i, j]
            d = (c - (g[:2] + g[2:]) / 2).norm(dim=1).masked_fill(skip, 1e8)
            near = d[:60].topk(5, largest=False)[1].tolist() + [60 + k for k in d[60:].topk(4, largest=False)[1].tolist()]
            o = box_iou(g[None], p[near])[0].double()
            thr = float(o.mean() + ((o - o.mean()) ** 2).sum().div(8).sqrt())
            for k, v in zip(near, o.tolist()):
                if v >= thr and min(c[k, 0] - g[0], c[k, 1] - g[1], g[2] - c[k, 0], g[3] - c[k, 1]) > 0.01 and v > best[k]:
                    best[k], who[k] = v, j
        assert got.index[i].tolist() == who
        assert torch.allclose(got.iou[i].double(), torch.tensor(best).double().clamp(min=0), atol=1e-6)


def slow_by_cost(cost, iou, cand, topk):
    "One image by the rule of dynamic k: cost and iou (N,M), candidates (N,)"
    n, m = cost.shape
    c = cand.nonzero()[:, 0]
    take = torch.zeros(n, m, dtype=torch.bool)
    for j in range(m if len(c) else 0):
        k = max(1, int(iou[c, j].sort(descending=True)[0][:topk].sum()))
        take[c[cost[c, j].sort()[1][:k]], j] = True
    return [-1 if not t.any() else int(cost[i].argmin()) if t.sum() > 1 else int(t.nonzero()[0]) for i, t in enumerate(take)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["simota", "soft"])
def test_dynamic_slow(seed, kind):
    "Costs with all classes written out, image by image, object by object"
    p = torch.cat(PointGenerator([8, 16], 0.5, True).grid([(12, 16), (6, 8)]))
    _, pred, boxes, valid = scene(seed, len(p))
    near = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))[:80]
    pred[:, near] = boxes[:, near % 7] + noise(3, 80, 4, seed=seed) * 3
    x, labels = noise(3, len(p), 5, seed=seed), torch.arange(21).view(3, 7) % 5
    a = SimOTAAssigner() if kind == "simota" else DynamicSoftLabelAssigner()
    m = a.match(p, pred, x.sigmoid() if kind == "simota" else x, boxes, labels, valid)
    for i in range(3):
        js = valid[i].nonzero()[:, 0]
        g, lab = boxes[i][js], labels[i][js]
        if not len(js):
            assert (m.index[i] == -1).all()
            continue
        iou, one = box_iou(pred[i], g), torch.nn.functional.one_hot(lab, 5).float()
        inside = torch.stack([(p[:, :2] > b[:2]).all(1) & (p[:, :2] < b[2:]).all(1) for b in g], 1)
        c, logits = (g[:, :2] + g[:, 2:]) / 2, x[i][:, None].expand(-1, len(js), 5)
        if kind == "simota":
            close_ = ((p[:, None, :2] - c).abs() < 2.5 * p[:, None, 2:]).all(-1)
            cls = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), one.expand(len(p), -1, -1), reduction="none").sum(-1)
            cost, cand = cls - 3 * (iou + 1e-7).log() + 1e5 * ~(inside & close_), (inside | close_).any(1)
        else:
            soft = one * iou[..., None]
            cls = (torch.nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="none") * (soft - logits.sigmoid()).square()).sum(-1)
            cost, cand = cls - 3 * (iou + 1e-7).log() + 10 ** ((p[:, None, :2] - c).norm(dim=-1) / p[:, 2:3] - 3), inside.any(1)
        want = slow_by_cost(cost, iou, cand, 10 if kind == "simota" else 13)
        assert m.index[i].tolist() == [int(js[o]) if o >= 0 else -1 for o in want]


@pytest.mark.parametrize("seed", range(4))
def test_nearest_point_slow(seed):
    p = torch.cat([o[:, :3] for o in PointGenerator([8, 16, 32], 0.0, True).grid([(12, 16), (6, 8), (3, 4)])])
    _, _, boxes, valid = scene(seed)
    got = NearestPointAssigner(4.0, 2)(p, boxes, valid)
    for i in range(3):
        best, who = [math.inf] * len(p), [-1] * len(p)
        for j in valid[i].nonzero()[:, 0].tolist():
            x1, y1, x2, y2 = boxes[i, j].tolist()
            w, h = x2 - x1, y2 - y1
            level = min(max(int((math.log2(w / 4) + math.log2(h / 4)) / 2), 3), 5)
            d = sorted((math.hypot((x - (x1 + x2) / 2) / w, (y - (y1 + y2) / 2) / h), k) for k, (x, y, s) in enumerate(p.tolist()) if s == 2**level)
            for v, k in d[:2]:
                if v < best[k]:
                    best[k], who[k] = v, j
        assert got[i].tolist() == who


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [True, False])
def test_grid_slow(seed, ties):
    p, _, boxes, valid = scene(seed)
    mark = torch.rand(3, 90, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = GridAssigner(0.4, (0.05, 0.3) if seed % 2 else 0.3, 0.1, ties)(p, mark, boxes, valid)
    lo, hi = (0.05, 0.3) if seed % 2 else (-1, 0.3)
    for i in range(3):
        js = valid[i].nonzero()[:, 0].tolist()
        iou = box_iou(boxes[i], p)
        want = [-1 if not js or lo < max(float(iou[j, k]) for j in js) <= hi else -2 for k in range(90)]
        for k in mark[i].nonzero()[:, 0].tolist() if js else []:
            j = max(js, key=lambda j: float(iou[j, k]))
            want[k] = j if iou[j, k] > 0.4 else want[k]
        for j in js:
            row = iou[j].masked_fill(~mark[i], -1)
            if row.max() > 0.1:
                for k in (row == row.max()).nonzero()[:, 0].tolist()[: None if ties else 1]:
                    want[k] = j
        assert got[i].tolist() == want


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("front", [True, False])
def test_center_region_slow(seed, front):
    p, _, boxes, valid = scene(seed)
    labels, crowd = torch.arange(21).view(3, 7) % 2, ~valid & (torch.arange(7) < 4)
    m = CenterRegionAssigner(0.4, 0.7, 0.05, 0.5, front).match(p, boxes, labels, valid, crowd)

    def shrunk(b, f):
        cx, cy, w, h = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, (b[2] - b[0]) * f / 2, (b[3] - b[1]) * f / 2
        return torch.stack([cx - w, cy - h, cx + w, cy + h])

    for i in range(3):
        for k in range(90):
            cx, cy = float(p[k, 0] + p[k, 2]) / 2, float(p[k, 1] + p[k, 3]) / 2
            has = lambda b: bool(b[0] < cx < b[2] and b[1] < cy < b[3])  # noqa: E731
            over = lambda b: float(box_iou(p[k : k + 1], b[None], "iof")) > 0.05  # noqa: E731
            js = valid[i].nonzero()[:, 0].tolist()
            core = [j for j in js if has(boxes[i, j]) and over(shrunk(boxes[i, j], 0.4))]
            area = lambda j: float((boxes[i, j, 2] - boxes[i, j, 0]) * (boxes[i, j, 3] - boxes[i, j, 1]))  # noqa: E731
            own = min(core, key=area, default=-1)
            dark = {j for j in js if j != own and (j in core or over(shrunk(boxes[i, j], 0.7)))}
            if any(has(shrunk(boxes[i, j], 0.5)) for j in crowd[i].nonzero()[:, 0].tolist()):
                own = -2
            same = {j for j in dark if own >= 0 and labels[i, j] == labels[i, own]}
            assert int(m.index[i, k]) == (-1 if same and not front else own)
            assert {int(j) for j in m.shadow[i, :, k].nonzero()} == (dark - same if front else dark)


@pytest.mark.parametrize("seed", range(4))
def test_uniform_slow(seed):
    p, pred, boxes, valid = scene(seed)
    got = UniformAssigner(0.15, 0.5, 3)(p, pred, boxes, valid)
    form = lambda o: torch.stack([(o[:, 0] + o[:, 2]) / 2, (o[:, 1] + o[:, 3]) / 2, o[:, 2] - o[:, 0], o[:, 3] - o[:, 1]], 1)  # noqa: E731
    for i in range(3):
        js = valid[i].nonzero()[:, 0].tolist()
        want = [-2 if js and max(float(box_iou(pred[i][k][None], boxes[i][j][None])) for j in js) > 0.5 else -1 for k in range(90)]
        near = {(w, j): (form(o) - form(boxes[i])[j]).abs().sum(1).argsort()[:3].tolist() for w, o in enumerate((pred[i], p)) for j in js}
        for place in range(3):
            for w in range(2):
                for j in js:
                    k = near[w, j][place]
                    want[k] = j if float(box_iou(p[k][None], boxes[i][j][None])) >= 0.15 else -2
        assert got[i].tolist() == want


@pytest.mark.parametrize("costs", [[dict(type="ClassificationCost")], [dict(type="FocalLossCost")], [dict(type="BBoxL1Cost", box_format="xywh")], [dict(type="BBoxL1Cost")], [dict(type="IoUCost", iou_mode="giou")],
                                   [dict(type="IoUCost", iou_mode="iou")], [dict(type="DiceCost", pred_act=True)], [dict(type="CrossEntropyLossCost")], [dict(type="FocalLossCost", binary_input=True)]], ids=lambda o: "-".join(map(str, o[0].values())))
def test_hungarian_facts(costs):
    "Two objects and ten queries give exactly two positives, whatever the cost; none give none"
    a = build(dict(type="HungarianAssigner", match_costs=costs))
    pred = dict(scores=noise(1, 10, 4), boxes=rand_boxes(10)[None], masks=noise(1, 10, 30))
    gt = dict(labels=LABELS, boxes=rand_boxes(2, seed=3)[None], sizes=torch.tensor([[480, 640]]), masks=(noise(1, 2, 30, seed=2) > 0).float())
    got = a(pred, gt, BOTH)[0]
    assert sorted(got[got >= 0].tolist()) == [0, 1] and (got == -1).sum() == 8
    assert (a(pred, gt, ~BOTH) == -1).all()


def test_hungarian_needs_costs():
    with pytest.raises(ConfigError, match="at least one cost"):
        HungarianAssigner([])


def test_one_and_huge():
    "One prior, one object; an object far larger than the image; not a number among predictions"
    one, yes, lab = torch.tensor([[[0.0, 0, 1e7, 1e7]]]), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
    p, pt = torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([[8.0, 8, 8, 8]])
    x = torch.full((1, 1, 3), 0.5)
    assert SimOTAAssigner()(pt, p[None], x, one, lab, yes).tolist() == [[0]]
    assert DynamicSoftLabelAssigner()(pt, p[None], x, torch.tensor([[[0.0, 0, 20, 20]]]), lab, yes).tolist() == [[0]]
    assert SimOTAAssigner()(pt, p[None] * torch.nan, x, one, lab, yes).tolist() == [[-1]]
    assert TaskAlignedAssigner()(p, p[None], x, torch.tensor([[[0.0, 0, 20, 20]]]), lab, yes).tolist() == [[0]]
    assert CenterRegionAssigner()(torch.tensor([[4e6, 4e6, 6e6, 6e6]]), one, lab, yes).tolist() == [[0]]
    assert NearestPointAssigner()(pt[:, :3], one, yes).tolist() == [[0]]
    assert UniformAssigner()(p, p[None], torch.tensor([[[0.0, 0, 20, 20]]]), yes).tolist() == [[0]]
