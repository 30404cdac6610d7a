"What MMDetection's tests say of coarse masks, against a slow computation in double precision"
import pytest
import torch
import torch.nn.functional as F

from visdet.core.basics import ConfigError
from visdet.core.testing import close, rand_boxes
from visdet.cv.roi import to_rois
from visdet.nn.coarse_mask import CoarseMaskHead


@pytest.mark.parametrize("kw,cells", [(dict(), 7), (dict(down=1, size=8), 8), (dict(down=4, size=8, num_convs=2), 2), (dict(num_fcs=3, hidden=4), 7)])
@pytest.mark.parametrize("n", [3, 0])
def test_shapes_and_numbers(kw, cells, n):
    torch.manual_seed(0)
    h = CoarseMaskHead(4, 6, [4], 4, **{**dict(hidden=8), **kw})
    torch.nn.init.normal_(h.out.weight)
    x, rois, lbl = torch.randn(1, 4, 32, 32), to_rois([rand_boxes(n, (128, 128), 1)]), torch.arange(n) % 6
    out = h([x], rois, lbl)
    assert out.shape == (n, cells, cells)
    if not n:
        return
    y = h.pool([x], rois).double()
    for b in h.tower:
        y = F.relu(F.conv2d(y, b.conv.weight.double(), b.conv.bias.double(), padding=1))
    if h.down is not None:
        y = F.relu(F.conv2d(y, h.down.weight.double(), h.down.bias.double(), stride=h.down.stride))
    y = y.flatten(1)
    for o in h.fcs:
        y = F.relu(y @ o.weight.double().flatten(1).T + o.bias.double())
    y = (y @ h.out.weight.double().T + h.out.bias.double()).reshape(n, 6, cells, cells)
    close(out.double(), y[torch.arange(n), lbl], 1e-5)


def test_start_and_limits():
    h = CoarseMaskHead(16, 6, [4], 16, hidden=32)
    assert (h.out.weight == 0.001).all() and (h.out.bias == 0).all()
    assert float(h.fcs[1].weight.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.1) and float(h.fcs[0].weight.std()) == pytest.approx((2 / (16 * 49 + 32)) ** 0.5, rel=0.1)
    with pytest.raises(ConfigError, match="cells"):
        CoarseMaskHead(4, 6, [4], size=2, down=4)
