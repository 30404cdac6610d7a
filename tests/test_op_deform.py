"Deformable attention and deformable convolution: backends against the reference in float64, torchvision and finite differences"
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from op_tools import backends_of
from visdet.core.basics import ConfigError
from visdet.core.kernels import kernels_missing
from visdet.core.testing import close
from visdet.cv.deform_attn import ms_deform_attn
from visdet.cv.deform_conv import deform_conv

KERNELS = pytest.mark.skipif(bool(kernels_missing()), reason=str(kernels_missing()))
SIZES = [(5, 7), (3, 2), (1, 1)]


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def problem(d=8, q=7, h=2, b=2, p=3, sizes=SIZES, dtype=torch.float64, seed=0):
    "Points inside, across and outside the edges"
    g = torch.Generator().manual_seed(seed)

    def rand(*s):
        return torch.rand(*s, generator=g, dtype=torch.float64)

    cells = sum(i * j for i, j in sizes)
    return (rand(b, cells, h, d) - 0.5).to(dtype), (rand(b, q, h, len(sizes), p, 2) * 1.6 - 0.3).to(dtype), (rand(b, q, h, len(sizes), p) - 0.3).to(dtype)


def value_and_grads(backend, xs, sizes=SIZES):
    xs = [o.detach().clone().requires_grad_() for o in xs]
    y = ms_deform_attn(xs[0], sizes, *xs[1:], backend=backend)
    return [y, *torch.autograd.grad((y.double() * torch.arange(1.0, y.numel() + 1).view(y.shape).cos()).sum(), xs)]


@pytest.mark.parametrize("backend", backends_of("ms_deform_attn"))
@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("d", [1, 16, 32, 40])
def test_attention_equals_reference(backend, dtype, tol, d):
    xs = problem(d, dtype=dtype)
    xs = [xs[0], xs[1].to(torch.promote_types(dtype, torch.float32)), xs[2]]
    for got, want in zip(value_and_grads(backend, xs), value_and_grads("torch", [o.double() for o in xs])):
        close(got, want, tol)
    assert value_and_grads(backend, xs)[0].dtype == dtype


@pytest.mark.parametrize("backend", backends_of("ms_deform_attn", but=("torch",)))
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_attention_of_any_shape(backend, sizes, d, q, h, p, seed):
    xs = problem(d, q, h, 1, p, sizes, seed=seed)
    for got, want in zip(value_and_grads(backend, xs, sizes), value_and_grads("torch", xs, sizes)):
        close(got, want, 1e-11)


@pytest.mark.parametrize("backend", backends_of("ms_deform_attn"))
@pytest.mark.parametrize("q,d,p", [(0, 8, 3), (7, 0, 3), (7, 8, 0)])
def test_attention_of_nothing(backend, q, d, p):
    got = value_and_grads(backend, problem(d, q, p=p))
    assert got[0].shape == (2, q, 2 * d) and not any(o.any() for o in got)


@pytest.mark.parametrize("backend", backends_of("ms_deform_attn"))
def test_attention_far_outside_and_not_finite(backend):
    v, loc, w = problem(16, dtype=torch.float32)
    far = value_and_grads(backend, [v, loc * 1e30 + 5, w])
    assert not far[0].any() and not far[1].any() and not far[2].any()
    assert not value_and_grads(backend, [v, torch.full_like(loc, -3.0), w])[0].any()
    for x in ("nan", "inf", "-inf"):
        bad = loc.clone()
        bad[1, 4, 1, 2, 0, 1] = float(x)
        y = ms_deform_attn(v, SIZES, bad, w, backend=backend).view(2, 7, 2, 16)
        assert y[1, 4, 1].isnan().all() and y.isnan().sum() == 16
    broken = v.clone()
    broken[:, 34] = float("nan")  # the last cell of the first level: points beside it stay clean
    touch = ((loc[:, :, :, 0] * torch.tensor([7.0, 5.0]) - 0.5 - torch.tensor([6.0, 4.0])).abs() < 1).all(-1).any(-1)
    assert torch.equal(ms_deform_attn(broken, SIZES, loc, w, backend=backend).view(2, 7, 2, 16).isnan().any(-1), touch)


