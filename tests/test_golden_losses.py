"Losses and overlaps against figures recorded from MMDetection, published values, slow definitions, finite differences"
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from golden import cases
from visdet.core.basics import ConfigError
from visdet.core.registry import lookup
from visdet.core.testing import close, rand_boxes
from visdet.cv.iou import box_iou
from visdet.nn import balance, box_losses, class_losses, dice, overlap_losses  # noqa: F401  they register the losses

ALWAYS = dict(FocalLoss=dict(use_sigmoid=True), QualityFocalLoss=dict(use_sigmoid=True), VarifocalLoss=dict(use_sigmoid=True), GHMC=dict(use_sigmoid=True), SeesawLoss=dict(use_sigmoid=False), DiceLoss=dict(use_sigmoid=True))
HEATMAP_AND_DISTRIBUTION = ("FocalLoss", "QualityFocalLoss", "DistributionFocalLoss", "VarifocalLoss", "GaussianFocalLoss")
CODES = ("SmoothL1Loss", "L1Loss", "BalancedL1Loss", "MSELoss")
OVERLAPS = ("IoULoss", "BoundedIoULoss", "GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss")


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def build(name, args):
    "A loss from MMDetection's name and arguments; an argument that has only one legal value has none here"
    args = dict(args)
    for k, v in ALWAYS.get(name, {}).items():
        assert args.pop(k, v) == v, f"{name} has no {k}={not v}"
    if args.pop("linear", False):
        args["mode"] = "linear"
    return lookup("loss", name)(**args)


def inputs(case):
    "Prediction, target and weight of a case; masks and qualities go in as pairs"
    x = case.array("in.pred").requires_grad_()
    get = lambda *ks: next((case.array(f"in.{k}") for k in ks if case.has(f"in.{k}")), None)  # noqa: E731
    y, w, more = get("target", "label"), get("weight", "label_weight"), get("quality")
    if case.args.get("use_mask"):
        y = (y, case.array("in.label"))
    elif more is not None:
        y = (y, more)
    return x, y, w


def run(case):
    loss = build(case.component, case.args)
    x, y, w = inputs(case)
    a, reduction = case.settings.get("avg_factor"), case.settings.get("reduction_override")
    out = loss(x, y, w, a, reduction)
    parts = {f"loss.{k}": v for k, v in out.items()} if isinstance(out, dict) else {"loss": out}
    for k, v in parts.items():
        case.check(k, v.reshape(case.array(f"out.{k}").shape))  # masks: recorded with one axis of length 1
    sum(v.sum() for v in parts.values()).backward()
    case.check("grad", x.grad)


@pytest.mark.parametrize("case", cases("losses", "CrossEntropyLoss"))
def test_cross_entropy(case):
    run(case)


@pytest.mark.parametrize("case", cases("losses", *HEATMAP_AND_DISTRIBUTION))
def test_focal_family(case):
    run(case)


@pytest.mark.parametrize("case", cases("losses", "GHMC", "GHMR", "SeesawLoss"))
def test_losses_that_remember(case):
    run(case)


@pytest.mark.parametrize("case", cases("losses", *CODES))
def test_codes(case):
    run(case)


@pytest.mark.parametrize("case", cases("losses", *OVERLAPS))
def test_overlap_losses(case):
    run(case)


@pytest.mark.parametrize("case", cases("losses", "DiceLoss"))
def test_dice(case):
    run(case)


@pytest.mark.parametrize("case", cases("losses"))
def test_nothing_recorded_is_left_out(case):
    lookup("loss", case.component)


@pytest.mark.parametrize("case", cases("overlaps", "bbox_overlaps"))
def test_overlaps(case):
    a = case.args
    case.check("overlaps", box_iou(case.array("in.a"), case.array("in.b"), a["mode"], a["is_aligned"], eps=a["eps"]))
    case.check("overlaps", box_iou(case.array("in.a"), case.array("in.b"), a["mode"], a["is_aligned"]))


# -- every loss: rules, gradients, edges ------------------------------------------------------------------

LABELS = torch.tensor([0, 2, 4, 1, 4, 3, 0])  # 4 is background
QUALITY = torch.tensor([0.7, 0.0, 0.3, 1.0, 0.2, 0.5, 0.9]).double()


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(n=7, k=4):
    return class_losses._one_hot(LABELS[:n], k, QUALITY[:n])


