"Suppression and fusion: backends against the references, independent oracles, recorded figures of MMDetection, awkward input"
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from op_tools import backends_of
from visdet.core.basics import ConfigError, DataError
from visdet.core.kernels import kernels_missing
from visdet.core.testing import close, crowded_boxes
from visdet.cv.nms import batched_nms, nms

KERNELS = pytest.mark.skipif(bool(kernels_missing("cpu")), reason=f"kernels: {kernels_missing('cpu')}")
NIL = torch.zeros(0, dtype=torch.long)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def scene(n, kind="plain", classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    b, s = crowded_boxes(n, (300, 400), seed=seed)
    if kind == "whole":
        b = (torch.rand(n, 4, generator=g) * 8).round()
        b[:, 2:] += b[:, :2]
    if kind in ("ties", "whole"):
        s = (s * 8).round() / 8
    if kind == "flat" and n > 3:
        b[::3, 2] = b[::3, 0]
        b[1::3] = b[1::3][:, [2, 3, 0, 1]]
    if kind == "huge":
        b = b * 1e18
    if kind == "far":
        b = b + 3e6
    return b, s, torch.randint(0, classes, (n,), generator=g)


def one_by_one(b, s, l, t):
    "torchvision's operator on each class alone"
    kept = [(l == c).nonzero()[:, 0][torchvision.ops.nms(b[l == c], s[l == c].to(b.dtype), t)] for c in l.unique()]
    kept = torch.cat([NIL, *kept]).sort()[0]
    return kept[s[kept].argsort(descending=True, stable=True)]


@pytest.mark.parametrize("backend", backends_of("batched_nms"))
@pytest.mark.parametrize("kind", ["plain", "ties", "whole", "flat", "huge", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched(backend, kind, dtype):
    for n, k in ((0, 1), (1, 1), (2, 80), (40, 3), (300, 1), (300, 40)):
        b, s, l = scene(n, kind, k, n)
        b, s = b.to(dtype), s.to(dtype)
        for t in (0.0, 0.3, 0.5, 0.7, 1.0):
            want = one_by_one(b, s, l, t)
            assert torch.equal(batched_nms(b, s, l, t, backend=backend), want)
            assert torch.equal(batched_nms(b, s, l * 2**40 - 2**60, t, 9, backend), want[:9])
            assert torch.equal(batched_nms(b, s.double(), l.to(torch.int32), t, 0, backend), want[:0])
        if k == 1 and n:
            assert torch.equal(nms(b, s, 0.5, backend), one_by_one(b, s, l, 0.5))


@pytest.mark.parametrize("backend", backends_of("nms"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_in_float32(backend, dtype):
    b, s, l = scene(200, "ties", 3)
    b, s = b.to(dtype), s.to(dtype)
    assert torch.equal(batched_nms(b, s, l, 0.5, backend=backend), one_by_one(b.float(), s.float(), l, 0.5))
    assert torch.equal(nms(b * 100, s, 0.5, backend), torchvision.ops.nms((b * 100).float(), s.float(), 0.5))


@pytest.mark.parametrize("backend", backends_of("nms", but=["torch"]))
def test_one_crowded_class(backend):
    "Enough boxes of one class for the kernel's grid; scores in double precision that float32 cannot tell apart"
    for seed, thr, scale in ((0, 0.5, 1.0), (1, 0.2, 1e4), (2, 0.8, 1e-3)):
        b, s = crowded_boxes(5000, seed=seed)
        b = b * scale
        assert torch.equal(nms(b, s, thr, backend), torchvision.ops.nms(b, s, thr))
    fine = 0.5 + torch.arange(5000).double().flip(0) * 1e-14
    want = torch.arange(5000)[torchvision.ops.nms(b, torch.arange(5000, 0, -1).float(), 0.5)]
    assert torch.equal(nms(b, fine, 0.5, backend), want)
    same = torch.tensor([[1.0, 2, 30, 40]]).repeat(6000, 1)
    assert nms(same, torch.zeros(6000), 0.5, backend).tolist() == [0]
    assert len(nms(same, torch.zeros(6000), 1.0, backend)) == 6000


@pytest.mark.parametrize("backend", backends_of("nms"))
def test_refusals_and_infinities(backend):
    b, s, l = scene(9)
    for bad in (float("nan"), float("inf")):
        c = b.clone()
        c[4, 2] = bad
        with pytest.raises(DataError, match="1 of 9"):
            batched_nms(c, s, l, backend=backend)
    with pytest.raises(DataError, match="9 of 9"):
        nms(b, s * float("nan"), backend=backend)
    t = torch.tensor([1.0, float("-inf"), 3, float("inf")])
    apart = torch.tensor([[0.0, 0, 1, 1]]) + 5 * torch.arange(4)[:, None]
    assert nms(apart, t, backend=backend).tolist() == [3, 2, 0, 1]
    assert nms(apart, torch.tensor([0.0, -0.0, 0.0, -0.0]), backend=backend).tolist() == [0, 1, 2, 3]
    for f in (lambda: nms(b, s[:4], backend=backend), lambda: nms(b, s, -0.1, backend), lambda: batched_nms(b, s, l, max_num=-1, backend=backend), lambda: batched_nms(b, s, s, backend=backend)):
        with pytest.raises(ConfigError):
            f()
    x = b.clone().requires_grad_()
    assert torch.equal(nms(x, x[:, 0], backend=backend), nms(b, b[:, 0]))


@KERNELS
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4, st.integers(0, 3), st.integers(-1, 1)), max_size=40), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.75]))
@settings(max_examples=60, deadline=None)
def test_kernel_equals_reference(rows, thr):
    r = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    b, s, l = r[:, :4], r[:, 4], r[:, 5].long()
    for o in (b, b.double()):
        assert torch.equal(batched_nms(o, s, l, thr, backend="kernels"), batched_nms(o, s, l, thr, backend="torch"))


