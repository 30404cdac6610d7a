"ATSS, GFL, VFNet and TOOD as wholes against figures recorded from MMDetection: maps, raw outputs, detections, loss terms, gradients"
import functools
import json
from pathlib import Path

import pytest
import torch

from golden import DetectorCase, detectors
from visdet.data.targets import make_targets
from visdet.models.certificate import certificate
from visdet.models.mmdet import load_mmdet, mmdet_args, to_mmdet
from visdet.models.mmdet_keys import key_table

NAMES = "atss", "gfl", "vfnet", "tood"
TOL = 1e-4
TERMS = dict(loss_cls="cls", loss_bbox="box", loss_centerness="ctr", loss_dfl="dfl", loss_bbox_rf="fine")


@functools.cache
def loaded(name):
    "The model with its weights, the normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = load_mmdet(case.config, case.state(), norm="bn")  # Norms that learn, as there; the tests keep their statistics
    x = (case.image()[None].float() / 255 - torch.tensor(model.norm[0])[:, None, None]) / torch.tensor(model.norm[1])[:, None, None]
    with torch.no_grad():
        return model, x, model(x)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_keys(case):
    model = loaded(case.id)[0]
    assert not model.mmdet_report.problems()
    back, state = to_mmdet(model), case.state()
    assert set(back) - set(state) <= {"bbox_head.integral.project"}
    for k, v in state.items():
        assert torch.equal(back[k], v), k
    name, args, fates = mmdet_args(case.config)
    assert name == case.id and not [o for o in fates if o.effect and not o.key.startswith("model.backbone")], fates


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
    norms = {r.theirs: grads[r.mine][... if r.row is None else r.row].norm().item() for r in key_table(model) if r.mine in grads}
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


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_certificate(case):
    c = certificate(load_mmdet(case.config, case.state()), golden=case._file.with_suffix(".npz"))
    assert c.ok and len(c["outputs"]) >= 18 and c["worst"] <= TOL and c["loss"]["relative"] <= TOL


def test_broken_weights_are_seen():
    for case in (o.values[0] for o in detectors("tood")):
        if case is None:
            return
        state = case.state()
        state["bbox_head.reg_offset_module.2.weight"] = state["bbox_head.reg_offset_module.2.weight"].flip(0)
        assert not certificate(load_mmdet(case.config, state), golden=case._file.with_suffix(".npz")).ok


STOCK = Path(__file__).resolve().parents[2] / "shared/mmdet/configs"


@pytest.mark.parametrize("name", ["atss_r50_fpn_1x_coco", "gfl_r50_fpn_1x_coco"])
def test_published_configurations(name):
    if not (STOCK / f"{name}.json").is_file():
        pytest.skip("the published configurations are not here")
    entry, args, fates = mmdet_args(json.loads((STOCK / f"{name}.json").read_text()))
    assert entry == name.split("_")[0] and args["num_classes"] == 80
    assert not [o for o in fates if o.effect and not o.key.startswith("model.backbone")]
