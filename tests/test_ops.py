"""One table: every operator x backend x type of number x edge case, against the `torch` backend in float64; `gradcheck`; `opcheck`.

A row says how inputs are made for each edge case and what of the result is compared. An operator, or a compiled kernel,
without a row fails the first test. What concerns one family alone (oracles, shapes found by hypothesis, threads) is in the
files test_op_*.py.
"""
import inspect
from dataclasses import dataclass, field

import pytest
import torch
from op_tools import backends_of
from visdet.core.backends import _ops
from visdet.core.basics import DataError
from visdet.core.kernels import kernels_missing
from visdet.core.registry import lookup, names
from visdet.core.testing import close, crowded_boxes, rand_boxes
from visdet.cv import all as cv
from visdet.cv.masks import _pack

EDGES = "plain", "empty", "one", "huge", "degenerate", "nan", "mixed"
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALL = F32, F64, F16, BF16
NAN = float("nan")


@dataclass
class Row:
    "How an operator is tried"
    make: callable  # make(edge, dtype) -> list of arguments; floating tensors in float64, which then take the type
    call: callable  # call(backend keywords, *arguments) -> tensors, arrays, dicts, in any nesting
    dtypes: tuple = ALL
    tol: float = 1e-5  # of float32 and of what is computed in it; float64 has 1e-9
    low: dict = field(default_factory=dict)  # of results that come in fewer bits
    undefined: dict = field(default_factory=dict)  # edge -> why it has no meaning
    refused: dict = field(default_factory=dict)  # edge -> what the error says
    grad: tuple = ()  # which arguments get a gradient
    no_grad: tuple = ()  # backends that say they have none
    slack: float = 20  # gradients may be this much further off than values
    check: tuple = None  # backends for gradcheck; all that have a gradient if None
    op: str = None  # the operator whose backends it has, if that is another
    other: torch.dtype = None  # type of every second argument in the edge case "mixed"


ROWS = {}


def row(name, make, call, **kw):
    ROWS[name] = Row(make, call, **kw)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def count(edge, n):
    return {"empty": 0, "one": 1}.get(edge, n)


def largest(dtype):
    "A factor for coordinates of some hundreds, whose products stay in the range of the type that is computed in"
    return 64.0 if dtype == F16 else 1e14


# boxes that suppress one another


def candidates(edge, dtype, n=37, classes=3):
    "Boxes, scores, labels"
    b, s = (o.double() for o in crowded_boxes(count(edge, n), (300, 400), seed=3))
    l = torch.arange(len(b)) * 7 % classes
    if edge == "huge":
        b, l = b * largest(dtype), l * 2**40 - 2**60
    if edge == "degenerate":
        b[::3, 2] = b[::3, 0]
        b[1::5] = b[1::5][:, [2, 3, 0, 1]]
        b[2::7] = b[2]
        s = (s * 8).round() / 8
    if edge == "nan":
        b[4, 1] = NAN
    return [b, s, l]


def suppressing(name, call, labels=True, **kw):
    row(name, lambda *a: candidates(*a)[: 3 if labels else 2], call, refused=dict(nan="1 of 37"), **kw)


suppressing("nms", lambda kw, b, s: cv.nms(b, s, 0.5, **kw), labels=False)
suppressing("batched_nms", lambda kw, b, s, l: [cv.batched_nms(b, s, l, t, m, **kw) for t, m in ((0.5, None), (0.3, 4))])
suppressing("soft_nms", lambda kw, b, s, l: [cv.soft_nms(b, s, l, how, max_num=m, **kw) for how, m in (("linear", None), ("gaussian", 9))])
suppressing("matrix_nms", lambda kw, b, s, l: [cv.matrix_nms(b, s, l, how, **kw) for how in ("linear", "gaussian")])
suppressing("fast_nms", lambda kw, b, s, l: [cv.fast_nms(b, s, l, 0.5, pre, **kw) for pre in (200, 3)])
suppressing("nms_match", lambda kw, b, s, l: cv.nms_match(b, s, l, 0.5, **kw))
suppressing("weighted_box_fusion", lambda kw, b, s, l: cv.weighted_box_fusion([b[::2], b[1::2]], [s[::2], s[1::2]], [l[::2], l[1::2]], **kw), low={F16: 1e-3, BF16: 8e-3})


