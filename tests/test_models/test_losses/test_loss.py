"""The behaviours that MMDetection states for its losses: reductions, weights, empty inputs, ignored labels, figures

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from visdet.core.basics import ConfigError
from visdet.core.testing import noise, rand_boxes
from visdet.nn.balance import GHMC, GHMR, SeesawLoss
from visdet.nn.box_losses import BalancedL1Loss, BoundedIoULoss, L1Loss, MSELoss, SmoothL1Loss
from visdet.nn.class_losses import CrossEntropyLoss, DistributionFocalLoss, FocalLoss, GaussianFocalLoss, QualityFocalLoss, VarifocalLoss
from visdet.nn.dice import DiceLoss
from visdet.nn.overlap_losses import CIoULoss, DIoULoss, EIoULoss, GIoULoss, IoULoss, SIoULoss

BEHAVIOURS = {
    "weights of zero give zero": "test_zero_weights",
    "an unknown reduction is refused": "test_bad_reduction",
    "avg_factor with 'sum' is refused, with 'mean' it divides the sum": "test_avg_factor",
    "'none' gives one number an entry": "test_none",
    "no entries: zero, with a gradient": "test_empty",
    "weights of boxes: one each, or four": "test_box_weights",
    "classification: predictions (10, 5), labels (10,)": "test_none",
    "focal: dense predictions (3, 5, 40, 40)": "test_focal_dense",
    "quality focal: labels with scores equal a table": "test_quality_focal_forms",
    "dice: weights of another length, predictions that are not logits": "test_dice",
    "distribution focal: (10, 17)": "test_distribution_focal",
    "cross-entropy: ignored labels and means without them, in three forms": "test_ignore",
    "cross-entropy: everything ignored": "test_all_ignored",
    "cross-entropy: 200, and 40 with class weights": "test_cross_entropy_figures",
    "cross-entropy: masks and sigmoid exclude each other": "test_mask_and_sigmoid",
    "varifocal: a perfect prediction costs nothing": "test_varifocal_perfect",
    "Seesaw: objectness 200, classes 180, 200 + ln 100": "test_seesaw",
}
WITHOUT = {
    "dice: predictions without sigmoid are not implemented": "they are: `activate=False` takes probabilities",
    "knowledge distillation with T < 1 is refused": "there is no such loss",
    "accuracy: top 1, with a threshold, top k, without rows": "training shows loss terms and AP; there is no such function",
}

OVERLAP = {c.__name__: c for c in (IoULoss, GIoULoss, DIoULoss, CIoULoss, EIoULoss, SIoULoss, BoundedIoULoss)}
CODES = {c.__name__: c for c in (L1Loss, MSELoss, SmoothL1Loss, BalancedL1Loss)}
CLASSES = {c.__name__: c for c in (CrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss)}
ALL = {**OVERLAP, **CODES, **CLASSES, **{c.__name__: c for c in (GaussianFocalLoss, DistributionFocalLoss, DiceLoss)}}
SELF_AVERAGING = {"GHMC": GHMC, "GHMR": GHMR}


def near(a, b, tol=1e-4):
    torch.testing.assert_close(torch.as_tensor(a).detach(), torch.as_tensor(b, dtype=torch.float32), rtol=tol, atol=tol)


def rows(name, n=10):
    "Predictions and targets of `n` entries"
    if name in OVERLAP:
        return rand_boxes(n, (100, 100), 1, 5).requires_grad_(), rand_boxes(n, (100, 100), 2, 5)
    if name in CODES or name == "GHMR":
        return noise(n, 4).requires_grad_(), noise(n, 4, seed=1)
    if name in ("QualityFocalLoss", "VarifocalLoss"):
        return noise(n, 5).requires_grad_(), (torch.arange(n) % 6, torch.linspace(0, 1, n))
    if name in ("CrossEntropyLoss", "FocalLoss", "GHMC"):
        return noise(n, 5).requires_grad_(), torch.arange(n) % 5
    if name == "DistributionFocalLoss":
        return noise(n, 17).requires_grad_(), torch.linspace(0, 16, n)
    if name == "DiceLoss":
        return noise(n, 6, 6).requires_grad_(), (noise(n, 6, 6, seed=1) > 0).float()
    return noise(n, 4).sigmoid().detach().requires_grad_(), noise(n, 4, seed=1).sigmoid()


@pytest.mark.parametrize("name", ALL)
def test_zero_weights(name):
    x, y = rows(name)
    loss = ALL[name]()(x, y, torch.zeros(10))
    assert loss.item() == 0
    loss.backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_bad_reduction(name):
    x, y = rows(name)
    with pytest.raises(ConfigError):
        ALL[name](reduction="total")
    for bad in (True, "max"):
        with pytest.raises(ConfigError):
            ALL[name]()(x, y, reduction=bad)


@pytest.mark.parametrize("name", [*ALL, *SELF_AVERAGING])
def test_bad_reduction_of_those_that_average(name):
    with pytest.raises(ConfigError):
        {**ALL, **SELF_AVERAGING}[name](reduction="total")


@pytest.mark.parametrize("name", ALL)
def test_avg_factor(name):
    x, y = rows(name)
    loss = ALL[name]()
    total = loss(x, y, reduction="sum")
    near(loss(x, y, avg_factor=7.0), total / 7)
    near(loss(x, y, avg_factor=torch.tensor(7.0)), total / 7)
    near(loss(x, y, avg_factor=7.0, reduction="none").sum(), total)
    with pytest.raises(ConfigError, match="avg_factor"):
        loss(x, y, avg_factor=7.0, reduction="sum")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["mean", "sum", "none"])
def test_none(name, how):
    x, y = rows(name)
    loss = ALL[name]()
    got, each = loss(x, y, reduction=how), loss(x, y, reduction="none")
    assert each.shape[0] == 10 and torch.equal(ALL[name](reduction=how)(x, y), got)
    near(got, each if how == "none" else each.sum() if how == "sum" else each.mean())
    near(ALL[name](loss_weight=3.0)(x, y, reduction=how), got * 3)


@pytest.mark.parametrize("name", ALL)
def test_empty(name):
    x, y = rows(name, 0)
    for how in ("mean", "sum"):
        loss = ALL[name]()(x, y, reduction=how)
        assert loss.item() == 0 and loss.requires_grad
        loss.backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", OVERLAP)
def test_box_weights(name):
    x, y = rows(name)
    loss, w = OVERLAP[name](), torch.linspace(0, 2, 10)
    each = loss(x, y, reduction="none")
    four = w[:, None].expand(10, 4)
    if each.ndim == 1:
        near(loss(x, y, w, reduction="none"), each * w)
    near(loss(x, y, w, reduction="sum"), (each * w.view(10, *[1] * (each.ndim - 1))).sum())
    near(loss(x, y, four, reduction="sum"), loss(x, y, w, reduction="sum"))
    near(loss(x, y, four, avg_factor=3.0), loss(x, y, w, reduction="sum") / 3)


def test_focal_dense():
    "A map of (3, 5, 40, 40) as rows of its cells, labels as numbers or as a table"
    x, labels = noise(3, 5, 40, 40), torch.arange(4800).view(3, 40, 40) % 6
    flat, y = x.permute(0, 2, 3, 1).reshape(-1, 5), labels.flatten()
    want = FocalLoss()(flat, y)
    near(FocalLoss()(flat, F.one_hot(y, 6)[:, :5].float()), want)
    near(FocalLoss()(x, F.one_hot(labels, 6)[..., :5].permute(0, 3, 1, 2).float()), want)
    near(FocalLoss(activated=True)(flat.sigmoid(), F.one_hot(y, 6)[:, :5].float()), want)


def test_quality_focal_forms():
    x, (labels, scores) = rows("QualityFocalLoss")
    table = F.one_hot(labels, 6)[:, :5] * scores[:, None]
    for how in ("none", "mean", "sum"):
        near(QualityFocalLoss()(x, (labels, scores), reduction=how), QualityFocalLoss()(x, table, reduction=how))


def test_dice():
    x, y = rows("DiceLoss")
    with pytest.raises(ConfigError):
        DiceLoss()(x, y, torch.ones(8))
    near(DiceLoss(activate=False)(x.sigmoid(), y), DiceLoss()(x, y))
    perfect = DiceLoss(activate=False)(y, y, reduction="none")
    assert (perfect < 1e-3).all() and (DiceLoss(activate=False)(1 - y, y, reduction="none") > 0.99).all()


def test_distribution_focal():
    "Ten distances over seventeen bins; a whole number is a plain cross-entropy"
    x = noise(10, 17)
    whole = torch.arange(10)
    near(DistributionFocalLoss()(x, whole.float(), reduction="none"), F.cross_entropy(x, whole, reduction="none"))
    near(DistributionFocalLoss()(x, whole + 0.25, reduction="none"), 0.75 * F.cross_entropy(x, whole, reduction="none") + 0.25 * F.cross_entropy(x, whole + 1, reduction="none"))


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("form", ["softmax", "sigmoid", "table"])
@pytest.mark.parametrize("ignore", [255, 3, None])
def test_ignore(form, ignore, avg_non_ignore):
    "Ignored labels cost nothing; the mean counts them unless told otherwise"
    x, y = noise(10, 5), torch.arange(10) % 5
    y[[2, 7]] = -100 if ignore is None else ignore
    keep = y != (-100 if ignore is None else ignore)
    loss = CrossEntropyLoss(use_sigmoid=form != "softmax", ignore_index=ignore, avg_non_ignore=avg_non_ignore)
    if form == "softmax":
        want = F.cross_entropy(x, y, ignore_index=-100 if ignore is None else ignore, reduction="mean" if avg_non_ignore else "sum") / (1 if avg_non_ignore else 10)
        near(loss(x, y), want)
        return
    one = F.binary_cross_entropy_with_logits(x[keep], F.one_hot(y[keep], 5).float(), reduction="sum")
    if form == "table":
        table = F.one_hot(y.where(keep, torch.tensor(0)), 5)
        table[~keep] = -100 if ignore is None else ignore
        y = table
    near(loss(x, y), one / (5 * keep.sum() if avg_non_ignore else 50))


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_all_ignored(sigmoid, avg_non_ignore):
    x = noise(10, 5).requires_grad_()
    loss = CrossEntropyLoss(use_sigmoid=sigmoid, avg_non_ignore=avg_non_ignore, ignore_index=255)(x, torch.full((10,), 255))
    assert loss.item() == 0
    loss.backward()
    assert (x.grad == 0).all()


def test_masks():
    "The mask of each row's class, and no other"
    x, masks, labels = noise(10, 3, 4, 4), (noise(10, 4, 4, seed=1) > 0).float(), torch.arange(10) % 3
    near(CrossEntropyLoss(use_mask=True)(x, (masks, labels)), F.binary_cross_entropy_with_logits(x[torch.arange(10), labels], masks))
    assert CrossEntropyLoss(use_mask=True)(x[:0], (masks[:0], labels[:0])).item() == 0


def test_cross_entropy_figures():
    x, y = torch.tensor([[100.0, -100]]), torch.tensor([1])
    near(CrossEntropyLoss()(x, y), 200)
    near(CrossEntropyLoss(class_weight=[0.8, 0.2])(x, y), 40)
    near(CrossEntropyLoss(loss_weight=1.5)(x, y), 300)
    near(CrossEntropyLoss(use_sigmoid=True, class_weight=[0.8, 0.2])(x, y), (100 + 0.2 * 100) / 2)


def test_mask_and_sigmoid():
    with pytest.raises(ConfigError):
        CrossEntropyLoss(use_mask=True, use_sigmoid=True)


@pytest.mark.parametrize("iou_weighted", [True, False])
def test_varifocal_perfect(iou_weighted):
    x = torch.tensor([[100.0, -100]])
    near(VarifocalLoss(iou_weighted=iou_weighted)(x, torch.tensor([[1.0, 0.0]])), 0)
    assert VarifocalLoss()(x, torch.tensor([[0.0, 1.0]])) > 1


def seesaw(p, q, x, label, seen=None):
    loss = SeesawLoss(num_classes=2, p=p, q=q)
    if seen is not None:
        loss.cum_samples[:2] = torch.tensor(seen)
    d = loss(torch.tensor([x]), torch.tensor([label]))
    return float(d["loss_cls_objectness"]), float(d["loss_cls_classes"])


def test_seesaw():
    "Logits of two classes, of an object, and of none"
    assert seesaw(0, 0, [-100.0, 100, -100, 100], 1) == pytest.approx((200, 0), abs=1e-4)
    assert seesaw(0, 0, [-100.0, 100, 100, -100], 2) == pytest.approx((200, 0), abs=1e-4)
    assert seesaw(1, 0, [100.0, -100, 100, -100], 1, [1.0, math.exp(20)]) == pytest.approx((0, 180), abs=1e-3)
    assert seesaw(0, 1, [100.0, -100, 100, -100], 1) == pytest.approx((0, 200 + math.log(100)), abs=1e-3)


@pytest.mark.parametrize("name", SELF_AVERAGING)
def test_harmonised(name):
    "They average over what is valid: without any valid entry they are zero"
    x, y = rows(name)
    loss = SELF_AVERAGING[name]()
    assert loss(x, y) > 0 and loss(x, y, torch.zeros(10)).item() == 0
    assert loss(x, y, torch.ones(10)).item() == pytest.approx(loss(x, y).item(), rel=1e-5)
    assert SELF_AVERAGING[name](reduction="none")(x, y).shape == x.shape
