"YOLOX: the recorded AP of a real checkpoint, its way through saving, and frozen norms"
import json

import pytest
import torch
from conftest import ROOT

from visdet.core.basics import ConfigError
from visdet.core.testing import close
from visdet.cv.iou import box_iou
from visdet.data.targets import make_targets
from visdet.data.transforms import Resize
from visdet.deploy.predict import as_predictor, load
from visdet.deploy.save import save_model
from visdet.models.yolox import YOLOX_SIZES, load_yolox, yolox, yolox_author_key, yolox_mmdet_key, yolox_norm

RECORD = json.loads((ROOT / "benchmarks/results/yolox_nano.json").read_text())


def test_recorded_ap_is_the_reference():
    ref = RECORD["reference"]["AP"]
    assert RECORD["images"] == 206 and ref == pytest.approx(0.289, abs=5e-4)
    assert RECORD["as_reference"]["AP"] == pytest.approx(ref, abs=2e-4)
    assert RECORD["best_class"]["AP"] == pytest.approx(0.289, abs=2e-3)


@pytest.fixture
def nano(real_data):
    file = real_data / "weights/detectors/yolox_nano_coco_bnfused.pth"
    if not file.exists():
        pytest.skip("the checkpoint is not here")
    return file


def test_checkpoint_finds_what_the_reference_found(nano, real_data, tmp_path):
    "Three images against recorded detections, and the same again from a saved file"
    mini = real_data / "coco_mini"
    ann = json.loads((mini / "annotations/instances_val2017.json").read_text())
    cats = [o["id"] for o in sorted(ann["categories"], key=lambda o: o["id"])]
    want = json.loads((mini / "reference_detections/yolox_nano_416.json").read_text())
    names = {o["id"]: o["file_name"] for o in ann["images"]}
    model = yolox(vocab=[str(o) for o in cats], size="nano", weights=nano, score_thr=0.3, all_classes=True)
    p = as_predictor(model, Resize((416, 416), "letterbox", antialias=False), (416, 416))
    again = load(save_model(model, tmp_path / "nano", Resize((416, 416), "letterbox", antialias=False), (416, 416)))
    assert not again.resize.antialias and model.norm == yolox_norm and float(again.model.body.net.shift) == 114
    for i in list(names)[:3]:
        d, e = (o.predict(mini / "val2017" / names[i], score=0.3) for o in (p, again))
        assert torch.equal(d.boxes, e.boxes) and torch.equal(d.scores, e.scores)
        ref = [o for o in want if o["image_id"] == i and o["score"] > 0.4]
        x, y, w, h = torch.tensor([o["bbox"] for o in ref]).T
        over = box_iou(torch.stack([x, y, x + w, y + h], 1), d.boxes)
        over[torch.tensor([cats.index(o["category_id"]) for o in ref])[:, None] != d.labels] = 0
        best, j = over.max(1)
        assert best.min() > 0.75 and best.median() > 0.9
        close(d.scores[j], [o["score"] for o in ref], 0.1)


def test_other_classes_start_anew(nano):
    m = yolox(vocab=["a", "b"], size="nano", weights=nano)
    assert m.head.cls[0].weight.shape[0] == 2 and "6 layers for other classes" in m.body.report
    xb, t = torch.randn(2, 3, 96, 96) * 60, make_targets([[[10.0, 10, 60, 60]], []], [[1], []], [(96, 96)] * 2)
    terms = m.train().loss(m(xb), t)
    sum(terms.values()).backward()
    assert all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize("size", YOLOX_SIZES)
def test_keys_are_one_to_one(size):
    with torch.device("meta"):
        m = yolox(3, size=size)
    ks = [k for k in m.state_dict() if k != "body.net.shift"]
    for f in (yolox_mmdet_key, yolox_author_key):
        assert len({f(k) for k in ks}) == len(ks)


def test_grey_images_and_frozen_norms():
    m = yolox(2, size="nano", in_chans=1, norm="frozen", frozen_stages=1)
    xb, t = torch.randn(1, 1, 64, 64), make_targets([[[10.0, 10, 60, 60]]], [[1]], [(64, 64)])
    sum(m.loss(m(xb), t).values()).backward()
    assert any(not p.requires_grad for p in m.body.parameters())
    with pytest.raises(ConfigError, match="no ImageNet weights"):
        yolox(2, nodes=["a"])


def test_same_outputs_on_any_padding():
    "Zero in a batch is the grey the network was trained with: a wider canvas changes only what is near its edge"
    torch.manual_seed(0)
    a = yolox(2, size="nano").eval()
    load_yolox(a, {**a.state_dict(), "body.net.shift": torch.tensor(114.0)})
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        grey = a.body.net.stem(torch.full((1, 3, 64, 64), 114.0))
        close(a.body.net.stem(x + a.body.net.shift), grey)
