"""The behaviours that MMDetection states for its box coders, with its figures

Sizes to clip to are an argument of `decode` here. `BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no
counterpart.
"""
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.cv.coder_kinds import TBLRCoder, YOLOCoder
from visdet.cv.coders import DeltaCoder, DistanceCoder

BEHAVIOURS = {
    "deltas: boxes in an image of 32 x 32": "test_delta",
    "deltas: the size as a pair, a tensor, one for each image": "test_delta_sizes",
    "deltas: a batch keeps its shape": "test_delta_batch",
    "deltas: sizes of another number of images are refused": "test_delta_wrong_sizes",
    "deltas: no regions": "test_delta_none",
    "deltas: a limit of the centre's move": "test_centre_clip",
    "YOLO at stride 32": "test_yolo",
    "top, bottom, left, right in an image of 13 x 12": "test_tblr",
    "distances: encoding with a limit": "test_distance_encode",
    "distances: decoding clips to the image": "test_distance_decode",
}
WITHOUT = {
    "deltas of GLIP: sizes with one pixel more": "GLIP is not taken; `LegacyDeltaCoder` counts pixels in both directions",
}

ROIS = torch.tensor([[0.0, 0, 1, 1]] * 3 + [[5.0, 5, 5, 5]])
DELTAS = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]])
BOXES = torch.tensor([[0.0, 0, 1, 1], [0.1409, 0.1409, 2.8591, 2.8591], [0, 0.3161, 4.1945, 0.6839], [5, 5, 5, 5]])


def near(a, b, atol=1e-4):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float32), atol=atol, rtol=0)


def test_delta():
    near(DeltaCoder().decode(ROIS, DELTAS, (32, 32)), BOXES)


@pytest.mark.parametrize("size", [(32, 32), [32, 32], torch.tensor([32, 32]), torch.tensor([32.0, 32.0])])
def test_delta_sizes(size):
    near(DeltaCoder().decode(ROIS, DELTAS, size), BOXES)


@pytest.mark.parametrize("sizes", [(32, 32), torch.tensor([[32, 32], [32, 32]]), [(32, 32), (32, 32)], torch.tensor([[32, 32], [2, 1]])])
def test_delta_batch(sizes):
    "Two images, each clipped to its own size where there are two"
    got = DeltaCoder().decode(torch.stack([ROIS, ROIS]), torch.stack([DELTAS, DELTAS]), sizes)
    assert got.shape == (2, 4, 4)
    near(got[0], BOXES)
    small = torch.as_tensor(sizes).tolist()[-1] == [2, 1]
    near(got[1], BOXES.minimum(torch.tensor([1.0, 2, 1, 2])) if small else BOXES)


@pytest.mark.parametrize("sizes", [torch.tensor([[32, 32]] * 3), [(32, 32)] * 3, (32, 32, 32)])
def test_delta_wrong_sizes(sizes):
    with pytest.raises((ConfigError, RuntimeError)):
        DeltaCoder().decode(torch.stack([ROIS, ROIS]), torch.stack([DELTAS, DELTAS]), sizes)


def test_delta_none():
    for coder in (DeltaCoder(), TBLRCoder()):
        assert coder.decode(ROIS[:0], DELTAS[:0], (32, 32)).shape == (0, 4)
        assert coder.encode(ROIS[:0], ROIS[:0]).shape == (0, 4)
    assert YOLOCoder().decode(ROIS[:0], DELTAS[:0], 32).shape == (0, 4)
    assert DistanceCoder().decode(ROIS[:0, :2], DELTAS[:0], (32, 32)).shape == (0, 4)


def test_centre_clip():
    "A move of six pixels stops at two, while the size still grows"
    got = DeltaCoder(centre_clip=2.0).decode(torch.tensor([[0.0, 0, 6, 6]]), torch.tensor([[1.0, 1, 2, 2]]), (32, 32))
    near(got, [[0, 0, 27.1672, 27.1672]])


def test_yolo():
    priors = torch.tensor([[-42.0 + 32 * i, -29, 74 + 32 * i, 61] for i in range(4)])
    preds = torch.tensor([[0.4709, 0.6152, 0.169, -0.4056], [0.5399, 0.6653, 0.1162, -0.4162], [0.4654, 0.6618, 0.1548, -0.4301], [0.4786, 0.6197, 0.1896, -0.4479]])
    want = [[-53.6102, -10.3096, 83.7478, 49.6824], [-15.87, -8.3901, 114.4236, 50.9693], [11.1822, -8.0924, 146.6034, 50.4476], [41.2068, -8.9232, 181.4236, 48.584]]
    near(YOLOCoder().decode(priors, preds, 32), want, atol=1e-3)
    near(YOLOCoder().encode(priors, torch.tensor(want), 32), preds, atol=1e-4)


@pytest.mark.parametrize("norm", [15.0, (15.0, 15.0, 15.0, 15.0)])
def test_tblr(norm):
    "Sides that cross are left as they are"
    got = TBLRCoder(norm, by_size=True).decode(ROIS, torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]]), (13, 12))
    near(got, [[0.5, 0.5, 0.5, 0.5], [0, 0, 12, 13], [0, 0.5, 0, 0.5], [5, 5, 5, 5]])


POINTS = torch.tensor([[74.0, 61], [-29, 106], [138, 61], [29, 170]])
GTS = torch.tensor([[74.0, 61, 75, 62], [0, 104, 0, 112], [100, 90, 100, 120], [0, 120, 100, 120]])


def test_distance_encode():
    "Negative distances become zero, and long ones the limit"
    got = DistanceCoder(max_dis=50.0, eps=0.0).encode(POINTS, GTS)
    near(got, [[0, 0, 1, 1], [0, 2, 29, 6], [38, 0, 0, 50], [29, 50, 50, 0]])


@pytest.mark.parametrize("size", [(120, 100), torch.tensor([120, 100])])
def test_distance_decode(size):
    distances = torch.tensor([[0.0, 0, 1, 1], [1, 2, 10, 6], [22, -29, 138, 61], [54, 29, 170, 61]])
    got = DistanceCoder().decode(POINTS, distances, size)
    near(got, [[74, 61, 75, 62], [0, 104, 0, 112], [100, 90, 100, 120], [0, 120, 100, 120]])
    batch = DistanceCoder().decode(POINTS.expand(2, 4, 2), distances.expand(2, 4, 4), torch.tensor([[120, 100], [120, 100]]))
    near(batch, got.expand(2, 4, 4))
    free = DistanceCoder().decode(POINTS, distances)
    near(free[3], [-25, 141, 199, 231])