def turned(edge, dtype, n=23, seed=0):
    "Rotated boxes"
    b = rand(count(edge, n), 5, seed=seed) * torch.tensor([60.0, 60, 50, 30, 14]) + torch.tensor([0.0, 0, 1, 1, -7])
    if edge == "huge":
        b[:, :4] *= 64.0 if dtype == F16 else 1e6
    if edge == "degenerate":
        b[::2, 2] = 0
        b[1::4] = b[:1]
    if edge == "nan":
        b[2, 3] = NAN
    return b


row("rotated_iou", lambda e, t: [turned(e, t), turned("plain" if e == "empty" else e, t, 14, 1)], lambda kw, a, b: [cv.rotated_iou(a, b, kind=k, **kw) for k in ("iou", "iof")], tol=2e-5, grad=(0, 1), slack=50)
row("rotated_nms", lambda e, t: [turned(e, t), candidates(e, t, 23)[1], torch.arange(count(e, 23)) % 2], lambda kw, b, s, l: cv.rotated_nms(b, s, l, 0.1, **kw), refused=dict(nan="1 of 23"))


# overlaps, assignment


def two(edge, dtype, n=21, m=13):
    "Boxes to compare; the first set is empty in the edge case of that name"
    a, b = rand_boxes(count(edge, n), (300, 400), 1).double(), rand_boxes(1 if edge == "one" else m, (300, 400), 2).double()
    if edge == "huge":
        a, b = a * largest(dtype), b * largest(dtype)
    if edge == "degenerate":
        a[::2, 2], b[::3, 3], a[5], b[1] = a[::2, 0], b[::3, 1], b[4], b[1, [2, 3, 0, 1]]
    if edge == "nan":
        a[3, 2], b[5, 0] = NAN, float("inf")
    return [a, b]


def overlaps(kw, a, b):
    with torch.set_grad_enabled(torch.is_grad_enabled() and kw.get("backend") != "kernels"):
        return [cv.box_iou(a, b, kind, **kw) for kind in ("iou", "iof", "giou", "diou", "ciou")]


row("box_iou", two, overlaps, grad=(0, 1), no_grad=("kernels",), check=())  # CIoU holds a factor constant; gradcheck is below
row("best_iou", lambda e, t: [*two(e, t), torch.arange(1 if e == "one" else 13) % 4 < 3], lambda kw, a, b, v: [o for least in (None, 0.2) for o in cv.best_iou(a, b, v, least, **kw) if o is not None])


def costs(edge, dtype):
    c = (rand(2, count(edge, 9), count(edge, 6)) * 64 - 32).round()
    if edge == "huge":
        c = c * (1e3 if dtype == F16 else 1e30)
    if edge == "degenerate":
        c[:, 1:] = c[:, :1]
    if edge == "nan":
        c[1, 3, 4] = NAN
    return [c, torch.tensor([4, 0])] if edge == "mixed" else [c]


def assigned(kw, c, k=None):
    "Sums and numbers of pairs: several assignments may be optimal"
    r, j = cv.hungarian(c, k, **kw)
    return [(c.double()[i, r[i][r[i] >= 0], j[i][j[i] >= 0]].sum(), (r[i] >= 0).sum(), r[i].unique().numel(), j[i].unique().numel()) for i in range(len(c))]


row("hungarian", costs, assigned, refused=dict(nan="table 1"))


def pairs(edge, dtype):
    a, b = two(edge, dtype, 13)
    return [a, b[: len(a)], rand(len(a), seed=5)]


row("box_iou_loss", pairs, lambda kw, x, y, w: [cv.box_iou_loss(x, y, w, kind, how, 0.5, **kw) for kind in ("iou", "giou", "diou", "ciou") for how in ("sum", "mean", "none")], grad=(0, 1), check=())


# losses