def golden():
    "Recorded figures of MMDetection: cases, and their arrays"
    root = Path(os.environ.get("VISDET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")).parent
    folder = root / "mmdet" / "golden" / "components"
    if not folder.is_dir():
        pytest.skip("no recorded figures here: set VISDET_DATA")
    z = np.load(folder / "nms.npz")
    get = lambda k: torch.from_numpy(z[k])
    return [(c, c["args"], {n: get(f"{c['id']}.in.{n}") for n in c["inputs"] if f"{c['id']}.in.{n}" in z}, {n: get(f"{c['id']}.out.{n}") for n in c["outputs"] if f"{c['id']}.out.{n}" in z}) for c in json.loads((folder / "nms.json").read_text())["cases"]]


def test_recorded_hard():
    "Greedy suppression by MMDetection"
    for c, a, i, o in golden():
        if c["component"] == "nms" and not a.get("offset"):
            keep = nms(i["boxes"], i["scores"], a["iou_threshold"])
            keep = keep[i["scores"][keep] > a.get("score_threshold", -1)][: a.get("max_num")]
            assert torch.equal(keep, o["keep"])
        cfg = a.get("nms_cfg", {})
        if c["component"] == "batched_nms" and cfg["type"] == "nms":
            ids = i["ids"] * (not (a["class_agnostic"] or cfg.get("class_agnostic")))
            assert torch.equal(batched_nms(i["boxes"], i["scores"], ids, cfg["iou_threshold"], cfg.get("max_num")), o["keep"])


# soft, matrix, fast

from visdet.cv.soft import fast_nms, matrix_nms, soft_nms  # noqa: E402


@pytest.mark.parametrize("backend", backends_of("soft_nms"))
def test_recorded_soft(backend):
    for c, a, i, o in golden():
        cfg = a.get("nms_cfg", a)
        if c["component"] == "soft_nms" and a["method"] != "naive":
            k, s = soft_nms(i["boxes"], i["scores"], None, a["method"], a["iou_threshold"], a["sigma"], a["min_score"], backend=backend)
        elif c["component"] == "batched_nms" and cfg["type"] == "soft_nms":
            k, s = soft_nms(i["boxes"], i["scores"], i["ids"], "linear", cfg["iou_threshold"], min_score=cfg["min_score"], backend=backend)
        else:
            continue
        assert torch.equal(k, o["keep"])
        close(s, o["dets"][:, 4], 1e-5)


