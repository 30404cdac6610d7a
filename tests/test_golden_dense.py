"ATSS, GFL, VFNet and TOOD as wholes against figures recorded from MMDetection: maps, raw outputs, detections, loss terms, gradients"
import functools
import re

import pytest
import torch

from golden import DetectorCase, detectors
from visdet.data.targets import make_targets
from visdet.models.zoo import create_model

NAMES = "atss", "gfl", "vfnet", "tood"
TOL = 1e-4
RULES = [
    (r"body\.net\.", "backbone."),
    (r"neck\.lateral\.", "neck.lateral_convs."),
    (r"neck\.smooth\.", "neck.fpn_convs."),
    (r"neck\.more\.(\d)\.", lambda m: f"neck.fpn_convs.{int(m[1]) + 3}."),
    (r"head\.(cls|reg)_tower\.", r"bbox_head.\1_convs."),
    (r"\.norm\.", ".gn."),
]
LAST = dict(
    atss=[(r"head\.(cls|reg)\.", r"bbox_head.atss_\1."), (r"head\.ctr\.", "bbox_head.atss_centerness.")],
    vfnet=[
        (r"head\.(cls|reg|fine)_star\.", lambda m: f"bbox_head.vfnet_{'reg_refine' if m[1] == 'fine' else m[1]}_dconv."),
        (r"head\.fine\.", "bbox_head.vfnet_reg_refine."),
        (r"head\.(cls|reg|reg_conv)\.", r"bbox_head.vfnet_\1."),
    ],
    tood=[
        (r"head\.stack\.", "bbox_head.inter_convs."),
        (r"head\.(cls|reg)_part\.attention\.", r"bbox_head.\1_decomp.layer_attention."),
        (r"head\.(cls|reg)_part\.reduce\.", r"bbox_head.\1_decomp.reduction_conv."),
        (r"head\.(cls|reg)\.", r"bbox_head.tood_\1."),
        (r"head\.agree\.", "bbox_head.cls_prob_module."),
        (r"head\.shift\.", "bbox_head.reg_offset_module."),
    ],
    gfl=[(r"head\.(cls|reg)\.", r"bbox_head.gfl_\1."), (r"head\.integral\.", "bbox_head.integral.")],
)
ARGS = dict(atss={}, gfl={}, vfnet={}, tood={})
TERMS = dict(loss_cls="cls", loss_bbox="box", loss_centerness="ctr", loss_dfl="dfl", loss_bbox_rf="fine")


def theirs(case, k):
    "MMDetection's name of a tensor"
    for a, b in RULES[:-1] + LAST[case.id] + RULES[-1:]:
        k = re.sub("^" + a if a[0] != "\\" else a, b, k)
    return k


def tensors(case, named):
    "MMDetection's name of each tensor of a model -> the tensor; level scales are one tensor each there"
    for k, v in named:
        if m := re.fullmatch(r"head\.(scale|fine_scale)\.weight", k):
            for i in range(len(v)):
                yield f"bbox_head.{'scales' if m[1] == 'scale' else 'scales_refine'}.{i}.scale", k, i
        else:
            yield theirs(case, k), k, ...


@functools.cache
def loaded(name):
    "The model with its weights, the normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = create_model(name, num_classes=80, frozen_stages=1, **ARGS[name])
    mine, state = model.state_dict(), case.state()
    for k, own, i in tensors(case, list(mine.items())):
        if k != "bbox_head.integral.project":  # Whole numbers that the constructor makes
            mine[own][i] = state.pop(k)
    assert not state
    model.load_state_dict(mine)
    x = (case.image()[None].float() / 255 - torch.tensor(model.norm[0])[:, None, None]) / torch.tensor(model.norm[1])[:, None, None]
    with torch.no_grad():
        return model.eval(), x, model(x)


def targets(case):
    h, w = case.array("in0.img_shape").tolist()
    return make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], [(h, w)])


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_maps(case):
    model, x, _ = loaded(case.id)
    with torch.no_grad():
        maps = model.body(x)
        for i, o in enumerate(maps):
            case.check(f"eval.backbone#0.{i + 1}", o, TOL)
        for i, o in enumerate(model.neck(maps)):
            case.check(f"eval.neck#0.{i}", o, TOL)


def seen(case, raw):
    "What the head gives in MMDetection, in its order"
    if case.id == "tood":
        return [[o.sigmoid() for o in raw["cls"]], raw["reg"]]
    return [raw[k] for k in ("cls", "fine" if "fine" in raw else "reg", "ctr") if k in raw]


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_raw(case):
    for j, maps in enumerate(seen(case, loaded(case.id)[2])):
        for i, o in enumerate(maps):
            case.check(f"eval.bbox_head#0.{j}.{i}", o, TOL)


@pytest.mark.parametrize("kind", ["own", "thr0"])
@pytest.mark.parametrize("case", detectors(*NAMES))
def test_predictions(case, kind):
    "Equal scores may stand in another order; boxes are clipped to the image here"
    model, x, raw = loaded(case.id)
    old, size = model.head.score_thr, case.array("in0.img_shape").tolist()
    try:
        model.head.score_thr = 0.0 if kind == "thr0" else old
        d = model.decode(raw, [size])[0]
    finally:
        model.head.score_thr = old
    b, s, c = (case.array(f"pred.{kind}.0.{k}") for k in ("bboxes", "scores", "labels"))
    b = torch.stack([b[:, 0::2].clamp(0, size[1]), b[:, 1::2].clamp(0, size[0])], -1).flatten(1)
    assert len(d) == len(s)
    assert (d.scores - s).abs().max() <= TOL
    cost = torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()
    near, row = cost.min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.1, f"{case!r}: {near.max():.3g} pixels and thousandths of score"


@functools.cache
def stepped(name):
    "Loss terms and gradient norms by MMDetection's names; the body's batch norms keep their statistics, as there"
    case, (model, x, _) = DetectorCase(name), loaded(name)
    model.train()
    model.body.eval()
    model.zero_grad()
    terms = model.loss(model(x), targets(case))
    sum(terms.values()).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    norms = {k: grads[own][i].norm().item() for k, own, i in tensors(case, list(grads.items()))}
    model.zero_grad()
    model.eval()
    return {k: v.item() for k, v in terms.items()}, norms


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_losses(case):
    mine, want = stepped(case.id)[0], {}
    for k, v in zip(case.doc["loss_names"], case.array("loss.values").tolist()):
        k = TERMS[k.split(".")[0]]
        want[k] = want.get(k, 0.0) + v
    assert set(mine) == set(want)
    for k in want:
        assert mine[k] == pytest.approx(want[k], rel=TOL, abs=1e-6), (case, k)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_gradients(case):
    norms, names, want = stepped(case.id)[1], case.doc["grad_names"], case.array("grad.norms")
    assert {k for k, v in norms.items()} == set(names)
    got = torch.tensor([norms[k] for k in names])
    off = (got - want).abs() / (want + 1e-3 * want.max())
    assert off.max() <= 1e-3, f"{names[int(off.argmax())]}: {got[off.argmax()]:.6g} instead of {want[off.argmax()]:.6g}"