def boxes(seed=0):
    return rand_boxes(7, seed=seed, size=(60, 80), min_side=4.0).double()


def near():
    "Boxes that overlap well, and two that do not"
    b = boxes(1)
    return torch.cat([b[:5] + logits(5, 4) * 1.5, boxes(2)[5:]])


# name of a case -> (loss from arguments of all losses, prediction, target); one of each form in which targets come
FORMS = {
    "softmax": (lambda **k: build("CrossEntropyLoss", dict(class_weight=[1.0, 2.0, 0.5, 1.0, 0.1], **k)), logits(7, 5), LABELS),
    "pixels": (lambda **k: build("CrossEntropyLoss", k), logits(7, 5, 2, 1), LABELS[:, None, None].expand(7, 2, 1)),
    "sigmoid": (lambda **k: build("CrossEntropyLoss", dict(use_sigmoid=True, class_weight=[1.0, 2.0, 0.5, 1.0], **k)), logits(7, 4), LABELS),
    "sigmoid table": (lambda **k: build("CrossEntropyLoss", dict(use_sigmoid=True, **k)), logits(7, 4), table()),
    "mask": (lambda **k: build("CrossEntropyLoss", dict(use_mask=True, **k)), logits(7, 5, 2, 2), ((logits(7, 2, 2, seed=1) > 0).double(), LABELS)),
    "focal": (lambda **k: build("FocalLoss", dict(gamma=1.5, alpha=0.4, **k)), logits(7, 4), LABELS),
    "focal table": (lambda **k: build("FocalLoss", k), logits(7, 4), (table() > 0).double()),
    "focal probabilities": (lambda **k: build("FocalLoss", dict(activated=True, **k)), logits(7, 4).sigmoid(), LABELS),
    "quality": (lambda **k: build("QualityFocalLoss", k), logits(7, 4), (LABELS, QUALITY)),
    "quality table": (lambda **k: build("QualityFocalLoss", k), logits(7, 4), table()),
    "quality probabilities": (lambda **k: build("QualityFocalLoss", dict(activated=True, **k)), logits(7, 4).sigmoid(), (LABELS, QUALITY)),
    "distribution": (lambda **k: build("DistributionFocalLoss", k), logits(7, 9), torch.tensor([0.0, 8, 0.3, 7.9, 4, 3.25, 6.5]).double()),
    "varifocal": (lambda **k: build("VarifocalLoss", k), logits(7, 4), (LABELS, QUALITY)),
    "varifocal table": (lambda **k: build("VarifocalLoss", dict(iou_weighted=False, **k)), logits(7, 4), table()),
    "gaussian": (lambda **k: build("GaussianFocalLoss", dict(pos_weight=2.0, neg_weight=0.5, **k)), logits(7, 4).sigmoid(), table()),
    "smooth l1": (lambda **k: build("SmoothL1Loss", dict(beta=0.4, **k)), logits(7, 4), logits(7, 4, seed=1)),
    "l1": (lambda **k: build("L1Loss", k), logits(7, 4), logits(7, 4, seed=1)),
    "balanced l1": (lambda **k: build("BalancedL1Loss", dict(beta=0.6, **k)), logits(7, 4), logits(7, 4, seed=1)),
    "mse": (lambda **k: build("MSELoss", k), logits(7, 4), logits(7, 4, seed=1)),
    "dice": (lambda **k: build("DiceLoss", k), logits(7, 3, 3), (logits(7, 3, 3, seed=1) > 0).double()),
    "naive dice": (lambda **k: build("DiceLoss", dict(naive_dice=True, activate=False, **k)), logits(7, 9).sigmoid(), (logits(7, 9, seed=1) > 0).double()),
    **{f"iou {m}": (lambda m=m, **k: build("IoULoss", dict(mode=m, **k)), near(), boxes(1)) for m in ("log", "linear", "square")},
    **{n: (lambda n=n, **k: build(n, k), near(), boxes(1)) for n in OVERLAPS[1:]},
    "paper's SIoU": (lambda **k: build("SIoULoss", dict(neg_gamma=True, **k)), near(), boxes(1)),
}
OWN_AVERAGE = {  # these have an average of their own, or two terms
    "ghm-c": (lambda **k: build("GHMC", dict(momentum=0.5, **k)), logits(7, 4), LABELS),
    "ghm-c table": (lambda **k: build("GHMC", k), logits(7, 4), table()),
    "ghm-r": (lambda **k: build("GHMR", k), logits(7, 4), logits(7, 4, seed=1)),
    "seesaw": (lambda **k: build("SeesawLoss", dict(num_classes=4, q=0.0, return_dict=False, **k)), logits(7, 6), LABELS),
}
W = torch.tensor([1.0, 0, 0.5, 2, 1, 0.1, 3]).double()


