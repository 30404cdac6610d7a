"Boxes, IoU, NMS, priors and coders: random inputs against torchvision, recorded figures of MMDetection"
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from visdet.core.basics import ConfigError, DataError
from visdet.core.testing import close, rand_boxes
from visdet.cv.boxes import box_area, box_flaws, clip_boxes, convert_boxes, flip_boxes, scale_boxes, shift_boxes
from visdet.cv.coders import DeltaCoder, DistanceCoder
from visdet.cv.iou import box_iou
from visdet.cv.nms import batched_nms, nms
from visdet.cv.priors import AnchorGenerator, PointGenerator, octave_sizes

coord = st.integers(-16000, 16000).map(lambda o: o / 8)
box_lists = st.lists(st.tuples(coord, coord, coord, coord), max_size=12).map(lambda o: torch.tensor(o, dtype=torch.float32).reshape(-1, 4))
whole = st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=40).map(lambda o: torch.tensor(o, dtype=torch.float32))
many = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def golden(request):
    "Recorded inputs and outputs of MMDetection's parts"
    root = Path(os.environ.get("VISDET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")).parent
    folder = root / "mmdet" / "golden" / "components"
    if not folder.is_dir():
        pytest.skip("no recorded figures here: set VISDET_GOLDEN")

    def load(group):
        return json.loads((folder / f"{group}.json").read_text())["cases"], np.load(folder / f"{group}.npz")

    return load


def ts(z, *keys):
    return [torch.from_numpy(z[k]) for k in keys]


# boxes


@given(box_lists)
@many
def test_formats_round_trip(b):
    for f in ("xywh", "cxcywh"):
        close(convert_boxes(convert_boxes(b, "xyxy", f), f, "xyxy"), b, 1e-3)
        close(convert_boxes(b, "xyxy", f), torchvision.ops.box_convert(b, "xyxy", f), 1e-6)
    assert (convert_boxes(b.numpy(), "xyxy", "cxcywh") == convert_boxes(b, "xyxy", "cxcywh").numpy()).all()


@given(box_lists, st.integers(1, 900), st.integers(1, 900))
@many
def test_moves_agree_with_each_other(b, h, w):
    size = (h, w)
    for how in ("horizontal", "vertical", "diagonal"):
        close(flip_boxes(flip_boxes(b, size, how), size, how), b, 1e-3)
        close(box_area(flip_boxes(b, size, how)), box_area(b), 1e-3)
        close(clip_boxes(flip_boxes(b, size, how), size), flip_boxes(clip_boxes(b, size), size, how), 1e-3)
    c = clip_boxes(b, size)
    assert torch.equal(clip_boxes(c, size), c) and torch.equal(c, torchvision.ops.clip_boxes_to_image(b, size))
    close(shift_boxes(shift_boxes(b, 7, -3), -7, 3), b, 1e-3)
    close(scale_boxes(b, (2.0, 0.5)), b * torch.tensor([2, 0.5, 2, 0.5]))
    f = box_flaws(c, size)
    assert not f["outside"].any() and not f["negative"].any() and not f["gone"].any()
    assert torch.equal(box_flaws(b, size)["gone"], (box_area(b) > 0) & (box_area(c) == 0))


def test_padded_batches_have_a_size_each():
    b = rand_boxes(12, (900, 900)).view(3, 4, 4)
    sizes = torch.tensor([[100, 200], [900, 900], [1, 1]])
    for o, s, got in zip(b, sizes.tolist(), clip_boxes(b, sizes)):
        assert torch.equal(clip_boxes(o, s), got)
    assert clip_boxes(torch.zeros(2, 0, 4), sizes[:2]).shape == (2, 0, 4)


# IoU


