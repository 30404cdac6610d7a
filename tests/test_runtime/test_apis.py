"""The behaviours that MMDetection states for its interfaces: a detector from a configuration, and detections for images

`init_detector` is `visdet.load_mmdet` for its configurations and `visdet.load` for a file of visdet's own;
`inference_detector` and `DetInferencer` are the `Predictor` that these give. `BEHAVIOURS` names the test of each
behaviour, `WITHOUT` what has no counterpart.
"""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visdet
from visdet.cli.commands import device
from visdet.cli.main import main
from visdet.core.basics import ConfigError, DataError
from visdet.data.detections import Detections
from visdet.data.transforms import Resize
from visdet.deploy.predict import as_predictor
from visdet.deploy.save import save_model

BEHAVIOURS = {
    "a detector from a path as text and as Path": "test_from_a_file",
    "options that change the configuration": "test_changes",
    "a configuration that is a list is refused": "test_wrong_kind",
    "without a checkpoint: random weights, COCO's classes": "test_no_checkpoint",
    "one image gives one result": "test_one_image",
    "a list gives a list": "test_list",
    "a file and its pixels give the same": "test_path_and_array",
    "a folder, one by one and in batches": "test_folder",
    "files of pictures and predictions": "test_written",
    "predictions as plain values": "test_plain_values",
    "models by name": "test_names",
    "devices by name, and lists of them": "test_devices",
}
WITHOUT = {
    "names such as 'rtmdet-t' fetch a configuration and a checkpoint": "nothing is fetched; a name gives a model, a file its weights",
    "panoptic models": "there is no panoptic detector",
    "return_datasamples": "a result is always a `Detections`",
    "a warning where there is no checkpoint": "weights are asked for by an argument; a model without them is not mended by a warning",
    "a list of devices": "a predictor has one device",
}

VOCAB = ["cat", "dog"]


def anchors():
    return dict(type="AnchorGenerator", octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128])