def cut(y, n):
    "The first n rows of a target"
    return tuple(o[:n] for o in y) if isinstance(y, tuple) else y[:n]


@pytest.mark.parametrize("name", FORMS)
def test_rules(name):
    "none, mean, sum, weights, averaging factor, factor of the result, and what cannot be combined"
    make, x, y = FORMS[name]
    each = make(reduction="none")(x, y)
    w = W.view(-1, *[1] * (each.ndim - 1))
    assert each.shape[0] == 7 and each.isfinite().all() and (each >= 0).all()
    close(make()(x, y), each.mean(), 1e-9)
    close(make(reduction="sum")(x, y), each.sum(), 1e-9)
    close(make(reduction="none")(x, y, W), each * w, 1e-9)
    close(make(loss_weight=3.0)(x, y, W), 3 * (each * w).mean(), 1e-9)
    eps = torch.finfo(torch.float32).eps
    for a in (5, 5.0, torch.tensor(5), torch.tensor(5.0)):
        close(make(loss_weight=3.0)(x, y, W, a), 3 * (each * w).sum() / (5 + eps), 1e-6)
    close(make()(x, y, W, 0.5, "none"), each * w, 1e-9)
    close(make(reduction="none")(x, y, W, reduction="mean"), (each * w).mean(), 1e-9)
    close(make()(x, y, (w.expand(each.shape) * 2)), 2 * (each * w).mean(), 1e-9)
    assert make()(x, y, W * 0).item() == 0 and make()(x, y, W * 0, 0.0).item() == 0
    for bad in (lambda: make(reduction="sum")(x, y, W, 5.0), lambda: make()(x, y, None, 5.0, "sum"), lambda: make()(x, y, reduction="average")(), lambda: make(reduction="average"), lambda: make(loss_weight=-1.0)):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(ConfigError, match="do not belong|one number a row"):
        make()(x, y, torch.ones(6).double())


@pytest.mark.parametrize("name", [k for k in {**FORMS, **OWN_AVERAGE} if k != "CIoULoss"])
def test_gradients_are_those_of_finite_differences(name):
    make, x, y = {**FORMS, **OWN_AVERAGE}[name]
    x = x.clone().requires_grad_()
    for w in (None, W):
        loss = make(loss_weight=2.0).eval()
        if hasattr(loss, "acc_sum"):
            loss.acc_sum.fill_(3.0)
        assert torch.autograd.gradcheck(lambda o: loss(o, y, w), x)


def test_gradient_of_ciou_holds_alpha():
    "The weight of the ratio is a constant, so finite differences hold only with it frozen"
    x, y = near().requires_grad_(), boxes(1)
    parts = lambda o: overlap_losses._parts(o, y, 1e-6)  # noqa: E731
    v = lambda o: 4 / math.pi**2 * (torch.atan(y[:, 2:].sub(y[:, :2])[:, 0] / y[:, 2:].sub(y[:, :2])[:, 1]) - torch.atan((o[:, 2] - o[:, 0]) / (o[:, 3] - o[:, 1]))) ** 2  # noqa: E731
    iou = parts(x)[0].detach()
    alpha = torch.where(iou > 0.5, v(x) / (1 - iou + v(x)), 0.0).detach()
    assert (iou > 0.5).any() and (iou < 0.5).any()
    frozen = lambda o: (1 - parts(o)[0] + overlap_losses._apart(*parts(o)[1:3], 1e-6) + alpha * v(o)).sum()  # noqa: E731
    assert torch.autograd.gradcheck(frozen, x)
    close(build("CIoULoss", dict(reduction="sum"))(x, y), frozen(x), 1e-6)
    close(torch.autograd.grad(build("CIoULoss", dict(reduction="sum"))(x, y), x)[0], torch.autograd.grad(frozen(x), x)[0], 1e-6)


