"What MMDetection's tests say of box heads: layers, losses with and without objects, detections, moved regions"
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.core.testing import rand_boxes
from visdet.cv.roi import to_rois
from visdet.data.targets import make_targets
from visdet.nn.conv_fc_head import ConvFCHead
from visdet.nn.region_kinds import make_box_head
from visdet.nn.roi_head import BoxHead


def test_layers():
    two, four = (make_box_head(o, 1, 4, [4], hidden=1) for o in (dict(shared_convs=0, shared_fcs=2), "4conv1fc"))
    assert (len(two.shared_convs), len(two.shared_fcs)) == (0, 2) and (len(four.shared_convs), len(four.shared_fcs)) == (4, 1)


@pytest.mark.parametrize("kw", [dict(shared_fcs=1, cls_convs=1), dict(shared_fcs=2, reg_convs=3)])
def test_no_convolutions_after_numbers(kw):
    with pytest.raises(ConfigError, match="shared_fcs=0"):
        ConvFCHead(1, 4, [4], **kw)


@pytest.mark.parametrize("norm,names", [(None, ["bias"]), ("gn", ["norm.bias", "norm.weight"]), ("bn", ["norm.bias", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "norm.weight"])])
def test_norms(norm, names):
    keys = sorted(k for k in ConvFCHead(4, 4, [4], channels=8, hidden=8, norm=norm).state_dict() if k.startswith("shared_convs.2."))
    assert keys == sorted([f"shared_convs.2.{'conv.' if norm is None else ''}{o}" for o in names] + ["shared_convs.2.conv.weight"])


def plain(classes=6, agnostic=True, ni=1, size=7, **kw):
    torch.manual_seed(0)
    return ConvFCHead(ni, classes, [4], 0, 0, agnostic=agnostic, size=size, score_thr=0.0, nms_thr=0.5, max_num=100, **kw)


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("n", [2, 1, 0])
def test_detections(n, agnostic):
    "Two regions of six classes give at most twelve detections; none give none, with all columns"
    h = plain(agnostic=agnostic)
    rois = to_rois([rand_boxes(n, (128, 128), 0)])
    cls, reg = torch.rand(n, 7), torch.rand(n, 4 if agnostic else 24)
    (d,) = h.decode(cls, reg, rois, [(128, 128)])
    assert len(d) <= 6 * n and (len(d) > 0) == (n > 0) and d.boxes.shape == (len(d), 4) and d.scores.shape == d.labels.shape == (len(d),)
    assert (d.boxes >= 0).all() and (d.boxes <= 128).all() and (d.scores[:-1] >= d.scores[1:]).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [20, 1, 0])
def test_moved_regions(n, seed):
    "As many regions as before, four numbers each, inside their image"
    h = plain()
    sizes = [(128, 128), (90, 110)]
    rois = to_rois([rand_boxes(n, s, seed + i) for i, s in enumerate(sizes)])
    out = h.moved(torch.randn(len(rois), 4, generator=torch.Generator().manual_seed(seed)) * 3, rois, sizes)
    assert out.shape == (2 * n, 5) and torch.equal(out[:, 0], rois[:, 0])
    lim = torch.tensor([[128.0, 128.0] * 2, [110.0, 90.0] * 2])[rois[:, 0].long()]
    assert (out[:, 1:] >= 0).all() and (out[:, 1:] <= lim).all()


@pytest.mark.parametrize("cls", [BoxHead, ConvFCHead])
@pytest.mark.parametrize("n", [1, 0], ids=["object", "none"])
def test_losses(cls, n):
    "Eight channels, regions of three cells: both terms with an object, the class term alone without"
    torch.manual_seed(0)
    h = cls(8, 4, [4], hidden=8, size=3)
    box = torch.tensor([[23.6667, 23.8757, 238.6326, 151.8874]])[:n]
    t = make_targets([box], [torch.full((n,), 2)], [(256, 256)])
    rois = torch.cat([torch.zeros(9, 1), torch.cat([rand_boxes(8, (256, 256), 3), torch.tensor([[20.0, 20, 230, 150]])])], 1)
    rows = dict(rois=rois, match=torch.tensor([-1] * 8 + [0 if n else -1]), weight=torch.ones(9), row=torch.arange(9))
    out = h([torch.randn(1, 8, 64, 64)], rois)
    loss = h.loss(*out, rows, t)
    assert loss["cls"] > 0 and (loss["box"] > 0) == bool(n) and all(v.requires_grad for v in loss.values())


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "iou", "giou", "diou", "ciou", "log_iou"])
def test_box_terms_divide_by_all_regions(name):
    "Doubling the background halves the box term; every term is nothing for perfect deltas"
    torch.manual_seed(0)
    h = BoxHead(2, 3, [4], 4, size=2, reg_loss=name)
    box = torch.tensor([[30.0, 30, 90, 80]])
    t = make_targets([box], [torch.tensor([1])], [(128, 128)])
    near, far = torch.tensor([[0.0, 34, 28, 95, 85]]), torch.tensor([[0.0, 0, 0, 20, 20]])
    value = []
    for n in (1, 3):
        rows = dict(rois=torch.cat([near, far.repeat(n, 1)]), match=torch.tensor([0] + [-1] * n), weight=torch.ones(n + 1), row=torch.arange(n + 1))
        value.append(float(h.loss(torch.zeros(n + 1, 4), torch.zeros(n + 1, 12), rows, t)["box"]))
    assert value[0] == pytest.approx(2 * value[1], rel=1e-5) and value[0] > 0
    perfect = torch.zeros(4, 12)
    perfect[0, 4:8] = h.coder.encode(near[:, 1:], box)[0]
    assert float(h.loss(torch.zeros(4, 4), perfect, rows, t)["box"]) == pytest.approx(0, abs=1e-4)
