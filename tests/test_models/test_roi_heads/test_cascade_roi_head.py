"What MMDetection's tests say of a cascade's stages: terms of every stage, zero boxes and masks without objects"
import pytest
import torch

from visdet.core.testing import rand_boxes
from visdet.data.targets import make_targets
from visdet.models.zoo import create_model

BEHAVIOURS = {
    "losses of every stage, named by it": "test_terms",
    "no object: every box and mask term == 0": "test_terms",
}
WITHOUT = {}

SMALL = dict(body="resnet18", channels=16, hidden=16, roi_num=32, pre=(100, 100), post=(50, 50))
KINDS = {
    "boxes": ("cascade_rcnn", {}),
    "masks": ("cascade_mask_rcnn", dict(mask_channels=8, mask_convs=1)),
    "each class": ("cascade_rcnn", dict(box_head=dict(shared_convs=1, channels=16, norm="gn"), agnostic=False, roi_loss="giou", roi_weights=(1.0, 10.0))),
    "hard": ("cascade_rcnn", dict(roi_sampler="OHEMSampler")),
}


def batch(counts, masks):
    torch.manual_seed(0)
    boxes = [rand_boxes(n, (96, 128), i, 16) for i, n in enumerate(counts)]
    flat = (torch.rand(sum(counts), 96, 128) > 0.3).to(torch.uint8) if masks else None
    return torch.randn(len(counts), 3, 96, 128), make_targets(boxes, [torch.arange(n) % 3 for n in counts], [(96, 128)] * len(counts), masks=flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)], ids=["objects", "none"])
def test_terms(kind, counts):
    name, kw = KINDS[kind]
    torch.manual_seed(0)
    m = create_model(name, 3, **SMALL, **kw)
    x, t = batch(counts, kind == "masks")
    loss = m.loss(m(x, t), t)
    parts = ("cls", "box", "mask") if kind == "masks" else ("cls", "box")
    assert set(loss) == {"rpn_cls", "rpn_box", *(f"s{i}_{k}" for i in range(3) for k in parts)}
    assert all(v >= 0 and v.isfinite() for v in loss.values())
    if not sum(counts):
        assert all(v == 0 for k, v in loss.items() if k.endswith(("box", "mask"))) and all(loss[f"s{i}_cls"] > 0 for i in range(3))
    sum(loss.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)


def test_factors_of_the_stages():
    "The terms of a stage are multiplied by its factor"
    x, t = batch((3, 1), False)
    res = []
    for w in ((1.0, 0.5, 0.25), (1.0, 1.0, 1.0)):
        torch.manual_seed(0)
        m = create_model("cascade_rcnn", 3, **SMALL, stage_weights=w).eval()
        with torch.no_grad():
            res.append(m.loss(m(x, t), t))
    for i, f in enumerate((1.0, 0.5, 0.25)):
        for k in ("cls", "box"):
            assert float(res[0][f"s{i}_{k}"]) == pytest.approx(f * float(res[1][f"s{i}_{k}"]), rel=1e-5, abs=1e-9)


def test_classes_of_moved_regions():
    "With a box for each class, a positive moves by its object's class, another region by the likeliest"
    torch.manual_seed(0)
    m = create_model("cascade_rcnn", 3, **SMALL, agnostic=False)
    for s in m.head.stages:
        torch.nn.init.normal_(s.reg.weight, std=0.1)
    x, t = batch((3, 1), False)
    steps = m(x, t)["steps"]
    rows, cls, reg = (steps[0][k] for k in ("rows", "cls", "reg"))
    lbl = torch.where(rows["match"] >= 0, t.labels[rows["rois"][:, 0].long(), rows["match"].clamp(min=0)], cls[:, :-1].argmax(1))
    moved = m.head.stages[0].moved(reg, rows["rois"], t.sizes, lbl)
    nxt = steps[1]["rows"]["rois"]
    own = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(t.boxes)])
    assert torch.cdist(nxt, torch.cat([moved, own]), p=1).min(1).values.max() < 1e-3