@pytest.mark.parametrize("name", {**FORMS, **OWN_AVERAGE})
def test_edges(name):
    "No rows, one row, NaN, half precision, huge logits"
    make, x, y = {**FORMS, **OWN_AVERAGE}[name]
    nil = x[:0].clone().requires_grad_()
    loss = make()(nil, cut(y, 0))
    loss.backward()
    assert loss.item() == 0 and nil.grad.shape == nil.shape
    assert make()(nil, cut(y, 0), W[:0], 0).item() == 0
    one = make()(x[:1], cut(y, 1))
    assert one.isfinite() and one.ndim == 0
    if "probabilities" in name:  # torch itself refuses what is not a probability
        with pytest.raises(RuntimeError):
            make()(x * float("nan"), y)
    else:
        assert make()(x * float("nan"), y).isnan()
    half = x.half().clone().requires_grad_()
    got = make()(half, cut(y, 7))
    got.backward()
    assert got.dtype == torch.float32 and half.grad.dtype == torch.float16 and half.grad.isfinite().all()
    close(got, make()(half.detach().float(), y), 1e-5)
    if "probabilities" not in name and name not in ("gaussian", "naive dice"):
        big = (x * 300).clone().requires_grad_()
        got = make()(big, y)
        got.backward()
        assert got.isfinite() and big.grad.isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_all_ignored(name):
    make, x, _ = FORMS[name]
    for avg in (False, True):
        p = x.clone().requires_grad_()
        loss = make(ignore_index=255, avg_non_ignore=avg)(p, torch.full((7,), 255), W)
        loss.backward()
        assert loss.item() == 0 and p.grad.abs().max() == 0


@pytest.mark.parametrize("sigmoid", [False, True])
def test_ignored_rows_leave_what_the_others_give(sigmoid):
    "avg_non_ignore: the same as without these rows"
    f, x, y = build("CrossEntropyLoss", dict(use_sigmoid=sigmoid, ignore_index=3, avg_non_ignore=True)), logits(7, 5), LABELS
    keep = y != 3
    close(f(x, y), build("CrossEntropyLoss", dict(use_sigmoid=sigmoid))(x[keep], y[keep]), 1e-7)
    close(f(x, y, W), build("CrossEntropyLoss", dict(use_sigmoid=sigmoid))(x[keep], y[keep], W[keep]), 1e-7)
    if not sigmoid:
        close(f(x, y), F.cross_entropy(x, y, ignore_index=3), 1e-7)


@pytest.mark.parametrize("hidden", [-1.0, 255.0])
def test_ignored_entries_of_a_table(hidden):
    "Negative targets, and those equal to the ignored label, cost nothing and are left out of the mean"
    x, y, out = logits(7, 4), table(), table() > 0
    f = build("CrossEntropyLoss", dict(use_sigmoid=True, ignore_index=255, avg_non_ignore=True))
    want = F.binary_cross_entropy_with_logits(x, y, reduction="none")[~out]
    close(f(x, torch.where(out, hidden, y)), want.mean(), 1e-7)
    close(f(x, torch.where(out, hidden, y), W), (want * W[:, None].expand(7, 4)[~out]).mean(), 1e-7)


def test_boxes_with_four_weights():
    "The weight of a box is the mean of its four, except where an entry is a number"
    w4 = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)).double()
    for n in OVERLAPS:
        f = build(n, {})
        want = f(near(), boxes(1), w4.mean(1)) if n != "BoundedIoULoss" else (f(near(), boxes(1), reduction="none") * w4).mean()
        close(f(near(), boxes(1), w4), want, 1e-9)


def test_gradients_of_targets():
    "Overlap losses pull at both boxes; bounded IoU, as published, only at the prediction"
    for n in OVERLAPS:
        y = boxes(1).requires_grad_()
        x = near().requires_grad_()
        build(n, {})(x, y).backward()
        assert x.grad.abs().sum() > 0 and (y.grad is None) == (n == "BoundedIoULoss")


def test_siou_is_cut_off():
    "Between 0 and 2; with the exponent's default sign boxes far apart cost nothing, with the paper's more than any that touch"
    x, y = torch.tensor([[1000.0, 0, 1010, 10]]), torch.tensor([[0.0, 0, 10, 10]])
    assert build("SIoULoss", {})(x, y) == 0 and 1 < build("SIoULoss", dict(neg_gamma=True))(x, y) <= 2


