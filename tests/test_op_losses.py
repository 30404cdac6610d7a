"Focal losses and overlap losses: every backend against definitions in double precision, torchvision, autograd"
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from op_tools import backends_of
from visdet.bench.isolate import _rss_of
from visdet.core.basics import ConfigError, DataError
from visdet.core.kernels import kernels_missing
from visdet.core.testing import close, rand_boxes
from visdet.cv.box_loss import box_iou_loss
from visdet.cv.focal import quality_focal_loss, sigmoid_focal_loss, varifocal_loss
from visdet.cv.iou import box_iou

BACKENDS = backends_of("sigmoid_focal_loss", but=("triton",))
BOX_BACKENDS = backends_of("box_iou_loss")
KINDS = ("sigmoid", "quality", "varifocal")
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KERNELS = pytest.mark.skipif(bool(kernels_missing("cpu")), reason=str(kernels_missing("cpu")))


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def inputs(R, K, dtype=torch.float32, seed=0, spread=5.0):
    "Logits, labels with both ways to say background, qualities with zeros and ones, weights"
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(R, K, generator=g, dtype=torch.float64) * spread - 1).to(dtype)
    q = torch.rand(R, generator=g).mul(1.4).sub(0.2).clamp(0, 1)
    return x, torch.randint(-1, K + 1, (R,), generator=g), q, torch.rand(R, generator=g)


def ours(kind, x, labels, q, w, gamma=2.0, **kw):
    if kind == "sigmoid":
        return sigmoid_focal_loss(x, labels, w, 0.3, gamma, **kw)
    if kind == "quality":
        return quality_focal_loss(x, labels, q, w, gamma, **kw)
    return varifocal_loss(x, labels, q, w, 0.6, gamma, **kw)


def definition(kind, x, labels, q, w, gamma=2.0):
    "The loss of each entry in float64, from the papers, with a table of targets"
    x = x.double()
    hot = torch.zeros_like(x)
    rows = ((labels >= 0) & (labels < x.shape[1])).nonzero()[:, 0]
    hot[rows, labels[rows]] = 1
    y = hot if kind == "sigmoid" else hot * q.double()[:, None]
    bce = y * F.softplus(-x, threshold=60) + (1 - y) * F.softplus(x, threshold=60)
    p, n = x.sigmoid(), (-x).sigmoid()
    if kind == "sigmoid":
        l = torch.where(hot > 0, 0.3 * n**gamma, 0.7 * p**gamma) * bce
    elif kind == "quality":
        l = torch.where(y == 1, n, torch.where(y == 0, p, (y - p).abs())) ** gamma * bce
    else:
        l = torch.where(y > 0, y, 0.6 * p**gamma) * bce
    return l if w is None else l * w.double()[:, None]


def check(kind, backend, R, K, dtype, gamma, weighted=True, seed=0):
    "Sum, mean, each entry, and the three gradients"
    x, labels, q, w = inputs(R, K, dtype, seed)
    w = w if weighted else None
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    ref = definition(kind, b, labels, q, w, gamma)
    wide = torch.promote_types(dtype, torch.float32)
    tol = 1e-9 if dtype == torch.float64 else 3e-6
    slope_tol = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: tol * (1 + gamma)}.get(dtype, tol)
    if backend == "triton" and dtype == torch.bfloat16:
        slope_tol *= 2  # Triton's interpreter cuts digits off where a GPU rounds
    up = torch.rand(R, K, generator=torch.Generator().manual_seed(1)).to(wide)
    for how, want in (("sum", ref.sum() * 0.5), ("mean", ref.mean() * 0.5), ("none", ref * 0.5)):
        got = ours(kind, a, labels, q, w, gamma, reduction=how, scale=0.5, backend=backend)
        assert got.dtype == wide
        close(got.double(), want, tol)
        arriving = up if how == "none" else torch.tensor(3.0, dtype=wide)
        (ga,) = torch.autograd.grad(got, a, arriving)
        (gb,) = torch.autograd.grad(want, b, arriving.double(), retain_graph=True)
        assert ga.dtype == dtype and ga.shape == x.shape
        err = (ga.double() - gb).abs() - slope_tol * gb.abs()
        assert err.max() <= (1.2e-7 if dtype == torch.float16 else 3e-8), (how, err.max())