def soft_plain(b, s, l, how, thr, sigma, low):
    "Soft suppression in float64 with Python numbers, class by class"
    b, s, res = b.double().tolist(), dict(enumerate(s.double().tolist())), []

    def iou(p, q):
        w, h = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
        i = max(w, 0) * max(h, 0)
        return i / ((p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - i) if i > 0 else 0

    while s := {i: v for i, v in s.items() if v >= low}:
        top = max(s, key=lambda i: (s[i], -i))
        res.append((top, s.pop(top)))
        for i in s:
            if l[i] == l[top]:
                o = iou(b[top], b[i])
                s[i] *= math.exp(-o * o / sigma) if how == "gaussian" else 1 - o if o > thr else 1
    return res


@pytest.mark.parametrize("backend", backends_of("soft_nms"))
@pytest.mark.parametrize("how", ["linear", "gaussian"])
@pytest.mark.parametrize("kind", ["plain", "flat", "far"])
def test_soft(backend, how, kind):
    for n, k in ((0, 1), (1, 1), (30, 1), (90, 4)):
        b, s, l = scene(n, kind, k, n)
        b, s = b.double(), s.double()
        want = soft_plain(b, s, l.tolist(), how, 0.3, 0.4, 0.02)
        got, new = soft_nms(b, s, l, how, 0.3, 0.4, 0.02, backend=backend)
        assert got.tolist() == [i for i, _ in want]
        close(new, torch.tensor([v for _, v in want], dtype=torch.float64), 1e-12)
        top = soft_nms(b, s, l - 2**61, how, 0.3, 0.4, 0.02, 7, backend)
        assert torch.equal(top[0], got[:7]) and torch.equal(top[1], new[:7])


@KERNELS
@pytest.mark.parametrize("kind", ["plain", "ties", "whole", "huge"])
def test_soft_kernel_equals_reference(kind):
    b, s, l = scene(400, kind, 2)
    for dt in (torch.float32, torch.float16):
        for lab in (None, l):
            for low in (0.0, 0.1):
                (k, v), (k0, v0) = (soft_nms(b.to(dt) if kind != "huge" else b, s.to(dt), lab, "linear", 0.3, 0.5, low, backend=o) for o in ("kernels", "torch"))
                assert torch.equal(k, k0) and torch.equal(v, v0)
    (k, v), (k0, v0) = (soft_nms(b, s, l, "gaussian", backend=o) for o in ("kernels", "torch"))
    assert set(k.tolist()) == set(k0.tolist())
    close(v[k.argsort()], v0[k0.argsort()], 1e-5)


@KERNELS
def test_opcheck_soft_and_fusion():
    b, s, l = scene(40)
    torch.library.opcheck(torch.ops.visdet.soft_nms, (b, s, l, True, 0.3, 0.5, 0.01, -1))
    torch.library.opcheck(torch.ops.visdet.soft_nms, (b.double(), s.double(), None, False, 0.3, 0.5, 0.01, 5))
    torch.library.opcheck(torch.ops.visdet.fuse_boxes, (b.double(), s.double(), l.sort()[0], 0.5))
    with pytest.raises(DataError, match="40 of 40"):
        soft_nms(b * float("nan"), s, backend="kernels")


def test_recorded_matrix():
    for c, a, i, o in golden():
        if c["component"] != "mask_matrix_nms":
            continue
        k, s = matrix_nms(None, i["scores"], i["labels"], a["kernel"], a.get("sigma", 2.0), a.get("filter_thr", 0.0), a.get("nms_pre"), a.get("max_num"), masks=i["masks"])
        close(s, o["scores"], 1e-5)
        assert torch.equal(i["labels"][k], o["labels"]) and torch.equal(k, o["keep"])


def test_matrix_counts():
    "As in MMDetection's own test: nothing, a thousand random masks, a limit before and after, a thousand equal ones"
    g = torch.Generator().manual_seed(0)
    assert [tuple(o.shape) for o in matrix_nms(None, torch.zeros(0), NIL, masks=torch.zeros(0, 28, 28))] == [(0,), (0,)]
    m, s, l = torch.rand(1000, 28, 28, generator=g) > 0.5, torch.rand(1000, generator=g), torch.randint(0, 80, (1000,), generator=g)
    for kw, n in (({}, 1000), (dict(pre=500), 500), (dict(pre=500, max_num=100), 100)):
        k, v = matrix_nms(None, s, l, masks=m, **kw)
        assert len(k) == n and (v.diff() <= 0).all() and len(k.unique()) == n
    k, v = matrix_nms(None, torch.ones(1000), torch.ones(1000).long(), sigma=2.0, min_score=0.5, masks=m[:1].expand(1000, 28, 28))
    assert k.tolist() == [0] and v.tolist() == [1]
    for bad in (dict(masks=m[:9]), dict(masks=m, iou=torch.eye(1000)), dict(masks=m, how="none")):
        with pytest.raises(ConfigError):
            matrix_nms(None, s, l, **bad)


def test_recorded_fast():
    for c, a, i, o in golden():
        if c["component"] != "fast_nms":
            continue
        s = i["scores"][:, :-1].T
        label, row = torch.arange(len(s))[:, None].expand_as(s).flatten(), torch.arange(s.shape[1]).expand_as(s).flatten()
        live = s.flatten() > a["score_thr"]
        k = fast_nms(i["boxes"][row][live], s.flatten()[live], label[live], a["iou_thr"], a["top_k"], a["max_num"])
        close(torch.cat([i["boxes"][row][live][k], s.flatten()[live][k, None]], 1), o["dets"], 1e-6)
        assert torch.equal(label[live][k], o["labels"]) and torch.equal(i["coeffs"][row][live][k], o["coeffs"])


# fusion

from visdet.cv.fusion import nms_match, weighted_box_fusion  # noqa: E402

RULES = {"avg": "avg", "max": "max", "models": "box_and_model_avg", "absent": "absent_model_aware_avg"}


def ensemble(n, models, classes, seed):
    b, s, l = scene(n, "plain", classes, seed)
    ok = ((b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1])).nonzero()[:, 0]
    return [[o[ok][i::models] for i in range(models)] for o in (b, s, l)]


