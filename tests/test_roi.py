"RoI Align and the pooler: backends against each other, recorded figures of MMDetection, awkward regions"
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from visdet.core.basics import ConfigError
from visdet.core.testing import close
from visdet.cv.roi import RoIPooler, roi_align, roi_levels, to_rois

STRIDES = [4, 8, 16, 32]


def value_and_grad(f, *feats):
    xs = [o.detach().clone(memory_format=torch.preserve_format).requires_grad_() for o in feats]
    y = f(*xs)
    return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), xs)]


def pyramid(b=2, c=4, size=(128, 192), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, c, size[0] // s, size[1] // s, generator=g) for s in STRIDES]


def regions(n, b=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    xy, wh = torch.rand(n, 2, generator=g) * 220 - 30, torch.rand(n, 2, generator=g) ** 2 * 900
    return torch.cat([torch.randint(0, b, (n, 1), generator=g).float(), xy, xy + wh], 1)


corner = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(st.integers(0, 1), corner, corner, corner, corner), max_size=6), st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=120, deadline=None)
def test_backends_agree(rows, s, aligned, bins, h, w):
    r = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    f = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h * 8 + w))
    a, b = (value_and_grad(lambda x: roi_align(x, r, (bins, 2), 0.25, s, aligned, backend=k), f) for k in ("torch", "torchvision"))
    close(a[0], b[0], 2e-5)
    close(a[1], b[1], 1e-4)


@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_pooler_equals_torchvision(s, last):
    feats, r = pyramid(), regions(60)
    if last:
        feats = [o.contiguous(memory_format=torch.channels_last) for o in feats]
    tv = torchvision.ops.MultiScaleRoIAlign(list("0123"), 7, s)
    boxes = [r[r[:, 0] == i, 1:] for i in (0, 1)]
    want = value_and_grad(lambda *x: tv(dict(zip("0123", x)), boxes, [(128, 192)] * 2), *feats)
    for backend in ("torch", "torchvision"):
        got = value_and_grad(lambda *x: RoIPooler(STRIDES, 7, s, backend=backend)(x, to_rois(boxes)), *feats)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(got, want):
            close(a, b, 1e-4)


def test_order_of_regions_is_kept():
    feats, r, pool = pyramid(), regions(40), RoIPooler(STRIDES, 3)
    perm = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert len(pool.levels(r).unique()) == 4
    close(pool(feats, r[perm]), pool(feats, r)[perm], 0)
    close(pool(feats, r[5:6])[0], pool(feats, r)[5], 0)


def test_levels_without_regions_stay_in_the_graph():
    pool = RoIPooler(STRIDES, 7)
    for r in (torch.tensor([[1.0, 5, 5, 25, 25]]), torch.zeros(0, 5)):
        got = value_and_grad(lambda *x: pool(x, r), *pyramid())
        assert [bool(g.any()) for g in got[1:]] == [len(r) > 0, False, False, False]


def test_nan_and_strangers():
    f, bad = torch.ones(1, 2, 8, 8), torch.tensor([[0, 1, float("nan"), 9, 9], [0, 1, 1, 9, 9]])
    for s, backend in ((0, "torch"), (2, "torch"), (0, "torchvision"), (2, "torchvision")):
        y = roi_align(f, bad, 2, 0.5, s, backend=backend)
        assert y[0].isnan().all() and torch.equal(y[1], torch.ones(2, 2, 2))
    for i in (-1.0, 1.0):
        with pytest.raises(Exception, match="idx|valid range"):
            roi_align(f, torch.tensor([[i, 1, 1, 9, 9]]), 2, 0.5, 2)
    with pytest.raises(ConfigError):
        roi_align(f, torch.zeros(3, 4), 2)
    with pytest.raises(ConfigError):
        roi_levels(torch.zeros(3, 4), [4, 6])
    assert roi_levels(torch.full((1, 4), float("nan")), STRIDES).tolist() == [0]


def test_half_precision_and_double():
    f, r = pyramid()[1], regions(10)
    want = roi_align(f, r, 7, 1 / 8, 2)
    for dt, tol in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-5)):
        for backend in ("torch", "torchvision"):
            y = roi_align(f.to(dt), r, 7, 1 / 8, 2, backend=backend)
            assert y.dtype == dt
            close(y, want, tol)


def test_recorded(request):
    root = Path(os.environ.get("VISDET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")).parent
    folder = root / "mmdet" / "golden" / "components"
    if not folder.is_dir():
        pytest.skip("no recorded figures here: set VISDET_DATA")
    cases, z = json.loads((folder / "roi.json").read_text())["cases"], np.load(folder / "roi.npz")
    feats = [torch.from_numpy(z[f"c00.in.feat.{i}"]) for i in range(4)]
    seen = 0
    for c in cases:
        if c["component"] != "SingleRoIExtractor":
            continue
        k, a = c["id"], c["args"]
        lay, r = a["roi_layer"], torch.from_numpy(z[f"{c['id']}.in.rois"])
        pool = RoIPooler(a["featmap_strides"], lay["output_size"], lay["sampling_ratio"], lay.get("aligned", True), canonical=a.get("finest_scale", 56) * 4)
        assert pool.levels(r).tolist() == z[f"{k}.out.levels"].tolist()
        for backend in ("torch", "torchvision"):
            pool.backend = backend
            xs = [f.clone().requires_grad_() for f in feats]
            y = pool(xs, r)
            grads = torch.autograd.grad((y * y).sum(), xs)
            for name, t in [("roi_feats", y), *((f"grad.{i}", g) for i, g in enumerate(grads))]:
                close(t.flatten()[torch.from_numpy(z[f"{k}.out.{name}.idx"])], z[f"{k}.out.{name}.val"], 1e-4)
        seen += 1
    assert seen >= 3
