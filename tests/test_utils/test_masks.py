"""The behaviours that MMDetection states for bitmap and polygon masks, with its figures

There is no container of masks here: an object's mask is an item, a list of polygons or run lengths (a bitmap, compressed),
and functions take items one by one or bitmaps (N, H, W) at once. What MMDetection says of `BitmapMasks` is asked of run
lengths and bitmaps, what it says of `PolygonMasks` of lists of polygons, each against bitmaps made by numpy.
`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import numpy as np
import pytest
import torch

from visdet.core.basics import ConfigError, DataError
from visdet.cv.masks import crop_mask, flip_mask, masks_to_boxes, rasterise, rle_area, rle_decode, rle_encode, rle_to_box, scale_mask
from visdet.data.targets import Sample, collate, with_objects
from visdet.data.transforms import crop_sample, fit_size
from visdet.nn.mask_head import cut_masks

BEHAVIOURS = {
    "bitmap: from arrays, one or a stack; other nestings are refused; length and size": "TestBitmap::test_made",
    "bitmap: rescale keeps the aspect": "TestBitmap::test_rescale",
    "bitmap: resize": "TestBitmap::test_resize",
    "bitmap: boxes have exclusive far corners": "test_boxes",
    "bitmap: flips, twice is the identity": "TestBitmap::test_flip",
    "bitmap: pad": "TestBitmap::test_pad",
    "bitmap: crop is slicing; one box only": "TestBitmap::test_crop",
    "bitmap: crop and resize": "TestBitmap::test_crop_and_resize",
    "bitmap: expand": "TestBitmap::test_expand",
    "bitmap: areas": "TestBitmap::test_area",
    "bitmap: to array and tensor": "TestBitmap::test_forms",
    "bitmap: indices, iteration": "TestBitmap::test_index",
    "polygon: invalid nesting is refused": "TestPolygon::test_made",
    "polygon: resize and rescale, to squares and others; box": "TestPolygon::test_resize",
    "polygon: an object of two parts": "TestPolygon::test_two_parts",
    "polygon: crop; one box only": "TestPolygon::test_crop",
    "polygon: pad changes the size only": "TestPolygon::test_pad",
    "polygon: crop and resize": "TestPolygon::test_crop_and_resize",
    "polygon: area equals that of the bitmap": "TestPolygon::test_area",
    "polygon: flips, twice is the identity": "TestPolygon::test_flip",
    "polygon: indices by lists and arrays": "TestPolygon::test_index",
    "no masks: arrays (0, H, W) of the new size": "test_none",
    "boxes of an empty mask, a full one, a pentagon": "test_boxes",
    "translate, to the same and to another size, both ways": "test_translate",
    "cat of masks": "test_cat",
    "targets of a mask head": "TestBitmap::test_mask_target",
}
WITHOUT = {
    "polygon: expand is not implemented": "it is, by a window that reaches beyond the image (test_translate)",
    "polygon: a tensor as index is a ValueError": "lists and numpy select objects; with_objects refuses nothing that numpy takes",
    "polygon: area by the shoelace formula": "areas are those of the pixels, for every kind of mask",
    "cat of bitmap and polygon masks is a TypeError": "items of both kinds may stand side by side, see test_cat",
    "crop_and_resize of masks to zeros and ones": "cells hold the share of the mask in them; a threshold gives zeros and ones",
    "interpolation other than nearest for bitmaps": "run lengths take the nearest pixel",
}

SIDE, SIZE = 28, (28, 28)


def noise(n=3, size=SIZE, seed=0):
    return (np.random.default_rng(seed).random((n, *size)) > 0.5).astype(np.uint8)


def bits(masks, size):
    "Bitmaps of items"
    return rasterise(masks, size)


def scaled(masks, old, new):
    "Bitmaps after a change of the image's size"
    f = (new[1] / old[1], new[0] / old[0])
    return bits([scale_mask(m, f, new) for m in masks], new)


def rows(size, spans):
    "A bitmap from {row: (first column, last column)}"
    m = np.zeros(size, np.uint8)
    for r, (a, b) in spans.items():
        m[r, a : b + 1] = 1
    return m


both = pytest.mark.parametrize("n", [0, 3])


class TestBitmap:
    @both
    def test_made(self, n):
        a = noise(n)
        for form in (a, a.astype(bool), torch.from_numpy(a), a * 255):
            m = rle_encode(form)
            assert len(m) == n and all(tuple(o["size"]) == SIZE for o in m)
            assert (bits(m, SIZE) == a).all()
        for one, o in zip(a, rle_encode(a)):
            assert rle_encode(one) == o
        for bad in ([[a]], a.reshape(1, 1, 1, -1), 3):
            with pytest.raises(DataError):
                rle_encode(bad)

    @both
    def test_rescale(self, n):
        "To fit 56 x 72 a square becomes 56 x 56"
        new = fit_size(SIZE, (72, 56), "keep_ratio")
        assert new == (56, 56)
        assert (scaled(rle_encode(noise(n)), SIZE, new) == noise(n).repeat(2, 1).repeat(2, 2)).all()

    def test_rescale_wide(self):
        a = np.array([[1, 0, 0, 0], [0, 1, 0, 1]], np.uint8)
        new = fit_size((2, 4), (8, 8), "keep_ratio")
        assert new == (4, 8)
        assert (scaled([rle_encode(a)], (2, 4), new)[0] == a.repeat(2, 0).repeat(2, 1)).all()

    @both
    def test_resize(self, n):
        assert scaled(rle_encode(noise(n)), SIZE, (56, 72)).shape == (n, 56, 72)
        eye = np.eye(4, dtype=np.uint8)
        assert (scaled([rle_encode(eye)], (4, 4), (8, 8))[0] == eye.repeat(2, 0).repeat(2, 1)).all()
        assert (scaled([rle_encode(eye)], (4, 4), (4, 8))[0] == eye.repeat(2, 1)).all()

    @both
    @pytest.mark.parametrize("how,axes", [("horizontal", (2,)), ("vertical", (1,)), ("diagonal", (1, 2))])
    def test_flip(self, n, how, axes):
        a = noise(n)
        m = [flip_mask(o, SIZE, how) for o in rle_encode(a)]
        assert (bits(m, SIZE) == np.flip(a, axes)).all()
        assert [flip_mask(o, SIZE, how) for o in m] == rle_encode(a)
        with pytest.raises(ConfigError):
            flip_mask(rle_encode(a[0]) if n else [], SIZE, "sideways")

    @both
    def test_pad(self, n):
        got = bits([crop_mask(o, (0, 0, 56, 56), SIZE) for o in rle_encode(noise(n))], (56, 56))
        assert (got[:, :28, :28] == noise(n)).all() and got[:, 28:].sum() == got[:, :, 28:].sum() == 0

    @both
    def test_crop(self, n):
        a = noise(n)
        got = bits([crop_mask(o, (0, 10, 10, 27), SIZE) for o in rle_encode(a)], (17, 10))
        assert got.shape == (n, 17, 10) and (got == a[:, 10:27, 0:10]).all()
        with pytest.raises(ConfigError, match="one box"):
            crop_mask(rle_encode(noise(1)[0]), [(0, 10, 10, 27), (0, 0, 5, 5)], SIZE)

    @pytest.mark.parametrize("size", [(20, 30), (30, 20)])
    @pytest.mark.parametrize("window", [(3, 4, 17, 19), (-5, -6, 40, 35), (18, 15, 40, 40), (-9, 12, 4, 33)])
    def test_crop_beyond(self, size, window):
        "Images that are wider or taller, windows that leave them on every side"
        a, (x1, y1, x2, y2) = noise(2, size), window
        want = np.pad(a, ((0, 0), (50, 50), (50, 50)))[:, y1 + 50 : y2 + 50, x1 + 50 : x2 + 50]
        assert (bits([crop_mask(o, window, size) for o in rle_encode(a)], want.shape[1:]) == want).all()

    @both
    def test_crop_and_resize(self, n):
        "Five boxes of three masks, on a grid of 56 x 56 cells"
        inds = torch.arange(5) % n if n else torch.zeros(0, dtype=torch.int64)
        boxes = torch.tensor([[0.0, 10, 10, 27], [0, 0, 28, 28], [5, 5, 6, 6], [0.5, 3.2, 20.1, 21], [20, 20, 28, 28]])[: len(inds)]
        got = cut_masks(torch.from_numpy(noise(n)), inds, boxes, 56)
        assert got.shape == (len(inds), 56, 56) and (got >= 0).all() and (got <= 1).all()
        if n:
            whole = cut_masks(torch.from_numpy(noise(n)), torch.tensor([2]), torch.tensor([[0.0, 0, 28, 28]]), 28)
            torch.testing.assert_close(whole[0], torch.from_numpy(noise(n)[2]).float(), atol=1e-5, rtol=0)

    @both
    def test_expand(self, n):
        "Into 56 x 56, twelve rows down and fourteen columns right"
        got = bits([crop_mask(o, (-14, -12, 42, 44), SIZE) for o in rle_encode(noise(n))], (56, 56))
        assert (got[:, 12:40, 14:42] == noise(n)).all() and got.sum() == noise(n).sum()

    @both
    def test_area(self, n):
        a = noise(n)
        assert rle_area(rle_encode(a)).tolist() == a.sum((1, 2)).tolist()
        one = rle_encode(rows((28, 28), {3: (0, 4), 7: (2, 2)}))
        assert int(rle_area(one)) == 6

    @both
    def test_forms(self, n):
        got = bits(rle_encode(noise(n)), SIZE)
        assert got.shape == (n, 28, 28) and got.dtype == np.uint8 and set(np.unique(got)) <= {0, 1}
        t = torch.from_numpy(got).to(torch.float32)
        assert t.shape == (n, 28, 28) and t.device.type == "cpu" and (t.numpy() == noise(n)).all()

    def test_index(self):
        m = rle_encode(noise())
        assert (rle_decode(m[0]) == noise()[0]).all() and (bits(m[0:2], SIZE) == noise()[0:2]).all()
        assert [rle_decode(o).shape for o in m] == [SIZE] * 3

    @both
    def test_mask_target(self, n):
        "What a mask head of 28 cells learns: one square for each positive"
        boxes = torch.from_numpy(np.sort(np.random.default_rng(0).random((n, 2, 2)) * 28, 1).reshape(n, 4)).float()
        got = cut_masks(torch.from_numpy(noise(n)), torch.arange(n), boxes, 28)
        assert got.shape == (n, 28, 28) and ((got >= 0) & (got <= 1)).all()


PENTAGON = [np.array([1.0, 1, 3, 1, 4, 3, 2, 4, 1, 3])]
TWO_PARTS = [np.array([0.0, 0, 1, 0, 1, 1]), np.array([1.0, 1, 2, 1, 2, 2, 1, 2])]
SQUARE = [np.array([1.0, 3, 5, 1, 5, 6, 1, 6])]
TRIANGLE = [np.array([1.0, 1, 5, 1, 3, 4])]


class TestPolygon:
    @pytest.mark.parametrize("bad", [[np.arange(7.0)], [[1.0, 2, np.nan, 4, 5, 6]], [[1.0, 2, 3, 4, 5, 1e9]]])
    def test_made(self, bad):
        with pytest.raises(DataError):
            bits([bad], (9, 9))

    @pytest.mark.parametrize("bad", [[[np.arange(6.0)], [[[["a"]]]]], [5], [None]])
    def test_nesting(self, bad):
        with pytest.raises((DataError, TypeError, ValueError)):
            bits(bad, (9, 9))

    def test_resize(self):
        want = rows((10, 10), {2: (2, 5), 3: (2, 6), 4: (2, 6), 5: (2, 7), 6: (3, 6), 7: (4, 4)})
        assert (scaled([PENTAGON], (5, 5), (10, 10))[0] == want).all()
        assert fit_size((5, 5), (12, 10), "keep_ratio") == (10, 10)
        xy = scale_mask(PENTAGON, 2.0, (10, 10))[0].reshape(-1, 2)
        assert [*xy.min(0), *xy.max(0)] == [2, 2, 8, 8]
        want = rows((5, 10), {1: (2, 6), 2: (2, 7), 3: (3, 5)})
        assert (scaled([PENTAGON], (5, 5), (5, 10))[0] == want).all()

    def test_two_parts(self):
        "A triangle and a square are one object"
        got = scaled([TWO_PARTS], (3, 3), (6, 6))
        assert got.shape == (1, 6, 6) and (got[0] == rows((6, 6), {0: (1, 1), 2: (2, 3), 3: (2, 3)})).all()

    def test_crop(self):
        want = rows((4, 3), {2: (2, 2), 3: (1, 2)})
        assert (bits([crop_mask(SQUARE, (0, 0, 3, 4), (7, 7))], (4, 3))[0] == want).all()
        s = Sample(np.zeros((7, 7, 3), np.uint8), [[1, 1, 5, 6]], [0], masks=[SQUARE])
        cut = crop_sample(s, (0, 0, 3, 4), keep="share", min_share=0.0)
        assert cut.size == (4, 3) and (bits(cut.masks, (4, 3))[0] == want).all()
        assert all(p.min() >= 0 and p[0::2].max() <= 3 and p[1::2].max() <= 4 for p in cut.masks[0])
        with pytest.raises(ConfigError, match="one box"):
            crop_mask(SQUARE, [(0, 0, 3, 4), (0, 0, 2, 2)], (7, 7))

    def test_pad(self):
        got = bits([SQUARE, PENTAGON], (20, 30))
        assert got.shape == (2, 20, 30) and (got[:, :7, :7] == bits([SQUARE, PENTAGON], (7, 7))).all() and got[:, 7:].sum() == got[:, :, 7:].sum() == 0
        s = Sample(np.zeros((7, 7, 3), np.uint8), [[1, 1, 5, 6]], [0], masks=[SQUARE])
        _, t = collate([s], pad=16, masks=True)
        assert t.masks.shape == (1, 16, 16) and (t.masks.numpy() == bits([SQUARE], (16, 16))).all()

    def test_crop_and_resize(self):
        a = torch.from_numpy(bits([SQUARE, PENTAGON], (7, 7)))
        got = cut_masks(a, torch.tensor([0, 1, 0, 1, 0]), torch.tensor([[0.0, 0, 7, 7]] * 5), 56)
        assert got.shape == (5, 56, 56) and torch.equal(got[0], got[2]) and not torch.equal(got[0], got[1])
        assert abs(float(got[0].mean()) * 49 - int(a[0].sum())) < 0.5

    def test_area(self):
        got = bits([TRIANGLE], (6, 6))
        assert rle_area(rle_encode(got)).tolist() == [got.sum()] and got.sum() == 6
        xy = TRIANGLE[0].reshape(-1, 2)
        x, y = xy.T
        assert abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2 == 6

    @pytest.mark.parametrize("how,axes", [("horizontal", (1,)), ("vertical", (2,)), ("diagonal", (1, 2))])
    def test_flip(self, how, axes):
        "Corners on whole pixels: the mirrored polygon covers the mirrored pixels"
        square = [np.array([1.0, 1, 4, 1, 4, 3, 1, 3])]
        once = flip_mask(square, (5, 6), how)
        both = {"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}[how]
        assert (bits([once], (5, 6)) == np.flip(bits([square], (5, 6)), both)).all()
        for m in (square, PENTAGON, TWO_PARTS):
            twice = flip_mask(flip_mask(m, (5, 6), how), (5, 6), how)
            assert all((a == b).all() for a, b in zip(m, twice))

    @pytest.mark.parametrize("keep", [[0, 2], np.array([0, 2]), np.array([True, False, True]), slice(0, 3, 2)])
    def test_index(self, keep):
        s = Sample(np.zeros((7, 7, 3), np.uint8), np.ones((3, 4)), [0, 1, 2], masks=[SQUARE, PENTAGON, TRIANGLE])
        got = with_objects(s, keep)
        assert got.masks == [SQUARE, TRIANGLE] and got.labels.tolist() == [0, 2]


def test_none():
    "No object at all, in every form"
    for size in (SIZE, (56, 72), (0, 5)):
        assert bits([], size).shape == (0, *size)
    assert rle_encode(noise(0)) == [] and masks_to_boxes(noise(0)).shape == (0, 4) and len(rle_area([])) == 0
    assert bits([[]], (4, 4)).tolist() == np.zeros((1, 4, 4)).tolist()
    assert flip_mask([], SIZE) == scale_mask([], 2, SIZE) == crop_mask([], (0, 0, 5, 5), SIZE) == []
    _, t = collate([Sample(np.zeros((7, 7, 3), np.uint8), masks=[])], masks=True)
    assert len(t.masks) == 0


def test_boxes():
    "Far corners are one beyond the last pixel"
    blob, wide = np.zeros((28, 28), np.uint8), rows((4, 8), {0: (0, 5), 2: (1, 3)})
    blob[1:6, 1:6] = 1
    pentagon = bits([[np.array([3.0, 2, 6, 2, 7, 4, 5, 6, 2, 4])]], (10, 10))[0]
    for a, box in ((blob, [1, 1, 6, 6]), (wide, [0, 0, 6, 3]), (np.zeros((5, 5)), [0, 0, 0, 0]), (np.ones((20, 15)), [0, 0, 15, 20]), (pentagon, [2, 2, 7, 6])):
        assert masks_to_boxes(a[None]).tolist() == [box]
        assert np.asarray(rle_to_box(rle_encode(a))).ravel().tolist() == box


@pytest.mark.parametrize("out", [(28, 28), (28, 40), (40, 20)])
@pytest.mark.parametrize("dx,dy", [(5, 0), (-5, 0), (0, 7), (0, -7), (3, -4), (28, 0)])
def test_translate(out, dx, dy):
    "A window that starts at (-dx, -dy) moves the masks by (dx, dy), bitmaps and polygons alike"
    h, w = out
    window = (-dx, -dy, w - dx, h - dy)
    want = np.zeros((3, 100, 100), np.uint8)
    want[:, 30 + dy : 58 + dy, 30 + dx : 58 + dx] = noise()
    assert (bits([crop_mask(o, window, SIZE) for o in rle_encode(noise())], out) == want[:, 30 : 30 + h, 30 : 30 + w]).all()
    square = [np.array([4.0, 6, 20, 6, 20, 18, 4, 18])]
    moved = rasterise([[p + np.tile([dx, dy], 4) for p in square]], out)
    assert (bits([crop_mask(square, window, SIZE)], out) == moved).all()


def test_cat():
    "Lists of items join, kinds mixed"
    a, b = rle_encode(noise(2, (7, 7))), [SQUARE, TRIANGLE]
    assert (bits(a + b, (7, 7)) == np.concatenate([bits(a, (7, 7)), bits(b, (7, 7))])).all()
    with pytest.raises(DataError):
        bits([*a, *rle_encode(noise(1, (8, 7)))], (7, 7))