@pytest.mark.parametrize("backend", backends_of("weighted_box_fusion"))
@pytest.mark.parametrize("how", RULES)
def test_fusion_equals_the_authors_program(backend, how):
    peer = pytest.importorskip("ensemble_boxes.ensemble_boxes_wbf", reason="ensemble_boxes is not installed")
    for n, m, w, skip in ((1, 1, None, 0.0), (60, 3, None, 0.0), (90, 2, (2.0, 0.5), 0.2)):
        b, s, l = ensemble(n, m, 4, n)
        size = torch.tensor([400.0, 300, 400, 300])
        for cap in (True, False) if how == "avg" else (True,):
            x, y, z = weighted_box_fusion(b, s, l, w, 0.5, skip, how, cap, backend)
            p, q, r = peer.weighted_boxes_fusion([(o / size).double().tolist() for o in b], [o.tolist() for o in s], [o.tolist() for o in l], w, 0.5, skip, RULES[how], not cap)
            close(y, q, 1e-5)
            by, peers = np.lexsort((x[:, 0].numpy(), z.numpy())), np.lexsort((p[:, 0], r))
            close(x[by], p[peers] * size.numpy(), 2e-5)
            close(y[by], q[peers], 1e-5)


@pytest.mark.parametrize("backend", backends_of("weighted_box_fusion"))
def test_fusion_edges(backend):
    b, s, l = ensemble(50, 2, 3, 1)
    x, y, z = weighted_box_fusion(b, s, l, backend=backend)
    assert (y.diff() <= 0).all() and x.dtype == torch.float32
    p, q, r = weighted_box_fusion([o.half() for o in b], [o.half() for o in s], l, backend=backend)
    assert p.dtype == torch.float16
    one = weighted_box_fusion([torch.cat(b)], [torch.cat(s)], [torch.cat(l)], iou_thr=1.0, backend=backend)
    assert len(one[0]) == 50
    empty = weighted_box_fusion([b[0], b[0][:0]], [s[0], s[0][:0]], [l[0], NIL], cap=False, backend=backend)
    alone = weighted_box_fusion([b[0]], [s[0]], [l[0]], cap=False, backend=backend)
    close(empty[1], alone[1] / 2, 1e-6)
    with pytest.raises(DataError):
        weighted_box_fusion([b[0] * float("nan")], [s[0]], [l[0]], backend=backend)
    for bad in (dict(weights=(1, 0)), dict(weights=(1,)), dict(iou_thr=2)):
        with pytest.raises(ConfigError):
            weighted_box_fusion(b, s, l, backend=backend, **bad)


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4, st.integers(0, 3), st.integers(-1, 1)), max_size=30), st.sampled_from([0.0, 0.25, 0.5]))
@settings(max_examples=40, deadline=None)
def test_match_is_a_partition(rows, thr):
    r = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    b, s, l = r[:, :4], r[:, 4], r[:, 5].long()
    groups = nms_match(b, s, l, thr)
    assert [int(o[0]) for o in groups] == batched_nms(b, s, l, thr).tolist()
    assert sorted(i for o in groups for i in o.tolist()) == list(range(len(b)))
    taken = set()
    for o in groups:
        head, *rest = o.tolist()
        iou = torchvision.ops.box_iou(b[head : head + 1], b)[0].nan_to_num()
        solid = (b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1])
        mine = {i for i in range(len(b)) if i not in taken and i != head and l[i] == l[head] and solid[i] and solid[head] and iou[i] > thr and (s[i], -i) < (s[head], -head)}
        assert set(rest) == mine
        taken |= {head, *rest}


