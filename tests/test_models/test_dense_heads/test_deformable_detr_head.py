"""The behaviours that MMDetection states for the head of Deformable DETR, over random maps of an image of 256 x 256

Once without objects and once with one; plain, with refined boxes, and with queries from the encoder. The last form is DINO's.
"""
import pytest
import torch

from visdet.data.targets import make_targets
from visdet.nn.dino_head import DINOHead
from visdet.nn.query_head import DeformableDETRHead

BEHAVIOURS = {
    "without objects: class terms of every layer above 0, box and overlap terms 0": "test_empty",
    "with one object: every term of every layer above 0": "test_one_object",
    "branches are shared by the layers, or each layer has its own": "test_branches",
    "scores begin at one per cent, boxes at their references": "test_start",
}
S, LAYERS = 256, 3
FORMS = [
    (DeformableDETRHead, dict()),
    (DeformableDETRHead, dict(refine=True)),
    (DeformableDETRHead, dict(refine=True, two_stage=True)),
    (DINOHead, dict(dn_num=4)),
]


def head(kind, kw, **more):
    torch.manual_seed(0)
    return kind(4, 32, 3, 12, 1, LAYERS, 4, 2, 64, 0.0, **kw, **more)


def run(h, boxes, labels):
    g = torch.Generator().manual_seed(0)
    maps = [torch.rand(1, 32, S // s, S // s, generator=g) for s in (8, 16, 32)]
    t = make_targets([torch.tensor(boxes).view(-1, 4)], [torch.tensor(labels, dtype=torch.long)], [(S, S)])
    raw = h(maps, torch.zeros(1, 3, S, S), t.sizes, t)
    return raw, t, h.loss(raw, t)


def prefixes(h):
    "What stands before the names of terms"
    layers = [f"d{i}." for i in range(LAYERS - 1)] + [""]
    return layers + (["enc_"] if h.two_stage else [])


@pytest.mark.parametrize("kind,kw", FORMS)
def test_empty(kind, kw):
    h = head(kind, kw)
    _, _, terms = run(h, [], [])
    for p in prefixes(h):
        assert terms[f"{p}cls"] > 0 and terms[f"{p}box"] == 0 and terms[f"{p}iou"] == 0
    assert all(v == 0 for k, v in terms.items() if "dn_" in k)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in h.parameters())


@pytest.mark.parametrize("kind,kw", FORMS)
def test_one_object(kind, kw):
    h = head(kind, kw)
    _, _, terms = run(h, [[23.6667, 23.8757, 238.6326, 151.8874]], [2])
    want = [p + k for p in prefixes(h) for k in ("cls", "box", "iou")]
    want += [p + "dn_" + k for p in prefixes(h)[:LAYERS] for k in ("cls", "box", "iou")] if kind is DINOHead else []
    assert set(terms) == set(want) and all(v.ndim == 0 and v.isfinite() and v > 0 for v in terms.values())


def test_branches():
    n = LAYERS
    for kw, layers, kinds in ((dict(), n, 1), (dict(refine=True), n, n), (dict(two_stage=True), n + 1, 1), (dict(two_stage=True, refine=True), n + 1, n + 1)):
        h = head(DeformableDETRHead, kw)
        for b in (h.cls_branches, h.reg_branches):
            assert len(b) == layers and len({id(o) for o in b}) == kinds
    assert len({id(o) for o in head(DINOHead, {}).reg_branches}) == n + 1


@pytest.mark.parametrize("kind,kw", FORMS)
def test_start(kind, kw):
    h = head(kind, kw).eval()
    raw, _, _ = run(h, [], [])
    for o in h.cls_branches:
        assert torch.allclose(o.bias.sigmoid(), torch.tensor(0.01), atol=1e-4)
    boxes = torch.stack(raw["reg"])
    assert torch.allclose(boxes, boxes[:1].expand_as(boxes), atol=2e-3 if kind is DINOHead else 1e-4)
    if not h.two_stage and not h.refine:
        assert torch.allclose(boxes[..., 2:], torch.tensor(-2.0).sigmoid().expand_as(boxes[..., 2:]), atol=1e-4)
