"""Planted faults, each caught with its stage and a remedy; and sound sets, which give no alarm"""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttransform import ItemTransform
from PIL import Image

from visdet.core.basics import DataError, VisdetError
from visdet.data.batch import Normalize
from visdet.data.coco import read_coco
from visdet.data.loaders import DetDataLoaders
from visdet.data.records import Records
from visdet.data.toy import make_toy, toy_records
from visdet.data.transforms import flip_sample, resize_sample
from visdet.data.voc import read_voc
from visdet.engine.learner import det_learner
from visdet.engine.preflight import Preflight, preflight
from conftest import data_root

torch.set_num_threads(1)
DATA = data_root()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A toy set in COCO format: 24 training and 8 validation images"
    return make_toy(tmp_path_factory.mktemp("toy")/"set", 32, 0.25)


@pytest.fixture(scope="module")
def model():
    "A detector for the toy classes"
    dls = DetDataLoaders.from_records(toy_records(4), bs=2, resize=128, num_workers=0)
    return det_learner(dls, "fcos", body="resnet18", channels=32, num_convs=1).model


def load(toy, train="train.json", valid="valid.json", **kw):
    "Loaders of the toy set from files of these names"
    return DetDataLoaders.from_coco(toy/train, toy/"train", toy/valid, toy/"valid", **dict(bs=4, resize=128, num_workers=0, verbose=False, aug="flip") | kw)


def fly(dls, model, **kw):
    return preflight(det_learner(dls, model), **kw)


def edited(toy, name, f, source="train.json"):
    "A copy of an annotation file that `f` has changed"
    d = json.loads((toy/source).read_text()); f(d); (toy/name).write_text(json.dumps(d))
    return name


def caught(p, stage, *words, severity=None):
    "Is there an alarm at this stage with these words and a remedy?"
    hit = [o for o in p.errors+p.warnings if o.stage == stage and all(w in f"{o.message} {o.remedy}" for w in words)]
    assert hit, f"no alarm at {stage} with {words} in:\n{p}"
    assert all(o.remedy for o in hit) and (severity is None or hit[0].severity == severity)
    if any(o.severity == "error" for o in hit):
        with pytest.raises(DataError): p.raise_if_failed()


# ---- faults that never get as far as a preflight: reading refuses them ----

def test_empty_annotation_file(toy):
    with pytest.raises(DataError, match="no box to learn from"): load(toy, edited(toy, "empty.json", lambda d: d["annotations"].clear()))
    (toy/"blank.json").write_text("")
    with pytest.raises(DataError, match="not a JSON file"): load(toy, "blank.json")


def test_off_by_one_category_ids(toy):
    def shift(d):
        for a in d["annotations"]: a["category_id"] += 1
    name = edited(toy, "offbyone.json", shift)
    with pytest.raises(DataError, match="not in the class table"): load(toy, name)


def test_class_tables_in_another_order(toy):
    def rename(d):
        names = [c["name"] for c in d["categories"]]
        for c, n in zip(d["categories"], names[1:]+names[:1]): c["name"] = n
    with pytest.raises(DataError, match="class tables differ"): load(toy, valid=edited(toy, "renamed.json", rename, "valid.json"))


def test_all_crowd_training(toy):
    def crowd(d):
        for a in d["annotations"]: a["iscrowd"] = 1
    with pytest.raises(DataError, match="marked as crowd"): load(toy, edited(toy, "crowd.json", crowd))


# ---- faults of the file ----

def test_corners_read_as_width_and_height(toy, model):
    def corners(d):
        for a in d["annotations"]: x, y, w, h = a["bbox"]; a["bbox"] = [x, y, x+w, y+h]; a["segmentation"] = []
    caught(fly(load(toy, edited(toy, "corners.json", corners)), model), "file", "xyxy", "format", severity="error")


def test_width_and_height_read_as_corners(toy, model):
    r = read_coco(toy/"train.json", toy/"train")
    rows = [dict(image_path=f, xmin=b[0], ymin=b[1], xmax=b[2]-b[0], ymax=b[3]-b[1], label=r.vocab[l]) for i in range(len(r)) for f, b, l in zip([r[i].path]*99, r[i].boxes.tolist(), r[i].labels)]
    import pandas as pd
    from visdet.data.frame import read_df
    bad = read_df(pd.DataFrame(rows), vocab=r.vocab, verbose=False)
    caught(fly(DetDataLoaders.from_records(bad, read_coco(toy/"valid.json", toy/"valid"), bs=4, resize=128, num_workers=0, masks=False), model), "file", "xywh", severity="error")


