"Mask operators: every backend against pycocotools, torchvision and SciPy, bit for bit"
import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from op_tools import backends_of
from scipy import ndimage
from torchvision.models.detection.roi_heads import paste_masks_in_image

from visdet.core.basics import ConfigError, DataError
from visdet.cv.components import connected_components
from visdet.cv.masks import _rles_of, _runs, masks_to_boxes, polygons_to_rle, rle_area, rle_decode, rle_encode, rle_iou, rle_merge, rle_to_box
from visdet.cv.paste import _lerp, paste_masks, paste_rles

stacks = st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 90)).flatmap(lambda s: arrays(np.bool_, s))
quick = settings(max_examples=60, deadline=None)


def of_coco(a):
    return coco.encode(np.asfortranarray(a.transpose(1, 2, 0).astype(np.uint8)))


@pytest.mark.parametrize("b", backends_of("rle_encode"))
@given(stacks)
@quick
def test_codes(b, a):
    r = rle_encode(a, b)
    assert r == of_coco(a) and rle_encode(a[0], b) == r[0]
    assert (rle_decode(r, b) == a).all() and rle_decode(r[0], b).shape == a.shape[1:]
    assert rle_area(r, b).tolist() == a.sum((1, 2)).tolist()
    box = np.array(coco.toBbox(r), np.float32)
    box[:, 2:] += box[:, :2]
    assert (rle_to_box(r, b) == box).all() and (masks_to_boxes(a, b).numpy() == box).all()
    assert (rle_decode(rle_merge(r, backend=b), b) == a.any(0)).all()
    for how in ("union", "intersection"):
        assert rle_merge(r, how, b) == coco.merge(r, intersect=how == "intersection")
    assert all(_runs(o["counts"]).sum() == a[0].size for o in r)


@pytest.mark.parametrize("b", backends_of("rle_encode"))
@pytest.mark.parametrize("density", [0, .01, .5, .99, 1])
def test_codes_of_larger_bitmaps(b, density):
    a = np.random.default_rng(0).random((3, 150, 231)) < density
    r = of_coco(a)
    assert rle_encode(a, b) == r and (rle_decode(r, b) == a).all()
    assert rle_encode(torch.from_numpy(a).half(), b) == r and rle_encode(a[:, :, ::-1], b) == of_coco(a[:, :, ::-1])
    shades = np.random.default_rng(1).integers(1, 255, a.shape).astype(np.uint8) * a
    shades.setflags(write=False)
    assert rle_encode(shades, b) == r


@pytest.mark.parametrize("b", backends_of("rle_encode"))
def test_no_masks_and_no_pixels(b):
    assert rle_encode(np.zeros((0, 3, 4)), b) == [] and rle_area([], b).shape == (0,) and rle_to_box([], b).shape == (0, 4)
    assert masks_to_boxes(np.zeros((0, 3, 4)), b).shape == (0, 4) and masks_to_boxes(np.zeros((2, 0, 4)), b).shape == (2, 4)
    assert rle_iou([], [], backend=b).shape == (0, 0)


@pytest.mark.parametrize("b", backends_of("rle_decode"))
@pytest.mark.parametrize("code", [b"", b"o", b"0o", b"01", b"O1", b"0\x01", b"\x7f0", b"oooooooooooooooooo0", b"94O", b"9"])
def test_damaged_codes(b, code):
    with pytest.raises(DataError):
        rle_decode(dict(size=[3, 4], counts=code), b)
    if b == "kernels":
        for f in (rle_area, rle_to_box, rle_merge, lambda o, backend: rle_iou(o, o, backend=backend)):
            with pytest.raises(DataError):
                f([dict(size=[3, 4], counts=code)] * 2, backend=b)


@pytest.mark.parametrize("b", backends_of("rle_iou"))
@given(stacks, st.integers(0, 99))
@quick
def test_overlap(b, a, seed):
    rng = np.random.default_rng(seed)
    c = rng.random((3, *a.shape[1:])) < rng.choice([.02, .3, .8])
    crowd = rng.random(3) < .5
    ra, rc = of_coco(a), of_coco(c)
    assert (rle_iou(ra, rc, crowd, b) == coco.iou(ra, rc, crowd.astype(int).tolist())).all()
    assert (rle_iou(ra, rc, backend=b) == coco.iou(ra, rc, [0] * 3)).all()