@given(box_lists, box_lists)
@many
def test_iou_laws(a, b):
    i, g, d, c = (box_iou(a, b, k) for k in ("iou", "giou", "diou", "ciou"))
    assert all(o.isfinite().all() for o in (i, g, d, c))
    assert (i >= 0).all() and (i <= 1 + 1e-5).all()
    close(i, box_iou(b, a).T, 1e-5)
    ok = lambda o: (o[:, 2] > o[:, 0]) & (o[:, 3] > o[:, 1])
    a, b = a[ok(a)], b[ok(b)]
    i, g, d, c = (box_iou(a, b, k) for k in ("iou", "giou", "diou", "ciou"))
    assert (g <= i + 1e-5).all() and (g >= -1 - 1e-5).all() and (d <= i + 1e-5).all() and (c <= d + 1e-5).all()
    close(box_iou(a, a, aligned=True), torch.ones(len(a)), 1e-4)


def test_iou_recorded(golden):
    cases, z = golden("overlaps")
    for c in cases:
        a, b, want = ts(z, f"{c['id']}.in.a", f"{c['id']}.in.b", f"{c['id']}.out.overlaps")
        close(box_iou(a, b, c["args"]["mode"], c["args"]["is_aligned"]), want, 1e-5)


# suppression


@given(whole, st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0]), st.integers(0, 5))
@many
def test_nms_ties_and_thresholds(b, t, seed):
    b = torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1)
    g = torch.Generator().manual_seed(seed)
    s, lab = torch.randint(0, 4, (len(b),), generator=g) / 4, torch.randint(0, 3, (len(b),), generator=g)
    want = torchvision.ops.nms(b, s, t)
    assert torch.equal(nms(b, s, t), want) and torch.equal(nms(b, s, t, "torch"), want)
    per = torch.cat([(lab == c).nonzero()[:, 0][torchvision.ops.nms(b[lab == c], s[lab == c], t)] for c in lab.unique()]).sort()[0]
    want = per[s[per].argsort(descending=True, stable=True)]
    assert torch.equal(batched_nms(b, s, lab, t), want) and torch.equal(batched_nms(b, s, lab, t, backend="torch"), want)
    assert torch.equal(batched_nms(b, s, lab, t, max_num=3), want[:3])


def test_overlap_equal_to_the_threshold_is_judged_in_float32():
    b, s = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]]), torch.tensor([0.9, 0.8])
    assert nms(b, s, 0.3).tolist() == [0]
    assert batched_nms(b, s, torch.tensor([7, 7]), 0.3).tolist() == [0]
    assert batched_nms(b, s, torch.tensor([7, 6]), 0.3).tolist() == [0, 1]


def test_nms_refuses_what_has_no_order():
    b, s = rand_boxes(5), torch.rand(5)
    for bad in (math.nan, math.inf):
        x = b.clone()
        x[3, 2] = bad
        with pytest.raises(DataError, match="1 of 5"):
            batched_nms(x, s, torch.zeros(5).long())
    with pytest.raises(DataError):
        nms(b, s.where(s < s.max(), math.nan))
    with pytest.raises(ConfigError):
        nms(b, s[:3])


def test_nms_recorded(golden):
    cases, z = golden("nms")
    seen = 0
    for c in cases:
        k, a = c["id"], c["args"]
        if c["component"] == "nms" and not a.get("offset") and "score_threshold" not in a:
            b, s, want = ts(z, f"{k}.in.boxes", f"{k}.in.scores", f"{k}.out.keep")
            assert torch.equal(nms(b, s, a["iou_threshold"]), want)
        elif c["component"] == "batched_nms" and a["nms_cfg"]["type"] == "nms":
            b, s, i, want = ts(z, f"{k}.in.boxes", f"{k}.in.scores", f"{k}.in.ids", f"{k}.out.keep")
            cfg = a["nms_cfg"]
            i = torch.zeros_like(i) if a["class_agnostic"] or cfg.get("class_agnostic") else i
            assert torch.equal(batched_nms(b, s, i, cfg["iou_threshold"], cfg.get("max_num")), want)
        else:
            continue
        seen += 1
    assert seen >= 4


# priors


