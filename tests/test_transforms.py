"Transforms move image, boxes and masks together: painted rectangles through thousands of random compositions"
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visdet.cv.masks import rasterise, rle_encode, rle_to_box
from visdet.data.targets import Sample, collate
from visdet.data.transforms import (Compose, RandomCrop, RandomFlip, RandomResize, Resize, crop_sample, fit_size,
                                    flip_sample, resize_sample, visible)

quick = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def painted(h, w, boxes, rle=()):
    "Rectangles of pure colours on black, as boxes and as masks (run lengths for the numbers in `rle`)"
    img = np.zeros((h, w, 3), np.uint8)
    masks = []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        img[y1:y2, x1:x2] = COLOURS[i]
        if i in rle:
            m = np.zeros((h, w), np.uint8)
            m[y1:y2, x1:x2] = 1
            masks.append(rle_encode(m))
        else:
            masks.append([np.float32([x1, y1, x2, y1, x2, y2, x1, y2])])
    return Sample(img, boxes=boxes, labels=list(range(len(boxes))), masks=masks, id=3)


@st.composite
def samples(draw):
    "One to three rectangles side by side, so that none hides another"
    h, w = draw(st.integers(24, 140)), draw(st.integers(24, 140))
    n = draw(st.integers(1, 3))
    cuts = np.linspace(0, w, n + 1).astype(int)
    boxes = []
    for a, b in zip(cuts, cuts[1:]):
        x1 = draw(st.integers(a, b - 7))
        x2 = draw(st.integers(x1 + 6, b - 1))
        y1 = draw(st.integers(0, h - 7))
        y2 = draw(st.integers(y1 + 6, h))
        boxes.append((x1, y1, x2, y2))
    return painted(h, w, boxes, rle=draw(st.sets(st.integers(0, 2))))


def sides(lo=40):
    return st.tuples(st.integers(lo, 120), st.integers(0, 80)).map(lambda o: (o[0], o[0] + o[1]))


tfms = st.one_of(
    st.just(RandomFlip(0.8, ["horizontal", "vertical", "diagonal"])),
    st.tuples(st.floats(0.3, 0.9), st.sampled_from(["centre", "share"]), st.booleans()).map(
        lambda o: RandomCrop((o[0], 1.0), keep=o[1], allow_empty=o[2])),
    st.integers(30, 90).map(lambda n: RandomCrop((n, n + 20))),
    sides().map(RandomResize),
    st.tuples(st.integers(40, 150), st.sampled_from(["keep_ratio", "letterbox", "stretch"])).map(lambda o: Resize(*o)),
)


def extent(img, colour):
    "Box of the pixels whose colour is nearer to `colour` than to the others or to black"
    i = int(colour.argmax())
    a = img.astype(int)
    m = (a[..., i] > 127) & (a[..., [k for k in range(3) if k != i]].max(-1) < 128)
    ys, xs = np.nonzero(m)
    return None if not len(xs) else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)


def check(s):
    "Everything that must hold for a sample after any transform"
    h, w = s.size
    assert s.image.dtype == np.uint8 and s.boxes.dtype == np.float32 and s.labels.dtype == np.int64 and s.crowd.dtype == bool
    assert len(s.boxes) == len(s.labels) == len(s.crowd) == len(s.masks)
    assert np.isfinite(s.boxes).all()
    assert (s.boxes[:, :2] >= 0).all() and (s.boxes[:, 2:] <= [w, h]).all()
    assert (s.boxes[:, 2:] > s.boxes[:, :2]).all()


def gaps(s):
    "For each object, how far its pixels and its mask are from its box, in pixels"
    res = []
    for b, l, m in zip(s.boxes, s.labels, s.masks):
        if min(b[2] - b[0], b[3] - b[1]) < 3:
            continue  # a sliver of less than three pixels may fall below half intensity when it is resampled
        e = extent(s.image, COLOURS[l])
        assert e is not None
        bits = rasterise([m], s.size)[0]
        ys, xs = np.nonzero(bits)
        assert len(xs)
        res.append((np.abs(e - b).max(), np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - b).max()))
    return res


@quick
@given(samples(), st.lists(tfms, min_size=1, max_size=5), st.integers(0, 2**31))
def test_boxes_and_masks_follow_their_pixels(s, ts, seed):
    before = (s.image.copy(), s.boxes.copy())
    out = Compose(ts)(s, np.random.default_rng(seed))
    check(out)
    enlarged = max(1, max(out.scale))
    for pix, msk in gaps(out):
        # resampling blurs an edge over about a pixel of the smaller image, and each step rounds once
        assert pix <= 1.5 * enlarged + 0.5 * len(ts), (pix, ts)
        assert msk <= 1.5 * enlarged + 0.5 * len(ts), (msk, ts)
    assert np.array_equal(before[0], s.image) and np.array_equal(before[1], s.boxes)
    again = Compose(ts)(s, np.random.default_rng(seed))
    assert np.array_equal(again.image, out.image) and np.array_equal(again.boxes, out.boxes)


@quick
@given(samples(), st.integers(0, 2**31))
def test_flips_and_crops_are_exact_to_the_pixel(s, seed):
    rng = np.random.default_rng(seed)
    out = Compose([RandomFlip(1.0, ["horizontal", "vertical", "diagonal"]), RandomCrop((0.4, 1.0), keep="share", min_share=0.01)])(s, rng)
    check(out)
    for b, l, m in zip(out.boxes, out.labels, out.masks):
        assert np.array_equal(extent(out.image, COLOURS[l]), b)
        if isinstance(m, dict):
            assert np.array_equal(rle_to_box(m), b)
        else:
            p = np.concatenate(m).reshape(-1, 2)
            assert np.allclose([*p.min(0), *p.max(0)], b, atol=1e-4)


