"""The behaviours that MMDetection states for priors, with its figures

An anchor generator takes sizes in pixels here, where MMDetection takes base sizes and scales; the figures are those
of the anchors and therefore the same. `BEHAVIOURS` names the test of each of them, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.cv.anchor_kinds import SSDAnchorGenerator, YOLOAnchorGenerator
from visdet.cv.priors import AnchorGenerator, PointGenerator, octave_sizes

BEHAVIOURS = {
    "one anchor of ten pixels over 2 x 2 cells": "test_one_anchor",
    "strides are pairs (x, y)": "test_stride_pairs",
    "number of anchors of a cell, by level": "test_num_per_cell",
    "SSD from lists of sizes: cells, numbers, valid flags": "test_ssd_lists",
    "SSD300 from a range of shares: cells, numbers, valid flags, tuple strides": "test_ssd300",
    "SSD refuses half of a pair of lists, and lists of unequal length": "test_ssd_errors",
    "YOLO: the cells of three levels": "test_yolo_cells",
    "RetinaNet: the cells of five levels, valid flags": "test_retinanet",
    "guided anchors: nine approximate anchors and one square, valid flags": "test_guided",
    "points of several levels: number, columns, offset": "test_points",
    "valid flags of points for padded images of uneven sides": "test_point_flags",
    "points are the same on every device": "test_points_on_cuda",
    "sparse priors are rows of the grid": "test_sparse",
}
WITHOUT = {
    "num_base_anchors, the older name of num_base_priors": "one name, `num_per_cell`",
    "SSD min_sizes without max_sizes is an AssertionError": "the same condition raises a ConfigError",
}

SSD_LO, SSD_HI = [48, 100, 150, 202, 253, 304], [100, 150, 202, 253, 304, 320]
CENTRED = {  # Half widths and heights of RetinaNet's anchors at stride 8, ratio-major
    0.5: [(22.6274, 11.3137), (28.5088, 14.2544), (35.9188, 17.9594)],
    1.0: [(16, 16), (20.1587, 20.1587), (25.3984, 25.3984)],
    2.0: [(11.3137, 22.6274), (14.2544, 28.5088), (17.9594, 35.9188)],
}


def near(a, b, atol=2e-4, rtol=1e-5):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float32).reshape(a.shape), atol=atol, rtol=rtol)


def counts(gen, sizes, image):
    "How many priors of each level the image reaches"
    return [int(o.sum()) for o in gen.valid(sizes, image)]


def test_one_anchor():
    gen = AnchorGenerator([10], [10], ratios=(1.0,))
    assert gen.grid([(2, 2)])[0].tolist() == [[-5, -5, 5, 5], [5, -5, 15, 5], [-5, 5, 5, 15], [5, 5, 15, 15]]


def test_stride_pairs():
    gen = AnchorGenerator([(10, 20)], [10], ratios=(1.0,))
    assert gen.grid([(2, 2)])[0].tolist() == [[-5, -5, 5, 5], [5, -5, 15, 5], [-5, 15, 5, 25], [5, 15, 15, 25]]


def test_num_per_cell():
    "Three ratios of one size of eight strides"
    gen = AnchorGenerator([4, 8], [32, 64], ratios=(0.5, 1.0, 2.0))
    assert gen.num_per_cell == [3, 3]
    assert [len(o) for o in gen.grid([(2, 3), (1, 2)])] == [18, 6]


def test_ssd_lists():
    gen = SSDAnchorGenerator([16, 32, 64, 107, 160, 320], [[2, 3]] * 6, SSD_LO, SSD_HI)
    near(gen.cells[0], [[-16, -16, 32, 32], [-26.641, -26.641, 42.641, 42.641], [-25.9411, -8.9706, 41.9411, 24.9706], [-8.9706, -25.9411, 24.9706, 41.9411], [-33.5692, -5.8564, 49.5692, 21.8564], [-5.8564, -33.5692, 21.8564, 49.5692]])
    near(gen.cells[5][:4], [[8, 8, 312, 312], [4.0513, 4.0513, 315.9487, 315.9487], [-54.9605, 52.5198, 374.9604, 267.4802], [52.5198, -54.9605, 267.4802, 374.9604]], atol=1e-3)
    assert gen.num_per_cell == [6] * 6
    sizes = [(n, n) for n in (38, 19, 10, 5, 3, 1)]
    assert counts(gen, sizes, (320, 320)) == [2400, 600, 150, 54, 24, 6]
    assert [len(o) for o in gen.grid(sizes)] == [n * n * 6 for n, _ in sizes]


@pytest.mark.parametrize("pairs", [False, True])
def test_ssd300(pairs):
    strides = [8, 16, 32, 64, 100, 300]
    gen = SSDAnchorGenerator([(s, s) for s in strides] if pairs else strides, [[2], [2, 3], [2, 3], [2, 3], [2], [2]], input_size=300, shares=(0.15, 0.9))
    near(gen.cells[0], [[-6.5, -6.5, 14.5, 14.5], [-11.3704, -11.3704, 19.3704, 19.3704], [-10.8492, -3.4246, 18.8492, 11.4246], [-3.4246, -10.8492, 11.4246, 18.8492]])
    near(gen.cells[5], [[19.5, 19.5, 280.5, 280.5], [6.6342, 6.6342, 293.3658, 293.3658], [-34.5549, 57.7226, 334.5549, 242.2774], [57.7226, -34.5549, 242.2774, 334.5549]])
    assert gen.num_per_cell == [4, 6, 6, 6, 4, 4]
    sizes = [(n, n) for n in (38, 19, 10, 5, 3, 1)]
    assert counts(gen, sizes, (300, 300)) == [5776, 2166, 600, 150, 36, 4]


@pytest.mark.parametrize("lo,hi", [(SSD_LO, None), (None, SSD_HI), (SSD_LO[:5], SSD_HI), (SSD_LO, SSD_HI[1:])])
def test_ssd_errors(lo, hi):
    with pytest.raises(ConfigError):
        SSDAnchorGenerator([16, 32, 64, 107, 160, 320], [[2, 3]] * 6, lo, hi)


def test_yolo_cells():
    sizes = [[(116, 90), (156, 198), (373, 326)], [(30, 61), (62, 45), (59, 119)], [(10, 13), (16, 30), (33, 23)]]
    gen = YOLOAnchorGenerator([32, 16, 8], sizes)
    want = [
        [[-42, -29, 74, 61], [-62, -83, 94, 115], [-170.5, -147, 202.5, 179]],
        [[-7, -22.5, 23, 38.5], [-23, -14.5, 39, 30.5], [-21.5, -51.5, 37.5, 67.5]],
        [[-1, -2.5, 9, 10.5], [-4, -11, 12, 19], [-12.5, -7.5, 20.5, 15.5]],
    ]
    grid = gen.grid([(1, 1)] * 3)
    for level, w in enumerate(want):
        assert grid[level].tolist() == w
    maps = [(14, 18), (28, 36), (56, 72)]
    assert [len(o) for o in gen.grid(maps)] == [14 * 18 * 3, 28 * 36 * 3, 56 * 72 * 3]
    assert counts(gen, maps, (448, 576)) == [14 * 18 * 3, 28 * 36 * 3, 56 * 72 * 3]


def test_retinanet():
    strides = [8, 16, 32, 64, 128]
    gen = AnchorGenerator(strides, octave_sizes(strides, 4, 3), ratios=(0.5, 1.0, 2.0))
    half = torch.tensor([wh for r in (0.5, 1.0, 2.0) for wh in CENTRED[r]])
    for level in range(5):
        near(gen.cells[level], torch.cat([-half, half], 1) * 2**level, atol=1e-3 * 2**level)
    assert gen.num_per_cell == [9] * 5
    assert counts(gen, [(80, 80), (40, 40), (20, 20), (10, 10), (5, 5)], (640, 640)) == [57600, 14400, 3600, 900, 225]


def test_guided():
    "Nine anchors for the search of a shape, and one square of four strides that it starts from"
    strides, maps = [8, 16, 32, 64, 128], [(100, 152), (50, 76), (25, 38), (13, 19), (7, 10)]
    many = AnchorGenerator(strides, octave_sizes(strides, 4, 3), ratios=(0.5, 1.0, 2.0))
    assert many.num_per_cell == [9] * 5
    assert counts(many, maps, (800, 1216)) == [136800, 34200, 8550, 2223, 630]
    square = AnchorGenerator(strides, [4 * s for s in strides], ratios=(1.0,))
    assert square.num_per_cell == [1] * 5
    assert [o.tolist() for o in square.cells] == [[[-h, -h, h, h]] for h in (16, 32, 64, 128, 256)]
    assert counts(square, maps, (800, 1216)) == [15200, 3800, 950, 247, 70]


@pytest.mark.parametrize("offset", [0.5, 0.0])
def test_points(offset):
    sizes = [(3, 2), (4, 4)]
    plain, rows = PointGenerator([4, 10], offset).grid(sizes), PointGenerator([4, 10], offset, with_stride=True).grid(sizes)
    for s, (h, w), p, q in zip((4, 10), sizes, plain, rows):
        assert p.shape == (h * w, 2) and q.shape == (h * w, 4)
        assert p.tolist() == [[(x + offset) * s, (y + offset) * s] for y in range(h) for x in range(w)]
        assert torch.equal(q[:, :2], p) and (q[:, 2:] == s).all()
    assert PointGenerator([4, 10], offset).num_per_cell == [1, 1]


def test_point_flags():
    "An image of 11 x 13 pixels in maps that are larger than it"
    flags = PointGenerator([4, 10]).valid([(4, 5), (3, 2)], (11, 13))
    assert flags[0].view(4, 5).tolist() == [[y < 3 and x < 4 for x in range(5)] for y in range(4)]
    assert flags[1].view(3, 2).tolist() == [[y < 2 and x < 2 for x in range(2)] for y in range(3)]
    assert [int(o.sum()) for o in PointGenerator([4, 10]).valid([(4, 5), (3, 2)], (16, 20))] == [20, 4]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_points_on_cuda():
    gen, sizes = PointGenerator([4, 10], with_stride=True), [(3, 2), (4, 4)]
    for a, b in zip(gen.grid(sizes), gen.grid(sizes, "cuda")):
        assert b.is_cuda and torch.equal(a, b.cpu())


SPARSE = {
    "points": (lambda: PointGenerator([4, 10], 0.0), [(3, 2), (4, 3)]),
    "points with their strides": (lambda: PointGenerator([4, (10, 8)], with_stride=True), [(3, 2), (4, 3)]),
    "points with strides in pairs": (lambda: PointGenerator([(4, 8), (10, 5)]), [(3, 2), (4, 3)]),
    "anchors": (lambda: AnchorGenerator([8, 16], [(16, 32), (32, 64)], ratios=(0.5, 1.0)), [(3, 2), (4, 3)]),
    "ssd": (lambda: SSDAnchorGenerator([16, 32], [[2], [2, 3]], [48, 100], [100, 150]), [(3, 2), (4, 3)]),
    "yolo": (lambda: YOLOAnchorGenerator([32, 16], [[(116, 90), (156, 198)], [(30, 61)]]), [(3, 2), (4, 3)]),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("level", [0, 1])
def test_sparse(name, level):
    make, sizes = SPARSE[name]
    gen = make()
    grid = gen.grid(sizes)[level]
    idx = torch.tensor([0, 1, len(grid) - 1, 2, 1])
    assert torch.equal(gen.sparse(idx, sizes[level], level), grid[idx])
    assert gen.sparse(idx[:0], sizes[level], level).shape == (0, grid.shape[1])
