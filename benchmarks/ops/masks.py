"Masks against pycocotools, torchvision and SciPy: the photograph of 800 x 1333 that two-stage detectors see"
import numpy as np
import pycocotools.mask as coco
import torch
from scipy import ndimage
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import masks_to_boxes as tv_boxes

from visdet.core.testing import noise, rand_boxes
from visdet.cv.components import connected_components
from visdet.cv.masks import masks_to_boxes, polygons_to_rle, rasterise, rle_area, rle_decode, rle_encode, rle_iou, rle_merge, rle_to_box
from visdet.cv.paste import paste_masks, paste_rles

SIZE = (800, 1333)


def inputs(n, size=SIZE):
    "Probabilities with an object in the middle, and boxes of detections: small ones are the most"
    boxes = rand_boxes(n, size, min_side=8)
    y, x = np.mgrid[:28, :28] / 13.5 - 1
    bump = torch.from_numpy(4 - 6 * np.hypot(x, y)).float()
    return (noise(n, 28, 28) * .5 + bump).sigmoid(), boxes


def polygons(n, size=SIZE):
    "Ellipses of 32 corners, one in each box"
    t, b = np.linspace(0, 2 * np.pi, 32, endpoint=False), rand_boxes(n, size, min_side=16).numpy().astype(np.float64)
    return [[o.ravel()] for o in (b[:, None, 2:] + b[:, None, :2]) / 2 + (b[:, None, 2:] - b[:, None, :2]) / 2 * np.stack([np.cos(t), np.sin(t)], 1)]


def ready(make, *args):
    "A factory: `make(*args)` prepares once and returns the call"
    return lambda: make(*args)


def coco_encode(a):
    return coco.encode(np.asfortranarray(a.transpose(1, 2, 0)))


def paste_ours(n):
    p, b = inputs(n)
    return lambda: paste_masks(p, b, SIZE)


def paste_tv(n):
    p, b = inputs(n)
    return lambda: paste_masks_in_image(p[:, None], b, SIZE)[:, 0] > .5


def paste_torch(n):
    p, b = inputs(n)
    return lambda: paste_masks(p, b, SIZE, backend="torch")


def probs_ours(n):
    p, b = inputs(n)
    return lambda: paste_masks(p, b, SIZE, None)


def probs_tv(n):
    p, b = inputs(n)
    return lambda: paste_masks_in_image(p[:, None], b, SIZE)[:, 0]


def rles_ours(n):
    p, b = inputs(n)
    return lambda: paste_rles(p, b, SIZE)


def rles_tv(n):
    f = paste_tv(n)
    return lambda: coco_encode(f().numpy().view(np.uint8))


def rles_torch(n):
    p, b = inputs(n)
    return lambda: paste_rles(p, b, SIZE, backend="torch")


def encode_ours(n):
    a = rasterise(polygons(n), SIZE)
    return lambda: rle_encode(a)


def encode_coco(n):
    a = rasterise(polygons(n), SIZE)
    return lambda: coco_encode(a)


def encode_coco_columns(n):
    a = np.asfortranarray(rasterise(polygons(n), SIZE).transpose(1, 2, 0))
    return lambda: coco.encode(a)


def rles(n):
    return [polygons_to_rle(p, SIZE) for p in polygons(n)]


def decode_ours(n):
    r = rles(n)
    return lambda: rle_decode(r)


def decode_coco(n):
    r = rles(n)
    return lambda: np.ascontiguousarray(coco.decode(r).transpose(2, 0, 1))


def iou_ours(n):
    r = rles(2 * n)
    return lambda: rle_iou(r[:n], r[n:])


def iou_coco(n):
    r = rles(2 * n)
    return lambda: coco.iou(r[:n], r[n:], [0] * n)


def merge_ours(n):
    r = rles(n)
    return lambda: rle_merge(r)["counts"]


def merge_coco(n):
    r = rles(n)
    return lambda: coco.merge(r)["counts"]


