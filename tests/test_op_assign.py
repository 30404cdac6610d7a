"Overlaps, best objects and optimal assignment: every backend against the reference, SciPy and torchvision"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from op_tools import backends_of
from scipy.optimize import linear_sum_assignment
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou as tv_iou
from visdet.core.backends import backend
from visdet.core.basics import ConfigError, DataError
from visdet.core.testing import rand_boxes
from visdet.cv.best_iou import best_iou
from visdet.cv.hungarian import hungarian
from visdet.cv.iou import box_iou
from visdet.nn.assign import MaxIoUAssigner

KINDS = ["iou", "iof", "giou", "diou", "ciou"]
FAST = settings(max_examples=60, deadline=None)
BEST, IOU, LSA = (backends_of(o) for o in ("best_iou", "box_iou", "hungarian"))
KERNEL = [o for o in BEST if o.values[0] == "kernels"]


def same(a, b):
    "Equal, NaN at the same places"
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all() if a.is_floating_point() else (a == b).all())


def table(boxes, gts, valid, least):
    "The answer of best_iou from the whole table"
    t = box_iou(gts, boxes, backend="torch").masked_fill(~valid[..., None], -1.0)
    (iou, index), (top, at) = t.max(1), t.max(2)
    hit = (t == top[..., None]) & (valid & (top > 0) & (top >= least))[..., None]
    claim = torch.where(hit, torch.arange(t.shape[1])[:, None], -1).amax(1)
    return iou, index.masked_fill(iou == -1, -1), top, at.masked_fill(top == -1, -1), claim


coord = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, -4.0, 0.25, float("nan"), float("inf"), 1e6])
box = st.tuples(coord, coord, coord, coord)


