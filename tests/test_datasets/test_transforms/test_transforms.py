"""The behaviours that MMDetection states for the transforms that visdet has too: resizing, flips, padding, crops

Sizes are (height, width) here. `BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import numpy as np
import pytest

from visdet.core.basics import ConfigError
from visdet.cv.masks import rasterise
from visdet.data.targets import Sample, collate
from visdet.data.transforms import RandomCrop, RandomFlip, RandomResize, Resize, crop_sample, fit_size, resize_sample

BEHAVIOURS = {
    "resize: sizes with the aspect kept": "test_keep_ratio",
    "resize: factors of x and y in their order": "test_factors",
    "resize: boxes and masks by two factors": "test_two_factors",
    "resize to a fixed shape: boxes, sizes": "test_fixed_shape",
    "resize: boxes are clipped to the image": "test_clipped",
    "resize by the shortest edge": "test_shortest_edge",
    "flip: boxes, masks, directions": "test_flip",
    "flip: a probability above one is refused": "test_probability",
    "pad: to a size, to a divisor, with masks": "test_pad",
    "crop: absolute and relative sizes": "test_crop_sizes",
    "crop: which boxes stay": "test_crop_boxes",
    "crop: no box left": "test_crop_empty",
    "crop: sizes that cannot be are refused": "test_crop_errors",
}
WITHOUT = {
    "FixScaleResize truncates where Resize rounds": "one rule: sizes are rounded, see test_factors",
    "boxes that are not clipped": "boxes are always clipped to their image",
    "padding to a square, to a value": "a batch is padded with zeros, to a multiple or a canvas",
    "an absolute range of crop sizes": "a range of shares",
    "recomputing boxes from cropped masks": "boxes are cropped as boxes",
    "a crop without objects gives None": "the sample stays whole",
    "homographies": "`Sample.scale` says how pixels of the file became pixels of the image",
    "MinIoURandomCrop, Expand, PhotoMetricDistortion, CutOut, Mosaic, MixUp, RandomAffine, CopyPaste, RandomErasing, RandomShift, shears, rotations, AutoAugment": "not taken, see the ledger of parts",
}


def sample(h, w, boxes=(), masks=None):
    return Sample(np.arange(h * w * 3, dtype=np.uint32).astype(np.uint8).reshape(h, w, 3), np.array(boxes, np.float32).reshape(-1, 4), list(range(len(boxes))), masks=masks)


def square(b):
    x1, y1, x2, y2 = b
    return [np.array([x1, y1, x2, y1, x2, y2, x1, y2], np.float64)]


@pytest.mark.parametrize("scale,want", [((100, 100), (80, 100)), ((100, 150), (100, 125))])
def test_keep_ratio(scale, want):
    s = Resize(scale)(sample(400, 500))
    assert s.size == s.image.shape[:2] == want and s.scale == pytest.approx((want[1] / 500, want[0] / 400))


def test_factors():
    "Unequal factors of a 200 x 300 image: that of x comes first"
    s = Resize((201, 101))(sample(200, 300))
    assert s.size == (101, 152) and s.scale == pytest.approx((152 / 300, 101 / 200))


def test_two_factors():
    s = resize_sample(sample(400, 500, [[0, 0, 112, 112]], [square([0, 0, 112, 112])]), (800, 750))
    assert s.boxes.tolist() == [[0, 0, 168, 224]] and s.scale == (1.5, 2.0)
    m = rasterise(s.masks, s.size)
    assert m.shape == (1, 800, 750) and m[0, :224, :168].all() and m.sum() == 224 * 168
    s = Resize((150, 200), "stretch")(sample(200, 100, [[20, 15, 60, 45]]))
    assert s.boxes.tolist() == [[40, 11.25, 120, 33.75]]


def test_fixed_shape():
    "Within a canvas with the aspect kept, or stretched to it"
    s = Resize((50, 100), "letterbox")(sample(200, 300))
    assert s.size == (50, 75) and s.scale == (0.25, 0.25) and Resize((50, 100), "letterbox").canvas == (50, 100)
    xb, t = collate([s], pad=Resize((50, 100), "letterbox").canvas)
    assert xb.shape[-2:] == (50, 100) and t.sizes.tolist() == [[50, 75]]
    s = Resize((200, 100), "letterbox")(sample(200, 300))
    assert s.size == (67, 100) and s.scale[0] == pytest.approx(1 / 3)
    s = Resize((200, 150), "stretch")(sample(200, 300, [[0, 0, 112, 133]]))
    assert s.size == (200, 150) and s.boxes.tolist() == [[0, 0, 56, 133]]


def test_clipped():
    s = Resize((150, 200), "stretch")(sample(300, 400, [[200, 150, 600, 450]]))
    assert s.boxes.tolist() == [[100, 75, 200, 150]]


@pytest.mark.parametrize("scale,want", [((10**6, 200), (440, 200)), ((301, 200), (301, 137)), ((10**6, 201), (442, 201))])
def test_shortest_edge(scale, want):
    assert fit_size((220, 100), scale) == want
    long, short = scale
    s = RandomResize([short], long=long)(sample(220, 100), np.random.default_rng(0))
    assert s.size == want and s.scale == pytest.approx((want[1] / 100, want[0] / 220))


@pytest.mark.parametrize("how,want", [("horizontal", [124, 1, 224, 101]), ("vertical", [0, 123, 100, 223]), ("diagonal", [124, 123, 224, 223])])
def test_flip(how, want):
    s0 = sample(224, 224, [[0, 1, 100, 101]], [square([0, 1, 100, 101])])
    s = RandomFlip(1.0, how)(s0, np.random.default_rng(0))
    assert s.boxes.tolist() == [want]
    axes = {"horizontal": (1,), "vertical": (0,), "diagonal": (0, 1)}[how]
    assert (s.image == np.flip(s0.image, axes)).all()
    assert (rasterise(s.masks, s.size)[0] == np.flip(rasterise(s0.masks, s0.size)[0], axes)).all()
    assert RandomFlip(0.0, how)(s0, np.random.default_rng(0)) is s0


def test_directions():
    "Each of a list is drawn about equally often"
    f, s0 = RandomFlip(1.0, ["horizontal", "vertical", "diagonal"]), sample(224, 224, [[0, 1, 100, 101]])
    rng = np.random.default_rng(0)
    got = [tuple(f(s0, rng).boxes[0].tolist()) for _ in range(300)]
    assert len(set(got)) == 3 and min(got.count(o) for o in set(got)) > 60


@pytest.mark.parametrize("p", [1.5, -0.1])
def test_probability(p):
    with pytest.raises(ConfigError, match="probability"):
        RandomFlip(p)
    with pytest.raises(ConfigError):
        RandomFlip(0.5, "sideways")


@pytest.mark.parametrize("pad,want", [((110, 120), (110, 120)), (11, (110, 88)), (32, (128, 96)), (1, (100, 80))])
def test_pad(pad, want):
    s = sample(100, 80, [[10, 20, 30, 60]], [square([10, 20, 30, 60])])
    xb, t = collate([s], pad=pad, masks=True)
    assert xb.shape == (1, 3, *want) and t.masks.shape == (1, *want) and t.sizes.tolist() == [[100, 80]]
    assert (xb[0, :, :100, :80].permute(1, 2, 0).numpy() == s.image).all() and xb[0, :, 100:].sum() == xb[0, :, :, 80:].sum() == 0
    assert (t.masks[0].numpy() == rasterise(s.masks, want)[0]).all()


@pytest.mark.parametrize("size", [(0.5, 0.5), (12, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_crop_sizes(size, seed):
    s0 = sample(24, 32)
    s = RandomCrop(size)(s0, np.random.default_rng(seed))
    assert s.size == s.image.shape[:2] == (12, 16) and s.orig_size == (24, 32)
    s = RandomCrop((0.5, 1.0))(s0, np.random.default_rng(seed))
    assert 12 <= s.size[0] <= 24 and 16 <= s.size[1] <= 32


@pytest.mark.parametrize("seed", range(6))
def test_crop_boxes(seed):
    "Five rows and seven columns of ten: both boxes stay while a part of them does"
    s0 = sample(10, 10, [[0, 0, 7, 7], [2, 3, 9, 9]])
    s = RandomCrop((5, 7), keep="share", min_share=0.0)(s0, np.random.default_rng(seed))
    assert s.size == (5, 7) and len(s.boxes) == len(s.labels) == 2 and s.boxes.dtype == np.float32 and s.labels.dtype == np.int64
    assert (s.boxes >= 0).all() and (s.boxes[:, 2] <= 7).all() and (s.boxes[:, 3] <= 5).all()
    s = crop_sample(s0, (0, 0, 7, 5), "share", 0.0)
    assert s.boxes.tolist() == [[0, 0, 7, 5], [2, 3, 7, 5]] and (s.image == s0.image[:5, :7]).all()


def test_crop_empty():
    "A window that would lose every object is not taken, unless that is allowed"
    s0 = sample(20, 20, [[0, 0, 8, 8]])
    got = [RandomCrop((8, 8), tries=3)(s0, np.random.default_rng(i)) for i in range(30)]
    assert all(len(s.boxes) == 1 for s in got) and {s.size for s in got} == {(8, 8), (20, 20)}
    got = [RandomCrop((8, 8), allow_empty=True)(s0, np.random.default_rng(i)) for i in range(30)]
    assert {s.size for s in got} == {(8, 8)} and {len(s.boxes) for s in got} == {0, 1}
    assert RandomCrop((8, 8))(sample(20, 20), np.random.default_rng(0)).size == (8, 8)


@pytest.mark.parametrize("size", [(0, 10), (-1, 5), (0.0, 0.5), (0.5, 1.5), (0.8, 0.5), (0.5, 10), (5,), (1, 2, 3)])
def test_crop_errors(size):
    with pytest.raises(ConfigError):
        RandomCrop(size)


def test_resize_errors():
    for bad in (0, -5, (0, 10), (1, 2, 3), 1.5):
        with pytest.raises(ConfigError):
            Resize(bad)
    with pytest.raises(ConfigError):
        Resize(100, "keep")