def config(depth=50, dataset="CocoDataset", classes=80):
    "A resolved configuration of RetinaNet"
    width = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    body = dict(type="ResNet", depth=depth, num_stages=4, out_indices=[0, 1, 2, 3], frozen_stages=1, norm_cfg=dict(type="BN", requires_grad=True), norm_eval=True, style="pytorch")
    head = dict(
        type="RetinaHead",
        num_classes=classes,
        in_channels=32,
        stacked_convs=1,
        feat_channels=32,
        anchor_generator=anchors(),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    )
    model = dict(
        type="RetinaNet",
        data_preprocessor=dict(type="DetDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32),
        backbone=body,
        neck=dict(type="FPN", in_channels=width, out_channels=32, start_level=1, add_extra_convs="on_input", num_outs=5),
        bbox_head=head,
        train_cfg=dict(assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1), sampler=dict(type="PseudoSampler"), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    )
    pipeline = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=[128, 64], keep_ratio=True), dict(type="PackDetInputs")]
    return dict(model=model, test_dataloader=dict(dataset=dict(type=dataset, pipeline=pipeline)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "The configuration as a file"
    p = tmp_path_factory.mktemp("config") / "retinanet_r18.json"
    p.write_text(json.dumps(config(18)))
    return p


@pytest.fixture(scope="module")
def predictor():
    "A small detector of two classes that finds something everywhere"
    torch.manual_seed(0)
    model = visdet.create_model("retinanet", vocab=VOCAB, body="test_resnet", channels=16, num_convs=1)
    torch.nn.init.normal_(model.head.cls.weight, std=0.3)
    torch.nn.init.constant_(model.head.cls.bias, -1.0)
    return as_predictor(model.eval(), Resize((64, 96)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Five images of noise, of three sizes"
    d, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, (h, w) in enumerate([(32, 32), (40, 32), (32, 32), (50, 70), (40, 32)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(d / f"{i}.png")
    return d


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def same(a, b):
    assert len(a) == len(b) and torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [str, Path])
def test_from_a_file(file, form):
    model = visdet.load_mmdet(form(file))
    assert model.spec[0] == "retinanet" and not model.training and model.body.channels == [128, 256, 512]
    assert model.mmdet_resize.scale == (128, 64)


def test_changes(file):
    "Arguments in the call win over those of the file, and a depth is one of them"
    model = visdet.load_mmdet(config(50), num_classes=2, body="resnet18")
    assert model.num_classes == 2 and model.body.channels[-1] == 512
    assert visdet.load_mmdet(file, num_classes=2).num_classes == 2
    with pytest.raises(ConfigError, match="num_klasses"):
        visdet.load_mmdet(file, num_klasses=2)


@pytest.mark.parametrize("bad", [["a.json"], 7, None, {}])
def test_wrong_kind(bad):
    with pytest.raises(ConfigError):
        visdet.load_mmdet(bad)


def test_no_checkpoint(file):
    "The names are those of the data set, where it is COCO's and their number fits"
    model = visdet.load_mmdet(file)
    assert len(model.vocab) == 80 and model.vocab[:2] == ["person", "bicycle"]
    assert visdet.load_mmdet(config(18, "Other", 3)).vocab is None
    assert visdet.load_mmdet(config(18, "Other", 2), vocab=VOCAB).vocab == VOCAB


def test_one_image(file):
    "From a configuration to detections of 32 x 32 pixels, without a checkpoint"
    model = visdet.load_mmdet(file)
    torch.nn.init.constant_(model.head.cls.bias, 0.0)
    d = as_predictor(model, model.mmdet_resize).predict(noise())
    assert isinstance(d, Detections) and d.size == (32, 32) and len(d) == 100
    assert d.boxes.shape == (100, 4) and (d.boxes >= 0).all() and (d.boxes <= 32).all()


def test_list(predictor):
    one, two = noise(0), noise(1)
    res = predictor.predict([one, two])
    assert isinstance(res, list) and len(res) == 2 and all(isinstance(o, Detections) for o in res)
    same(res[0], predictor.predict(one))
    same(res[1], predictor.predict(two))
    assert len(predictor.predict([one])) == 1 and predictor.predict([]) == []


def test_path_and_array(predictor, folder):
    for p in sorted(folder.iterdir()):
        d = predictor.predict(p)
        assert len(d)
        same(d, predictor.predict(np.asarray(Image.open(p))))
        same(d, predictor.predict(str(p)))
    with pytest.raises(DataError, match="nowhere"):
        predictor.predict(folder / "nowhere.png")


@pytest.mark.parametrize("bs", [1, 3])
def test_folder(predictor, folder, bs):
    res = predictor.predict(folder, bs=bs)
    assert [Path(d.path).name for d in res] == [f"{i}.png" for i in range(5)]
    for d in res:
        same(d, predictor.predict(d.path))


@pytest.fixture(scope="module")
def saved(predictor, tmp_path_factory):
    return save_model(predictor.model, tmp_path_factory.mktemp("saved") / "m.safetensors", resize=predictor.resize)


def test_written(predictor, saved, folder, tmp_path):
    "The command writes a picture an image and all predictions, and these are those that Python returns"
    assert main(["predict", str(saved), str(folder), "--out", str(tmp_path / "out"), "--score", "0.3"]) in (0, None)
    out = tmp_path / "out"
    assert sorted(o.name for o in out.iterdir()) == sorted([*(f"{i}.jpg" for i in range(5)), "detections.json", "detections.csv"])
    rows = json.loads((out / "detections.json").read_text())
    for i, d in enumerate(visdet.load(saved).predict(folder, score=0.3)):
        mine = [o for o in rows if o["image_id"] == i]
        assert [o["category"] for o in mine] == [d.name(k) for k in d.labels.tolist()]
        np.testing.assert_allclose([o["score"] for o in mine], d.scores, rtol=1e-3)
        h, w = np.asarray(Image.open(out / f"{i}.jpg")).shape[:2]
        assert h / w == pytest.approx(d.size[0] / d.size[1], rel=0.05)


def test_plain_values(predictor, tmp_path):
    "Boxes, labels and scores as lists, a table and a file of JSON"
    d = predictor.predict(noise())
    rows = d.to_coco(image_id=5)
    assert [o["category_id"] for o in rows] == d.labels.tolist() and {o["image_id"] for o in rows} == {5}
    xywh = torch.tensor([o["bbox"] for o in rows])
    torch.testing.assert_close(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), d.boxes)
    assert json.loads(d.save(tmp_path / "d.json").read_text()) == json.loads(json.dumps(d.to_coco()))
    assert d.to_df()["label"].tolist() == [VOCAB[i] for i in d.labels]
    assert d[:0].to_coco() == []


def test_names():
    "A name gives a model; a name that does not exist, the nearest"
    assert {"retinanet", "mask_rcnn"} <= set(visdet.list_models())
    with pytest.raises(ConfigError, match="mask_rcnn"):
        visdet.create_model("mask-rcnn", 2)


def test_devices(saved):
    assert device("cpu") == torch.device("cpu") and device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cpu", torch.device("cpu"), None):
        assert visdet.load(saved, name).device == torch.device("cpu")
    for bad in ("gpu", "cuda:99", "cpu,cpu"):
        with pytest.raises(ConfigError, match=bad):
            device(bad)


def test_arguments_stay(predictor):
    "Neither the image nor the configuration that was passed is written to"
    cfg, img = config(18), noise()
    before = copy.deepcopy(cfg), img.copy()
    visdet.load_mmdet(cfg)
    predictor.predict(img)
    assert cfg == before[0] and (img == before[1]).all()