def logits(edge, dtype):
    "Logits, labels with both ways to say background, qualities with zeros and ones, weights"
    r, k = count(edge, 19), 1 if edge in ("one", "degenerate") else 7
    x, l = (rand(r, k) - 0.5) * 8, torch.arange(r) % (k + 2) - 1
    q, w = (rand(r, seed=1) * 1.4 - 0.2).clamp(0, 1), rand(r, seed=2)
    if edge == "huge":
        x = x.sign() * 3e3 + x
    if edge == "degenerate":
        w[::2], q[:] = 0, 0
    if edge == "nan":
        x[3, 2] = NAN
    return [x, q, w, l]


SLOPES = {F16: 1e-3, BF16: 8e-3}
HOW = "sum", "mean", "none"
row("sigmoid_focal_loss", logits, lambda kw, x, q, w, l: [cv.sigmoid_focal_loss(x, l, w, 0.3, 2.0, how, 0.5, **kw) for how in HOW], grad=(0,))
row("quality_focal_loss", logits, lambda kw, x, q, w, l: [cv.quality_focal_loss(x, l, q, w, 2.0, how, 0.5, **kw) for how in HOW], grad=(0,))
row("varifocal_loss", logits, lambda kw, x, q, w, l: [cv.varifocal_loss(x, l, q, w, 0.6, 2.0, how, 0.5, **kw) for how in HOW], grad=(0,))


# regions