def test_nan_box(toy, model):
    p = fly(load(toy, edited(toy, "nan.json", lambda d: d["annotations"][3]["bbox"].__setitem__(2, float("nan")))), model)
    caught(p, "file", "not finite"); assert p.ok


def test_off_by_one_ids_dropped(toy, model):
    def shift(d):
        for a in d["annotations"]: a["category_id"] += 1
    caught(fly(load(toy, edited(toy, "offbyone.json", shift), on_unknown="drop"), model), "file", "unknown category", severity="error")


# ---- faults of records and images ----

def test_annotations_of_other_images(toy, model):
    "Every image gets the annotations of the next; sizes are made to agree, so that only the pixels know"
    def slip(d):
        names = [o["file_name"] for o in d["images"]]
        for o, n in zip(d["images"], names[1:]+names[:1]): o["file_name"] = n; h, w = np.asarray(Image.open(toy/"train"/n)).shape[:2]; o.update(height=h, width=w)
        for a in d["annotations"]: a["segmentation"] = []
    caught(fly(load(toy, edited(toy, "slipped.json", slip)), model), "records", "other images", severity="error")


def test_sizes_of_other_images(toy, model):
    def slip(d):
        names = [o["file_name"] for o in d["images"]]
        for o, n in zip(d["images"], names[1:]+names[:1]): o["file_name"] = n
    caught(fly(load(toy, edited(toy, "othersizes.json", slip)), model), "images", "size differs", severity="error")


def test_boxes_of_the_file_scaled(toy, model):
    def half(d):
        for a in d["annotations"]: a["bbox"] = [v/2 for v in a["bbox"]]; a["segmentation"] = []
    caught(fly(load(toy, edited(toy, "half.json", half)), model), "records", "twice their coordinates", severity="error")


def test_mirrored_boxes_in_the_file(toy, model):
    def mirror(d):
        w = {o["id"]: o["width"] for o in d["images"]}
        for a in d["annotations"]: a["bbox"][0] = w[a["image_id"]]-a["bbox"][0]-a["bbox"][2]; a["segmentation"] = []
    caught(fly(load(toy, edited(toy, "mirror.json", mirror)), model), "records", "mirrored left to right", severity="error")


def test_labels_out_of_range(toy, model):
    dls = load(toy); dls.records.labels[5] = 9
    caught(fly(dls, model), "records", "label outside 0..3", severity="error")


def test_validation_without_objects(toy, model):
    def crowd(d):
        for a in d["annotations"]: a["iscrowd"] = 1
    caught(fly(load(toy, valid=edited(toy, "vcrowd.json", crowd, "valid.json")), model, limit=6), "records", "crowd", severity="error")
    caught(fly(load(toy, valid=edited(toy, "vempty.json", lambda d: d["annotations"].clear(), "valid.json")), model, limit=6), "records", "not one box", severity="error")


