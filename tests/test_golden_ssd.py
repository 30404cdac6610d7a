"SSD as a whole against figures recorded from MMDetection: keys, maps, raw outputs, detections, loss terms, gradients"
import functools
import re

import pytest
import torch

from golden import DetectorCase, detectors
from visdet.data.targets import make_targets
from visdet.models.mmdet import load_mmdet, to_mmdet
from visdet.models.ssd import ssd

NAMES = ("ssd300",)
TOL = 1e-4
TERMS = dict(loss_cls="cls", loss_bbox="box")
RULES = [(r"^body\.net\.", "backbone."), (r"^neck\.length\.", "neck.l2_norm."), (r"^neck\.more\.", "neck.extra_layers."), (r"^head\.(cls|reg)\.", r"bbox_head.\1_convs.")]


def theirs(k):
    "MMDetection's name of a tensor"
    for a, b in RULES:
        k = re.sub(a, b, k)
    return k


@functools.cache
def loaded(name):
    "The model with its weights, the normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = ssd(80)
    state = case.state()
    model.load_state_dict({k: state.pop(theirs(k)) for k in model.state_dict()})
    assert not state
    mean, std = (torch.tensor(o)[:, None, None] for o in model.norm)
    x = (case.image()[None].float() / 255 - mean) / std
    with torch.no_grad():
        return model.eval(), x, model(x)


def targets(case):
    h, w = case.array("in0.img_shape").tolist()
    return make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], [(h, w)])


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_keys(case):
    "The section and the weights come over whole, and go back"
    model = load_mmdet(case.config, case.state())
    assert not model.mmdet_report.problems() and not model.mmdet_report.differences(True)
    back = to_mmdet(model)
    assert set(back) == set(case.state())
    for k, v in case.state().items():
        assert torch.equal(back[k], v), k
    mine = loaded(case.id)[0]
    for (k, a), (j, b) in zip(model.state_dict().items(), mine.state_dict().items()):
        assert k == j and torch.equal(a, b), k
    assert torch.allclose(torch.tensor(model.norm), torch.tensor(mine.norm)) and sum(p.numel() for p in model.parameters()) == case.doc["num_params"]


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_maps(case):
    model, x, _ = loaded(case.id)
    with torch.no_grad():
        maps = model.body(x)
        for i, o in enumerate(maps):
            case.check(f"eval.backbone#0.{i}", o, TOL)
        for i, o in enumerate(model.neck(maps)):
            case.check(f"eval.neck#0.{i}", o, TOL)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_raw(case):
    for j, k in enumerate(("cls", "reg")):
        for i, o in enumerate(loaded(case.id)[2][k]):
            case.check(f"eval.bbox_head#0.{j}.{i}", o, TOL)


@pytest.mark.parametrize("kind", ["own", "thr0"])
@pytest.mark.parametrize("case", detectors(*NAMES))
def test_predictions(case, kind):
    "Equal scores may stand in another order"
    model, x, raw = loaded(case.id)
    old = model.head.score_thr
    try:
        model.head.score_thr = 0.0 if kind == "thr0" else old
        d = model.decode(raw, [case.array("in0.img_shape").tolist()])[0]
    finally:
        model.head.score_thr = old
    b, s, c = (case.array(f"pred.{kind}.0.{k}") for k in ("bboxes", "scores", "labels"))
    assert len(d) == len(s)
    assert (d.scores - s).abs().max() <= TOL
    cost = torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()
    near, row = cost.min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.1, f"{case!r}: {near.max():.3g} pixels and thousandths of score"


@functools.cache
def stepped(name):
    "Loss terms and gradient norms by MMDetection's names"
    case, (model, x, _) = DetectorCase(name), loaded(name)
    model.train()
    model.zero_grad()
    terms = model.loss(model(x), targets(case))
    sum(terms.values()).backward()
    norms = {theirs(k): p.grad.norm().item() for k, p in model.named_parameters()}
    model.zero_grad()
    model.eval()
    return {k: v.item() for k, v in terms.items()}, norms


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_losses(case):
    mine = stepped(case.id)[0]
    assert len(mine) == len(case.doc["loss_names"])
    for k, v in zip(case.doc["loss_names"], case.array("loss.values").tolist()):
        assert mine[TERMS[k]] == pytest.approx(v, rel=TOL), k


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_gradients(case):
    norms, names, want = stepped(case.id)[1], case.doc["grad_names"], case.array("grad.norms")
    assert set(norms) == set(names)
    got = torch.tensor([norms[k] for k in names])
    off = (got - want).abs() / (want + 1e-3 * want.max())
    assert off.max() <= 1e-3, f"{names[int(off.argmax())]}: {got[off.argmax()]:.6g} instead of {want[off.argmax()]:.6g}"


def test_only_the_hardest_background_learns():
    "With towers of zeros all logits are equal, and each image learns three background anchors for every positive"
    model = ssd(3, body="resnet18", level_channels=[16] * 4)
    x = torch.zeros(2, 3, 64, 96)
    t = make_targets([torch.tensor([[5.0, 5, 60, 60]]), torch.zeros(0, 4)], [torch.tensor([1]), torch.zeros(0, dtype=torch.long)], [(64, 96)] * 2)
    raw = model(x)
    raw = {**raw, "cls": [torch.zeros_like(o).requires_grad_() for o in raw["cls"]]}
    n = int((model.head.assign(raw, t)[1] >= 0).sum())
    sum(model.loss(raw, t).values()).backward()
    moved = sum(int((o.grad.abs().unflatten(1, (-1, 4)).sum(2) > 0).sum()) for o in raw["cls"])
    assert n > 0 and moved == 4 * n
