"What MMDetection's tests say of the double head, and what its paper says"
import pytest
import torch

from visdet.core.testing import rand_boxes
from visdet.cv.roi import to_rois
from visdet.nn.double_head import DoubleHead


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("n", [4, 1, 0])
def test_forward(n, train):
    "Four bottlenecks, two linear layers, width four"
    torch.manual_seed(0)
    h = DoubleHead(1, 20, [4], 4, 2, channels=4, hidden=4, norm="bn").train(train)
    cls, reg = h([torch.randn(1, 1, 32, 32)], to_rois([rand_boxes(n, (128, 128), 1)]))
    assert cls.shape == (n, 21) and reg.shape == (n, 80) and cls.isfinite().all() and reg.isfinite().all()


def test_class_and_box_are_apart():
    "The class depends on no convolution, the box on no linear layer of the class"
    torch.manual_seed(0)
    h = DoubleHead(2, 3, [4], 2, 2, channels=8, hidden=8)
    x, rois = [torch.randn(1, 2, 32, 32)], to_rois([rand_boxes(5, (128, 128), 1, 10)])
    for i, names in enumerate((("widen.", "convs.", "reg."), ("fcs.", "cls."))):
        h.zero_grad()
        h(x, rois)[i].sum().backward()
        assert {k for k, p in h.named_parameters() if p.grad is None or not p.grad.abs().sum()} >= {k for k, _ in h.named_parameters() if k.startswith(names)}


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0])
def test_the_box_sees_more(factor):
    "A change outside the region reaches the box only if the factor lets it in"
    torch.manual_seed(0)
    h = DoubleHead(1, 3, [4], 1, 1, channels=8, hidden=8, scale=factor, sampling_ratio=2).eval()
    a = torch.randn(1, 1, 64, 64)
    b = a.clone()
    b[:, :, :, 46:] += 5  # from pixel 184 on, beyond the region
    rois = torch.tensor([[0.0, 60, 60, 180, 180]])
    (ca, ra), (cb, rb) = h([a], rois), h([b], rois)
    assert torch.equal(ca, cb) and torch.equal(ra, rb) == (factor < 1.3)