# focal losses


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_losses(backend, kind, dtype):
    for R, K, gamma in ((1, 1, 2.0), (40, 7, 2.0), (300, 80, 1.5), (1100, 1, 1.0), (3, 2000, 0.0), (64, 16, 2.5)):
        check(kind, backend, R, K, dtype, gamma)
    check(kind, backend, 30, 5, dtype, 2.0, weighted=False)


@given(st.integers(1, 60), st.integers(1, 70), st.sampled_from([0.0, 0.5, 1.0, 1.3, 2.0, 4.0]), st.sampled_from(KINDS), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_focal_backends_agree(R, K, gamma, kind, seed):
    if kind == "quality" and gamma < 1:
        gamma = 1.0  # the derivative has a pole where probability and target are equal
    for backend in ["torch"] if kernels_missing("cpu") else ["torch", "kernels"]:
        check(kind, backend, R, K, torch.float32, gamma, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_against_torchvision(backend):
    x, labels, _, _ = inputs(200, 9)
    x.requires_grad_()
    hot = F.one_hot(labels.clamp(0) % 9, 9).float() * ((labels >= 0) & (labels < 9))[:, None]
    for how in ("sum", "mean", "none"):
        for alpha, gamma in ((0.25, 2.0), (None, 0.0), (0.7, 3.0)):
            want = torchvision.ops.sigmoid_focal_loss(x, hot, -1 if alpha is None else alpha, gamma, how)
            got = sigmoid_focal_loss(x, labels, None, alpha, gamma, how, backend=backend)
            close(got, want, 1e-5)
            close(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_gradcheck(backend, kind):
    x, labels, q, w = inputs(7, 4, torch.float64)
    x = x.div(3).requires_grad_()
    for how in ("sum", "none"):
        for gamma in (2.0, 1.4):
            assert torch.autograd.gradcheck(lambda o: ours(kind, o, labels, q.double(), w.double(), gamma, reduction=how, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_corners(backend):
    "Empty tables, extreme logits, NaN, rows left out, strides"
    for R, K in ((0, 3), (4, 0), (0, 0)):
        x = torch.zeros(R, K, requires_grad=True)
        for how in ("sum", "mean", "none"):
            l = sigmoid_focal_loss(x, torch.full((R,), -1), reduction=how, backend=backend)
            assert l.shape == (x.shape if how == "none" else ())
            l.sum().backward()
            assert x.grad.shape == x.shape and l.sum() == 0
    x = torch.tensor([[-300.0, 300.0], [300.0, -300.0]], requires_grad=True)
    l = sigmoid_focal_loss(x, torch.tensor([0, -1]), backend=backend)
    l.backward()
    close(l, torch.tensor(0.25 * 300 + 1.5 * 300), 1e-6)
    close(x.grad, torch.tensor([[-0.25, 0.75], [0.75, 0.0]]), 1e-6)
    x = torch.randn(6, 5)
    x[2, 3] = float("nan")
    each = sigmoid_focal_loss(x, torch.full((6,), 1), reduction="none", backend=backend)
    assert each.isnan().nonzero().tolist() == [[2, 3]] and sigmoid_focal_loss(x, torch.full((6,), 1), backend=backend).isnan()
    x, labels, q, w = inputs(50, 6)
    w[::2] = 0
    y = x.clone()
    y[::2] = 77
    for kind in KINDS:
        close(ours(kind, x, labels, q, w, backend=backend), ours(kind, y, labels, q, w, backend=backend), 1e-6)
        t = x.t().contiguous().t()
        close(ours(kind, t, labels, q, w, backend=backend), ours(kind, x, labels, q, w, backend=backend), 1e-6)
        assert torch.equal(ours(kind, x, labels.int(), q, w, backend=backend), ours(kind, x, labels, q, w, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_graph_is_used_twice(backend):
    x, labels, _, _ = inputs(20, 5)
    for dtype in (torch.float32, torch.float16):
        a = x.to(dtype, copy=True).requires_grad_()
        l = sigmoid_focal_loss(a, labels, backend=backend)
        first, second = (torch.autograd.grad(l, a, torch.tensor(f), retain_graph=keep)[0] for f, keep in ((1.0, True), (2.0, False)))
        close(second, first * 2, 1e-3)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(l, a)
        l = sigmoid_focal_loss(a, labels, backend=backend)
        (g,) = torch.autograd.grad(l, a, create_graph=True)
        with pytest.raises(RuntimeError):
            g.sum().backward()
    a = x.detach().clone().requires_grad_()
    (sigmoid_focal_loss(a, labels, backend=backend) + sigmoid_focal_loss(a, labels, backend=backend) * 2).backward()
    b = x.detach().clone().requires_grad_()
    sigmoid_focal_loss(b, labels, scale=3.0, backend=backend).backward()
    close(a.grad, b.grad, 1e-6)


def test_focal_small_gradients_survive_half_precision():
    "A factor that comes late does not find zeros: gradient scaling of float16"
    x = torch.full((64, 80), -4.6, dtype=torch.float16)
    want = torch.full((64, 80), -4.6).half().double().requires_grad_()
    definition("sigmoid", want, torch.full((64,), -1), None, None).sum().mul(4096).backward()
    for backend in ["torch"] if kernels_missing("cpu") else ["torch", "kernels"]:
        a = x.clone().requires_grad_()
        (sigmoid_focal_loss(a, torch.full((64,), -1), alpha=0.3, backend=backend) * 4096).backward()
        close(a.grad.double(), want.grad, 1e-3)


def test_focal_refuses():
    x, labels, q, w = inputs(10, 4)
    for bad in (lambda: sigmoid_focal_loss(x[0], labels), lambda: sigmoid_focal_loss(x, labels[:3]), lambda: sigmoid_focal_loss(x, labels.float()),
                lambda: sigmoid_focal_loss(x, labels, gamma=-1), lambda: quality_focal_loss(x, labels, q[:4]), lambda: sigmoid_focal_loss(x, labels, scale=torch.ones(())),
                lambda: varifocal_loss(x, labels, q, reduction="total"), lambda: sigmoid_focal_loss(x, labels, backend="torchvision")):
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(DataError, match="label 6"):
        sigmoid_focal_loss(x, torch.full((10,), 6))


@KERNELS
def test_focal_elementary_functions():
    "softplus, sigmoid and powers of the kernel are within a few units of the last place, over the whole range"
    x = torch.linspace(-85, 85, 400_001)[:, None]
    none = torch.full((len(x),), -1)
    for gamma, want in ((0.0, F.softplus(x.double(), threshold=200)), (1.0, x.double().sigmoid() * F.softplus(x.double(), threshold=200))):
        got = sigmoid_focal_loss(x, none, alpha=None, gamma=gamma, reduction="none", backend="kernels").double()
        ok = want > 1.2e-38
        assert ((got / want - 1).abs()[ok]).max() < (3.2e-7 if gamma == 0 else 5e-7)
    (g,) = torch.autograd.grad(sigmoid_focal_loss(x.requires_grad_(), none, alpha=None, gamma=0.0, backend="kernels"), x)
    assert (g.double() / x.detach().double().sigmoid() - 1).abs().max() < 3.2e-7


@KERNELS
def test_focal_does_not_depend_on_threads():
    x, labels, q, w = inputs(3000, 80)
    res = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        a = x.clone().requires_grad_()
        l = quality_focal_loss(a, labels, q, w, backend="kernels")
        l.backward()
        res.append((l.detach(), a.grad))
    assert all(torch.equal(u, v) for r in res[1:] for u, v in zip(res[0], r))


@KERNELS
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process can only be reset on Linux")
@pytest.mark.parametrize("kind", KINDS)
def test_focal_kernel_holds_nothing_but_the_gradient(kind):
    "No table of targets, probabilities or losses: without a gradient next to nothing, with it once the size of the logits"
    x, labels, q, w = inputs(320_000, 40)  # tables above 32 MiB get pages of their own, which go back at once
    table, slack = x.numel() * 4, 6 << 20
    x.requires_grad_()

    def forward():
        with torch.no_grad():
            ours(kind, x, labels, q, w, backend="kernels")

    def step():
        torch.autograd.grad(ours(kind, x, labels, q, w, backend="kernels"), x)

    for f, most in ((forward, 0), (step, table)):
        f()
        assert _rss_of(f)["rise"] <= most + slack
    assert _rss_of(lambda: torch.autograd.grad(torchvision.ops.sigmoid_focal_loss(x, x.detach(), reduction="sum"), x))["rise"] >= 3 * table  # it would be seen


def test_focal_compiles_and_exports():
    x, labels, q, w = inputs(12, 5)

    class M(torch.nn.Module):
        def forward(self, x, labels, w):
            return sigmoid_focal_loss(x, labels, w, backend="torch")

    want = M()(x, labels, w)
    close(torch.export.export(M(), (x, labels, w)).module()(x, labels, w), want, 1e-6)
    f = torch.compile(M(), backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a, labels, w).backward(), M()(b, labels, w).backward()
    close(a.grad, b.grad, 1e-5)


@KERNELS
def test_focal_kernel_compiles():
    x, labels, q, w = inputs(12, 5)
    f = torch.compile(lambda x: varifocal_loss(x, labels, q, w, backend="kernels") * 2, backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a).backward(), (varifocal_loss(b, labels, q, w, backend="torch") * 2).backward()
    close(a.grad, b.grad, 1e-5)


TRITON = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_op_losses import KINDS, check, inputs, ours
for kind in KINDS:
    for R, K, gamma in ((3, 2, 2.0), (103, 11, 1.5)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            check(kind, "triton", R, K, dtype, gamma)
    check(kind, "triton", 9, 4, torch.float32, 2.0, weighted=False)
print("as defined")
"""


def test_focal_in_triton():
    "On the CPU, in Triton's interpreter; it must be chosen before Triton is imported, so in a process of its own"
    pytest.importorskip("triton")
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    p = subprocess.run([sys.executable, "-c", TRITON.format(tests=os.path.dirname(os.path.abspath(__file__)))], capture_output=True, text=True, env=env)
    assert p.returncode == 0 and "as defined" in p.stdout, p.stderr[-3000:]


# overlap losses


@pytest.mark.parametrize("kind", ("iou", "giou", "diou", "ciou"))
@pytest.mark.parametrize("backend", BOX_BACKENDS)
def test_box_losses(backend, kind):
    for n in (0, 1, 255, 257, 5000):
        x, y = rand_boxes(n, seed=1), rand_boxes(n, seed=2)
        w = torch.rand(n, generator=torch.Generator().manual_seed(0))
        for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            a, b, c, d = (o.to(dtype).requires_grad_() for o in (x, y, x, y))
            c, d = c.detach().double().requires_grad_(), d.detach().double().requires_grad_()
            ref = (1 - box_iou(c, d, kind, aligned=True)) * w.double() * 0.5
            for how, want in (("sum", ref.sum()), ("mean", ref.sum() / max(n, 1)), ("none", ref)):
                got = box_iou_loss(a, b, w, kind, how, 0.5, backend)
                assert got.dtype == dtype
                close(got.double(), want, max(tol, 1e-9))
                up = torch.rand(want.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
                for g, h in zip(torch.autograd.grad(got, (a, b), up), torch.autograd.grad(want, (c, d), up.double(), retain_graph=True)):
                    assert (g - h).abs().max() <= tol if n else g.shape == (0, 4)


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 8), min_size=1, max_size=40), st.sampled_from(["iou", "giou", "diou", "ciou"]))
@settings(max_examples=60, deadline=None)
def test_box_losses_where_edges_meet(rows, kind):
    "Whole coordinates: shared edges, equal boxes, no area, wrong way round"
    t = torch.tensor(rows, dtype=torch.float64)
    want = 1 - box_iou(t[:, :4], t[:, 4:], kind, aligned=True)
    solid = ((t[:, 2:4] - t[:, :2]).abs() * (t[:, 6:] - t[:, 4:6]).abs()).prod(1) > 0
    lo, hi = torch.maximum(t[:, :2], t[:, 4:6]), torch.minimum(t[:, 2:4], t[:, 6:])
    solid &= (hi != lo).all(1)  # what a clamp passes exactly at its limit differs between versions of torch
    solid &= ((t[:, 2:4] > t[:, :2]) & (t[:, 6:] > t[:, 4:6])).all(1)
    for backend in ["torch"] if kernels_missing("cpu") else ["torch", "kernels"]:
        close(box_iou_loss(t[:, :4], t[:, 4:], None, kind, "none", backend=backend), want, 1e-9)
        a, b, c, d = (o[solid].clone().requires_grad_() for o in (t[:, :4], t[:, 4:], t[:, :4], t[:, 4:]))
        got = torch.autograd.grad(box_iou_loss(a, b, None, kind, backend=backend), (a, b))
        for g, h in zip(got, torch.autograd.grad((1 - box_iou(c, d, kind, aligned=True)).sum(), (c, d))):
            close(g, h, 1e-9)


@pytest.mark.parametrize("backend", BOX_BACKENDS)
def test_box_losses_against_torchvision(backend):
    a, b = rand_boxes(100, seed=4).requires_grad_(), rand_boxes(100, seed=5)
    tv = dict(giou=torchvision.ops.generalized_box_iou_loss, diou=torchvision.ops.distance_box_iou_loss, ciou=torchvision.ops.complete_box_iou_loss)
    for k, f in tv.items():
        for how in ("sum", "mean", "none"):
            got, want = box_iou_loss(a, b, None, k, how, backend=backend), f(a, b, reduction=how)
            close(got, want, 1e-5)
            close(torch.autograd.grad(got.sum(), a)[0], torch.autograd.grad(want.sum(), a)[0], 1e-5)


@pytest.mark.parametrize("backend", BOX_BACKENDS)
def test_box_losses_gradcheck_and_corners(backend):
    x, y = rand_boxes(6, seed=6).double().requires_grad_(), rand_boxes(6, seed=7).double().requires_grad_()
    for k in ("iou", "giou", "diou"):  # the factor alpha of CIoU is a constant for the gradient only
        for how in ("sum", "none"):
            assert torch.autograd.gradcheck(lambda a, b: box_iou_loss(a, b, kind=k, reduction=how, backend=backend), (x, y), eps=1e-4, atol=1e-5)
    for bad in (float("nan"), float("inf")):
        z = rand_boxes(300, seed=8)
        z[7, 1] = bad
        for k in ("iou", "giou", "diou", "ciou"):
            l = box_iou_loss(z, rand_boxes(300, seed=9), None, k, "none", backend=backend)
            assert l.isnan().nonzero().flatten().tolist() == [7]
    for dtype in (torch.bfloat16, torch.float16):
        h = rand_boxes(9, seed=1).to(dtype).requires_grad_()
        l = box_iou_loss(h, rand_boxes(9, seed=2), kind="ciou", backend=backend)
        l.backward()
        assert l.dtype == torch.float32 and h.grad.dtype == dtype and h.grad.isfinite().all()
    a = rand_boxes(9, seed=1).requires_grad_()
    l = box_iou_loss(a, rand_boxes(9, seed=2), backend=backend)
    (first,) = torch.autograd.grad(l, a, torch.tensor(2.0), retain_graph=True)
    close(torch.autograd.grad(l, a)[0] * 2, first, 1e-6)


@KERNELS
def test_box_losses_opcheck():
    x, y, w = rand_boxes(5, seed=1), rand_boxes(5, seed=2), torch.rand(5)
    for kind in range(4):
        for each in (True, False):
            for by_y in (True, False):
                torch.library.opcheck(torch.ops.visdet.box_loss.default, (x.clone().requires_grad_(), y.clone().requires_grad_(by_y), w if by_y else None, kind, 0.5, each, True, by_y))
    f = torch.compile(lambda a: box_iou_loss(a, y, w, "ciou", backend="kernels") * 2, backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a).backward(), (box_iou_loss(b, y, w, "ciou", backend="torch") * 2).backward()
    close(a.grad, b.grad, 1e-5)
