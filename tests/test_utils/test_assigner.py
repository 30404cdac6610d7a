"""The behaviours that MMDetection states for its assigners, with its figures

Objects count from 1 there, 0 is background and -1 ignored; `inds` writes visdet's answer that way. Assigners take whole
batches here: every figure is asked of a batch whose second image has the same objects among padding.
`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.nn.assign import MaxIoUAssigner
from visdet.nn.atss import ATSSAssigner
from visdet.nn.by_place import CenterRegionAssigner, GridAssigner, NearestPointAssigner, UniformAssigner
from visdet.nn.dynamic import DynamicSoftLabelAssigner, SimOTAAssigner
from visdet.nn.hungarian_match import BoxL1Cost, ClassCost, DiceCost, FocalCost, HungarianAssigner, IoUCost, MaskCrossEntropyCost, MaskFocalCost
from visdet.nn.task_aligned import TaskAlignedAssigner

BEHAVIOURS = {
    "MaxIoU: a threshold and a range for background; labels": "test_max_iou",
    "MaxIoU: regions to ignore": "test_max_iou_ignore",
    "MaxIoU: without objects, without priors, without both": "test_empty[max_iou]",
    "AscendMaxIoU: the batched form": "test_max_iou",
    "ATSS: one level of four priors, with regions too": "test_atss",
    "ATSS: empty": "test_empty[atss]",
    "Point": "test_point",
    "Point: empty": "test_empty[point]",
    "Uniform": "test_uniform",
    "Uniform: empty": "test_empty[uniform]",
    "SimOTA and DynamicSoftLabel: one match, nothing valid": "test_dynamic",
    "SimOTA and DynamicSoftLabel: empty": "test_empty[simota]",
    "Grid: one and two thresholds, three are refused, ties": "test_grid",
    "Grid: empty": "test_empty[grid]",
    "CenterRegion: match, shadow, regions, the smaller object": "test_center_region",
    "CenterRegion: empty": "test_empty[centre]",
    "TaskAligned: no candidates is refused, number, empty": "test_task_aligned",
    "Hungarian: no costs is refused, no object, two objects with every cost": "test_hungarian",
}
WITHOUT = {
    "ApproxMaxIoU: as MaxIoU where approximate anchors are the squares": "guided anchoring is not taken; its assigner would be MaxIoU on the best of each group",
    "Region: match, regions to ignore are refused": "the assigner of Cascade RPN is not taken",
    "TopkHungarian: four predictions an object": "the assigner of DDQ is not taken",
    "random AssignResult": "there is no such object; property tests draw priors and boxes instead (tests/test_golden_assigners.py)",
    "labels are None where none are passed": "an assigner gives indices; labels are taken by them (`match_labels`)",
}

FOUR = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [32, 32, 38, 42]])
NEAR_REGION = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [30, 32, 40, 42]])
TWO, REGION = [[0.0, 0, 10, 9], [0, 10, 10, 19]], [30.0, 30, 40, 40]
PAD = [1.0, 2, 300, 400]


class Batch:
    "The same objects twice, the second time between padding; `region` is an object to ignore"

    def __init__(self, boxes, labels=(2, 3, 4, 5), region=None):
        rows, n = [*boxes, *([region] if region else [])], len(boxes)
        self.boxes = torch.tensor([[*rows, PAD, PAD], [PAD, *rows, PAD]])
        real, crowd = [True] * n + [False] * bool(region), [False] * n + [True] * bool(region)
        labels = [*labels[:n], *([-1] if region else [])]
        self.valid = torch.tensor([real + [False] * 2, [False] + real + [False]])
        self.crowd = torch.tensor([crowd + [False] * 2, [False] + crowd + [False]])
        self.labels = torch.tensor([labels + [-1] * 2, [-1] + labels + [-1]])

    def inds(self, index):
        "Objects from 1, 0 background, -1 ignored; both images must agree"
        other = torch.where(index[1] >= 0, index[1] - 1, index[1])
        assert torch.equal(index[0], other)
        return [{-1: 0, -2: -1}.get(o, o + 1) for o in index[0].tolist()]

    def names(self, index):
        "The label of each prior's object, -1 elsewhere"
        return torch.where(index >= 0, self.labels.gather(1, index.clamp(min=0)), -1)[0].tolist()


@pytest.mark.parametrize("neg", [0.5, (0.0, 0.5)])
def test_max_iou(neg):
    s = Batch(TWO)
    index = MaxIoUAssigner(0.5, neg)(FOUR, s.boxes, s.valid)
    assert s.inds(index) == [1, 0, 2, 0] and s.names(index) == [2, -1, 3, -1]
    assert (index >= 0)[0].tolist() == [True, False, True, False]


def test_max_iou_ignore():
    s = Batch(TWO, region=REGION)
    a = MaxIoUAssigner(0.5, 0.5, ignore=0.5, ignore_by="region")
    assert s.inds(a(NEAR_REGION, s.boxes, s.valid, s.crowd)) == [1, 0, 2, -1]
    assert s.inds(MaxIoUAssigner(0.5, 0.5)(NEAR_REGION, s.boxes, s.valid)) == [1, 0, 2, 0]


def test_atss():
    s = Batch(TWO)
    assert s.inds(ATSSAssigner(9)(FOUR, [4], s.boxes, s.valid)) == [1, 0, 0, 0]
    s = Batch(TWO, region=REGION)
    assert s.inds(ATSSAssigner(9)(NEAR_REGION, [4], s.boxes, s.valid, s.crowd)) == [1, 0, 0, 0]


def test_point():
    points, s = torch.tensor([[0.0, 0, 1], [10, 10, 1], [5, 5, 1], [32, 32, 1]]), Batch(TWO)
    index = NearestPointAssigner()(points, s.boxes, s.valid)
    assert s.inds(index) == [1, 2, 1, 0] and s.names(index) == [2, 3, 2, -1]


def test_uniform():
    s, pred = Batch(TWO), torch.tensor([[1.0, 1, 12, 8], [4, 4, 20, 20], [1, 5, 15, 15], [30, 5, 32, 42]])
    m = UniformAssigner(0.15, 0.7, 1).match(FOUR, pred.expand(2, 4, 4), s.boxes, s.valid)
    assert s.inds(m.index) == [-1, 0, 2, 0]


DYNAMIC = {"simota": SimOTAAssigner(2.5, topk=1), "soft": DynamicSoftLabelAssigner(3.0, topk=1)}


@pytest.mark.parametrize("kind", DYNAMIC)
def test_dynamic(kind):
    scores = torch.tensor([[[0.2], [0.8]]]).expand(2, 2, 1)
    priors, pred = torch.tensor([[30.0, 30, 8, 8], [4, 5, 6, 7]]), torch.tensor([[23.0, 23, 43, 43], [4, 5, 6, 7]]).expand(2, 2, 4)
    s = Batch([[23.0, 23, 43, 43]], labels=(0,))
    assert s.inds(DYNAMIC[kind](priors, pred, scores, s.boxes, s.labels, s.valid)) == [1, 0]
    priors, pred = torch.tensor([[30.0, 30, 8, 8], [55, 55, 8, 8]]), torch.tensor([[123.0, 123, 143, 143], [114, 151, 161, 171]]).expand(2, 2, 4)
    s = Batch([[0.0, 0, 1, 1]], labels=(0,))
    assert s.inds(DYNAMIC[kind](priors, pred, scores, s.boxes, s.labels, s.valid)) == [0, 0]


GRID = torch.tensor([[23.0, 23, 43, 43], [4, 5, 6, 7]]), torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize("kw,want", [(dict(neg=0.3), [1, 0]), (dict(neg=(0.1, 0.3)), [1, -1]), (dict(neg=0.3, ties=False, min_pos=1.0), [1, 0])])
def test_grid(kw, want):
    "Both priors stand in cells with a centre; an overlap of zero lies below the range of background"
    s = Batch([[23.0, 23, 43, 43]])
    assert s.inds(GridAssigner(0.5, **kw)(*GRID, s.boxes, s.valid)) == want


def test_grid_three_thresholds():
    with pytest.raises((ConfigError, ValueError)):
        GridAssigner(0.5, (0.0, 0.1, 0.3))


def shadows(s, m):
    "Pairs of a prior and the label that must not be trained there, in the first image"
    return [[n, int(s.labels[0, j])] for j, n in m.shadow[0].nonzero().tolist()]


def test_center_region():
    a, s = CenterRegionAssigner(0.2, 0.2, 0.01), Batch(TWO)
    m = a.match(FOUR, s.boxes, s.labels, s.valid)
    assert s.inds(m.index) == [1, 0, 0, 0] and shadows(s, m) == [[2, 3]]
    s = Batch(TWO, region=REGION)
    m = a.match(NEAR_REGION, s.boxes, s.labels, s.valid, s.crowd)
    assert s.inds(m.index) == [1, 0, 0, -1]


def test_center_region_smaller_object():
    "Of two objects around the same prior the smaller one has it, and an object far smaller than the prior does not"
    priors = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [8, 8, 9, 9]])
    s = Batch([[0.0, 0, 11, 11], [10, 10, 20, 20], [4.5, 4.5, 5.5, 5.5], [0, 0, 10, 10]])
    assert s.inds(CenterRegionAssigner(0.3, 1.0)(priors, s.boxes, s.labels, s.valid)) == [4, 2, 0]


def scored(a, p, s):
    "An assigner of predictions, which are the priors here"
    return a(p, p.expand(2, -1, -1), torch.rand(2, len(p), 6, generator=torch.Generator().manual_seed(0)), s.boxes, s.labels, s.valid)


def test_task_aligned():
    with pytest.raises((ConfigError, ValueError)):
        TaskAlignedAssigner(topk=0)
    s = Batch(TWO)
    index = scored(TaskAlignedAssigner(topk=13), FOUR, s)
    assert index.shape == (2, 4) and set(s.inds(index)) <= {0, 1, 2}
    assert scored(TaskAlignedAssigner(topk=13), FOUR, Batch([])).tolist() == [[-1] * 4] * 2
    assert scored(TaskAlignedAssigner(topk=13), FOUR[:0], s).shape == (2, 0)


EMPTY = {
    "max_iou": lambda p, s: MaxIoUAssigner(0.5, 0.5)(p, s.boxes, s.valid),
    "max_iou_ignore": lambda p, s: MaxIoUAssigner(0.5, 0.5, ignore=0.5, ignore_by="region")(p, s.boxes, s.valid, s.crowd),
    "atss": lambda p, s: ATSSAssigner(9)(p, [len(p)], s.boxes, s.valid),
    "atss_ignore": lambda p, s: ATSSAssigner(9, 0.5)(p, [len(p)], s.boxes, s.valid, s.crowd),
    "point": lambda p, s: NearestPointAssigner()(p[:, :3].clamp(min=1), s.boxes, s.valid),
    "uniform": lambda p, s: UniformAssigner(0.15, 0.7, 1)(p, p.expand(2, -1, -1), s.boxes, s.valid),
    "simota": lambda p, s: scored(DYNAMIC["simota"], p, s),
    "soft": lambda p, s: scored(DYNAMIC["soft"], p, s),
    "grid": lambda p, s: GridAssigner()(p, torch.ones(2, len(p), dtype=torch.bool), s.boxes, s.valid),
    "centre": lambda p, s: CenterRegionAssigner()(p, s.boxes, s.labels, s.valid, s.crowd),
    "task_aligned": lambda p, s: scored(TaskAlignedAssigner(), p, s),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("region", [None, REGION])
def test_empty(kind, region):
    "No object: background; no priors: nothing; neither: nothing. With a region to ignore, and without columns at all"
    none, s = Batch([], region=region), Batch(TWO, region=region)
    index = EMPTY[kind](FOUR, none)
    assert index.shape == (2, 4)
    # MMDetection asks for background where there is no object; CenterRegion alone keeps regions apart there too
    assert set(index.flatten().tolist()) == {-1} or (kind == "centre" and region and index[0].tolist() == [-1, -1, -1, -2])
    assert EMPTY[kind](FOUR[:0], s).shape == (2, 0)
    assert EMPTY[kind](FOUR[:0], none).shape == (2, 0)
    none.boxes, none.valid, none.crowd, none.labels = (o[:, :0] for o in (none.boxes, none.valid, none.crowd, none.labels))
    assert EMPTY[kind](FOUR, none).tolist() == [[-1] * 4] * 2
    assert EMPTY[kind](FOUR[:0], none).shape == (2, 0)


COSTS = [ClassCost(), FocalCost(), BoxL1Cost(fmt="cxcywh"), BoxL1Cost(), IoUCost(kind="giou"), IoUCost(kind="iou"), DiceCost(), MaskCrossEntropyCost(), MaskFocalCost()]


def queries(n=10):
    "Ten predictions, and two objects with masks of 64 points"
    g, s = torch.Generator().manual_seed(0), Batch([[23.0, 23, 43, 43], [10, 5, 60, 80]], labels=(0, 1))
    c = torch.rand(2, n, 2, generator=g) * 60
    pred = dict(scores=torch.randn(2, n, 2, generator=g), boxes=torch.cat([c, c + 20], -1), masks=torch.randn(2, n, 64, generator=g))
    masks = (torch.rand(1, s.boxes.shape[1], 64, generator=g) > 0.5).float().expand(2, -1, -1)
    return pred, dict(boxes=s.boxes, labels=s.labels, masks=masks, sizes=torch.tensor([[100, 100]] * 2)), s.valid


@pytest.mark.parametrize("costs", [[c] for c in COSTS] + [COSTS], ids=[f"{type(c).__name__}-{getattr(c, 'fmt', getattr(c, 'kind', ''))}" for c in COSTS] + ["all"])
def test_hungarian(costs):
    "Two objects take one query each and leave eight"
    pred, gt, valid = queries()
    index = HungarianAssigner(costs)(pred, gt, valid)
    for i in range(2):
        assert sorted(index[i][index[i] >= 0].tolist()) == valid[i].nonzero()[:, 0].tolist() and (index[i] == -1).sum() == 8


def test_hungarian_empty():
    with pytest.raises(ConfigError):
        HungarianAssigner([])
    pred, gt, valid = queries()
    for a in (HungarianAssigner(), HungarianAssigner(COSTS)):
        assert a(pred, gt, torch.zeros_like(valid)).tolist() == [[-1] * 10] * 2
        assert a(pred, {k: o if k == "sizes" else o[:, :0] for k, o in gt.items()}, valid[:, :0]).tolist() == [[-1] * 10] * 2
        assert a({k: o[:, :0] for k, o in pred.items()}, gt, valid).shape == (2, 0)
