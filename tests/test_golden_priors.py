"Priors against figures recorded from MMDetection, and against slow loops"
import numpy as np
import pytest
import torch

from golden import cases
from visdet.cv.anchor_kinds import LegacyAnchorGenerator, SSDAnchorGenerator, YOLOAnchorGenerator
from visdet.cv.priors import AnchorGenerator, PointGenerator


def boxes_of(a, cls, **kw):
    "A generator of boxes from MMDetection's arguments"
    strides = [tuple(o) if isinstance(o, list) else o for o in a["strides"]]
    base = a.get("base_sizes") or [min(o) if isinstance(o, tuple) else o for o in strides]
    scales = a.get("scales") or [a["octave_base_scale"] * 2 ** (i / a["scales_per_octave"]) for i in range(a["scales_per_octave"])]
    offset, one = a.get("center_offset", 0.0), 1 if cls is LegacyAnchorGenerator else 0
    centres = [tuple(o) for o in a["centers"]] if a.get("centers") else [(offset * (b - one),) * 2 for b in base]
    if cls is AnchorGenerator:
        kw["order"] = "ratio" if a.get("scale_major", True) else "size"
    return cls(strides, [tuple(b * s for s in scales) for b in base], tuple(a["ratios"]), centres=centres, **kw)


def ssd(a, **kw):
    "SSD's generator from MMDetection's arguments"
    assert not a.get("scale_major", True)
    return SSDAnchorGenerator(a["strides"], a["ratios"], a.get("min_sizes"), a.get("max_sizes"), a.get("input_size", 300), tuple(a.get("basesize_ratio_range", (0.15, 0.9))), **kw)


def pairs(xs):
    return [tuple(o) if isinstance(o, list) else o for o in xs]


PARTS = {
    "AnchorGenerator": lambda a: boxes_of(a, AnchorGenerator),
    "LegacyAnchorGenerator": lambda a: boxes_of(a, LegacyAnchorGenerator),
    "SSDAnchorGenerator": ssd,
    "LegacySSDAnchorGenerator": lambda a: ssd(a, legacy=True),
    "YOLOAnchorGenerator": lambda a: YOLOAnchorGenerator(pairs(a["strides"]), [pairs(o) for o in a["base_sizes"]]),
    "MlvlPointGenerator": lambda a: PointGenerator(pairs(a["strides"]), a.get("offset", 0.5)),
}


def build(args):
    "A generator from MMDetection's dict"
    return PARTS[args["type"]](args)


@pytest.mark.parametrize("case", cases("priors"))
def test_priors(case):
    gen, sizes = build({"type": case.component, **case.args}), [tuple(o) for o in case.settings["featmap_sizes"]]
    name = "grid" if gen.cells is not None else "grid_xy"
    grid = gen.grid(sizes)
    for i, g in enumerate(grid):
        case.check(f"{name}.{i}", g)
        if gen.cells is not None:
            case.check(f"base.{i}", gen.grid([(1, 1)] * len(sizes))[i])
    if name == "grid_xy":
        rows = PointGenerator(gen.strides, gen.offset, with_stride=True).grid(sizes)
        for i, g in enumerate(rows):
            case.check(f"grid_stride.{i}", g)
    for i, v in enumerate(gen.valid(sizes, case.settings["valid_pad_shape"])):
        case.check(f"valid_count.{i}", torch.tensor([int(v.sum()), len(v)]))
        case.check(f"valid_flags_bits.{i}", torch.from_numpy(np.packbits(v.numpy())))
    level = case.settings["sparse_level"]
    idx = case.array("in.sparse_flat_indices")
    got = gen.sparse(idx, sizes[level], level)
    case.check("sparse", got)
    assert torch.equal(got, grid[level][idx])
    if "num_base_priors" in case.settings:
        assert gen.num_per_cell == case.settings["num_base_priors"]


def test_anchors_2x2():
    "One anchor of ten pixels at stride 10, and at a stride that differs by axis"
    a = AnchorGenerator([10], [10], (1.0,)).grid([(2, 2)])[0]
    assert a.tolist() == [[-5, -5, 5, 5], [5, -5, 15, 5], [-5, 5, 5, 15], [5, 5, 15, 15]]
    a = AnchorGenerator([(10, 20)], [10], (1.0,)).grid([(2, 2)])[0]
    assert a[2:].tolist() == [[-5, 15, 5, 25], [5, 15, 15, 25]]


def test_retinanet_counts():
    gen = AnchorGenerator([8, 16, 32, 64, 128], [tuple(4 * s * 2 ** (i / 3) for i in range(3)) for s in (8, 16, 32, 64, 128)])
    half = (gen.cells[0][:, 2:]).tolist()
    want = [(22.6274, 11.3137), (28.5088, 14.2544), (35.9188, 17.9594), (16, 16), (20.1587, 20.1587), (25.3984, 25.3984), (11.3137, 22.6274), (14.2544, 28.5088), (17.9594, 35.9188)]
    assert np.allclose(half, want, atol=1e-3)
    sizes = [(80, 80), (40, 40), (20, 20), (10, 10), (5, 5)]
    assert [int(o.sum()) for o in gen.valid(sizes, (640, 640))] == [57600, 14400, 3600, 900, 225]


def test_ssd_manual():
    lo, hi = [48, 100, 150, 202, 253, 304], [100, 150, 202, 253, 304, 320]
    gen = SSDAnchorGenerator([16, 32, 64, 107, 160, 320], [[2, 3]] * 6, lo, hi)
    want = [[-16, -16, 32, 32], [-26.641, -26.641, 42.641, 42.641], [-25.9411, -8.9706, 41.9411, 24.9706], [-8.9706, -25.9411, 24.9706, 41.9411]]
    assert np.allclose(gen.cells[0][:4], want, atol=1e-3)
    assert np.allclose(gen.cells[5][0], [8, 8, 312, 312])


def test_valid_slow():
    "The flags of a batch equal those of a loop over images, cells and anchors"
    gen, sizes = AnchorGenerator([8, (16, 12)], [16, 32], (1.0, 2.0)), [(5, 7), (3, 4)]
    imgs = torch.tensor([[33, 41], [1, 1], [40, 56], [0, 0]])
    got = gen.valid(sizes, imgs)
    for k, ((h, w), s) in enumerate(zip(sizes, ((8, 8), (16, 12)))):
        for b, (ih, iw) in enumerate(imgs.tolist()):
            slow = [y * s[1] < ih and x * s[0] < iw for y in range(h) for x in range(w) for _ in range(2)]
            assert got[k][b].tolist() == slow


@pytest.mark.parametrize("n", [0, 1, 7])
def test_responsible_slow(n):
    gen, sizes = YOLOAnchorGenerator([16, 8], [[(10, 20), (30, 10)], [(5, 5)]]), [(4, 5), (8, 10)]
    g = torch.Generator().manual_seed(n)
    c = torch.rand(2, n, 2, generator=g) * torch.tensor([79.0, 63.0])
    boxes, valid = torch.cat([c - 3, c + 3], -1), torch.rand(2, n, generator=g) < 0.7
    got = gen.responsible(sizes, boxes, valid)
    for b in range(2):
        want = []
        for (h, w), s, k in zip(sizes, (16, 8), (2, 1)):
            cells = {(int(y // s), int(x // s)) for (x, y), v in zip(c[b].tolist(), valid[b].tolist()) if v}
            want += [(y, x) in cells for y in range(h) for x in range(w) for _ in range(k)]
        assert got[b].tolist() == want
