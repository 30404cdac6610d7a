"""The behaviours that MMDetection states for what reads regions from the levels of a pyramid

`BEHAVIOURS` names the test of each behaviour.
"""
import pytest
import torch
from torch import nn

from visdet.core.basics import ConfigError
from visdet.core.testing import noise
from visdet.nn.roi_extract import GenericRoIExtractor, SingleRoIExtractor

BEHAVIOURS = {
    "single: one region of four levels; enlarged; none; one level": "test_single",
    "generic: unknown aggregation is refused": "test_unknown",
    "generic: sum with convolutions before and after": "test_sum",
    "generic: joined channels": "test_concat",
    "generic: joined channels of another width are refused": "test_width",
    "generic: no regions": "test_sum",
}
STRIDES = [4, 8, 16, 32]
ROI = torch.tensor([[0.0, 587.8285, 52.1405, 886.2484, 341.5644]])


def maps():
    return [noise(1, 16, h, w, seed=i) for i, (h, w) in enumerate([(200, 336), (100, 168), (50, 84), (25, 42)])]


@pytest.mark.parametrize("factor", [None, 2.0])
def test_single(factor):
    f = SingleRoIExtractor(STRIDES, 7, roi_scale_factor=factor)
    assert f(maps(), ROI).shape == (1, 16, 7, 7) and f(maps(), ROI[:0]).shape == (0, 16, 7, 7)
    one = SingleRoIExtractor([4], 7, roi_scale_factor=factor)
    assert one(maps()[:1], ROI).shape == (1, 16, 7, 7) and len(one(maps()[:1], ROI[:0])) == 0


def test_level():
    "A region of about 293 x 289 pixels is read from the third level, and only from it"
    xs = [x.requires_grad_() for x in maps()]
    SingleRoIExtractor(STRIDES, 7)(xs, ROI).sum().backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in xs] == [False, False, True, False]


def test_unknown():
    with pytest.raises(ConfigError):
        GenericRoIExtractor(STRIDES, 7, aggregation="product")


def test_sum():
    conv = lambda: nn.Conv2d(16, 16, 5, padding=2)  # noqa: E731
    f = GenericRoIExtractor(STRIDES, 7, pre=conv(), post=conv())
    assert f(maps(), ROI).shape == (1, 16, 7, 7) and len(f(maps(), ROI[:0])) == 0
    plain = GenericRoIExtractor(STRIDES, 7)
    each = sum(GenericRoIExtractor([s], 7)([x], ROI) for s, x in zip(STRIDES, maps()))
    torch.testing.assert_close(plain(maps(), ROI), each)


def test_concat():
    f = GenericRoIExtractor(STRIDES, 7, aggregation="concat")
    assert f(maps(), ROI).shape == (1, 64, 7, 7) and len(f(maps(), ROI[:0])) == 0
    torch.testing.assert_close(f(maps(), ROI)[:, 16:32], GenericRoIExtractor([8], 7)(maps()[1:2], ROI))


def test_width():
    "What follows says how many channels it takes"
    f = GenericRoIExtractor(STRIDES, 7, aggregation="concat", post=nn.Conv2d(256, 256, 1))
    with pytest.raises(RuntimeError, match="256"):
        f(maps(), ROI)