def test_unreadable_image(tmp_path, model):
    r = toy_records(10, tmp_path); v = toy_records(4, seed=9)
    p = tmp_path/r.files[4]; p.write_bytes(p.read_bytes()[:len(p.read_bytes())//2])
    caught(fly(DetDataLoaders.from_records(r, v, bs=4, resize=128, num_workers=0), model), "images", "00004.png", severity="error")


# ---- faults of the split ----

def permuted(r, to):
    return Records.build(r.files, r.sizes, r.boxes, np.array(to)[r.labels], r.vocab, offsets=r.offsets, crowd=r.crowd, root=r.root)


@pytest.mark.parametrize("to", [(1, 2, 3, 0), (1, 0, 2, 3)])
def test_labels_permuted_between_sets(toy, model, to):
    t, v = read_coco(toy/"train.json", toy/"train"), read_coco(toy/"valid.json", toy/"valid")
    caught(fly(DetDataLoaders.from_records(t, permuted(v, to), bs=4, resize=128, num_workers=0, masks=False), model), "classes", "permuted", severity="error")


def test_shared_images(toy, model):
    t, v = read_coco(toy/"train.json", toy/"train"), read_coco(toy/"valid.json", toy/"valid")
    both = lambda valid: fly(DetDataLoaders.from_records(t, valid, bs=4, resize=128, num_workers=0), model)
    caught(both(t.subset(range(6))), "split", "is the training set", severity="error")
    one = toy/"valid"/v.files[0]; old = one.read_bytes()
    try:
        one.write_bytes((toy/"train"/t.files[2]).read_bytes()); v.sizes[0] = t.sizes[2]
        caught(both(v), "split", "also in the training set", t.files[2], severity="error")
        Image.open(toy/"train"/t.files[2]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(one, format="JPEG", quality=80)
        caught(both(v), "split", "nearly the same", severity="warning")
    finally: one.write_bytes(old)


# ---- faults of transforms and model ----

class PixelFlip:
    order = 20
    def __call__(self, s, rng): return replace(flip_sample(s), boxes=s.boxes, masks=s.masks) if rng.random() < .5 else s


class BoxScale:
    order = 20
    def __call__(self, s, rng): return replace(s, boxes=s.boxes*.5)


class ImageScale:
    order = 20
    def __call__(self, s, rng): return replace(s, image=resize_sample(s, (s.size[0]*2, s.size[1]*2)).image)


class NanBox:
    order = 20
    def __call__(self, s, rng):
        b = s.boxes.copy(); b[:1] = np.nan
        return replace(s, boxes=b)


class WrongLabel:
    order = 20
    def __call__(self, s, rng): return replace(s, labels=s.labels+1)


class DeviceFlip(ItemTransform):
    order = 50
    def encodes(self, b): return (b[0].flip(-1), *b[1:])


@pytest.mark.parametrize("tfm,stage,words", [(PixelFlip(), "item transforms", "mirrored"), (BoxScale(), "item transforms", "scaled"), (ImageScale(), "item transforms", "scaled"),
    (NanBox(), "item transforms", "not finite"), (WrongLabel(), "item transforms", "labels"), (DeviceFlip(), "batch transforms", "DeviceFlip")])
def test_transforms(toy, model, tfm, stage, words):
    caught(fly(load(toy, aug=[tfm]), model, limit=8), stage, words, severity="error")


def test_normalisation(toy, model):
    learn = det_learner(load(toy), model); keep = learn.dls
    learn.dls = load(toy, norm=((.5,)*3, (.25,)*3))
    caught(preflight(learn, limit=6), "model", "normalised by", severity="error")
    learn.dls = load(toy)
    for dl in learn.dls.loaders: dl.after_batch.add(Normalize(*keep.norm))
    caught(preflight(learn, limit=6), "batch transforms", "the model expects", severity="error")


def test_wrong_decoding(toy, model):
    coder = model.head.coder; old = coder.decode
    coder.decode = lambda p, d, *a, **k: old(p, d*1.2, *a, **k)
    try: caught(fly(load(toy), model, limit=8), "decoding", "coder", severity="error")
    finally: del coder.decode


def test_objects_too_small_for_the_model(toy, model):
    caught(fly(load(toy, resize=32), model, limit=8), "assigner", "lost", severity=None)


# ---- sound sets ----

def sound(p):
    assert isinstance(p, Preflight) and p.clean, str(p)
    assert len(p.df) and (p.df["record"].iloc[-1] >= p.df["loss"].iloc[-1] > 0) and min(p.oracle.values()) > .95
    assert p._repr_html_() and str(p) and p.raise_if_failed() is p


@pytest.mark.parametrize("kw", [dict(), dict(colour="any", seed=3), dict(classes=("circle",), seed=4)])
def test_sound_toys(kw):
    seed = kw.pop("seed", 0)
    dls = DetDataLoaders.from_records(toy_records(24, seed=(seed, 0), **kw), toy_records(8, seed=(seed, 1), **kw), bs=4, resize=160, num_workers=0)
    learn = det_learner(dls, "retinanet", body="resnet18", channels=32, num_convs=1)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    sound(learn.preflight())
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and all(p.grad is None for p in learn.model.parameters())


def test_sound_two_stages():
    dls = DetDataLoaders.from_records(toy_records(8, seed=(0, 0)), toy_records(4, seed=(0, 1)), bs=4, resize=192, num_workers=0, masks=False)
    sound(preflight(det_learner(dls, "faster_rcnn", body="resnet18", channels=32, hidden=32, scale=3)))


def _real(train, valid=None):
    dls = DetDataLoaders.from_records(train, valid, bs=4, resize=224, num_workers=0, masks=False)
    return preflight(det_learner(dls, "retinanet", body="resnet18", channels=32, num_convs=1, base=2), limit=24)


def test_sound_bccd(real_data):
    d = real_data/"bccd"
    sound(_real(*(read_coco(d/"annotations_coco"/f"{o}.json", d/"images", verbose=False) for o in ("train", "test"))))


def test_sound_coco(real_data):
    d = real_data/"coco_mini"; ann = d/"annotations"
    train = read_coco(ann/"instances_train2017.json", d/"train2017", verbose=False)
    sound(_real(train, read_coco(ann/"instances_val2017.json", d/"val2017", vocab=train.vocab, verbose=False)))


def test_sound_voc(real_data):
    d = real_data/"voc100_formats"
    sound(_real(read_voc(d/"gts/pascalvoc_format", ann_dir=".", img_dir=(d/"images").resolve(), coords="zero_based", verbose=False)))