@pytest.mark.parametrize("backend", backends_of("ms_deform_attn"))
def test_attention_takes_any_memory_layout(backend):
    v, loc, w = problem(16)
    want = ms_deform_attn(v, SIZES, loc, w, backend="torch")
    odd = [v.transpose(1, 2).contiguous().transpose(1, 2), loc.flip(-1).flip(-1), w.transpose(0, 1).contiguous().transpose(0, 1)]
    close(ms_deform_attn(odd[0], SIZES, *odd[1:], backend=backend), want, 1e-12)


@KERNELS
def test_attention_gradient_is_the_same_with_any_number_of_threads():
    xs = problem(40, 300, 3, dtype=torch.float32)
    one = value_and_grads("kernels", xs)
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(one, value_and_grads("kernels", xs)))


@KERNELS
def test_attention_kernel_refuses_what_does_not_fit():
    v, loc, w = problem(dtype=torch.float32)
    op, shapes = torch.ops.visdet.ms_deform_attn, [o for hw in SIZES for o in hw]
    for args in [(v, shapes[:-2], loc, w), (v, shapes, loc[:1], w), (v, shapes, loc, w.double()), (v.half(), shapes, loc.half(), w.half()), (v.transpose(1, 2), shapes, loc, w)]:
        with pytest.raises(RuntimeError):
            op(*args)


def test_attention_arguments():
    v, loc, w = problem()
    with pytest.raises(ConfigError, match="43 cells|42"):
        ms_deform_attn(v, [(5, 7), (3, 2), (2, 1)], loc, w)
    with pytest.raises(ConfigError, match="weights"):
        ms_deform_attn(v, SIZES, loc, w[:, :3])


TRITON = """
    import torch
    from visdet.core.testing import close
    from visdet.cv.deform_attn import ms_deform_attn
    sizes = [(5, 7), (3, 2), (1, 1)]
    def run(backend, xs):
        xs = [o.detach().clone().requires_grad_() for o in xs]
        y = ms_deform_attn(xs[0], sizes, *xs[1:], backend=backend)
        return [y, *torch.autograd.grad((y.double()*torch.arange(1., y.numel()+1).view(y.shape).cos()).sum(), xs)]
    g = torch.Generator().manual_seed(0)
    for d, dtype, tol in ((3, torch.float64, 1e-12), (8, torch.float32, 2e-5), (4, torch.bfloat16, 2e-2)):
        wide = torch.promote_types(dtype, torch.float32)
        xs = [torch.rand(2, 42, 2, d, generator=g)-.5, torch.rand(2, 2, 2, 3, 3, 2, generator=g)*1.6-.3, torch.rand(2, 2, 2, 3, 3, generator=g)-.3]
        xs = [xs[0].to(dtype), xs[1].to(wide), xs[2].to(dtype)]
        for got, want in zip(run('triton', xs), run('torch', [o.double() for o in xs])): close(got, want, tol)
    xs[1][1, 0, 1, 2, 0, 1] = float('nan')
    bad = run('triton', xs)[0].isnan().view(2, 2, 2, 4)
    assert bad[1, 0, 1].all() and bad.sum() == 4
    print('done')
"""


