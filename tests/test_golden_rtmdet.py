"RTMDet, with masks and without, against figures recorded from MMDetection: raw outputs, detections, loss terms, gradients"
import copy
import functools

import pytest
import torch

from golden import DetectorCase, detectors
from visdet.core.basics import CheckpointError
from visdet.data.targets import make_targets
from visdet.models.certificate import certificate
from visdet.models.mmdet import load_mmdet, to_mmdet
from visdet.models.mmdet_keys import key_table

NAMES = "rtmdet_s", "rtmdet-ins_s"

@functools.cache
def loaded(name):
    "The case, the model with its weights, the normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = load_mmdet(case.config, case.state())
    mean, std = (torch.tensor(o)[:, None, None] for o in model.norm)
    x = (case.image()[None].float() / 255 - mean) / std
    with torch.no_grad():
        return case, model, x, model(x)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_keys_and_certificate(case):
    "Every tensor comes over and goes back, shared ones under all their names; and the certificate agrees"
    case, model, _, _ = loaded(case.id)
    assert not model.mmdet_report.problems()
    back, state = to_mmdet(model), case.state()
    assert set(back) == set(state) and all(torch.equal(back[k], v) for k, v in state.items())
    c = certificate(model, golden=case._file.with_suffix(".npz"))
    assert c.ok and c["worst"] <= 1e-4 and len(c["outputs"]) == (16 if "ins" in case.id else 12)


@pytest.mark.parametrize("case", detectors("rtmdet-ins_s"))
def test_copies_that_differ_are_refused(case):
    state = case.state()
    state["bbox_head.reg_convs.1.0.conv.weight"] = state["bbox_head.reg_convs.1.0.conv.weight"] + 1
    with pytest.raises(CheckpointError, match="twin"):
        load_mmdet(case.config, state)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_maps(case):
    case, model, x, raw = loaded(case.id)
    with torch.no_grad():
        maps = model.body(x)
        for i, (o, p) in enumerate(zip(maps, model.neck(maps))):
            case.check(f"eval.backbone#0.{i}", o, 1e-4)
            case.check(f"eval.neck#0.{i}", p, 1e-4)
    for j, k in enumerate(k for k in ("cls", "reg", "kernel") if k in raw):
        for i, o in enumerate(raw[k]):
            case.check(f"eval.bbox_head#0.{j}.{i}", o, 1e-4)
    if "mask" in raw:
        case.check("eval.bbox_head#0.3", raw["mask"], 1e-4)
    assert sum(p.numel() for p in model.parameters()) == case.doc["num_params"]


@pytest.mark.parametrize("kind", ["own", "thr0"])
@pytest.mark.parametrize("case", detectors(*NAMES))
def test_predictions(case, kind):
    case, model, x, raw = loaded(case.id)
    old = model.head.score_thr
    model.head.score_thr = 0.0 if kind == "thr0" else old
    d = model.decode(raw, [case.array("in0.img_shape").tolist()])[0]
    model.head.score_thr = old
    b, s, c = (case.array(f"pred.{kind}.0.{k}") for k in ("bboxes", "scores", "labels"))
    assert len(d) == len(s) and (d.scores - s).abs().max() <= 1e-4
    cost = torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()
    near, row = cost.min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.1
    if not case.has(f"pred.{kind}.0.mask_areas"):
        return
    masks, area = d.masks, case.array(f"pred.{kind}.0.mask_areas")[row]
    assert (masks.flatten(1).sum(1) - area).abs().max() <= 4
    top = case.bits(f"pred.{kind}.0.masks_top10_bits", masks.shape[-1])
    for i, r in enumerate(row.tolist()):
        if r < len(top):
            assert (masks[i] != top[r]).sum() <= 4


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_losses_and_gradients(case):
    "Batch norms learn here, in batches of one image; the reference itself moves by 1e-4 in its terms, and by 1e-2 and more in small gradients"
    case, model, x, _ = loaded(case.id)
    h, w = case.array("in0.img_shape").tolist()
    masks = case.bits("in0.gt_masks_bits", w).to(torch.uint8) if case.has("in0.gt_masks_bits") else None
    t = make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], [(h, w)], masks=masks)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train().zero_grad()
    terms = model.loss(model(x), t)
    sum(terms.values()).backward()
    model.load_state_dict(state)
    model.eval()
    want = {}
    for k, v in zip(case.doc["loss_names"], case.array("loss.values").tolist()):
        k = dict(loss_cls="cls", loss_bbox="box", loss_mask="mask")[k.split(".")[0]]
        want[k] = want.get(k, 0.0) + v
    assert set(terms) == set(want)
    for k, v in want.items():
        assert terms[k].item() == pytest.approx(v, rel=3e-4), k
    twin, y = copy.deepcopy(model).double().train(), x.double()
    with torch.no_grad():
        exact = twin.loss(twin(y), t)
    for k, v in want.items():
        assert exact[k].item() == pytest.approx(v, rel=5e-5), k
    theirs = {o.mine: o.theirs for o in reversed(key_table(model))}
    norms = {theirs[k]: p.grad.norm() for k, p in model.named_parameters()}
    got, want = torch.stack([norms[k] for k in case.doc["grad_names"]]), case.array("grad.norms")
    assert len(norms) == len(want)
    off = (got - want).abs() / (want + 1e-3 * want.max())
    assert off.max() < 1e-2 and off.median() < 1e-3