@pytest.mark.parametrize("broken", ["box", "mask"])
def test_the_marker_test_would_notice(broken):
    "A flip that forgets the boxes, or the masks, is caught by the same check"
    s = painted(60, 90, [(5, 10, 30, 40)])
    f = flip_sample(s)
    bad = Sample(f.image, s.boxes if broken == "box" else f.boxes, s.labels, masks=s.masks if broken == "mask" else f.masks)
    assert max(max(g) for g in gaps(bad)) > 20
    assert max(max(g) for g in gaps(f)) < 1


@quick
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 2000))
def test_keep_ratio_fits_both_edges(h, w, a, b):
    nh, nw = fit_size((h, w), (a, b))
    f = min(max(a, b) / max(h, w), min(a, b) / min(h, w))
    assert (nh, nw) == (max(1, int(h * f + 0.5)), max(1, int(w * f + 0.5)))
    assert max(nh, nw) <= max(a, b) + 1 and min(nh, nw) <= max(min(a, b), 1) + 1
    assert fit_size((w, h), (a, b)) == (nw, nh)
    assert fit_size((h, w), (b, a)) == (nh, nw)


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(8, 900), st.integers(8, 900))
def test_letterbox_stays_on_its_canvas(h, w, a, b):
    nh, nw = fit_size((h, w), (a, b), "letterbox")
    assert nh <= a and nw <= b and (nh == a or nw == b)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_sizes_of_object_lists(n):
    rng = np.random.default_rng(n)
    xy = rng.integers(0, 180, (n, 2))
    s = Sample(np.zeros((200, 200, 3), np.uint8), np.c_[xy, xy + 20], np.zeros(n), masks=[[np.float32([x, y, x + 20, y, x + 20, y + 20])] for x, y in xy])
    pipe = Compose([RandomCrop((0.3, 0.8)), Resize(77), RandomFlip()])
    for i in range(10):
        check(pipe(s, np.random.default_rng(i)))


def test_crop_rules_against_plain_arithmetic():
    "The vectorised rules agree with a loop that says them in words"
    rng = np.random.default_rng(0)
    xy = rng.uniform(-5, 90, (500, 2))
    b = np.c_[xy, xy + rng.uniform(2, 40, (500, 2))].astype(np.float32)
    win = (10, 20, 70, 65)
    for keep, share in (("centre", 0), ("share", 0.3), ("share", 0.8)):
        got = visible(b, win, keep, share)
        for (x1, y1, x2, y2), g in zip(b.astype(float), got):
            iw, ih = min(x2, win[2]) - max(x1, win[0]), min(y2, win[3]) - max(y1, win[1])
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            counts = win[0] <= cx <= win[2] and win[1] <= cy <= win[3] if keep == "centre" else iw * ih >= share * (x2 - x1) * (y2 - y1)
            assert g == (iw >= 1 and ih >= 1 and counts)


def test_crowd_stays_while_visible_and_never_counts_as_an_object():
    s = Sample(np.zeros((50, 100, 3), np.uint8), [[0, 0, 60, 50], [70, 10, 90, 30]], [0, 1], crowd=[True, False])
    c = crop_sample(s, (55, 0, 100, 50))
    assert c.crowd.tolist() == [True, False]
    for i in range(50):  # a window on the crowd alone is not a window on an object
        c = RandomCrop((0.3, 0.4))(s, np.random.default_rng(i))
        assert not c.crowd.all()


def test_polygon_outside_the_window_goes_with_its_box():
    s = painted(40, 40, [(0, 0, 8, 8), (20, 20, 38, 38)])
    c = crop_sample(s, (10, 10, 40, 40))
    assert c.labels.tolist() == [1] and len(c.masks) == 1


def test_concave_polygon_is_cut_like_its_bitmap():
    star = np.float32([50 + r * np.cos(a) if k == 0 else 50 + r * np.sin(a) for i, a in enumerate(np.linspace(0, 2 * np.pi, 11)[:-1])
                       for r in [(44, 16)[i % 2]] for k in (0, 1)])
    s = Sample(np.zeros((100, 100, 3), np.uint8), [[6, 6, 94, 94]], [0], masks=[[star]])
    full = rasterise([[star]], (100, 100))[0]
    for win in ((0, 0, 50, 50), (30, 10, 95, 60), (55, 55, 100, 100), (40, 0, 60, 100)):
        c = crop_sample(s, win, keep="share", min_share=0.01)
        got, want = rasterise(c.masks, c.size)[0], full[win[1]:win[3], win[0]:win[2]]
        assert (got != want).mean() < 0.01


def test_scale_carries_boxes_back_to_the_file():
    rng = np.random.default_rng(1)
    for _ in range(50):
        h, w = rng.integers(30, 900, 2)
        xy = rng.uniform(0, 25, (4, 2))
        b = np.c_[xy, xy + 4].astype(np.float32)
        s = resize_sample(Sample(np.zeros((h, w, 3), np.uint8), b, [0] * 4), fit_size((h, w), 333))
        s = resize_sample(s, fit_size(s.size, 200))
        back = s.boxes / np.tile(s.scale, 2)
        assert np.allclose(back, b, atol=1e-3)
        t = collate([s])[1]
        assert np.allclose(t.boxes[0] / t.scales[0].repeat(2), b, atol=1e-3)


def test_grey_images_pass_through():
    s = Sample(np.zeros((30, 40, 1), np.uint8), [[1, 1, 9, 9]], [0])
    out = Compose([RandomCrop((0.5, 1.0)), Resize(64), RandomFlip(1.0)])(s, np.random.default_rng(0))
    assert out.image.shape[2] == 1 and out.image.ndim == 3
