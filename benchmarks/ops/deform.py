"Deformable attention against its grid-sample formulation, deformable convolution against torchvision's; forward and backward"
from functools import partial

import torch

from visdet.cv.deform_attn import ms_deform_attn
from visdet.cv.deform_conv import deform_conv


def step(f, *xs):
    "Result and gradients of the tensors in `xs`, as a call without arguments"
    xs = [o.requires_grad_() for o in xs]
    grad = torch.randn(f(*xs).shape, generator=torch.Generator().manual_seed(1))

    def call():
        y = f(*xs)
        return [y.detach(), *torch.autograd.grad(y, xs, grad)]

    return call


def attention(backend, h, w, q, bs):
    "8 heads of 32 channels, 4 points on each of the strides 8 to 64; q=0: every cell is a query"
    g, hw = torch.Generator().manual_seed(0), [(-(-h // s), -(-w // s)) for s in (8, 16, 32, 64)]
    cells = sum(i * j for i, j in hw)
    if q:
        at = torch.rand(bs, q, 1, 1, 1, 2, generator=g)
    else:
        at = torch.cat([torch.cartesian_prod((torch.arange(i) + 0.5) / i, (torch.arange(j) + 0.5) / j).flip(-1) for i, j in hw])[None, :, None, None, None]
    q = q or cells
    loc = at + torch.randn(bs, q, 8, 4, 4, 2, generator=g) * 2 / torch.tensor([(j, i) for i, j in hw])[:, None]
    wt = torch.randn(bs, q, 8, 16, generator=g).softmax(-1).view(bs, q, 8, 4, 4)
    return step(lambda v, l, a: ms_deform_attn(v, hw, l, a, backend=backend), torch.randn(bs, cells, 8, 32, generator=g), loc, wt)


def convolution(backend, c, h, w, bs, groups=1):
    "3 x 3 taps with masks, as many outputs as inputs"
    g = torch.Generator().manual_seed(0)

    def rand(*s):
        return torch.randn(*s, generator=g)

    xs = rand(bs, c, h, w), rand(bs, 18, h, w), rand(c, c // groups, 3, 3) / (9 * c / groups) ** 0.5, rand(bs, 9, h, w).sigmoid()
    return step(lambda x, o, k, m: deform_conv(x, o, k, m, padding=1, groups=groups, backend=backend), *xs)


def same(a, b):
    return all((x - y).abs().max() <= 2e-3 * y.abs().max() for x, y in zip(a, b))


CASES = [
    *(
        dict(op="ms_deform_attn", size=size, target=0.5, against="grid_sample", same=same, ours=partial(attention, None, **kw), others={"grid_sample": partial(attention, "torch", **kw)})
        for size, kw in (("decoder: 300 queries, 2 images of 800 x 1333", dict(h=800, w=1333, q=300, bs=2)), ("encoder: every cell a query, 2 images of 320 x 480", dict(h=320, w=480, q=0, bs=2)))
    ),
    *(
        dict(op="deform_conv", size=size, same=same, ours=partial(convolution, None, **kw), others={"torchvision": partial(convolution, "torchvision", **kw)})
        for size, kw in (
            ("256 channels, 50 x 84", dict(c=256, h=50, w=84, bs=1)),
            ("128 channels, 100 x 168", dict(c=128, h=100, w=168, bs=1)),
            ("256 channels in 32 groups, 50 x 84", dict(c=256, h=50, w=84, bs=1, groups=32)),
        )
    ),
]