def test_attention_triton_in_the_interpreter():
    pytest.importorskip("triton")
    env = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    r = subprocess.run([sys.executable, "-c", textwrap.dedent(TRITON)], env=env, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0 and "done" in r.stdout, r.stderr[-3000:]


def convolution(b=2, c=8, o=6, size=(7, 9), ks=(3, 3), s=1, p=1, d=1, groups=1, og=2, mask=True, dtype=torch.float64, seed=0):
    "Arguments with offsets that reach far outside, and the sizes that belong to them"
    g = torch.Generator().manual_seed(seed)

    def rand(*n):
        return torch.randn(*n, generator=g, dtype=torch.float64).to(dtype)

    h, w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k in zip(size, ks))
    k = ks[0] * ks[1]
    xs = [rand(b, c, *size), rand(b, og * 2 * k, h, w) * 2, rand(o, c // groups, *ks), rand(b, og * k, h, w).sigmoid() if mask else None, rand(o)]
    return xs, dict(stride=s, padding=p, dilation=d, groups=groups)


def conv_and_grads(f, xs, **kw):
    xs = [o if o is None else o.detach().clone().requires_grad_() for o in xs]
    y = f(*xs, **kw)
    return [y, *torch.autograd.grad((y.double() * torch.arange(1.0, y.numel() + 1).view(y.shape).cos()).sum(), [o for o in xs if o is not None])]


def oracle(x, offset, weight, mask, bias, stride, padding, dilation, groups):
    return torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


@pytest.mark.parametrize("backend", backends_of("deform_conv"))
@pytest.mark.parametrize(
    "kw",
    [{}, dict(mask=False), dict(groups=2, og=4), dict(ks=(1, 3), s=2, p=2, d=3), dict(c=6, o=3, groups=3, og=2, mask=False), dict(c=144, o=5, og=1, groups=1), dict(c=70, o=4, groups=2, og=5), dict(b=1, size=(1, 1), og=1), dict(size=(40, 60), c=130, o=130, b=1, og=1)],
)
def test_convolution_equals_torchvision(backend, kw):
    xs, geo = convolution(**kw)
    for got, want in zip(conv_and_grads(deform_conv, xs, backend=backend, **geo), conv_and_grads(oracle, xs, **geo)):
        close(got, want, 1e-10)


@pytest.mark.parametrize("backend", backends_of("deform_conv"))
@pytest.mark.parametrize("scale", [0, 1])
def test_convolution_on_whole_offsets(backend, scale):
    "Bilinear interpolation has kinks there, and training starts from offsets of zero"
    xs, geo = convolution(seed=5)
    xs[1] = xs[1].round() * scale
    for got, want in zip(conv_and_grads(deform_conv, xs, backend=backend, **geo), conv_and_grads(oracle, xs, **geo)):
        close(got, want, 1e-10)


@pytest.mark.parametrize("backend", backends_of("deform_conv"))
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_convolution_in_fewer_bits(backend, dtype, tol):
    xs, geo = convolution(dtype=dtype)
    want = conv_and_grads(deform_conv, [o.double() for o in xs], backend="torch", **geo)
    for got, ref in zip(conv_and_grads(deform_conv, xs, backend=backend, **geo), want):
        close(got / ref.abs().max(), ref / ref.abs().max(), tol)


@pytest.mark.parametrize("backend", backends_of("deform_conv", but=("torch",)))
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_convolution_of_any_shape(backend, h, w, kh, kw, s, p, d, og, groups, mask, seed):
    if min(h + 2 * p - d * (kh - 1), w + 2 * p - d * (kw - 1)) < 1:
        return
    xs, geo = convolution(1, 4, 2, (h, w), (kh, kw), s, p, d, groups, og, mask, seed=seed)
    for got, want in zip(conv_and_grads(deform_conv, xs, backend=backend, **geo), conv_and_grads(deform_conv, xs, backend="torch", **geo)):
        close(got, want, 1e-10)


@pytest.mark.parametrize("backend", backends_of("deform_conv"))
def test_convolution_not_finite_and_empty(backend):
    (x, off, w, m, b), geo = convolution(dtype=torch.float32, og=1)
    bad = off.clone()
    bad[1, 5, 2, 4] = float("nan")
    for mask in (m, None):
        y = deform_conv(x, bad, w, mask, b, backend=backend, **geo)
        assert y.isnan().any(1).nonzero().tolist() == [[1, 2, 4]]
    for far in (float("inf"), -float("inf"), 1e30, -1e30):
        assert not deform_conv(x, torch.full_like(off, far), w, m, backend=backend, **geo).any()
    y, *grads = conv_and_grads(deform_conv, [o[:0] if o.ndim == 4 and len(o) == 2 else o for o in (x, off, w, m, b)], backend=backend, **geo)
    assert y.shape == (0, 6, 7, 9) and not any(o.any() for o in grads)


@KERNELS
def test_convolution_gradient_is_the_same_with_any_number_of_threads():
    xs, geo = convolution(size=(12, 12), c=130, dtype=torch.float32)
    one = conv_and_grads(deform_conv, xs, backend="kernels", **geo)
    torch.set_num_threads(2)
    two = conv_and_grads(deform_conv, xs, backend="kernels", **geo)
    for a, b in zip(one, two):  # the matrix product may add up in another order
        close(a / a.abs().max(), b / a.abs().max(), 1e-5)


def test_convolution_arguments():
    (x, off, w, m, b), geo = convolution()
    for args, kw, said in [((x, off[:, :-2], w), {}, "offset"), ((x, off, w, m[:1]), {}, "mask"), ((x, off, w, m, b[:2]), {}, "bias"), ((x, off, w), dict(groups=3), "groups"), ((x, off, w), dict(stride=0), "positive")]:
        with pytest.raises(ConfigError, match=said):
            deform_conv(*args, **{**geo, **kw})