def ours(a):
    "Our generator for recorded arguments, or None if the convention is not one of ours"
    if a["type"] == "MlvlPointGenerator":
        return PointGenerator(a["strides"], a["offset"])
    if a["type"] != "AnchorGenerator":
        return None
    base = a.get("base_sizes") or [min(s) if isinstance(s, list) else s for s in a["strides"]]
    sizes = [[b * k for k in a["scales"]] for b in base] if "scales" in a else octave_sizes(base, a["octave_base_scale"], a["scales_per_octave"])
    return AnchorGenerator(a["strides"], sizes, a["ratios"], a.get("center_offset", 0.0))


def test_priors_recorded(golden):
    cases, z = golden("priors")
    seen = 0
    for c in cases:
        gen = ours(c["args"])
        if gen is None:
            continue
        for i, g in enumerate(gen.grid(c["settings"]["featmap_sizes"])):
            k = f"{c['id']}.out.grid{'_xy' if g.shape[1] == 2 else ''}.{i}"
            assert list(g.shape) == z[f"{k}.shape"].tolist()
            close(g.flatten()[torch.from_numpy(z[f"{k}.idx"])], z[f"{k}.val"], 1e-6)
        seen += 1
    assert seen >= 7


# coders


def test_coders_recorded(golden):
    cases, z = golden("coders")
    seen = 0
    for c in cases:
        k, a = c["id"], c["args"]
        if c["component"] == "DeltaXYWHBBoxCoder":
            coder = DeltaCoder(a.get("target_stds", (1,) * 4), a.get("target_means", (0,) * 4), abs(math.log(0.016)), a["ctr_clamp"] if a.get("add_ctr_clamp") else None)
            b, gt, d, dm = ts(z, *[f"{k}.in.{o}" for o in ("boxes", "gt", "deltas", "deltas_multiclass")])
            enc, dec, cut, multi, wideclip = ts(z, *[f"{k}.out.{o}" for o in ("encode", "decode", "decode_maxshape", "decode_multiclass", "decode_wideclip")])
            size = c["settings"]["max_shape"] if a.get("clip_border", True) else None
            close(coder.encode(b, gt), enc, 1e-5)
            close(coder.decode(b, d), dec, 1e-5)
            close(coder.decode(b, d, size), cut, 1e-5)
            close(coder.decode(b[:, None], dm.view(len(b), -1, 4), size).flatten(1), multi, 1e-5)
            coder.clip = (-math.inf if a.get("add_ctr_clamp") else math.log(0.2), -math.log(0.2))
            close(coder.decode(b, d, size), wideclip, 1e-5)
        elif c["component"] == "DistancePointBBoxCoder":
            p, gt, d = ts(z, *[f"{k}.in.{o}" for o in ("points", "gt", "distances")])
            enc, lim, dec, cut = ts(z, *[f"{k}.out.{o}" for o in ("encode", "encode_maxdis", "decode", "decode_maxshape")])
            close(DistanceCoder().encode(p, gt), enc, 1e-5)
            close(DistanceCoder(max_dis=c["settings"]["max_dis"], eps=c["settings"]["eps"]).encode(p, gt), lim, 1e-5)
            close(DistanceCoder().decode(p, d), dec, 1e-5)
            close(DistanceCoder().decode(p, d, c["settings"]["max_shape"] if a.get("clip_border", True) else None), cut, 1e-5)
        else:
            continue
        seen += 1
    assert seen >= 7


@given(st.integers(0, 10**6))
@many
def test_coders_invert(seed):
    p, b = rand_boxes(30, seed=seed, min_side=20), rand_boxes(30, seed=seed + 1, min_side=20)
    coder = DeltaCoder((0.1, 0.1, 0.2, 0.2), (0.1, 0, -0.2, 0), clip=8)
    close(coder.decode(p, coder.encode(p, b)), b, 1e-3)
    pts, unit = p[:, :2], p[:, 2]
    close(DistanceCoder().decode(pts, DistanceCoder().encode(pts, b, norm=unit), norm=unit), b, 1e-3)
