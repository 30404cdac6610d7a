"RoI Align and RoI pooling: every backend against the reference in float64, gradients, determinism"
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from op_tools import backends_of
from visdet.core.backends import backend
from visdet.core.testing import close
from visdet.cv.roi import RoIPooler, roi_align
from visdet.cv.roi_pool import roi_pool

STRIDES = [4, 8, 16, 32]
ALIGN, POOL = backends_of("roi_align"), backends_of("roi_pool")
KERNEL = [o for o in ALIGN if o.values[0] == "kernels"]
FAST = settings(max_examples=80, deadline=None)


def pyramid(b=2, c=20, size=(128, 192), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(b, c, size[0] // s, size[1] // s, generator=g).to(dtype) for s in STRIDES]


def regions(n, b=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    xy, wh = torch.rand(n, 2, generator=g) * 220 - 30, torch.rand(n, 2, generator=g) ** 2 * 900
    return torch.cat([torch.randint(0, b, (n, 1), generator=g).float(), xy, xy + wh], 1)


def value_and_grad(f, *xs):
    xs = [o.detach().clone(memory_format=torch.preserve_format).requires_grad_() for o in xs]
    y = f(*xs)
    return [y, *torch.autograd.grad((y * y.detach().float().cos()).sum(), xs)]


corner = st.floats(-100, 100, width=32)


@pytest.mark.parametrize("name", ALIGN)
@given(st.lists(st.tuples(st.integers(0, 1), corner, corner, corner, corner), max_size=5), st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 16, 83]))
@FAST
def test_roi_align_on_anything(name, rows, s, aligned, bins, h, w, c):
    r = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    f = torch.randn(2, c, h, w, generator=torch.Generator().manual_seed(h * 8 + w), dtype=torch.float64)
    a, b = (value_and_grad(lambda x: roi_align(x, r, (bins, 2), 0.25, s, aligned, backend=k), f) for k in (name, "torch"))
    close(a[0], b[0], 1e-9)
    close(a[1], b[1], 1e-9)


@pytest.mark.parametrize("name", ALIGN)
@pytest.mark.parametrize("dtype,tol", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5), (torch.float64, 1e-5)])
@pytest.mark.parametrize("s,aligned,last", [(2, False, False), (0, True, True), (3, True, False)])
def test_pooler(name, dtype, tol, s, aligned, last):
    feats, r = pyramid(dtype=dtype), regions(50)
    if last:
        feats = [o.contiguous(memory_format=torch.channels_last) for o in feats]
    want = value_and_grad(lambda *x: RoIPooler(STRIDES, (7, 4), s, aligned, backend="torch")(x, r), *(o.double() for o in feats))
    got = value_and_grad(lambda *x: RoIPooler(STRIDES, (7, 4), s, aligned, backend=name)(x, r), *feats)
    assert got[0].dtype == dtype and got[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, want):
        close(a, b, tol * (1 if a is got[0] else 20))


def test_regions_get_a_gradient_from_the_reference_only_when_it_is_named():
    f = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    r = torch.tensor([[0.0, 5, 6, 31, 29]], requires_grad=True)
    assert roi_align(f, r, 3, 0.25, 2, backend="torch").requires_grad
    assert not roi_align(f, r, 3, 0.25, 2).requires_grad
    with backend("torch"):
        assert not roi_align(f, r, 3, 0.25, 2).requires_grad


@pytest.mark.parametrize("name", ALIGN)
def test_broken_regions(name):
    f = torch.ones(1, 17, 8, 8)
    for v in (float("nan"), float("inf")):
        bad = torch.tensor([[0, 1, v, 9, 9], [0, 1, 1, 9, 9]])
        if v != v or name == "kernels":
            y = roi_align(f, bad, 2, 0.5, 2, backend=name)
            assert y[0].isnan().all() and torch.equal(y[1], torch.ones(17, 2, 2))
    for i in (-1.0, 1.0, 7.0):
        with pytest.raises(Exception, match="idx|index|valid range"):
            roi_align(f, torch.tensor([[i, 1, 1, 9, 9]]), 2, 0.5, 2, backend=name)


@pytest.mark.parametrize("name", KERNEL)
def test_gradient_does_not_depend_on_threads(name):
    n, res = torch.get_num_threads(), []
    for c in (70, 256):
        for k in (1, 2, 5):
            torch.set_num_threads(k)
            res.append(value_and_grad(lambda *x: RoIPooler(STRIDES, 7, backend=name)(x, regions(60)), *pyramid(c=c)))
        torch.set_num_threads(n)
        assert all(torch.equal(a, b) for r in res[-2:] for a, b in zip(r, res[-3]))


@pytest.mark.parametrize("name", POOL)
@given(st.lists(st.tuples(st.integers(0, 1), corner, corner, corner, corner), max_size=5), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
@FAST
def test_roi_pool_on_anything(name, rows, bins, h, w):
    r = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    f = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h * 8 + w))
    a = value_and_grad(lambda x: roi_pool(x, r, (bins, 2), 0.25, backend=name), f)
    b = value_and_grad(lambda x: torchvision.ops.roi_pool(x, r, (bins, 2), 0.25), f)
    assert torch.equal(a[0], b[0])
    close(a[1], b[1], 1e-5)
