"Comparisons of the operators that suppress and fuse: ours against the best other ways to the same answer"
import importlib.util

import torch
import torchvision
from visdet.core.testing import crowded_boxes
from visdet.cv.boxes import convert_boxes
from visdet.cv.fusion import nms_match, weighted_box_fusion
from visdet.cv.nms import batched_nms, nms
from visdet.cv.rotated import rotated_iou, rotated_nms
from visdet.cv.soft import fast_nms, matrix_nms, soft_nms

SIZES = {"100": 100, "1k": 1000, "10k": 10_000, "100k": 100_000}


def boxes(n, classes=80):
    "Boxes, scores and labels: ten boxes to an object, objects spread over the classes"
    b, s = crowded_boxes(n)
    return b, s, torch.arange(n).div(10, rounding_mode="floor") % classes


def turned(n):
    "The same boxes, each object at an angle of its own"
    b, s, _ = boxes(n)
    return torch.cat([convert_boxes(b, "xyxy", "cxcywh"), (torch.arange(n) // 10 * 0.1)[:, None]], 1), s


def call(f, make, *args, **kw):
    "A factory: nothing in, a function without arguments out; `make()` gives the first arguments"

    def factory():
        data = make()
        return lambda: f(*data, *args, **kw)

    return factory


def published_soft_nms():
    "Published CPU implementations of soft suppression that are installed here, by name: functions of (boxes, scores, labels, how)"
    out, seen = {}, {}

    def plain(b, s, how):
        "Boxes and scores in the form the others take, converted once"
        if (key := (id(b), how)) not in seen:
            seen[key] = b, torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], 1).int().tolist(), s.tolist(), b.double().numpy(), s.double().numpy()
        return seen[key][1:]

    if importlib.util.find_spec("cv2"):
        import cv2

        def opencv(b, s, labels, how):  # C++; corners are cut to whole pixels
            xywh, scores, _, _ = plain(b, s, how)
            return cv2.dnn.softNMSBoxes(xywh, scores, 1e-3, 0.3, 0, 0.5, dict(linear=1, gaussian=2)[how])

        out["opencv"] = opencv
    if importlib.util.find_spec("ensemble_boxes"):
        from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float

        def ensemble(b, s, labels, how):  # NumPy
            _, _, dets, scores = plain(b, s, how)
            return cpu_soft_nms_float(dets.copy(), scores.copy(), 0.3, 0.5, 1e-3, dict(linear=1, gaussian=2)[how])

        out["ensemble_boxes"] = ensemble
    return out


def soft_alike(a, b):
    "The same answer as the reference; as many boxes as the published ones, up to their rounding of corners"
    if isinstance(b, tuple) and isinstance(b[0], torch.Tensor):
        return near(a, b)
    kept = len(b[1]) if isinstance(b, tuple) else len(b)
    return abs(kept - len(a[0])) <= max(2, len(a[0]) // 20)


def case(op, n, f, make, *args, target=None, against=None, others=None, same=None, **kw):
    "One comparison; `others` names functions that take the data and `args`"
    rows = {k: call(g, make, *args) for k, g in (others or {}).items()}
    return dict(op=op, size=n, target=target, against=against, ours=call(f, make, *args, **kw), others=rows, **({"same": same} if same else {}))


def equal(a, b):
    return torch.equal(a, b)


def near(a, b):
    "Same rows, scores equal but for rounding"
    return set(a[0].tolist()) == set(b[0].tolist()) and torch.allclose(a[1], b[1], atol=1e-4)


def reference(f, **kw):
    return lambda *a: f(*a, **kw, backend="torch")


def fused(*data):
    return weighted_box_fusion(*data)


def models(n, k=5):
    return [[o[i::k] for i in range(k)] for o in boxes(n)]


CASES = []
for _name, _n in SIZES.items():
    CASES.append(case("batched_nms", f"{_name} boxes, 80 classes", batched_nms, lambda n=_n: boxes(n), 0.5, target=0.7 if _n == 10_000 else None, others={"torchvision": torchvision.ops.batched_nms},
                      # torchvision adds float32 offsets to boxes, which bends a few overlaps
                      same=lambda a, b: len(set(a.tolist()) ^ set(b.tolist())) <= max(2, len(a) // 500)))
    CASES.append(case("nms", f"{_name} boxes, one class", nms, lambda n=_n: boxes(n)[:2], 0.5, others={"torchvision": torchvision.ops.nms}, same=equal))
    CASES.append(case("fast_nms", f"{_name} boxes, 80 classes", fast_nms, lambda n=_n: boxes(n), 0.5, others={"reference": reference(fast_nms)}, same=equal))
for _name, _n in list(SIZES.items())[:3]:
    for _how in ("linear", "gaussian"):
        CASES.append(case("soft_nms", f"{_name} boxes, one class, {_how}", soft_nms, lambda n=_n: boxes(n)[:2], None, _how, target=1 / 20 if _n <= 1000 or _how == "linear" else None, others=({"reference": reference(soft_nms)} if _n <= 1000 or _how == "linear" else {}) | published_soft_nms(), against="reference" if _n <= 1000 or _how == "linear" else None, same=soft_alike))
    CASES.append(case("nms_match", f"{_name} boxes, 80 classes", nms_match, lambda n=_n: boxes(n), 0.5, others={"reference": reference(nms_match)}, same=lambda a, b: len(a) == len(b) and all(map(torch.equal, a, b))))
    if _n <= 1000:
        CASES.append(case("rotated_iou", f"{_name} x {_name} boxes", rotated_iou, lambda n=_n: (turned(n)[0], turned(n)[0]), others={"reference": reference(rotated_iou)}, same=lambda a, b: torch.allclose(a, b, atol=1e-5)))
        CASES.append(case("rotated_nms", f"{_name} boxes, one class", rotated_nms, lambda n=_n: turned(n), others={"reference": reference(rotated_nms)}, same=equal))
        CASES.append(case("matrix_nms", f"{_name} boxes, 80 classes", matrix_nms, lambda n=_n: boxes(n), others={"reference": reference(matrix_nms)}, same=near))
        CASES.append(case("weighted_box_fusion", f"{_name} boxes of 5 models, 80 classes", fused, lambda n=_n: models(n), others={"reference": reference(weighted_box_fusion)}, same=lambda a, b: torch.allclose(a[1], b[1], atol=1e-5)))
