"Coders against figures recorded from MMDetection, and against gradients in double precision"
import math

import pytest
import torch

from golden import cases
from visdet.core.testing import noise, rand_boxes
from visdet.cv.coder_kinds import BucketingCoder, LegacyDeltaCoder, PseudoCoder, TBLRCoder, YOLOCoder
from visdet.cv.coders import DeltaCoder, DistanceCoder


def delta(a, ratio=16 / 1000):
    top, clamp = abs(math.log(ratio)), a.get("add_ctr_clamp", False)
    return DeltaCoder(a.get("target_stds", (1.0,) * 4), a.get("target_means", (0.0,) * 4), (-math.inf, top) if clamp else top, a.get("ctr_clamp", 32) if clamp else None)


def four(x):
    return tuple(x) if isinstance(x, list) else x


PARTS = {
    "DeltaXYWHBBoxCoder": delta,
    "LegacyDeltaXYWHBBoxCoder": lambda a: LegacyDeltaCoder(a.get("target_stds", (1.0,) * 4), a.get("target_means", (0.0,) * 4)),
    "TBLRBBoxCoder": lambda a: TBLRCoder(four(a.get("normalizer", 4.0))),
    "DistancePointBBoxCoder": lambda a: DistanceCoder(),
    "BucketingBBoxCoder": lambda a: BucketingCoder(a["num_buckets"], a["scale_factor"], a.get("offset_topk", 2), a.get("offset_upperbound", 1.0), a.get("cls_ignore_neighbor", True)),
    "YOLOBBoxCoder": lambda a: YOLOCoder(a.get("eps", 1e-6)),
    "PseudoBBoxCoder": lambda a: PseudoCoder(),
}


def build(args):
    "A coder from MMDetection's dict; whether it clips is a matter of the call"
    return PARTS[args["type"]](args)


def limit(case):
    return case.settings["max_shape"] if case.args.get("clip_border", True) else None


@pytest.mark.parametrize("case", cases("coders", "DeltaXYWHBBoxCoder"))
def test_delta(case):
    c, x = build({"type": case.component, **case.args}), {k: case.array(f"in.{k}") for k in ("boxes", "gt", "deltas", "deltas_multiclass")}
    case.check("encode", c.encode(x["boxes"], x["gt"]))
    case.check("decode", c.decode(x["boxes"], x["deltas"]))
    case.check("decode_maxshape", c.decode(x["boxes"], x["deltas"], limit(case)))
    case.check("decode_multiclass", c.decode(x["boxes"][:, None], x["deltas_multiclass"].unflatten(1, (-1, 4)), limit(case)).flatten(1))
    case.check("decode_wideclip", delta(case.args, 0.2).decode(x["boxes"], x["deltas"], limit(case)))
    sizes = torch.tensor([[240, 320], [180, 240]]) if limit(case) else None
    case.check("decode_batch", c.decode(x["boxes"].view(2, -1, 4), x["deltas"].view(2, -1, 4), sizes))


@pytest.mark.parametrize("case", cases("coders", "LegacyDeltaXYWHBBoxCoder", "TBLRBBoxCoder"))
def test_boxes(case):
    c, x = build({"type": case.component, **case.args}), {k: case.array(f"in.{k}") for k in ("boxes", "gt", "deltas")}
    case.check("encode", c.encode(x["boxes"], x["gt"]))
    case.check("decode", c.decode(x["boxes"], x["deltas"]))
    case.check("decode_maxshape", c.decode(x["boxes"], x["deltas"], limit(case)))


@pytest.mark.parametrize("case", cases("coders", "DistancePointBBoxCoder"))
def test_distance(case):
    c, x = build({"type": case.component, **case.args}), {k: case.array(f"in.{k}") for k in ("points", "gt", "distances")}
    case.check("encode", c.encode(x["points"], x["gt"]))
    case.check("encode_maxdis", DistanceCoder(max_dis=case.settings["max_dis"], eps=case.settings["eps"]).encode(x["points"], x["gt"]))
    case.check("decode", c.decode(x["points"], x["distances"]))
    case.check("decode_maxshape", c.decode(x["points"], x["distances"], limit(case)))


@pytest.mark.parametrize("case", cases("coders", "BucketingBBoxCoder"))
def test_bucketing(case):
    c = build({"type": case.component, **case.args})
    t = c.encode(case.array("in.boxes"), case.array("in.gt"))
    for name, value in zip(("enc_offsets", "enc_offsets_weights", "enc_bucket_labels", "enc_cls_weights"), t):
        case.check(name, value)
    box, sure = c.decode(case.array("in.boxes"), case.array("in.bucket_cls"), case.array("in.bucket_offset"), limit(case))
    case.check("decode", box)
    case.check("decode_confidence", sure)


