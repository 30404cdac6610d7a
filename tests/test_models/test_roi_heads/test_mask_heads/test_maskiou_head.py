"What MMDetection's tests say of the head that grades masks, and its targets by slow counting"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from visdet.core.testing import rand_boxes
from visdet.nn.mask_iou import MaskIoUHead, mask_overlaps, shares_inside


@pytest.mark.parametrize("n", [6, 1, 0])
def test_forward_and_loss(n):
    "Eight classes and channels, regions of six cells, masks of twelve"
    torch.manual_seed(0)
    h = MaskIoUHead(8, 8, channels=8, hidden=8, size=6)
    x, logits, goal = torch.randn(n, 8, 6, 6), torch.randn(n, 12, 12), (torch.rand(n, 12, 12) > 0.5).float()
    est = h(x, logits, torch.arange(n) % 8)
    loss = h.loss(est, logits, goal, torch.ones(n))
    assert est.shape == (n,) and (loss > 0) == (n > 0) and loss.requires_grad
    loss.backward()
    assert all(p.grad is not None for p in h.parameters())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]))
@settings(max_examples=30, deadline=None)
def test_targets_by_counting(seed, thr):
    "Cell by cell and pixel by pixel"
    g = torch.Generator().manual_seed(seed)
    masks = (torch.rand(3, 20, 30, generator=g) > torch.rand(3, 1, 1, generator=g)).to(torch.uint8)
    boxes, rows = rand_boxes(8, (20, 30), seed) * 1.4 - 4, torch.randint(0, 3, (8,), generator=g)
    share = []
    for b, r in zip(boxes.numpy(), rows.tolist()):
        x1, y1, x2, y2 = (int(np.clip(int(v), 0, m)) for v, m in zip(b, (30, 20, 30, 20)))
        inside = sum(int(masks[r, y, x]) for y in range(y1, min(y1 + max(y2 - y1, 1), 20)) for x in range(x1, min(x1 + max(x2 - x1, 1), 30)))
        share.append(inside / (int(masks[r].sum()) + 1e-7))
    got = shares_inside(masks, rows, boxes)
    assert np.allclose(got.numpy(), share, atol=1e-6)
    logits, goal = torch.randn(8, 5, 5, generator=g), (torch.rand(8, 5, 5, generator=g) > 0.6).float()
    for i, v in enumerate(mask_overlaps(logits, goal, got, thr).tolist()):
        m, t = logits[i].double().numpy() > thr, goal[i].numpy() > 0
        both = (m & t).sum()
        whole = t.sum() / (share[i] + 1e-7)
        want = both / (m.sum() + whole - both) if both else 0.0
        assert v == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_only_masks_that_touch_their_object_count():
    h = MaskIoUHead(8, 8, channels=8, hidden=8, size=6)
    logits, goal = torch.ones(2, 12, 12), torch.zeros(2, 12, 12)
    goal[0] = 1
    est = torch.tensor([0.25, 7.0])
    assert float(h.loss(est, logits, goal, torch.tensor([1.0, 1.0]))) == pytest.approx(0.5 * 0.75**2, rel=1e-5)
    assert h.loss(est[1:], logits[1:], goal[1:], torch.ones(1)) == 0
