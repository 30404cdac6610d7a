"""The behaviours that MMDetection states for its COCO metric: perfect predictions, proposals, files, empty predictions

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import json
import math
import warnings

import numpy as np
import pytest
import torch

from visdet.core.basics import ConfigError, DataError
from visdet.cv.masks import rasterise
from visdet.data.coco import read_coco, read_coco_results, write_coco
from visdet.data.detections import Detections
from visdet.data.records import Records
from visdet.eval.evaluate import evaluate

BEHAVIOURS = {
    "perfect boxes: AP, AP50, AP75, and by size, are 1": "test_perfect[bbox]",
    "perfect masks: the same": "test_perfect[segm]",
    "numbers of each class": "test_classes",
    "proposals: recall at 100, 300, 1000 is 1; at 2 and 4 of 4 it is 0.5 and 1": "test_proposals",
    "an unknown metric is refused": "test_unknown",
    "files of results and of the truth": "test_files",
    "empty predictions": "test_empty",
    "the truth need not be a file": "test_perfect[bbox]",
}
WITHOUT = {
    "metric_items selects numbers; unknown ones are refused": "`stats` has all twelve by name",
    "format_only without a prefix is refused": "results are written by `Detections.to_coco`, which needs none",
    "AP50 and AP by size take the largest of proposal_nums": "they take the largest of max_dets, which is 100 by default as in COCO's own numbers",
}

BOXES = torch.tensor([[50.0, 60, 70, 80], [100, 120, 130, 150], [150, 160, 190, 200], [250, 260, 350, 360]])
LABELS, SIZE = [0, 0, 1, 0], (640, 640)
POLYGONS = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in BOXES.tolist()]
SIX = "AP AP50 AP75 APs APm APl".split()


def records(labels=LABELS, vocab=("car", "bicycle")):
    return Records.build(["fake1.jpg"], [SIZE], [BOXES.numpy()], [np.array(labels)], list(vocab), masks=POLYGONS)


def found(keep=slice(None), labels=LABELS, masks=False):
    "Detections that are the truth, of falling scores"
    b = torch.from_numpy(rasterise(POLYGONS, SIZE)[keep].astype(bool)) if masks else None
    return [Detections(BOXES[keep], torch.tensor([1.0, 0.98, 0.96, 0.95])[keep], torch.tensor(labels)[keep], SIZE, bitmaps=b)]


@pytest.mark.parametrize("backend", ["visdet", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect(kind, backend):
    "Two small objects, a middling one and a large one"
    ev = evaluate(found(masks=kind == "segm"), records(), kind, backend)
    assert [ev.stats[k] for k in SIX] == pytest.approx([1.0] * 6) and ev.stats["AR100"] == 1.0


def test_classes():
    ev = evaluate(found(), records())
    t = ev.per_class()
    assert list(t.index) == ["car", "bicycle"] and t["AP"].tolist() == pytest.approx([1.0, 1.0])
    t = evaluate(found(slice(0, 2)), records()).per_class()
    assert t["AP"]["bicycle"] == 0 and 0.6 < t["AP"]["car"] < 0.7


def test_proposals():
    "Without classes: the best two of four find half of the objects"
    recs = records([0] * 4, ["object"])
    ev = evaluate(found(labels=[0] * 4), recs, max_dets=(2, 4))
    assert (ev.stats["AR2"], ev.stats["AR4"]) == (0.5, 1.0)
    ev = evaluate(found(labels=[0] * 4), recs, max_dets=(100, 300, 1000))
    assert [ev.stats[f"AR{n}"] for n in (100, 300, 1000)] == [1.0] * 3
    assert [ev.stats[k] for k in ("ARs", "ARm", "ARl")] == [1.0] * 3


def test_unknown():
    with pytest.raises(ConfigError, match="bbox"):
        evaluate(found(), records(), "boxes")
    with pytest.raises(ConfigError):
        evaluate(found(), records(), max_dets=(0,))
    with pytest.raises(ConfigError):
        evaluate(found(), records(), iou_thrs=[1.5])


@pytest.mark.parametrize("masks", [False, True])
def test_files(tmp_path, masks):
    "Truth and results written and read again give the same numbers"
    recs = records()
    truth = read_coco(write_coco(recs, tmp_path / "gt.json"), verbose=False)
    assert truth.vocab == recs.vocab and truth.boxes.tolist() == BOXES.tolist()
    rows = [o for i, d in enumerate(found(masks=masks)) for o in d.to_coco(recs[i].id, recs.cat_ids)]
    assert {"image_id", "category_id", "bbox", "score"} <= set(rows[0]) and ("segmentation" in rows[0]) == masks
    (tmp_path / "pred.json").write_text(json.dumps(rows))
    dets = read_coco_results(tmp_path / "pred.json", truth, masks=masks)
    ev = evaluate(dets, truth, "segm" if masks else "bbox")
    assert [ev.stats[k] for k in SIX] == pytest.approx([1.0] * 6)
    ev.save(tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text())["stats"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["visdet", "pycocotools"])
def test_empty(backend):
    "No detection is an AP of zero with a reason, not an error"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        ev = evaluate([d[:0] for d in found()], records(), backend=backend)
    assert [ev.stats[k] for k in SIX] == [0.0] * 6 and any("not a single detection" in str(o.message) for o in w)
    nothing = Records.build(["fake1.jpg"], [SIZE], [np.zeros((0, 4))], [np.zeros(0, int)], ["car", "bicycle"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isnan(evaluate(found(), nothing, backend=backend).stats["AP"])


def test_lengths():
    with pytest.raises(DataError, match="2 detections"):
        evaluate(found() * 2, records())