@pytest.mark.parametrize("name", BEST)
@given(st.lists(box, min_size=1, max_size=70), st.lists(box, min_size=1, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
@FAST
def test_best_iou_on_anything(name, boxes, gts, valid, least, double):
    t = torch.float64 if double else torch.float32
    b, g = torch.tensor(boxes, dtype=t), torch.tensor(gts, dtype=t)[None]
    v = torch.tensor(valid[: len(gts)])[None]
    for x, y in zip(best_iou(b, g, v, least, backend=name), table(b, g, v, least)):
        assert same(x, y)


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_best_iou_sizes(name, dtype):
    for n, m in ((2049, 3), (64, 200), (6000, 17)):
        b, g = rand_boxes(n, (200, 300), n).to(dtype), torch.stack([rand_boxes(m, (200, 300), i).to(dtype) for i in range(3)])
        v = torch.arange(m) % 3 != torch.arange(3)[:, None]
        w = (o.to(torch.promote_types(dtype, torch.float32)) for o in (b, g))
        got = best_iou(b, g, v, 0.2, backend=name)
        for x, y in zip(got, table(*w, v, 0.2)):
            assert same(x, y)
        one = best_iou(b, g[1], v[1], 0.2, backend=name)
        assert all(same(x[1], y) for x, y in zip(got, one))


@pytest.mark.parametrize("name", KERNEL)
def test_best_iou_does_not_depend_on_threads(name):
    b, g = rand_boxes(9000, seed=1), rand_boxes(40, seed=2).view(2, 20, 4)
    n, res = torch.get_num_threads(), []
    for k in (1, 2, 5):
        torch.set_num_threads(k)
        res.append(best_iou(b, g, None, 0.0, backend=name))
    torch.set_num_threads(n)
    assert all(same(x, y) for r in res[1:] for x, y in zip(r, res[0]))


@pytest.mark.parametrize("name", BEST)
def test_assigner_equals_torchvision(name):
    priors = torch.cat([rand_boxes(3000, (300, 400), 1), (rand_boxes(500, (300, 400), 2) / 16).round() * 16])
    for m in (1, 30):
        g = (rand_boxes(m, (300, 400), m) / 8).round() * 8
        for pos, neg in ((0.5, 0.4), (0.7, 0.3)):
            with backend({"best_iou": name}):
                got = MaxIoUAssigner(pos, neg, low="own")(priors, g[None], torch.ones(1, m, dtype=torch.bool))[0]
            keep = (tv_iou(g, priors).amax(1) > 0)  # torchvision gives an object that overlaps nothing all priors
            if keep.all():
                assert torch.equal(got, Matcher(pos, neg, True)(tv_iou(g, priors)))


@pytest.mark.parametrize("name", IOU)
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(box, max_size=20), st.lists(box, max_size=20), st.booleans())
@FAST
def test_box_iou_on_anything(name, kind, a, b, double):
    t = torch.float64 if double else torch.float32
    a, b = (torch.tensor(o, dtype=t).reshape(-1, 4) for o in (a, b))
    x, y = box_iou(a, b, kind, backend=name), box_iou(a, b, kind, backend="torch")
    if kind == "ciou":
        assert torch.equal(x.isnan(), y.isnan()) and torch.allclose(x.nan_to_num(), y.nan_to_num(), atol=2e-6, rtol=2e-6)
    else:
        assert same(x, y)


@pytest.mark.parametrize("name", IOU)
def test_box_iou_shapes_and_refusals(name):
    a, b = rand_boxes(12, seed=1).view(3, 4, 4), rand_boxes(10, seed=2)
    assert same(box_iou(a, b, backend=name), torch.stack([box_iou(o, b, backend="torch") for o in a]))
    assert box_iou(a[:, None], b.view(5, 2, 4), backend=name).shape == (3, 5, 4, 2)
    assert box_iou(a.half(), b, backend=name).dtype == torch.float32
    assert same(box_iou(a, b.double(), backend=name), box_iou(a, b.double(), backend="torch"))
    x = b.clone().requires_grad_()
    assert box_iou(x, b).requires_grad
    with torch.no_grad():
        assert not box_iou(x, b, backend=name).requires_grad
    if name == "kernels":
        for bad in (lambda: box_iou(x, b, backend=name), lambda: box_iou(b, b, aligned=True, backend=name)):
            with pytest.raises(ConfigError, match="without a gradient"):
                bad()


entry = st.one_of(st.integers(-4, 4).map(float), st.floats(-1e6, 1e6, width=32), st.just(float("inf")))


@pytest.mark.parametrize("name", LSA)
@given(st.integers(0, 7), st.integers(0, 7), st.data())
@FAST
def test_hungarian_total_is_least(name, n, m, data):
    c = np.array(data.draw(st.lists(entry, min_size=n * m, max_size=n * m)), dtype=np.float64).reshape(n, m)
    try:
        want = linear_sum_assignment(c)
    except ValueError:
        with pytest.raises(DataError, match="infinite"):
            hungarian(torch.from_numpy(c), backend=name)
        return
    r, k = (o.numpy() for o in hungarian(torch.from_numpy(c), backend=name))
    assert len(r) == min(n, m) and (np.diff(r) > 0).all() and len(set(k.tolist())) == len(k)
    assert abs(c[r, k].sum() - c[want].sum()) <= 1e-9 * (1 + np.abs(c[r, k]).sum())


@pytest.mark.parametrize("name", LSA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_hungarian_batches(name, dtype):
    g = torch.Generator().manual_seed(0)
    c = torch.stack([torch.randperm(30 * 13, generator=g).view(30, 13) ** 2 % 1009 for _ in range(5)]).to(dtype)
    k = torch.tensor([13, 0, 1, 7, 12])
    r, j = hungarian(c, k, backend=name)
    for i in range(5):
        n = int(k[i])
        assert (r[i, n:] == -1).all() and (j[i, n:] == -1).all()
        t = c[i, :, :n].double().numpy()
        assert t[r[i, :n], j[i, :n]].sum() == t[linear_sum_assignment(t)].sum()


@pytest.mark.parametrize("name", LSA)
def test_hungarian_refuses(name):
    c = torch.zeros(3, 4, 4)
    for x, why in ((float("nan"), "NaN"), (float("-inf"), "minus")):
        c[1, 2, 2] = x
        with pytest.raises(DataError, match=f"table 1.*{why}"):
            hungarian(c, backend=name)
    assert hungarian(c, [4, 2, 4], backend=name)[0].shape == (3, 4)  # the culprit is outside the columns that count
    for k in ([4, 4], [5, 1, 1], [-1, 1, 1]):
        with pytest.raises(ConfigError):
            hungarian(c, k, backend=name)