# rotated

from visdet.cv.rotated import rotated_iou, rotated_nms  # noqa: E402


def corners(b):
    c, s = b[:, 4].cos(), b[:, 4].sin()
    u, v = torch.stack([c * b[:, 2], s * b[:, 2]], 1) / 2, torch.stack([-s * b[:, 3], c * b[:, 3]], 1) / 2
    return torch.stack([b[:, :2] + i * u + j * v for i, j in ((1, 1), (-1, 1), (-1, -1), (1, -1))], 1)


def clipped(a, b):
    "Area of the intersection of two convex polygons: one is cut by each side of the other in turn"
    for (x0, y0), (x1, y1) in zip(b, b[1:] + b[:1]):
        side = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in a]
        cut = []
        for i, (p, q) in enumerate(zip(a, a[1:] + a[:1])):
            s, t = side[i], side[(i + 1) % len(a)]
            cut += [p] if s >= 0 else []
            cut += [tuple(u + (v - u) * s / (s - t) for u, v in zip(p, q))] if s * t < 0 else []
        a = cut
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(a, a[1:] + a[:1]))) / 2


def turned(n, seed, kind="plain"):
    g = torch.Generator().manual_seed(seed)
    b = torch.rand(n, 5, generator=g, dtype=torch.float64) * torch.tensor([60.0, 60, 50, 30, 14]) + torch.tensor([0.0, 0, 1, 1, -7])
    if kind == "whole":
        b = torch.cat([b[:, :4].round(), (b[:, 4:] % 4).round() * math.pi / 4], 1)
    if kind == "thin":
        b[:, 3] = 1e-3
    if kind == "flat":
        b[:, 2] = 0
    return b


