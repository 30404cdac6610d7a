"Whole detectors with MMDetection's weights against what MMDetection computed"
import functools

import pytest
import torch

from golden import DetectorCase, detectors
from visdet.data.targets import make_targets
from visdet.models.certificate import certificate
from visdet.models.mmdet import load_mmdet, to_mmdet
from visdet.models.mmdet_keys import key_table

NAMES = "retinanet", "fcos", "faster-rcnn", "mask-rcnn", "mask-rcnn_swin-t"
TOL = 1e-4


@functools.cache
def loaded(name):
    "The model with its weights, the normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = load_mmdet(case.config, case.state())
    x = (case.image()[None].float() / 255 - torch.tensor(model.norm[0])[:, None, None]) / torch.tensor(model.norm[1])[:, None, None]
    with torch.no_grad():
        return model, x, model(x)


def targets(case):
    "The recorded annotation"
    h, w = case.array("in0.img_shape").tolist()
    masks = case.bits("in0.gt_masks_bits", w).to(torch.uint8) if case.has("in0.gt_masks_bits") else None
    return make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], [(h, w)], masks=masks)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_keys(case):
    model = loaded(case.id)[0]
    assert not model.mmdet_report.problems()
    back = to_mmdet(model)
    state = case.state()
    assert set(state) <= set(back)
    for k, v in state.items():
        assert torch.equal(back[k], v), k
    assert sum(p.numel() for p in back.values() if p.is_floating_point()) >= case.doc["num_params"]


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_maps(case):
    model, x, _ = loaded(case.id)
    with torch.no_grad():
        maps = model.body(x)
        skip = 4 - len(maps)
        for i, o in enumerate(maps):
            case.check(f"eval.backbone#0.{i + skip}", o, TOL)
        for i, o in enumerate(model.neck(maps)):
            case.check(f"eval.neck#0.{i}", o, TOL)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_raw(case):
    model, x, raw = loaded(case.id)
    head, raw = ("rpn_head", raw["rpn"]) if "rpn" in raw else ("bbox_head", raw)
    for j, k in enumerate(k for k in ("cls", "reg", "ctr") if k in raw):
        for i, o in enumerate(raw[k]):
            if k == "reg" and case.id == "fcos":
                o = o * model.head.strides[i]
            case.check(f"eval.{head}#0.{j}.{i}", o, TOL)


@pytest.mark.parametrize("case", detectors("faster-rcnn", "mask-rcnn", "mask-rcnn_swin-t"))
def test_regions(case):
    model, x, raw = loaded(case.id)
    props = case.array("proposals.0.bboxes")
    mine = raw["rois"][:, 1:]
    assert len(mine) == len(props)
    assert (torch.cdist(mine, props, p=1).min(1).values <= 1e-2).all()
    rois = torch.cat([torch.zeros(len(props), 1), props], 1)
    with torch.no_grad():
        feats = model.features(x)
        case.check("eval.roi_head.bbox_roi_extractor#0", model.head.pool(feats, rois), TOL)
        for i, o in enumerate(model.head(feats, rois)):
            case.check(f"eval.roi_head.bbox_head#0.{i}", o, TOL)


def same_detections(case, d, kind):
    "Compare with recorded predictions; equal scores may stand in another order"
    b, s, c = (case.array(f"pred.{kind}.0.{k}") for k in ("bboxes", "scores", "labels"))
    assert len(d) == len(s)
    assert (d.scores - s).abs().max() <= TOL
    cost = torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()
    near, row = cost.min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.1, f"{case!r}: {near.max():.3g} pixels and thousandths of score"
    return row


@pytest.mark.parametrize("kind", ["own", "thr0"])
@pytest.mark.parametrize("case", detectors(*NAMES))
def test_predictions(case, kind):
    model, x, raw = loaded(case.id)
    old = model.head.score_thr
    try:
        if kind == "thr0":
            model.head.score_thr = 0.0
        d = model.decode(raw, [case.array("in0.img_shape").tolist()])[0]
    finally:
        model.head.score_thr = old
    row = same_detections(case, d, kind)
    if not case.has(f"pred.{kind}.0.mask_areas"):
        return
    area = case.array(f"pred.{kind}.0.mask_areas")[row]
    masks = torch.as_tensor(d.masks)
    assert (masks.flatten(1).sum(1) - area).abs().max() <= 4
    top = case.bits(f"pred.{kind}.0.masks_top10_bits", masks.shape[-1])
    for i, r in enumerate(row.tolist()):
        if r < len(top):
            assert (masks[i] != top[r]).sum() <= 4


def step(case):
    "Loss terms of one step in training, with gradients in the model"
    model, x, _ = loaded(case.id)
    t = targets(case)
    was = {m: m.training for m in model.modules()}
    try:
        model.train().zero_grad()
        terms = model.loss(model(x, t) if model.needs_targets else model(x), t)
        sum(terms.values()).backward()
    finally:
        for m, mode in was.items():
            m.training = mode
    return model, {k: float(v.detach()) for k, v in terms.items()}


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_losses(case):
    model, mine = step(case)
    names = dict(loss_cls="cls", loss_bbox="box", loss_centerness="ctr", loss_rpn_cls="rpn_cls", loss_rpn_bbox="rpn_box", loss_mask="mask")
    want = {}
    for k, v in zip(case.doc["loss_names"], case.array("loss.values").tolist()):
        if "loss" in k:
            k = names[k.split(".")[0]]
            want[k] = want.get(k, 0.0) + v
    assert set(mine) == set(want)
    for k in want:
        assert mine[k] == pytest.approx(want[k], rel=TOL, abs=1e-6), (case, k)
    compare_gradients(case, model)


def compare_gradients(case, model, tol=1e-3):
    "The norm of each parameter's gradient; those there is none of are zero in the recording"
    params = dict(model.named_parameters())
    names = {r.theirs: r for r in key_table(model, model.mmdet_report.bgr)}
    want = case.array("grad.norms")
    worst = 0.0
    for k, w in zip(case.doc["grad_names"], want.tolist()):
        r = names[k]
        g = params[r.mine].grad
        g = 0.0 if g is None else float((g[r.row] if r.how == "row" else g).double().norm())
        worst = max(worst, abs(g - w) / (w + 1e-4 * float(want.max())))
    assert worst <= tol, (case, worst)


@pytest.mark.parametrize("case", detectors(*NAMES, "cascade-rcnn", "cascade-mask-rcnn", "yolox_s"))
def test_certificate(case):
    model = load_mmdet(case.config, case.state())
    assert not model.mmdet_report.problems()
    c = certificate(model, golden=case._file.with_suffix(".npz"))
    assert c.ok and len(c["outputs"]) >= 9 and c["worst"] <= TOL


@pytest.mark.parametrize("case", detectors("retinanet"))
def test_broken_weights_are_seen(case):
    state = case.state()
    state["backbone.layer2.0.conv1.weight"] = state["backbone.layer2.0.conv1.weight"].flip(0)
    assert not certificate(load_mmdet(case.config, state), golden=case._file.with_suffix(".npz")).ok
    fcos = DetectorCase("fcos")
    wrong = {**fcos.config, "data_preprocessor": {**fcos.config["data_preprocessor"], "bgr_to_rgb": True}}
    assert not certificate(load_mmdet(wrong, fcos.state()), golden=fcos._file.with_suffix(".npz")).ok
    style = {**fcos.config, "backbone": {**fcos.config["backbone"], "style": "pytorch"}}
    assert not certificate(load_mmdet(style, fcos.state()), golden=fcos._file.with_suffix(".npz")).ok