def regions(edge, n=9, limit=90):
    "Boxes in quarter pixels, so that float32 and float64 round corners to the same cells"
    r = torch.cat([(torch.arange(n) % 2)[:, None], (rand(n, 2) * limit - 8) * 4 // 1 / 4, rand(n, 2, seed=1) * limit * 4 // 1 / 4], 1)[: count(edge, n)]
    r[:, 3:] += r[:, 1:3]
    if edge == "huge":
        r[:, 1:3], r[:, 3:] = -500, 1500
    if edge == "degenerate":
        r[::2, 3:], r[1::4] = r[::2, 1:3], r[1::4][:, [0, 3, 4, 1, 2]]
    if edge == "nan":
        r[2, 3] = NAN
    return r


def maps(edge, sizes, channels=5):
    return [rand(2, channels, *s, seed=i) - 0.5 for i, s in enumerate(sizes)]


LOW = {F16: 2e-3, BF16: 2e-2}
row("roi_align", lambda e, t: [*maps(e, [(11, 13)]), regions(e)], lambda kw, f, r: [cv.roi_align(f, r, (2, 3), 0.125, s, a, **kw) for s, a in ((0, True), (2, False))], low=LOW, grad=(0,))
row("RoIPooler", lambda e, t: [*maps(e, [(16, 20), (8, 10)], 70), regions(e, limit=300)], lambda kw, f, g, r: cv.RoIPooler([8, 16], 4, **kw)([f, g], r), low=LOW, grad=(0, 1), op="roi_align", check=())
row("roi_pool", lambda e, t: [*maps(e, [(11, 13)]), regions(e)], lambda kw, f, r: cv.roi_pool(f, r, (2, 4), 0.125, **kw), low=LOW, grad=(0,))


LEVELS = [(5, 7), (3, 2), (1, 1)]


def readings(edge, dtype):
    "Values, places inside, across and outside the edges, weights"
    q, d = count(edge, 7), 3 if edge == "one" else 16
    v, loc, w = rand(2, 42, 2, d) - 0.5, rand(2, q, 2, 3, 4, 2, seed=1) * 1.6 - 0.3, rand(2, q, 2, 3, 4, seed=2) - 0.3
    if edge == "huge":
        loc = (loc - 0.5) * 1e4
    if edge == "degenerate":  # on cells, on edges, all at one place
        loc = (loc * 2).round() / 2
        loc[:, ::2] = 0.5
    if edge == "nan":
        loc[1, 4, 1, 2, 0, 1] = NAN
    return [v, loc, w]


row("ms_deform_attn", readings, lambda kw, v, loc, w: cv.ms_deform_attn(v, LEVELS, loc, w, **kw), tol=2e-5, low={F16: 4e-3, BF16: 3e-2}, grad=(0, 1, 2), slack=50)


def convolution(edge, dtype):
    "Input, offsets that reach far outside, weight, mask, bias"
    b, size = count(edge, 2), (1, 1) if edge == "one" else (5, 6)
    x, off = rand(b, 8, *size) - 0.5, (rand(b, 36, *size, seed=1) - 0.5) * 6
    if edge == "huge":
        off = off * 1e3
    if edge == "degenerate":
        off = off.round() * 0
    if edge == "nan":
        off[1, 5, 2, 4] = NAN
    return [x, off, rand(6, 8, 3, 3, seed=2) - 0.5, rand(b, 18, *size, seed=3), rand(6, seed=4)]


row("deform_conv", convolution, lambda kw, x, off, w, m, b: [cv.deform_conv(x, off, w, m, b, padding=1, **kw), cv.deform_conv(x, off, w, None, None, padding=1, **kw)], tol=1e-4, low={F16: 1e-2, BF16: 6e-2}, grad=(0, 1, 2, 3, 4), slack=10)


# masks


def bitmaps(edge, dtype=None, n=4):
    h, w = {"one": (1, 1), "huge": (70, 91)}.get(edge, (19, 26))
    m = (rand(count(edge, n), h, w) < 0.4).double()
    if edge == "degenerate":
        m[0], m[1], m[2, :, 3] = 0, 1, 1
    if edge == "nan":
        m[1, 4, 5] = NAN
    return [m]


def coded(f, extra=()):
    "A row's call for run lengths of bitmaps"
    return lambda kw, m: f([cv.rle_encode(o, backend="torch") for o in m], kw)


ONE_INPUT = dict(mixed="there is one input")
BYTES = dict(nan="run lengths are bytes", mixed="run lengths are bytes")
row("rle_encode", bitmaps, lambda kw, m: cv.rle_encode(m, **kw), undefined=ONE_INPUT)
row("masks_to_boxes", bitmaps, lambda kw, m: cv.masks_to_boxes(m, **kw), undefined=ONE_INPUT)
row("connected_components", bitmaps, lambda kw, m: [cv.connected_components(m, k, **kw) for k in (4, 8)], undefined=ONE_INPUT)
row("rle_decode", bitmaps, coded(lambda r, kw: cv.rle_decode(r, **kw)), dtypes=(torch.uint8,), undefined=BYTES, refused=dict(empty="has no size"))
row("rle_area", bitmaps, coded(lambda r, kw: cv.rle_area(r, **kw)), dtypes=(torch.uint8,), undefined=BYTES)
row("rle_to_box", bitmaps, coded(lambda r, kw: cv.rle_to_box(r, **kw)), dtypes=(torch.uint8,), undefined=BYTES)
row("rle_merge", bitmaps, coded(lambda r, kw: [cv.rle_merge(r, how, **kw) for how in ("union", "intersection")]), dtypes=(torch.uint8,), undefined=BYTES, refused=dict(empty="no mask"))
row("rle_iou", bitmaps, coded(lambda r, kw: [cv.rle_iou(r, r[1:], [i % 2 for i in range(len(r[1:]))], **kw), cv.rle_iou(r, r, **kw)]), dtypes=(torch.uint8,), undefined=BYTES)


def polygons(edge, dtype):
    "Corners (P,2) of two polygons, in quarters of a pixel"
    p = [(rand(n, 2, seed=n) * 80 - 10) * 4 // 1 / 4 for n in (3, 11)]
    if edge == "empty":
        return []
    if edge == "one":
        return [p[0] * 0 + 5]
    if edge == "huge":
        p = [o * 300 for o in p]
    if edge == "degenerate":
        p[1][:, 0] = p[1][0, 0]
    if edge == "nan":
        p[0][1, 1] = NAN
    return p


row("polygons_to_rle", polygons, lambda kw, *ps: cv.polygons_to_rle([o.numpy() for o in ps], (61, 53), **kw), dtypes=(F32, F64, F16), refused=dict(nan="not finite"))


def probabilities(edge, dtype):
    n, m = count(edge, 5), 1 if edge == "one" else 14
    p, b = rand(n, m, m), rand_boxes(n, (60, 80), 4).double()
    if edge == "huge":
        b = b * 40 - 900
    if edge == "degenerate":
        b[0, 2:], b[1], b[2] = b[0, :2], b[1, [2, 3, 0, 1]], torch.tensor([900.0, 5, 990, 9])
    if edge == "nan":
        p[0, 3, 3], b[2, 1] = NAN, NAN
    return [p, b]


row("paste_masks", probabilities, lambda kw, p, b: [cv.paste_masks(p, b, (60, 80), t, **kw) for t in (0.5, None)])
row("sample_masks", probabilities, lambda kw, p, b: cv.sample_masks(p, b, (60, 80), None, **kw), undefined={"nan": "products of matrices spread what is not a number over its mask"})


def logits(edge, dtype):
    n, m = count(edge, 5), 1 if edge == "one" else 10
    x = rand(n, m, m) * largest(dtype) if edge == "huge" else (rand(n, m, m) - 0.5) * 8
    if edge == "degenerate":
        x[0] = 0
    if edge == "nan":
        x[0, 3, 3] = NAN
    return [x]


row("map_masks", logits, lambda kw, x: [cv.map_masks(x, (80, 80), (60, 80), s, None, **kw) for s in ((1.0, 1.0), (0.6, 0.6))], tol=1e-4, undefined=dict(mixed="there is one input"))
row("paste_rles", probabilities, lambda kw, p, b: cv.paste_rles(p, b, (60, 80), **kw))


def picture(edge, dtype):
    h, w = {"empty": (0, 5), "one": (1, 1), "huge": (400, 3)}.get(edge, (19, 26))
    x = rand(h, w, 3) * 255
    if edge == "degenerate":
        x[:] = 7
    if edge == "nan":
        x[3, 3] = NAN
    return [x.round() if dtype == torch.uint8 else x]


row("resize_image", picture, lambda kw, x: [cv.resize_image(x.numpy(), (12, 31), how) for how in ("bilinear", "bicubic", "nearest")], dtypes=(F32, F64, torch.uint8), tol=1e-4, low={torch.uint8: 0.01}, undefined=dict(mixed="there is one input"), refused=dict(empty="resize"))


# running the table


def has_backends(name):
    return (ROWS[name].op or name) in _ops


def trials(ok=lambda name, backend: True):
    "Parameters (operator, backend)"
    res = []
    for name in ROWS:
        for p in backends_of(ROWS[name].op or name) if has_backends(name) else [pytest.param(None)]:
            if ok(name, p.values[0]):
                res.append(pytest.param(name, p.values[0], marks=p.marks, id=f"{name}-{p.values[0]}"))
    return res


def typed(o, dtype, wide=None):
    "A floating tensor in `dtype`; whole numbers stay as they are"
    return o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o


def arguments(r, edge, dtype):
    "The arguments, and the same numbers in float64"
    args = r.make(edge, dtype)
    other = F64 if dtype == F32 else F32
    if edge == "mixed":
        args = [typed(a, dtype if i % 2 == 0 else other) for i, a in enumerate(args)]
    else:
        args = [typed(a, dtype) for a in args]
    return args, args if dtype == torch.uint8 else [typed(a, F64) for a in args]


def leaves(o):
    if isinstance(o, dict):
        yield torch.frombuffer(bytearray(o["counts"]), dtype=torch.uint8)
        yield torch.tensor(o["size"])
    elif isinstance(o, (list, tuple)):
        yield torch.tensor(len(o))
        for v in o:
            yield from leaves(v)
    else:
        yield torch.as_tensor(o)


def same(got, want, tol):
    got, want = list(leaves(got)), list(leaves(want))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        if b.is_floating_point():
            close(a, b, tol)
        else:
            assert a.shape == b.shape and torch.equal(a.long(), b.long())


def keywords(name, backend):
    return {} if backend is None else dict(backend=backend)


def tolerance(r, dtype, out=True):
    if dtype == F64:
        return max(1e-9, r.tol * 1e-5)
    return r.low.get(dtype, r.tol if out else max(r.tol, SLOPES.get(dtype, 0)))


def test_every_operator_has_a_row():
    "An operator is what the registry lists of visdet.cv, and what has backends; compositions of operators in other rooms have tests of their own"
    want = {n for n in names("op") if inspect.unwrap(lookup("op", n)).__module__.startswith("visdet.cv.")} | set(_ops)
    assert set(ROWS) == want, f"without a row: {sorted(want - set(ROWS))}; rows of nothing: {sorted(set(ROWS) - want)}"
    for n, r in ROWS.items():
        assert set(r.undefined) | set(r.refused) <= set(EDGES) and all(r.undefined.values()), n
        named = "backend" in inspect.signature(lookup("op", n)).parameters if n in names("op") else True
        assert named == has_backends(n), f"{n}: a parameter `backend` and an Op belong together"


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name,backend", trials())
def test_value(name, backend, edge):
    r = ROWS[name]
    if edge in r.undefined:
        return
    for dtype in r.dtypes:
        args, wide = arguments(r, edge, dtype)
        if edge in r.refused:
            with pytest.raises(DataError, match=r.refused[edge]):
                r.call(keywords(name, backend), *args)
            continue
        got, want = r.call(keywords(name, backend), *args), r.call(keywords(name, backend and "torch"), *wide)
        try:
            same(got, want, max(tolerance(r, dtype), 1e-5 if edge == "mixed" else 0))
        except AssertionError as e:
            raise AssertionError(f"{name}, {backend}, {edge}, {dtype}: {e}") from e


@pytest.mark.parametrize("edge", ["plain", "empty", "one", "mixed"])
@pytest.mark.parametrize("name,backend", trials(lambda n, b: ROWS[n].grad and b not in ROWS[n].no_grad))
def test_gradient(name, backend, edge):
    r = ROWS[name]
    for dtype in r.dtypes:
        res = []
        for b, args in zip((backend, backend and "torch"), arguments(r, edge, dtype)):
            args = [a.clone().requires_grad_() if i in r.grad else a for i, a in enumerate(args)]
            outs = [o for o in leaves(r.call(keywords(name, b), *args)) if o.is_floating_point()]
            total = sum((o.double() * torch.arange(1.0, o.numel() + 1, dtype=F64).view(o.shape).cos()).sum() for o in outs)
            res.append(torch.autograd.grad(total, [args[i] for i in r.grad], allow_unused=edge == "empty"))
        for i, a, b in zip(r.grad, *res):
            if a is None or b is None:
                assert edge == "empty"
                continue
            want = args[i]
            assert a.shape == want.shape
            scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
            try:
                close(a.double() / scale, b.double() / scale, max(tolerance(r, dtype, False) * r.slack, SLOPES.get(dtype, 0) * 2, 1e-5 if edge == "mixed" else 0))
            except AssertionError as e:
                raise AssertionError(f"{name}, {backend}, {edge}, {dtype}, argument {i}: {e}") from e


@pytest.mark.parametrize("name,backend", trials(lambda n, b: ROWS[n].grad and b not in ROWS[n].no_grad and b in (ROWS[n].check if ROWS[n].check is not None else (b,))))
def test_gradcheck(name, backend):
    r = ROWS[name]
    args = [a.detach().clone().requires_grad_() if i in r.grad else a for i, a in enumerate(small(name, r))]
    f = lambda *a: tuple(o for o in leaves(r.call(keywords(name, backend), *a)) if o.is_floating_point())  # noqa: E731
    assert torch.autograd.gradcheck(f, args, fast_mode=True)


def small(name, r):
    "The plain arguments in float64, fewer of them where there are many"
    args = r.make("plain", F64)
    return [a[:5] for a in args] if name == "rotated_iou" else args


@pytest.mark.parametrize("backend", backends_of("box_iou_loss"))
@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])  # CIoU holds its factor alpha constant for the gradient
def test_gradcheck_overlaps(backend, kind):
    x, y, w = pairs("plain", F64)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cv.box_iou_loss(a, b, w, kind, "none", backend=backend), (x, y), eps=1e-4, atol=1e-5, fast_mode=True)
    assert torch.autograd.gradcheck(lambda a, b: cv.box_iou(a, b, kind, backend="torch"), (x, y), eps=1e-4, atol=1e-5, fast_mode=True)