def area_ours(n):
    r = rles(n)
    return lambda: rle_area(r)


def area_coco(n):
    r = rles(n)
    return lambda: coco.area(r)


def box_ours(n):
    r = rles(n)
    return lambda: rle_to_box(r)


def box_coco(n):
    r = rles(n)

    def f():
        b = coco.toBbox(r).astype(np.float32)
        b[:, 2:] += b[:, :2]
        return b

    return f


def draw_ours(n):
    p = polygons(n)
    return lambda: [polygons_to_rle(o, SIZE) for o in p]


def draw_coco(n):
    p = [[q.tolist() for q in o] for o in polygons(n)]
    return lambda: [coco.merge(coco.frPyObjects(o, *SIZE)) for o in p]


def around_ours(n):
    a = torch.from_numpy(rasterise(polygons(n), SIZE)).bool()
    return lambda: masks_to_boxes(a)


def around_tv(n):
    a, one = torch.from_numpy(rasterise(polygons(n), SIZE)).bool(), torch.tensor([0, 0, 1, 1])
    return lambda: tv_boxes(a) + one


def blobs(n):
    return torch.nn.functional.interpolate(noise(n, 1, 50, 83), size=SIZE, mode="bicubic")[:, 0].numpy() > 0


def pieces_ours(n):
    a = blobs(n)
    return lambda: connected_components(a)[0].numpy()


def pieces_scipy(n):
    a = blobs(n)
    return lambda: np.stack([ndimage.label(o)[0] for o in a])


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def case(op, n, ours, others, size="{n} masks, 800 x 1333", **kw):
    "One comparison of factories that take the number of masks"
    return dict(op=op, size=size.format(n=n), ours=ready(ours, n), others={k: ready(f, n) for k, f in others.items()}, same=equal, **kw)


CASES = [
    case("paste_masks", 100, paste_ours, {"torchvision": paste_tv, "torch": paste_torch}, target=.5, against="torchvision"),
    case("paste_masks", 10, paste_ours, {"torchvision": paste_tv, "torch": paste_torch}),
    case("paste_masks", 100, probs_ours, {"torchvision": probs_tv}, size="{n} masks, 800 x 1333, probabilities"),
    case("paste_rles", 100, rles_ours, {"torchvision, pycocotools": rles_tv, "torch": rles_torch}),
    case("rle_encode", 100, encode_ours, {"pycocotools": encode_coco, "pycocotools, columns at hand": encode_coco_columns}, target=1., against="pycocotools"),
    *(case("rle_encode", n, encode_ours, {"pycocotools": encode_coco}, target=1.) for n in (1, 4)),
    case("rle_decode", 100, decode_ours, {"pycocotools": decode_coco}),
    case("rle_iou", 100, iou_ours, {"pycocotools": iou_coco}, size="{n} x {n} masks, 800 x 1333", target=1., against="pycocotools"),
    *(case("rle_iou", n, iou_ours, {"pycocotools": iou_coco}, size="{n} x {n} masks, 800 x 1333", target=1.) for n in (1, 2, 4)),
    *(case("rle_merge", n, merge_ours, {"pycocotools": merge_coco}, target=1.) for n in (2, 4, 20, 100)),
    *(case("polygons_to_rle", n, draw_ours, {"pycocotools": draw_coco}, size="{n} polygons of 32 corners, 800 x 1333", target=1.) for n in (1, 4, 100)),
    *(case(op, n, box_ours if op == "rle_to_box" else area_ours, {"pycocotools": box_coco if op == "rle_to_box" else area_coco}) for op in ("rle_area", "rle_to_box") for n in (1, 100)),
    case("masks_to_boxes", 100, around_ours, {"torchvision": around_tv}),
    case("connected_components", 10, pieces_ours, {"SciPy": pieces_scipy}, size="{n} bitmaps, 800 x 1333"),
]
