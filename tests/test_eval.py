"Evaluation against pycocotools: recorded numbers on real files, and random data sets of every shape"
import contextlib
import importlib.util
import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as cocomask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visdet.data.coco import read_coco, read_coco_results, write_coco
from visdet.data.detections import Detections
from visdet.data.records import Records
from visdet.eval.evaluate import CocoEvaluator, evaluate

LONG = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()
BACKENDS = ["visdet", "pycocotools"] + (["faster"] if importlib.util.find_spec("faster_coco_eval") else [])


def numbers(ev):
    return np.array([-1 if math.isnan(v) else v for v in ev.stats.values()])


def reference(gt_dict, results, kind):
    "The twelve numbers as pycocotools prints them, from dictionaries as they stand in files"
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(gt_dict))
        gt.createIndex()
        dt = gt.loadRes(json.loads(json.dumps(results)))
        e = COCOeval(gt, dt, kind)
        e.evaluate()
        e.accumulate()
        e.summarize()
    return e.stats


# real files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco100(real_data, tmp_path, kind, backend):
    d = real_data/"metrics_coco100"
    res = json.loads((d/f"instances_val2014_fake{kind}100_results.json").read_text())
    for o in res:
        if "bbox" not in o:
            o["bbox"] = cocomask.toBbox(o["segmentation"]).tolist()
    (tmp_path/"res.json").write_text(json.dumps(res))
    recs = read_coco(d/"instances_val2014_100.json", masks=kind == "segm", verbose=False)
    ev = evaluate(read_coco_results(tmp_path/"res.json", recs, masks=kind == "segm"), recs, kind, backend)
    expected = json.loads((d/"expected.json").read_text())[kind]
    np.testing.assert_allclose(numbers(ev), [expected[k] for k in LONG], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padilla_coco_case(real_data, backend):
    d = real_data/"metrics_padilla"
    recs = read_coco(d/"coco_case/gts/sampled_gts_bbox_area.json", masks=False, verbose=False)
    ev = evaluate(read_coco_results(d/"coco_case/cocoapi_results.json", recs), recs, backend=backend)
    expected = json.loads((d/"expected.json").read_text())["coco_case"]
    np.testing.assert_allclose(numbers(ev), [expected[k] for k in LONG], atol=1e-6)  # published with six digits


@pytest.mark.parametrize("model", ["nanodet_m_320", "yolox_nano_416"])
def test_real_detectors(real_data, model):
    d = real_data/"coco_mini"
    recs = read_coco(d/"annotations/instances_val2017.json", masks=False, verbose=False)
    dets = read_coco_results(d/f"reference_detections/{model}.json", recs)
    expected = json.loads((d/"reference_detections/expected.json").read_text())[model]["saved_file_score_ge_0.1"]["pycocotools_bbox"]
    ev = evaluate(dets, recs)
    np.testing.assert_allclose(numbers(ev), [expected[k] for k in LONG], atol=1e-6)
    assert ev.errors().table["count"].sum() > 0 and ev.confusion().counts.shape == (81, 81)
    assert 0 < ev.best_thresholds().f1["all"] < 1


# random data sets -------------------------------------------------------------------------------

def random_set(rng, images=4, classes=3, per_image=6, dets=10, masks=False, ids=None, digits=1):
    "Records, detections and the same as dictionaries of COCO's file format"
    H, W = 64, 80
    boxes, labels, crowd, out, polys = [], [], [], [], []
    for _ in range(images):
        n = int(rng.integers(0, per_image+1))
        b = rng.uniform(0, 50, (n, 4)).round(digits)
        b[:, 2:] = (b[:, :2]+rng.uniform(1, 30, (n, 2))).round(digits).clip(None, [W, H])
        b[:, :2] = np.minimum(b[:, :2], b[:, 2:]-.5)
        lab = rng.integers(0, classes, n)
        m = int(rng.integers(0, dets+1)) if n else int(rng.integers(0, 3))
        src = rng.integers(0, max(n, 1), m)
        box = (b[src] if n else rng.uniform(0, 30, (m, 4)))+rng.normal(0, 2, (m, 4))*(rng.random((m, 1)) < .7)
        box[:, 2:] = np.maximum(box[:, 2:], box[:, :2]+1)
        dl = np.where(rng.random(m) < .2, rng.integers(0, classes, m), lab[src] if n else 0)
        kw = dict(bitmaps=torch.from_numpy(rect_masks(box, H, W))) if masks else {}
        out.append(Detections(torch.tensor(box, dtype=torch.float32).reshape(-1, 4), torch.tensor(rng.random(m).round(1), dtype=torch.float32),
                              torch.tensor(dl, dtype=torch.int64), (H, W), **kw))
        boxes.append(b), labels.append(lab), crowd.append(rng.random(n) < .15)
        polys += [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in b.tolist()]
    recs = Records.build([f"{i}.jpg" for i in range(images)], [(H, W)]*images, boxes, labels, [f"c{k}" for k in range(classes)], ids=ids,
                         crowd=crowd, masks=polys if masks else None)
    return recs, out


def rect_masks(boxes, H, W):
    y, x = np.mgrid[:H, :W]
    b = boxes[:, :, None, None]
    return (x >= b[:, 0]) & (x < b[:, 2]) & (y >= b[:, 1]) & (y < b[:, 3])


def as_files(recs, dets, masks):
    "What would stand in the two JSON files"
    wh = lambda b: np.concatenate([b[:, :2], b[:, 2:]-b[:, :2]], 1).tolist()
    anns, i = [], 0
    for row in range(len(recs)):
        r = recs[row]
        rles = recs.rles(row) if masks else [None]*len(r)
        for b, lab, c, a, m in zip(wh(r.boxes.astype(float)), r.labels.tolist(), r.crowd.tolist(), r.areas.tolist(), rles):
            i += 1
            anns.append(dict(id=i, image_id=r.id, category_id=lab+1, bbox=b, iscrowd=int(c), area=a))
            if masks:
                anns[-1]["segmentation"] = dict(size=m["size"], counts=m["counts"].decode())
    gt = dict(info={}, images=[dict(id=recs[i].id, height=64, width=80) for i in range(len(recs))],
              categories=[dict(id=k+1, name=n) for k, n in enumerate(recs.vocab)], annotations=anns)
    res = []
    for row, d in enumerate(dets):
        rl = cocomask.encode(np.asfortranarray(d.bitmaps.numpy().transpose(1, 2, 0).astype(np.uint8))) if masks and len(d) else [None]*len(d)
        for b, s, lab, m in zip(wh(d.boxes.double().numpy()), d.scores.tolist(), d.labels.tolist(), rl):
            o = dict(image_id=recs[row].id, category_id=lab+1, score=s)
            o.update(dict(segmentation=dict(size=m["size"], counts=m["counts"].decode())) if masks else dict(bbox=b))
            res.append(o)
    return gt, res


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), images=st.integers(1, 6), classes=st.integers(1, 5), shuffle=st.booleans(), masks=st.booleans())
def test_random_sets_equal_pycocotools(seed, images, classes, shuffle, masks):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:images] if shuffle else None
    recs, dets = random_set(rng, images, classes, masks=masks, ids=ids)
    kind = "segm" if masks else "bbox"
    gt, res = as_files(recs, dets, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = [numbers(evaluate(dets, recs, kind, b)) for b in BACKENDS]
    for o in ours[1:]:
        np.testing.assert_allclose(ours[0], o, atol=1e-9)
    if res:
        np.testing.assert_allclose(ours[0], reference(gt, res, kind), atol=1e-6)


def test_more_than_a_hundred_of_a_class_in_one_image():
    rng = np.random.default_rng(3)
    recs, dets = random_set(rng, 2, 1, per_image=60, dets=400)
    gt, res = as_files(recs, dets, False)
    assert max(len(d) for d in dets) > 100
    for b in BACKENDS:
        np.testing.assert_allclose(numbers(evaluate(dets, recs, backend=b)), reference(gt, res, "bbox"), atol=1e-6)


def test_through_a_file_and_back(tmp_path):
    recs, dets = random_set(np.random.default_rng(5), 8, 3, digits=2)
    write_coco(recs, tmp_path/"gt.json")
    (tmp_path/"res.json").write_text(json.dumps([o for i, d in enumerate(dets) for o in d.to_coco(recs[i].id, recs.cat_ids)]))
    again = read_coco(tmp_path/"gt.json", masks=False, verbose=False)
    ev = evaluate(read_coco_results(tmp_path/"res.json", again), again)
    np.testing.assert_allclose(numbers(ev), numbers(evaluate(dets, recs)), atol=1e-6)


def test_evaluator_does_not_depend_on_batches():
    rng = np.random.default_rng(0)
    recs, dets = random_set(rng, 12, 3)
    whole = evaluate(dets, recs).stats
    order = rng.permutation(12)
    ev = CocoEvaluator(recs)
    for rows in np.array_split(order, 5):
        ev.add([dets[i] for i in rows], rows)
    assert ev.compute().stats == whole


def test_quiet(capfd):
    recs, dets = random_set(np.random.default_rng(1), 5, 2)
    for b in BACKENDS:
        evaluate(dets, recs, backend=b)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


def test_save_is_json(tmp_path):
    recs, dets = random_set(np.random.default_rng(1), 5, 2)
    evaluate(dets, recs).save(tmp_path/"e.json")
    d = json.loads((tmp_path/"e.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert list(d["stats"]) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split() and len(d["classes"]) == 2