# what torch.library knows of the kernels

CALLS = {}
NO_SHAPES = "test_schema"  # the size of the result depends on the numbers
NO_GRAD = "test_schema", "test_faketensor"


def kernel(*names, **kw):
    "Decorator: a function that yields arguments for kernels of these names"

    def inner(f):
        for n in names:
            CALLS[n] = f, kw
        return f

    return inner


def floats(*xs):
    return [o.float() if o.is_floating_point() else o for o in xs]


@kernel("nms")
def _(o):
    b, s, l = candidates("plain", F32)
    yield o, (b.float(), s.float(), l, 0.5, -1)
    yield o, (b, s, None, 0.3, 4)
    yield o, (b[:0], s[:0], None, 0.5, -1)


@kernel("nms_sorted")
def _(o):
    b, s, l = candidates("plain", F32)
    yield o, (b, l.sort()[0], 0.5)


@kernel("soft_nms")
def _(o):
    b, s, l = candidates("plain", F32)
    yield o, (b.float(), s.float(), l, True, 0.3, 0.5, 0.01, -1)
    yield o, (b, s, None, False, 0.3, 0.5, 0.01, 5)


@kernel("fuse_boxes")
def _(o):
    b, s, l = candidates("plain", F32)
    yield o, (b, s, l.sort()[0], 0.5)


