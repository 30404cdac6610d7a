"Cascade R-CNN with MMDetection's weights against what MMDetection computed"
import functools

import numpy as np
import pytest
import torch

from golden import ROOT, DetectorCase
from visdet.cv.sample_masks import sample_masks
from visdet.data.targets import make_targets
from visdet.models.cascade import cascade_mask_rcnn, cascade_rcnn
from visdet.models.mmdet import to_mmdet
from visdet.models.mmdet_keys import take_keys
from visdet.nn.mask_head import cut_masks

TOL = 1e-4
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="the recorded figures are not here: set VISDET_GOLDEN")
NAMES = pytest.mark.parametrize("name", ["cascade-rcnn", "cascade-mask-rcnn"])


@functools.cache
def loaded(name):
    "Case, model with its weights, normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = (cascade_mask_rcnn if "mask" in name else cascade_rcnn)(80, roi_num=1048576, rpn_num=1048576, frozen_stages=1).eval()
    state = case.state()
    got, used, *problems = take_keys(model, state)
    assert problems == [[], [], []]
    model.load_state_dict(got)
    back = to_mmdet(model)
    assert all(torch.equal(back[k], v) for k, v in state.items())
    pre = case.doc["data_preprocessor"]
    x = ((case.image().float() - torch.tensor(pre["mean"])[:, None, None]) / torch.tensor(pre["std"])[:, None, None])[None]
    with torch.no_grad():
        return case, model, x, model(x)


@NAMES
def test_raw(name):
    case, model, x, raw = loaded(name)
    for j, k in enumerate(("cls", "reg")):
        for i, o in enumerate(raw["rpn"][k]):
            case.check(f"eval.rpn_head#0.{j}.{i}", o, TOL)
    props = case.array("proposals.0.bboxes")
    assert len(raw["rois"]) == len(props)
    rois, sizes = torch.cat([torch.zeros(len(props), 1), props], 1), [case.array("in0.img_shape").tolist()]
    with torch.no_grad():
        feats = model.features(x)
        for i, s in enumerate(model.head.stages):
            case.check(f"eval.roi_head.bbox_roi_extractor.{i}#0", s.pool(feats, rois), TOL)
            cls, reg = s(feats, rois)
            case.check(f"eval.roi_head.bbox_head.{i}#0.0", cls, TOL)
            case.check(f"eval.roi_head.bbox_head.{i}#0.1", reg, TOL)
            rois = s.moved(reg, rois, sizes)


@NAMES
@pytest.mark.parametrize("kind", ["own", "thr0"])
def test_predictions(name, kind):
    case, model, x, raw = loaded(name)
    old = model.head.score_thr
    try:
        model.head.score_thr = 0.0 if kind == "thr0" else old
        size = case.array("in0.img_shape").tolist()
        d = model.decode(raw, [size])[0]
    finally:
        model.head.score_thr = old
    b, s, c = (case.array(f"pred.{kind}.0.{k}") for k in ("bboxes", "scores", "labels"))
    assert len(d) == len(s) and (d.scores - s).abs().max() <= TOL
    near, row = (torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()).min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.1, float(near.max())
    if "mask" not in name:
        return
    masks = sample_masks(d.mask_probs, d.boxes, size)
    assert (masks.flatten(1).sum(1) - case.array(f"pred.{kind}.0.mask_areas")[row]).abs().max() <= 4
    n, h, w = case.array(f"pred.{kind}.0.masks_top10_shape").tolist()
    top = torch.from_numpy(np.unpackbits(case.array(f"pred.{kind}.0.masks_top10_bits").numpy(), axis=-1, count=w).astype(bool))
    for m, r in zip(masks, row.tolist()):
        assert r >= n or (m != top[r]).sum() <= 4


@NAMES
def test_losses(name):
    case, model, x, _ = loaded(name)
    h, w = case.array("in0.img_shape").tolist()
    masks = case.bits("in0.gt_masks_bits", w).to(torch.uint8) if case.has("in0.gt_masks_bits") else None
    t = make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], [(h, w)], masks=masks)
    was = {m: m.training for m in model.modules()}
    try:
        model.train()
        model.body.eval()
        with torch.no_grad():
            raw = model(x, t)
            mine = {k: float(v) for k, v in model.loss(raw, t).items()}
    finally:
        for m, mode in was.items():
            m.training = mode
    names, want = dict(loss_cls="cls", loss_bbox="box", loss_mask="mask"), {}
    for k, v in zip(case.doc["loss_names"], case.array("loss.values").tolist()):
        if "loss" not in k:
            continue
        k = f"{k[:2]}_{names[k[3:]]}" if k[0] == "s" else k.split(".")[0].replace("loss_", "").replace("bbox", "box")
        want[k] = want.get(k, 0.0) + v
    assert set(mine) == set(want)
    for k, v in want.items():
        assert mine[k] == pytest.approx(v, rel=TOL, abs=1e-6 + (doubtful(model, raw, t, int(k[1])) if k.endswith("mask") else 0)), k


def doubtful(model, raw, t, i, near=1e-4):
    "What the pixels of cut masks that lie so close to one half that rounding of the regions decides them can change in the mask term of stage `i`"
    step = raw["steps"][i]
    k = step["mask_row"]
    goal = cut_masks(t.masks, step["rows"]["match"][k], step["rows"]["rois"][k, 1:], 28)
    doubt = (goal - 0.5).abs() <= near
    assert doubt.float().mean() < 1e-3
    return float(step["mask"][doubt].abs().sum() / goal.numel() * model.weights[i]) * 1.01


def test_no_objects():
    "Terms of boxes and masks are zero, those of classes are not"
    torch.manual_seed(0)
    model = cascade_mask_rcnn(4, body="resnet18", channels=16, hidden=16, mask_channels=16, mask_convs=1, roi_num=32)
    t = make_targets([torch.zeros(0, 4)], [torch.zeros(0).long()], [(64, 64)])
    terms = model.loss(model(torch.randn(1, 3, 64, 64), t), t)
    for k, v in terms.items():
        assert v.item() == 0 if k.endswith(("box", "mask")) else v.item() > 0, k
