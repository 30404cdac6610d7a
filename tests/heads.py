"""What the tests of dense heads share: the scene that MMDetection uses for nearly all of them

A head of four classes over one channel sees random features of an image of 256 x 256 pixels, once without objects, once
with one, and once with one that lies outside of the image.
"""
import math

import torch

from visdet.data.targets import make_targets

SIZE, CLASSES, GT = 256, 4, [[23.6667, 23.8757, 238.6326, 151.8874]]
FIVE = [8, 16, 32, 64, 128]


def features(strides, size=SIZE, channels=1, seed=1):
    "Maps of numbers from 0 to 1"
    g = torch.Generator().manual_seed(seed)
    n = channels if isinstance(channels, list) else [channels] * len(strides)
    return [torch.rand(1, c, math.ceil(size / s), math.ceil(size / s), generator=g) for s, c in zip(strides, n)]


def losses(head, strides, boxes, labels=None, size=SIZE, channels=1, epoch=None, **kw):
    "Terms of the loss for one image"
    targets = make_targets([boxes], [labels or [2] * len(boxes)], [(size, size)])
    head.train()
    raw = head(features(strides, size, channels), torch.zeros(1, 3, size, size))
    return head.loss(raw, targets, **kw)


def sound(head, terms):
    "Every term is a scalar in the graph with finite gradients, and every parameter gets one"
    assert all(o.shape == () and o.requires_grad and o.isfinite() for o in terms.values()), terms
    head.zero_grad()
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert any(p.grad is not None and p.grad.any() for p in head.parameters()) or sum(terms.values()).item() == 0
    return {k: v.item() for k, v in terms.items()}