@kernel("fast_nms", "matrix_nms", "nms_match")
def _(o):
    b, s, l = candidates("plain", F32)
    for labels in (l, None):
        yield torch.ops.visdet.fast_nms, (b.float(), s, labels, 0.5, 200, -1)
        yield torch.ops.visdet.matrix_nms, (b, s, labels, labels is None, 2.0, 0.0, -1, 5)
        yield torch.ops.visdet.nms_match, (b, s.float(), labels, 0.5)


@kernel("rotated_iou", "rotated_nms")
def _(o):
    from visdet.cv.rotated import _rows

    a, b = _rows(turned("plain", F64, 6)), _rows(turned("plain", F64, 9, 1))
    yield torch.ops.visdet.rotated_iou, (a, b, False, True)
    yield torch.ops.visdet.rotated_iou, (a, b[:6], True, False)
    yield torch.ops.visdet.rotated_nms, (b, torch.rand(9), None, 0.1, -1)


@kernel("best_iou")
def _(o):
    b, v = rand_boxes(70), torch.ones(2, 5, dtype=torch.bool)
    yield o, (b[None], b[:10].view(2, 5, 4), v, 0.1)
    yield o, (b.view(2, 35, 4), b[:10].view(2, 5, 4), v, None)


@kernel("box_iou")
def _(o):
    b = rand_boxes(70)
    yield o, (b.view(2, 35, 4), b[:10].view(2, 5, 4), 2)


