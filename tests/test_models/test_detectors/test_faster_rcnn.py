"What MMDetection's tests say of detectors of two stages: their parts, a loss and a prediction of uneven images, no objects, no proposals"
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.core.testing import rand_boxes
from visdet.data.targets import make_targets
from visdet.models.zoo import create_model

BEHAVIOURS = {
    "body, neck, proposal network and second stage are there": "test_parts",
    "the proposal network has one class whatever the configuration says": "test_parts",
    "loss of uneven images is a dictionary": "test_loss",
    "backward with ten boxes and with none": "test_loss",
    "training without proposals": "test_no_proposals",
    "two images, two predictions": "test_prediction",
    "inference one image at a time": "test_one_image",
}
WITHOUT = {"Sparse R-CNN and QueryInst": "not among the models", "run information of a message hub": "models read none"}

SMALL = dict(body="resnet18", channels=16, hidden=16, roi_num=64, pre=(200, 100), post=(100, 50))
MASKS = dict(mask_channels=8, mask_convs=1)
KINDS = {
    "faster_rcnn": ("faster_rcnn", {}),
    "ohem": ("faster_rcnn", dict(roi_sampler="OHEMSampler")),
    "4conv1fc": ("faster_rcnn", dict(box_head=dict(norm="gn", channels=16))),
    "double_head_rcnn": ("double_head_rcnn", dict(head_channels=16, head_convs=1)),
    "cascade_rcnn": ("cascade_rcnn", {}),
    "mask_rcnn": ("mask_rcnn", MASKS),
    "coarse": ("mask_rcnn", dict(MASKS, mask_head="coarse")),
    "mask_scoring_rcnn": ("mask_scoring_rcnn", dict(MASKS, iou_channels=8, iou_hidden=8)),
    "cascade_mask_rcnn": ("cascade_mask_rcnn", MASKS),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def model(kind, **kw):
    torch.manual_seed(0)
    name, more = KINDS[kind]
    return create_model(name, 4, **{**SMALL, **more, **kw})


def masked(kind):
    return "mask" in KINDS[kind][0]


def batch(counts, sizes=((128, 128), (125, 130)), masks=False):
    "Images of uneven sizes, padded to a multiple of 32"
    h, w = (-(-max(s[i] for s in sizes) // 32) * 32 for i in (0, 1))
    boxes = [rand_boxes(n, s, 7 + i, 12) for i, (n, s) in enumerate(zip(counts, sizes))]
    x = torch.zeros(len(sizes), 3, h, w)
    for o, s in zip(x, sizes):
        o[:, : s[0], : s[1]] = torch.randn(3, *s)
    flat = (torch.rand(sum(counts), h, w) > 0.3).to(torch.uint8) if masks else None
    return x, make_targets(boxes, [torch.randint(0, 4, (n,)) for n in counts], list(sizes), masks=flat)


@ALL
def test_parts(kind):
    m = model(kind)
    assert all(getattr(m, k) is not None for k in ("body", "neck", "rpn", "head")) and (getattr(m, "mask", None) is not None) == masked(kind)
    assert m.rpn.cls.out_channels == m.rpn.levels.gen.num_per_cell[0]  # object or not, however many classes there are


@ALL
@pytest.mark.parametrize("counts", [(10, 3), (0, 2), (0, 0)], ids=["objects", "one image without", "none"])
def test_loss(kind, counts):
    "A dictionary of scalars with a gradient, for ten boxes and for none"
    m = model(kind)
    x, t = batch(counts, masks=masked(kind))
    loss = m.loss(m(x, t), t)
    assert isinstance(loss, dict) and {"rpn_cls", "rpn_box"} <= set(loss) and all(v.ndim == 0 and v.isfinite() for v in loss.values())
    total = sum(loss.values())
    assert total > 0 and total.requires_grad
    total.backward()
    if not sum(counts):
        assert all(v == 0 for k, v in loss.items() if k.endswith(("box", "mask", "mask_iou")))


@ALL
def test_prediction(kind):
    "Two images of uneven sizes give two lists of detections inside their images"
    m = model(kind).eval()
    m.head.score_thr = 0.1
    sizes = ((256, 256), (255, 260)) if masked(kind) else ((128, 128), (125, 130))
    x, _ = batch((0, 0), sizes)
    with torch.no_grad():
        res = m.decode(m(x, sizes=torch.tensor(sizes)), sizes)
    assert len(res) == 2 and sum(map(len, res)) > 0
    for d, (h, w) in zip(res, sizes):
        assert d.size == (h, w) and (d.boxes >= 0).all() and (d.boxes[:, 0::2] <= w).all() and (d.boxes[:, 1::2] <= h).all() and len(d) <= 100
        if masked(kind) and len(d):
            assert torch.as_tensor(d[:2].masks).shape[1:] == (h, w)


@ALL
@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_no_proposals(kind, counts):
    "A first stage that finds nothing leaves the objects to learn from, or nothing at all, and no failure"
    m = model(kind)
    m.rpn.proposals = lambda raw, sizes, pre, post: [torch.zeros(0, 4) for _ in sizes]
    x, t = batch(counts, masks=masked(kind))
    loss = m.loss(m(x, t), t)
    assert isinstance(loss, dict) and all(v.isfinite() for v in loss.values())
    sum(loss.values()).backward()
    with torch.no_grad():
        assert [len(d) for d in m.eval().decode(m(x), t.sizes)] == [0, 0]


@pytest.mark.parametrize("shape", [(1, 3, 100, 100), (1, 3, 128, 128)])
@pytest.mark.parametrize("kind", ["faster_rcnn", "ohem", "mask_rcnn"])
def test_one_image(kind, shape):
    "Images one at a time, of a size that no stride divides"
    m = model(kind).eval()
    with torch.no_grad():
        assert len(m.decode(m(torch.randn(shape)), [shape[2:]])) == 1


def test_crowds():
    "Anchors and regions in a crowd learn nothing if asked to, and are background else"
    x, _ = batch((0,), ((128, 128),))
    t = make_targets([torch.tensor([[10.0, 10, 60, 60], [64, 0, 128, 128]])], [torch.tensor([0, 1])], [(128, 128)], crowd=[torch.tensor([False, True])])
    a, b = model("faster_rcnn").eval(), model("faster_rcnn", ignore=(0.5, 0.5)).eval()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        rows = [m(x, t)["rows"]["rois"][:, 1:] for m in (a, b)]
    share = [((torch.minimum(r[:, 2], torch.tensor(128.0)) - r[:, 0].clamp(min=64)).clamp(min=0) / (r[:, 2] - r[:, 0]).clamp(min=1e-6)) for r in rows]
    assert (share[0] > 0.5).any() and not (share[1] > 0.5).any()


@pytest.mark.parametrize("bad", [dict(box_head="3fc"), dict(roi_sampler="OHEM"), dict(roi_sampler=dict(type="OHEMSampler", hard=1)), dict(box_head=dict(norm="ln")), dict(roi_loss="l3")])
def test_unknown_parts_are_named(bad):
    with pytest.raises(ConfigError):
        model("faster_rcnn", **bad)