# -- published figures --------------------------------------------------------------------------------------

P, Y = torch.tensor([[2, -1, 0.5], [0, 3, -2]]), torch.tensor([0, 2])
A, B = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20]]), torch.tensor([[2.0, 2, 12, 14], [30, 30, 40, 40]])
FIGURES = [
    ("CrossEntropyLoss", {}, (P, Y), 2.648148),
    ("CrossEntropyLoss", {}, (P, Y, None, 4), 1.324074),
    ("CrossEntropyLoss", dict(use_sigmoid=True), (P, Y), 1.213822),
    ("FocalLoss", {}, (P, Y), 0.486283),
    ("FocalLoss", {}, (P, Y, None, 1), 2.917698),
    ("FocalLoss", {}, (P, torch.tensor([3, 0])), 0.609499),
    ("IoULoss", {}, (A, B), [0.890973, 13.815511]),
    ("IoULoss", dict(mode="linear"), (A, B), [0.589744, 0.999999]),
    ("IoULoss", dict(linear=True), (A, B), [0.589744, 0.999999]),
    ("IoULoss", dict(mode="square"), (A, B), [0.831690, 1.0]),
    ("GIoULoss", {}, (A, B), [0.661172, 1.777778]),
    ("DIoULoss", {}, (A, B), [0.627979, 1.444444]),
    ("CIoULoss", {}, (A, B), [0.627979, 1.444444]),
    ("CIoULoss", {}, (A, A), [0.0, 0.0]),  # the reference gives NaN
    ("EIoULoss", {}, (A, B), [0.539744, 1.7]),
    ("SIoULoss", {}, (A, B), [0.549491, 0.440376]),
    ("BoundedIoULoss", {}, (A[:1], B[:1]), [[0.471459, 0.566685, 0, 0.069502]]),
    ("SmoothL1Loss", dict(beta=1 / 9), (torch.tensor([0.05, 0.2, 2]), torch.zeros(3)), [0.01125, 0.144444, 1.944444]),
    ("QualityFocalLoss", {}, (P, (Y, torch.tensor([0.8, 0.3]))), [0.403510, 2.963329]),
    ("DistributionFocalLoss", {}, (torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([1.25])), [2.190190]),
    ("GaussianFocalLoss", {}, (torch.tensor([0.9, 0.2]), torch.tensor([1, 0.5])), [0.0010536, 0.0005579]),
    ("BalancedL1Loss", {}, (torch.tensor([0.5, 2]), torch.zeros(2)), [0.400568, 2.578593]),
]


@pytest.mark.parametrize("name,args,call,want", FIGURES)
def test_published_figures(name, args, call, want):
    f = build(name, args | (dict(reduction="none") if isinstance(want, list) else {}))
    close(f(*call), torch.tensor(want), 2e-6)


def test_dice_figure():
    close(build("DiceLoss", {})(torch.tensor([[[1.0, -1], [0, 2]]]), torch.eye(2)[None]), 0.113044, 2e-6)


# -- losses that remember -----------------------------------------------------------------------------------


def slow_ghm(g, valid, bins, last, counts, momentum):
    "Weights of the paper, entry by entry"
    edges = [i / bins for i in range(bins + 1)]
    edges[-1] += last
    inside = [(g >= a) & (g < b) & valid for a, b in zip(edges, edges[1:])]
    used = [i for i, o in enumerate(inside) if o.any()]
    for i in used:
        counts[i] = momentum * counts[i] + (1 - momentum) * inside[i].sum().item()
    w = torch.zeros_like(g)
    for i in used:
        w[inside[i]] = 1 / counts[i] / len(used)
    return w


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_ghm_over_several_batches(momentum):
    c, r = build("GHMC", dict(bins=8, momentum=momentum)), build("GHMR", dict(bins=8, momentum=momentum, mu=0.1))
    kept = [0.0] * 8, [0.0] * 8
    for seed in range(4):
        x, y, w = logits(20, 5, seed=seed) * 2, logits(20, 5, seed=seed + 9), (logits(20, 5, seed=seed + 50) > 0).double()
        t = (y > 0).double()
        bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
        close(c(x, t, w), (slow_ghm((x.sigmoid() - t).abs(), w > 0, 8, 1e-6, kept[0], momentum) * bce).sum(), 1e-5)
        d = x - y
        close(r(x, y, w), (slow_ghm((d / (d * d + 0.01).sqrt()).abs(), w > 0, 8, 999, kept[1], momentum) * ((d * d + 0.01).sqrt() - 0.1)).sum(), 1e-5)
    assert momentum == 0 or c.acc_sum.tolist() == pytest.approx(kept[0], rel=1e-5)