@kernel("hungarian")
def _(o):
    yield o, (torch.rand(2, 6, 4), torch.tensor([4, 2]))


@kernel("box_loss")
def _(o):
    x, y, w = rand_boxes(5, seed=1), rand_boxes(5, seed=2), torch.rand(5)
    for kind, each, by_y in ((0, True, True), (1, False, True), (2, True, False), (3, False, False)):
        yield o, (x.clone().requires_grad_(), y.clone().requires_grad_(by_y), w if by_y else None, kind, 0.5, each, True, by_y)


@kernel("focal_sum", "focal_each", "focal_backward", rtol=2e-3, atol=1e-3)
def _(o):
    for dtype in (F32, F16):
        x, q, w, l = logits("plain", dtype)
        x, q, w = x.to(dtype), q.float(), w.float()
        for kind in (0, 1, 2):
            a = l, q if kind else None, w, kind, 0.75, 0.25, 2.0, 0.5
            for ahead in (True, False):
                yield torch.ops.visdet.focal_sum.default, (x.clone().requires_grad_(), *a, ahead)
            yield torch.ops.visdet.focal_each.default, (x.clone().requires_grad_(), *a)
            yield torch.ops.visdet.focal_backward.default, (torch.ones(()), x, *a)


@kernel("roi_align", "roi_align_backward")
def _(o):
    feats = [f.float().permute(0, 2, 3, 1).contiguous().requires_grad_() for f in maps("plain", [(16, 16), (8, 8)])]
    r, lvl = regions("plain").float()[:6], torch.tensor([0, 1, 0, 1, 1, 0])
    yield torch.ops.visdet.roi_align.default, (feats, lvl, r, [0.25, 0.125], [2, 3], 2, True)
    yield torch.ops.visdet.roi_align_backward.default, (torch.ones(6, 2, 3, 5), lvl, r, [2, 16, 16, 2, 8, 8], [0.25, 0.125], 2, True)