number = st.one_of(st.integers(-40, 90).map(float), st.integers(-400, 900).map(lambda v: v / 10), st.floats(-60, 120, width=32), st.floats(-2e3, 2e3))
polygon = st.lists(number, min_size=6, max_size=18).map(lambda p: p[:len(p) // 2 * 2])


@pytest.mark.parametrize("b", backends_of("polygons_to_rle", but=("torch",)))
@given(st.lists(polygon, min_size=1, max_size=3), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_polygons(b, ps, h, w):
    assert polygons_to_rle(ps, (h, w), b) == coco.merge(coco.frPyObjects(ps, h, w))


@pytest.mark.parametrize("b", backends_of("polygons_to_rle", but=("torch",)))
def test_polygons_of_many_kinds(b):
    rng, objects = np.random.default_rng(0), []
    for i in range(800):
        n = rng.integers(3, 12)
        p = rng.random((n, 2)) * rng.choice([1, 20, 80, 300, 1500]) - rng.choice([0, 10, 100])
        if i % 5 == 1: p = np.round(p)
        if i % 5 == 2: p = np.round(p * 10) / 10
        if i % 5 == 3: p[1:3] = p[0]
        if i % 5 == 4: p[:, rng.integers(2)] = p[0, 0]
        objects.append([p.ravel()])
    want = [coco.frPyObjects([p.tolist() for p in o], 61, 83)[0] for o in objects]
    assert _rles_of(objects, (61, 83), b) == want
    assert _rles_of([], (61, 83), b) == [] and rle_area(_rles_of([[], objects[0]], (61, 83), b)[0]) == 0


def squares(seed, n, m, h, w):
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=g) * torch.tensor([w - 2., h - 2.])
    return torch.rand(n, m, m, generator=g), torch.cat([xy - 3, xy + 3 + torch.rand(n, 2, generator=g) ** 2 * 300], 1)


@pytest.mark.parametrize("b", backends_of("paste_masks"))
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7, 14, 28, 40]), st.integers(4, 260), st.integers(4, 260), st.sampled_from([0., .3, .5, .9]))
@settings(max_examples=40, deadline=None)
def test_pasted_values_are_torchvisions(b, seed, m, h, w, thr):
    p, boxes = squares(seed, 4, m, h, w)
    want = paste_masks_in_image(p[:, None], boxes, (h, w))[:, 0]
    assert torch.equal(paste_masks(p, boxes, (h, w), None, b), want)
    assert torch.equal(paste_masks(p, boxes, (h, w), thr, b), want > thr)
    hard = (p > .5).float()  # values on the threshold: the last bit decides
    assert torch.equal(paste_masks(hard, boxes, (h, w), .5, b), paste_masks_in_image(hard[:, None], boxes, (h, w))[:, 0] > .5)


ODD = torch.tensor([[-90., -90, -50, -50], [200, 5, 300, 9], [5, 5, 5, 5], [9, 9, 3, 3], [float("nan")] * 4, [-1e30, 0, 1e30, 8], [0, 0, float("inf"), 9],
                    [-3000, -4000, 5000, 6000], [-1e6, -1e6, 1e6, 1e6], [0, 0, 50, 40]])


@pytest.mark.parametrize("b", backends_of("paste_masks", but=("torch",)))
@pytest.mark.parametrize("thr", [None, .5])
def test_odd_boxes(b, thr):
    p = squares(0, len(ODD), 28, 9, 9)[0]
    want = paste_masks(p, ODD, (40, 50), thr, "torch")
    assert torch.equal(paste_masks(p, ODD, (40, 50), thr, b), want)
    for q in (p[:, None], p.double()): assert torch.equal(paste_masks(q, ODD, (40, 50), thr, b), want)
    for dtype in (torch.half, torch.bfloat16):
        assert torch.equal(paste_masks(p.to(dtype), ODD, (40, 50), thr, b), paste_masks(p.to(dtype).float(), ODD, (40, 50), thr, "torch"))
    assert not paste_masks(torch.full((1, 5, 5), float("nan")), ODD[-1:], (40, 50), .5, b).any()
    assert paste_masks(p[:0], ODD[:0], (4, 5), thr, b).shape == (0, 4, 5)


@pytest.mark.parametrize("b", backends_of("paste_rles"))
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 28]), st.integers(4, 200), st.integers(4, 200))
@settings(max_examples=40, deadline=None)
def test_pasted_run_lengths(b, seed, m, h, w):
    p, boxes = squares(seed, 4, m, h, w)
    assert paste_rles(p, boxes, (h, w), .5, b) == of_coco(paste_masks(p, boxes, (h, w), .5, "torch").numpy())
    assert paste_rles(p[:1].expand(len(ODD), m, m), ODD, (h, w), .3, b) == of_coco(paste_masks(p[:1].expand(len(ODD), m, m), ODD, (h, w), .3, "torch").numpy())


@pytest.mark.parametrize("m,n", [(30, 131), (30, 999), (9, 20_000), (30, 3)])
def test_stretching_rounds_as_torch_does(m, n):
    p = torch.rand(m, m, generator=torch.Generator().manual_seed(m))
    want = torch.nn.functional.interpolate(p[None, None], size=(n, 200), mode="bilinear")[0, 0]
    assert torch.equal(_lerp(_lerp(p.T, 200, 0, 200).T, n, n // 3, n), want[n // 3:])


@pytest.mark.parametrize("b", backends_of("connected_components"))
@pytest.mark.parametrize("connectivity,square", [(4, None), (8, np.ones((3, 3)))])
@given(arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 40))), st.sampled_from([0, .1, .41, .59, .9]))
@quick
def test_components(b, connectivity, square, a, density):
    for m in (a, np.random.default_rng(a.size).random(a.shape) < density):
        labels, counts = connected_components(m, connectivity, b)
        want = [ndimage.label(o, square) for o in m]
        assert labels.dtype == torch.int32 and counts.tolist() == [k for _, k in want]
        assert (labels.numpy() == np.stack([o for o, _ in want])).all()


@pytest.mark.parametrize("b", backends_of("connected_components"))
def test_winding_component(b):
    a = np.zeros((41, 41), bool)
    a[::2] = True
    a[1::4, -1] = a[3::4, 0] = True
    labels, n = connected_components(a, 8, b)
    assert int(n) == 1 and (labels.numpy() == a).all()
    assert connected_components(np.zeros((2, 3, 0, 4)), backend=b)[1].shape == (2, 3)
    with pytest.raises(ConfigError):
        connected_components(a, 5, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("b", backends_of("paste_masks", "cuda"))
def test_pasting_on_a_gpu(b):
    p, boxes = squares(0, 20, 28, 200, 300)
    want = paste_masks(p, boxes, (200, 300), None, "torch")
    got = paste_masks(p.cuda(), boxes.cuda(), (200, 300), None, b)
    assert (got.cpu() - want).abs().max() < 1e-5
    assert (paste_masks(p.cuda(), boxes.cuda(), (200, 300), .5, b).cpu() != (want > .5)).float().mean() < 1e-5
