"What second stages read and cut, against figures recorded from MMDetection"
import numpy as np
import pytest
import torch

from golden import _group, cases
from visdet.cv.masks import polygons_to_rle, rle_decode
from visdet.cv.sample_masks import sample_masks
from visdet.nn.mask_head import cut_masks
from visdet.nn.roi_extract import GenericRoIExtractor, SingleRoIExtractor, scale_rois


def bits(case, name):
    "Masks that are stored as bits"
    n, h, w = case.array(f"{name}_shape").tolist()
    return torch.from_numpy(np.unpackbits(case.array(f"{name}_bits" if case.has(f"{name}_bits") else name).numpy(), axis=-1, count=w)).view(n, h, w)


def feats():
    first = _group("roi")[0]
    return [first.array(f"in.feat.{i}").requires_grad_() for i in range(4)]


def build(a, **kw):
    "An extractor from MMDetection's dict"
    layer, a = dict(a["roi_layer"]), dict(a)
    assert layer.pop("type") == "RoIAlign"
    kind = dict(SingleRoIExtractor=SingleRoIExtractor, GenericRoIExtractor=GenericRoIExtractor)[a.pop("type")]
    kw |= {k: a[k] for k in ("finest_scale", "aggregation") if k in a}
    return kind(a["featmap_strides"], layer["output_size"], layer["sampling_ratio"], layer.get("aligned", True), **kw)


@pytest.mark.parametrize("case", cases("roi", "SingleRoIExtractor", "GenericRoIExtractor"))
def test_extractor(case):
    fs, rois, e = feats(), case.array("in.rois"), build(case.args)
    if case.has("out.levels"):
        assert e.levels(rois).equal(case.array("out.levels"))
    out = e(fs, rois)
    case.check("roi_feats", out)
    out.square().sum().backward()
    for i, f in enumerate(fs):
        case.check(f"grad.{i}", torch.zeros_like(f) if f.grad is None else f.grad)
    if case.has("out.roi_feats_scaled.shape"):
        case.check("roi_feats_scaled", build(case.args, roi_scale_factor=1.3)(fs, rois))


@pytest.mark.parametrize("kind", [SingleRoIExtractor, GenericRoIExtractor])
def test_gradient(kind):
    "Of the maps, in float64"
    g = torch.Generator().manual_seed(0)
    fs = [torch.randn(1, 2, n, n, dtype=torch.float64, generator=g, requires_grad=True) for n in (6, 3)]
    rois = torch.tensor([[0, 1.0, 2, 15, 19], [0, 2.0, 1, 22, 20]], dtype=torch.float64)
    kw = dict(finest_scale=8.0) if kind is SingleRoIExtractor else {}
    e = kind([4, 8], 2, 2, **kw)
    assert torch.autograd.gradcheck(lambda *o: e(list(o), rois), fs)


def test_scaled_level():
    "A region read enlarged stays on the level of its own size"
    fs = [torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 32, 32)]
    r = torch.tensor([[0, 60.0, 60, 160, 160]])
    assert SingleRoIExtractor([4, 8], roi_scale_factor=2.0)(fs, r).eq(0).all() and SingleRoIExtractor([4, 8])(fs, scale_rois(r, 1.5)).eq(1).all()


@pytest.mark.parametrize("case", cases("roi", "mask_target"))
def test_mask_target(case):
    boxes, which, size = case.array("in.proposals"), case.array("in.assigned_gt_inds"), case.args["mask_size"]
    if case.args.get("masks") == "polygon":
        cut, flat = case.array("in.polygon_offsets").tolist(), case.array("in.polygons").double()
        polys = [flat[a:b].view(-1, 2) for a, b in zip(cut, cut[1:])]
        out = []
        for b, i in zip(boxes.double(), which.tolist()):
            p = (polys[i] - b[:2]) * size / (b[2:] - b[:2]).clamp(min=0.1)
            out.append(torch.as_tensor(rle_decode(polygons_to_rle([p.flatten().tolist()], (size, size)))))
        return case.check("target", torch.stack(out).float())
    out = cut_masks(bits(case, "in.gt_masks"), which, boxes, size)
    case.check("target", out if case.args["soft_mask_target"] else (out >= 0.5).float())


@pytest.mark.parametrize("case", cases("roi", "FCNMaskHead.predict_by_feat"))
def test_pasted(case):
    "The stored boxes are already in the frame of the masks: MMDetection rescales them in place"
    s, x, boxes, labels = case.settings, case.array("in.mask_logits"), case.array("in.bboxes"), case.array("in.labels")
    p = x[:, 0] if case.args["class_agnostic"] and x.shape[1] == 1 else x[torch.arange(len(x)), labels * (not case.args["class_agnostic"])]
    size = s["ori_shape"] if s["rescale"] else s["img_shape"]
    thr = s["mask_thr_binary"]
    out = sample_masks(p.sigmoid(), boxes, tuple(size), thr if thr >= 0 else None)
    if thr < 0:
        got, want = (out * 255).to(torch.uint8).int(), case.array("out.masks").int()
        assert got.shape == want.shape and (got - want).abs().max() <= 1 and (got != want).float().mean() < 1e-3
    else:
        assert out.equal(bits(case, "out.masks").bool())