@pytest.mark.parametrize("backend", backends_of("rotated_iou"))
@pytest.mark.parametrize("kind", ["plain", "whole", "thin", "flat"])
def test_rotated_iou(backend, kind):
    a, b = turned(23, 0, kind), turned(18, 1, kind)
    inter = torch.tensor([[clipped(p.tolist(), q.tolist()) for q in corners(b)] for p in corners(a)], dtype=torch.float64)
    inter = inter * (kind != "flat")  # a rounding error in the oracle, divided by no area
    one, two = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    for dt, tol in ((torch.float64, 1e-11), (torch.float32, 2e-5 if kind == "thin" else 3e-6), (torch.float16, 0.2)):
        x, y = a.to(dt), b.to(dt)
        got = rotated_iou(x, y, backend=backend)
        assert got.dtype == (dt if dt != torch.float16 else torch.float32) and ((got >= 0) & (got <= 1)).all()
        if dt == torch.float16:
            continue
        close(got, inter / (one[:, None] + two - inter).clamp(min=1e-9), tol)
        close(rotated_iou(x, y, kind="iof", backend=backend), inter / one[:, None].clamp(min=1e-9), 4 * tol)
        close(rotated_iou(x[:18], y, True, backend=backend), got[:18].diagonal(), 0 if backend == "torch" else 1e-6)


@pytest.mark.parametrize("backend", backends_of("rotated_iou"))
def test_rotated_iou_nearly_equal(backend):
    "Boxes that almost coincide, where edges lie on edges; far from the origin; Shapely where it is"
    a = turned(60, 3).float()
    close(rotated_iou(a, a, True, backend=backend), torch.ones(60), 1e-5)
    for e in (1e-7, 1e-5, 1e-3):
        b = a.double() + e * torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        want = torch.tensor([clipped(p.tolist(), q.tolist()) for p, q in zip(corners(a.double()), corners(b))], dtype=torch.float64)
        want = want / (a[:, 2].double() * a[:, 3].double() + b[:, 2] * b[:, 3] - want)
        close(rotated_iou(a.double(), b, True, backend=backend), want, 1e-10)
    far = torch.tensor([1e6, -1e6, 0, 0, 0])
    c = turned(60, 4)
    c[:, :2] = c[:, :2].round()
    d = a.double()
    d[:, :2] = d[:, :2].round()
    close(rotated_iou((c + far).float(), (d + far).float(), True, backend=backend), rotated_iou(c, d, True), 1e-5)
    geometry = pytest.importorskip("shapely.geometry", reason="Shapely is not installed")
    p, q = ([geometry.Polygon(o.tolist()) for o in corners(v)] for v in (c, d))
    close(rotated_iou(c, d, True, backend=backend), np.array([i.intersection(j).area / i.union(j).area for i, j in zip(p, q)]), 1e-9)


@pytest.mark.parametrize("backend", backends_of("rotated_iou"))
def test_rotated_gradient(backend):
    a, b = turned(5, 5).requires_grad_(), turned(5, 6).requires_grad_()
    for aligned in (True, False):
        assert torch.autograd.gradcheck(lambda x, y: rotated_iou(x, y, aligned, backend=backend), (a, b))
    assert torch.autograd.gradcheck(lambda x: rotated_iou(x, b.detach(), kind="iof", backend=backend), (a,))


@pytest.mark.parametrize("backend", backends_of("rotated_nms"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotated_nms(backend, dtype):
    for n, k, kind in ((0, 1, "plain"), (1, 1, "plain"), (70, 1, "plain"), (70, 3, "whole"), (9, 1, "flat")):
        b, g = turned(n, n, kind), torch.Generator().manual_seed(n)
        s, l = (torch.rand(n, generator=g) * 9).round(), torch.randint(0, k, (n,), generator=g)
        over = rotated_iou(b.to(dtype), b.to(dtype), backend="torch")
        for t in (0.0, 0.1, 0.5):
            keep = []
            for i in s.argsort(descending=True, stable=True).tolist():
                if not any(l[j] == l[i] and over[i, j].item() > t for j in keep):
                    keep.append(i)
            assert rotated_nms(b.to(dtype), s, l - 5, t, backend=backend).tolist() == keep
            assert rotated_nms(b.to(dtype), s, l, t, 4, backend).tolist() == keep[:4]
    assert len(rotated_nms(turned(20, 1).half(), torch.rand(20).half(), backend=backend)) > 0
    with pytest.raises(DataError, match="20 of 20"):
        rotated_nms(turned(20, 1) * float("nan"), torch.rand(20), backend=backend)
    with pytest.raises(ConfigError):
        rotated_nms(turned(20, 1)[:, :4], torch.rand(20), backend=backend)
