"Masks against pycocotools, torchvision and themselves: random shapes and real annotations"
import json

import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.models.detection.roi_heads import paste_masks_in_image
from visdet.core.basics import DataError
from visdet.cv.masks import (as_rle, crop_mask, flip_mask, mask_to_polygons, masks_to_boxes, polygons_to_rle, rasterise, rle_area, rle_decode,
                             rle_encode, rle_iou, rle_merge, rle_normal, rle_to_box, scale_mask)
from visdet.cv.paste import paste_masks, paste_rles

bitmaps = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda s: arrays(np.bool_, s))
coord = st.floats(-30, 60, width=32)


def decode(m, size):
    return rasterise([m], size)[0].astype(bool)


@given(bitmaps)
@settings(max_examples=200, deadline=None)
def test_bitmap_rle_polygons_round_trip(m):
    r = rle_encode(m)
    assert r == coco.encode(np.asfortranarray(m.view(np.uint8)))
    assert (rle_decode(r) == m).all() and rle_area(r) == m.sum()
    assert (decode(mask_to_polygons(m), m.shape) == m).all()
    assert all((decode([p], m.shape) <= m).all() for p in mask_to_polygons(m))


@given(bitmaps)
@settings(max_examples=100, deadline=None)
def test_uncompressed_counts(m):
    flat = m.T.ravel()
    cuts = np.concatenate([[0] if flat[0] else [], [0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    r = dict(size=list(m.shape), counts=np.diff(cuts).astype(int).tolist())
    assert rle_normal(r) == rle_encode(m)
    r["counts"][-1] += 1
    with pytest.raises(DataError):
        rle_normal(r)


@given(bitmaps)
@settings(max_examples=100, deadline=None)
def test_boxes(m):
    b = rle_to_box(rle_encode(m))
    assert (masks_to_boxes(m[None])[0].numpy() == b).all()
    if m.any():
        y, x = np.nonzero(m)
        assert b.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    else:
        assert not b.any()


@given(bitmaps, st.integers(-5, 10), st.integers(-5, 10), st.integers(1, 15), st.integers(1, 15), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_polygons_and_rle_move_alike(m, x, y, w, h, sx, sy):
    pair = mask_to_polygons(m), rle_encode(m)
    canvas = np.zeros((60, 60), bool)
    canvas[20:20 + m.shape[0], 20:20 + m.shape[1]] = m
    want = canvas[20 + y:20 + y + h, 20 + x:20 + x + w]
    for o in pair:
        assert (decode(crop_mask(o, (x, y, x + w, y + h), m.shape), (h, w)) == want).all()
        assert (decode(flip_mask(o, m.shape), m.shape) == m[:, ::-1]).all()
        assert (decode(flip_mask(o, m.shape, "vertical"), m.shape) == m[::-1]).all()
        size = m.shape[0] * sy, m.shape[1] * sx
        assert (decode(scale_mask(o, (sx, sy), size), size) == m.repeat(sy, 0).repeat(sx, 1)).all()


def test_crop_drops_what_lies_outside_and_keeps_the_rest():
    square = [np.array([x, 2., x + 2, 2, x + 2, 4, x, 4]) for x in (0., 8, 20)]
    assert [p.tolist() for p in crop_mask(square, (7, 0, 12, 9), (30, 30))] == [[1, 2, 3, 2, 3, 4, 1, 4]]
    assert crop_mask(square, (0, 10, 30, 20), (30, 30)) == []
    assert len(mask_to_polygons(np.eye(3))) == 3


@given(st.lists(st.lists(coord, min_size=0, max_size=12).map(lambda p: p[:len(p) // 2 * 2]), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_polygons_follow_pycocotools(polys):
    r = polygons_to_rle(polys, (25, 31))
    ok = [p for p in polys if len(p) >= 6]
    assert r == (coco.merge(coco.frPyObjects(ok, 25, 31)) if ok else rle_encode(np.zeros((25, 31))))
    assert rle_decode(r).shape == (25, 31)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7, -1e12])
def test_bad_coordinates(bad):
    with pytest.raises(DataError):
        polygons_to_rle([[0, 0, 5, 0, 5, bad]], (10, 10))


@pytest.mark.parametrize("rle", [dict(size=[3, 3]), dict(size=[3, 3], counts=[4, -1, 6]), dict(size=[3, 3], counts=[2.5, 6.5]), 7])
def test_bad_rle(rle):
    with pytest.raises(DataError):
        rle_normal(rle)


def test_iou_and_merge_against_bitmaps():
    a, b = np.random.default_rng(0).random((2, 5, 20, 30)) < .4
    inter = (a[:, None] & b).sum((2, 3))
    ra, rb, crowd = rle_encode(a), rle_encode(b), [0, 1, 0, 1, 0]
    union = (a[:, None] | b).sum((2, 3))
    np.testing.assert_allclose(rle_iou(ra, rb), inter / union)
    np.testing.assert_allclose(rle_iou(ra, rb, crowd), np.where(crowd, inter / a.sum((1, 2))[:, None], inter / union))
    assert (rle_decode(rle_merge(ra)) == a.any(0)).all()
    assert (rle_decode(rle_merge(ra, "intersection")) == a.all(0)).all()


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0., .3, .5, .9]))
@settings(max_examples=40, deadline=None)
def test_paste_equals_torchvision(seed, m, thr):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(9, 2, generator=g) * torch.tensor([90., 60]) - 10
    boxes = torch.cat([xy, xy + 12 + torch.rand(9, 2, generator=g) ** 2 * 60], 1)
    probs = torch.rand(9, m, m, generator=g)
    out = paste_masks(probs, boxes, (70, 100), thr)
    assert out.dtype == torch.bool and out.shape == (9, 70, 100)
    assert torch.equal(out, paste_masks_in_image(probs[:, None], boxes, (70, 100))[:, 0] > thr)
    assert paste_rles(probs, boxes, (70, 100), thr) == rle_encode(out)
    assert paste_rles(probs, boxes * 3 - 60, (33, 21), thr) == rle_encode(paste_masks(probs, boxes * 3 - 60, (33, 21), thr))


def test_paste_outside_and_degenerate():
    boxes = torch.tensor([[-90., -90, -50, -50], [200, 5, 300, 9], [5, 5, 5, 5], [9, 9, 3, 3], [float("nan")] * 4, [-1e30, 0, 1e30, 8]])
    out = paste_masks(torch.ones(6, 28, 28), boxes, (40, 50))
    assert out.flatten(1).sum(1).tolist()[:2] == [0, 0] and not out[4].any() and out[5, :8].all() and not out[5, 10:].any()
    assert paste_masks(torch.ones(2, 1, 28, 28), boxes[2:4], (40, 50)).shape == (2, 40, 50)


@pytest.fixture(scope="module")
def annotations(real_data):
    d = json.loads((real_data / "coco_mini/annotations/instances_val2017.json").read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in d["images"]}
    return [(a, sizes[a["image_id"]]) for a in d["annotations"]]


def test_real_masks_match_pycocotools(annotations):
    for a, (h, w) in annotations:
        s = a["segmentation"]
        want = coco.merge(coco.frPyObjects(s, h, w)) if isinstance(s, list) else coco.frPyObjects(s, h, w)
        assert as_rle(s, (h, w)) == want, a["id"]


def test_real_masks_as_polygons_and_back(annotations):
    for a, size in annotations[::12] + [o for o in annotations if o[0]["iscrowd"]][:4]:
        r = as_rle(a["segmentation"], size)
        assert polygons_to_rle(mask_to_polygons(r), size) == r, a["id"]


def test_scaled_polygons_stay_close_to_scaled_bitmaps(annotations):
    for a, (h, w) in [o for o in annotations if not o[0]["iscrowd"] and o[0]["area"] > 5000][::20]:
        size = round(h * 1.7), round(w * 1.7)
        scale = size[1] / w, size[0] / h
        p, b = (as_rle(scale_mask(m, scale, size), size) for m in (a["segmentation"], as_rle(a["segmentation"], (h, w))))
        assert rle_iou([p], [b])[0, 0] > .95, a["id"]
