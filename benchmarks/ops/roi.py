"Features of regions: one map and a pyramid, forward alone and with the gradient"
import torch
import torchvision

from visdet.core.testing import maps, rand_boxes
from visdet.cv.roi import RoIPooler, roi_align, to_rois
from visdet.cv.roi_pool import roi_pool

SIZE, STRIDES = (800, 1216), [4, 8, 16, 32]


def both(f, xs, grad):
    "f() without gradient, or its value and the gradients of `xs`"
    if not grad:

        def g():
            with torch.no_grad():
                return [f()]
    else:

        def g():
            y = f()
            return [y, *torch.autograd.grad(y, xs, torch.ones_like(y))]

    return g


def pyramid(n, channels, s, way, grad, last=True):
    def make():
        fs = [o.detach().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_() for o in maps(SIZE, STRIDES, channels)]
        boxes = rand_boxes(n, SIZE, min_side=8)
        if way == "torchvision":
            pool, d = torchvision.ops.MultiScaleRoIAlign(list("0123"), 7, s), dict(zip("0123", fs))
            return both(lambda: pool(d, [boxes], [SIZE]), fs, grad)
        pool, rois = RoIPooler(STRIDES, 7, s, backend=way), to_rois([boxes])
        return both(lambda: pool(fs, rois), fs, grad)

    return make


def one(n, channels, s, way, grad):
    def make():
        (f,), rois = maps(SIZE, (8,), channels), to_rois([rand_boxes(n, SIZE, min_side=8)])
        if way == "torchvision":
            return both(lambda: torchvision.ops.roi_align(f, rois, 7, 1 / 8, s, True), [f], grad)
        return both(lambda: roi_align(f, rois, 7, 1 / 8, s, True, backend=way), [f], grad)

    return make


def greatest(n, channels, way, grad):
    def make():
        (f,), rois = maps(SIZE, (8,), channels), to_rois([rand_boxes(n, SIZE, min_side=8)])
        if way == "torchvision":
            return both(lambda: torchvision.ops.roi_pool(f, rois, 7, 1 / 8), [f], grad)
        return both(lambda: roi_pool(f, rois, 7, 1 / 8), [f], grad)

    return make


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-3, rtol=1e-3) for x, y in zip(a, b))


def name(grad):
    return "forward and backward" if grad else "forward"


CASES = [
    *(dict(op="RoIPooler", size=f"{n} regions, 256 channels, 4 levels, {name(g)}", target=0.7, against="torchvision", same=close, ours=pyramid(n, 256, 2, None, g),
           others={"torch": pyramid(n, 256, 2, "torch", g), "torchvision": pyramid(n, 256, 2, "torchvision", g)}) for n in (100, 512, 1000) for g in (False, True)),
    dict(op="RoIPooler", size="512 regions, 256 channels, 4 levels, not channels last, forward and backward", same=close, ours=pyramid(512, 256, 2, None, True, False),
         others={"torch": pyramid(512, 256, 2, "torch", True, False), "torchvision": pyramid(512, 256, 2, "torchvision", True, False)}),
    *(dict(op="roi_align", size=f"512 regions, 256 channels, {'adaptive' if s == 0 else f'{s} points'}, {name(g)}", target=0.7, against="torchvision", same=close, ours=one(512, 256, s, None, g),
           others={"torch": one(512, 256, s, "torch", g), "torchvision": one(512, 256, s, "torchvision", g)}) for s in (0, 2) for g in (False, True)),
    dict(op="roi_pool", size="512 regions, 256 channels, forward and backward", same=close, ours=greatest(512, 256, None, True), others={"torchvision": greatest(512, 256, "torchvision", True)}),
]