@kernel("ms_deform_attn", "ms_deform_attn_backward")
def _(o):
    v, loc, w = (a.float().requires_grad_() for a in readings("plain", F32))
    shapes = [n for hw in LEVELS for n in hw]
    yield torch.ops.visdet.ms_deform_attn, (v, shapes, loc, w)
    yield torch.ops.visdet.ms_deform_attn_backward, (torch.ones(2, 7, 32), v.detach(), shapes, loc.detach(), w.detach())


@kernel("deform_conv", "deform_conv_backward")
def _(o):
    x, off, w, m, _ = floats(*convolution("plain", F32))
    x, w, geo = x.permute(0, 2, 3, 1).contiguous(), w.view(1, 6, 8, 9).transpose(2, 3).reshape(1, 6, 72).contiguous(), [3, 3, 1, 1, 1, 1, 1, 1]
    for mask in (m, None):
        yield torch.ops.visdet.deform_conv, (*(a if a is None else a.clone().requires_grad_() for a in (x, off, mask, w)), geo)
        yield torch.ops.visdet.deform_conv_backward, (torch.ones(2, 5, 6, 6), x, off, mask, w, geo)


@kernel("rle_encode", "rle_merge", "rle_polygons", "paste_rles", test_utils=NO_SHAPES)
def _(o):
    a = bitmaps("plain")[0].bool()
    yield torch.ops.visdet.rle_encode, (a,)
    yield torch.ops.visdet.rle_merge, (_pack(cv.rle_encode(a)), 4, 19 * 26, False)
    yield torch.ops.visdet.rle_polygons, (rand(6, 2) * 9, [0, 3, 6], [0, 2], 9, 14)
    yield torch.ops.visdet.paste_rles, (*floats(*probabilities("plain", F32)), 60, 80, 0.5)


@kernel("rle_decode", "rle_measure", "rle_iou", "masks_to_boxes", "connected_components", "paste_masks", test_utils=NO_GRAD)
def _(o):
    a = bitmaps("plain")[0].bool()
    codes = _pack(cv.rle_encode(a))
    yield torch.ops.visdet.rle_decode, (torch.zeros(4, 19, 26, dtype=torch.uint8), codes)
    yield torch.ops.visdet.rle_measure, (codes, torch.tensor([[19, 26]] * 4))
    yield torch.ops.visdet.rle_iou, (_pack(cv.rle_encode(a), b"\1\0"), 2, 2, 19, 26)
    yield torch.ops.visdet.masks_to_boxes, (a,)
    yield torch.ops.visdet.connected_components, (torch.zeros(4, 19, 26, dtype=torch.int32), a, True)
    yield torch.ops.visdet.paste_masks, (torch.zeros(5, 60, 80, dtype=torch.bool), *floats(*probabilities("plain", F32)), 0.5)


KERNELS = pytest.mark.skipif(bool(kernels_missing("cpu")), reason=f"kernels: {kernels_missing('cpu')}")


@KERNELS
def test_every_kernel_is_checked():
    there = {o.split("::")[1].split(".")[0] for o in torch._C._dispatch_get_all_op_names() if o.startswith("visdet::")}
    assert set(CALLS) == there, f"without arguments to check: {sorted(there - set(CALLS))}; gone: {sorted(set(CALLS) - there)}"


@KERNELS
@pytest.mark.parametrize("calls", list({f: n for n, (f, _) in CALLS.items()}.items()), ids=lambda o: o[1])
def test_opcheck(calls):
    f, name = calls
    for op, args in f(getattr(torch.ops.visdet, name)):
        torch.library.opcheck(op, args, **CALLS[name][1])