@pytest.mark.parametrize("case", cases("coders", "YOLOBBoxCoder"))
def test_yolo(case):
    c, s = build({"type": case.component, **case.args}), case.settings["stride"]
    case.check("encode", c.encode(case.array("in.boxes"), case.array("in.gt"), s))
    case.check("decode", c.decode(case.array("in.boxes"), case.array("in.preds"), s))


def test_delta_facts():
    "The figures that MMDetection's own tests state"
    rois = torch.tensor([[0.0, 0, 1, 1]] * 3 + [[5, 5, 5, 5]])
    d = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]])
    want = torch.tensor([[0, 0, 1, 1], [0.1409, 0.1409, 2.8591, 2.8591], [0, 0.3161, 4.1945, 0.6839], [5, 5, 5, 5]])
    assert torch.allclose(DeltaCoder().decode(rois, d, (32, 32)), want, atol=1e-4)
    got = delta(dict(add_ctr_clamp=True, ctr_clamp=2)).decode(torch.tensor([[0.0, 0, 6, 6]]), torch.tensor([[1.0, 1, 2, 2]]), (100, 100))
    assert torch.allclose(got, torch.tensor([[0, 0, 27.1672, 27.1672]]), atol=1e-3)


def test_distance_facts():
    p = torch.tensor([[74.0, 61], [-29, 106], [138, 61], [29, 170]])
    g = torch.tensor([[74.0, 61, 75, 62], [0, 104, 0, 112], [100, 90, 100, 120], [0, 120, 100, 120]])
    want = torch.tensor([[0.0, 0, 1, 1], [0, 2, 29, 6], [38, 0, 0, 50], [29, 50, 50, 0]])
    assert torch.equal(DistanceCoder(max_dis=50, eps=0).encode(p, g), want)


def test_tblr_facts():
    rois = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 5, 5]])
    d = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]])
    got = TBLRCoder(15.0).decode(rois, d, (13, 12))
    assert torch.allclose(got, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0, 0, 12, 13], [0, 0.5, 0, 0.5], [5, 5, 5, 5]]), atol=1e-4)


KINDS = [LegacyDeltaCoder((0.1, 0.1, 0.2, 0.2)), TBLRCoder(), TBLRCoder((1.0, 2, 3, 4)), PseudoCoder(), DeltaCoder()]


@pytest.mark.parametrize("c", KINDS, ids=lambda o: type(o).__name__)
def test_batched_and_gradient(c):
    "Leading axes change nothing, empty is legal, and gradients agree with finite differences in float64"
    a, b = rand_boxes(12, seed=1, min_side=5), rand_boxes(12, seed=2, min_side=5)
    assert torch.equal(c.encode(a.view(3, 4, 4), b.view(3, 4, 4)).view(12, 4), c.encode(a, b))
    d = noise(12, 4) * 0.3
    sizes = torch.tensor([[100, 120], [480, 640], [1, 1]])
    got = c.decode(a.view(3, 4, 4), d.view(3, 4, 4), sizes)
    for i in range(3):
        assert torch.equal(got[i], c.decode(a.view(3, 4, 4)[i], d.view(3, 4, 4)[i], tuple(sizes[i].tolist())))
    assert c.encode(a[:0], b[:0]).shape == c.decode(a[:0], b[:0]).shape == (0, 4)
    f = lambda x, y: c.decode(a.double(), x) + c.encode(a.double(), y)  # noqa: E731
    assert torch.autograd.gradcheck(f, (d.double().requires_grad_(), b.double().requires_grad_()))


def test_bucketing_slow():
    "Targets of every side and bucket by plain loops"
    c, p, g = BucketingCoder(7, 1.5, 3, 1.2), rand_boxes(20, min_side=4), rand_boxes(20, seed=3, min_side=4)
    t = c.encode(p, g)
    for n in range(20):
        x1, y1, x2, y2 = p[n].tolist()
        cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * 1.5, (y2 - y1) * 1.5
        for side, (start, step, want) in enumerate(((cx - w / 2, w / 7, g[n, 0]), (cx + w / 2, -w / 7, g[n, 2]), (cy - h / 2, h / 7, g[n, 1]), (cy + h / 2, -h / 7, g[n, 3]))):
            d = [(start + step * (k + 0.5) - float(want)) / abs(step) for k in range(4)]
            rank = sorted(range(4), key=lambda k: abs(d[k]))
            s = slice(side * 4, side * 4 + 4)
            assert torch.allclose(t.offsets[n, s], torch.tensor(d), rtol=1e-4, atol=1e-4)
            assert t.labels[n, s].tolist() == [float(k == rank[0]) for k in range(4)]
            assert t.offset_weights[n, s].tolist() == [float(k == rank[0] or (k in rank[:3] and abs(d[k]) < 1.2)) for k in range(4)]
            assert t.label_weights[n, s].tolist() == [float(not (abs(d[k]) < 1 and k != rank[0])) for k in range(4)]