def test_ghm_bins_are_half_open():
    "A gradient norm on an edge belongs to the upper bin, one of exactly 1 to the last"
    f = build("GHMC", dict(bins=4))
    x = torch.tensor([[0.0], [0.4], [40.0], [2.0]])  # norms 0.5 and 0.6 together, 1 and 0.88 together
    w = F.binary_cross_entropy_with_logits(x, torch.zeros(4, 1), reduction="none")
    close(f(x, torch.zeros(4, 1)), w.sum() / 2 / 2, 1e-5)


def test_seesaw_definition():
    "Two batches against the paper, row by row; the factors carry no gradient"
    K, p, q, eps = 5, 0.8, 2.0, 1e-2
    f, n = build("SeesawLoss", dict(num_classes=K, p=p, q=q, eps=eps)), torch.zeros(K)
    for seed in range(2):
        x = (logits(12, K + 2, seed=seed) * 2).requires_grad_()
        y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 5, 5, 3, 0, 1])
        n = n + torch.bincount(y, minlength=K + 1)[:K]
        rows = []
        for i in (y < K).nonzero()[:, 0].tolist():
            t, s = y[i].item(), x[i, :K].detach().softmax(0)
            m = [min(1.0, (max(n[j].item(), 1) / max(n[t].item(), 1))) ** p for j in range(K)]
            c = [max(1.0, s[j].item() / max(s[t].item(), eps)) ** q for j in range(K)]
            push = torch.tensor([0.0 if j == t else math.log(m[j] * c[j]) for j in range(K)], dtype=torch.float64)
            rows.append(F.cross_entropy((x[i, :K] + push)[None], y[i : i + 1]))
        want, got = torch.stack(rows).mean(), f(x, y)
        close(got["loss_cls_classes"], want, 1e-5)
        close(got["loss_cls_objectness"], F.cross_entropy(x[:, K:], (y == K).long()), 1e-6)
        close(torch.autograd.grad(got["loss_cls_classes"], x, retain_graph=True)[0], torch.autograd.grad(want, x)[0], 1e-5)
    assert f.cum_samples.tolist() == [*n.tolist(), 4.0]


def test_state_has_the_reference_keys():
    assert sorted(build("GHMC", dict(momentum=0.5)).state_dict()) == ["acc_sum", "edges"] == sorted(build("GHMR", dict(momentum=0.5)).state_dict())
    assert list(build("SeesawLoss", dict(num_classes=3)).state_dict()) == ["cum_samples"]


# -- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,bad", [("CrossEntropyLoss", dict(use_sigmoid=True, use_mask=True)), ("FocalLoss", dict(gamma=-1.0)), ("FocalLoss", dict(alpha=2.0)), ("IoULoss", dict(mode="cubic")), ("IoULoss", dict(eps=0.0)), ("SmoothL1Loss", dict(beta=0.0)),
                                      ("GHMC", dict(bins=0)), ("GHMR", dict(momentum=1.5)), ("DiceLoss", dict(eps=-1.0)), ("SeesawLoss", dict(num_classes=0)), ("EIoULoss", dict(smooth_point=float("nan")))])  # fmt: skip
def test_impossible_settings(name, bad):
    with pytest.raises(ConfigError):
        build(name, bad)


@pytest.mark.parametrize("name", ["FocalLoss", "QualityFocalLoss", "VarifocalLoss", "DiceLoss", "GHMC"])
def test_softmax_is_not_offered(name):
    assert "use_sigmoid" not in inspect.signature(lookup("loss", name)).parameters


def test_pickles_and_moves():
    import copy
    import pickle

    for make, x, y in {**FORMS, **OWN_AVERAGE}.values():
        f = make()
        g = pickle.loads(pickle.dumps(copy.deepcopy(f)))
        close(g.eval()(x, y), f.eval()(x, y), 0)
        assert repr(f).startswith(type(f).__name__)
