"""The behaviours that MMDetection states for its COCO data set: classes, ids, filters and regions

A data set there filters when it is built; here `read_coco` keeps every image and says in its report what it repaired,
and a filter is a subset of the records. `BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import json

import numpy as np
import pytest
from PIL import Image

from visdet.core.basics import DataError
from visdet.data.coco import read_coco
from visdet.data.loaders import DetDataLoaders

BEHAVIOURS = {
    "class names can be given and stay": "test_classes",
    "classes of an image": "test_categories_of_an_image",
    "without a filter all images are there, in training and in evaluation": "test_all_images",
    "annotation ids must be unique": "test_ids_are_unique",
    "images without objects can be left out": "test_without_objects",
    "images below a side can be left out": "test_min_size",
    "labels follow the order of the classes": "test_label_order",
    "boxes are x, y, x + w, y + h": "test_boxes",
    "crowd regions are kept apart, objects to ignore too": "test_crowd",
    "boxes outside the image, without area or of unknown classes are dropped": "test_dropped",
    "evaluation keeps the ids and classes of the file": "test_written_back",
}
WITHOUT = {
    "other keys of metainfo (task_name)": "records hold class names only",
    "labels follow the order of categories in the file": "without `vocab` they follow the ids, so that two files with the same classes agree",
    "objects thinner than one pixel are dropped": "they are kept while they have an area",
    "objects marked ignore are dropped": "they are crowd regions, so that they do not count as background either",
    "training and evaluation differ in what they read": "one set of records serves both",
}

IMAGES = [("a.png", 800, 800), ("b.png", 800, 800), ("c.png", 800, 800), ("d.png", 20, 20)]
FILE = dict(
    images=[dict(id=i, file_name=f, height=h, width=w) for i, (f, h, w) in enumerate(IMAGES)],
    categories=[dict(id=1, name="bus", supercategory="none"), dict(id=2, name="car", supercategory="none")],
    annotations=[
        dict(id=1, image_id=0, category_id=1, bbox=[100, 200, 50, 40], area=2000, iscrowd=0),
        dict(id=2, image_id=0, category_id=2, bbox=[0, 0, 20.5, 30], area=615, iscrowd=0),
        dict(id=3, image_id=1, category_id=2, bbox=[10, 10, 20, 20], area=400, iscrowd=0),
        dict(id=4, image_id=3, category_id=1, bbox=[5, 5, 10, 10], area=100, iscrowd=0),
    ],
)


@pytest.fixture
def read(tmp_path):
    "Read a file that differs from `FILE` in some of its lists"

    def f(kw=None, **changes):
        p = tmp_path / "ann.json"
        p.write_text(json.dumps({**FILE, **changes}))
        return read_coco(p, verbose=False, **(kw or {}))

    return f


def changed(**kw):
    "The annotations, the first of them with other values"
    first, *rest = FILE["annotations"]
    return [{**first, **kw}, *rest]


def test_classes(read):
    assert read().vocab == ["bus", "car"]
    assert read(dict(vocab=["car", "bus"])).vocab == ["car", "bus"]


def test_categories_of_an_image(read):
    recs = read()
    assert sorted(recs[0].labels.tolist()) == [0, 1]
    assert [sorted(set(r.labels.tolist())) for r in recs] == [[0, 1], [1], [], [0]]


def test_all_images(read, tmp_path):
    "Four of them, the one without objects and the small one too"
    recs = read()
    assert len(recs) == 4 and recs.sizes.tolist() == [[800, 800]] * 3 + [[20, 20]]
    for f, h, w in IMAGES:
        Image.fromarray(np.zeros((h, w, 3), np.uint8)).save(tmp_path / f)
    dls = DetDataLoaders.from_coco(tmp_path / "ann.json", tmp_path, tmp_path / "ann.json", bs=2, num_workers=0, resize=(64, 64), device="cpu")
    assert len(dls.train.dataset) == len(dls.valid.dataset) == 4
    assert sorted(i for _, t in dls.valid for i in t.ids.tolist()) == [0, 1, 2, 3]
    assert sorted(i for _, t in dls.train for i in t.ids.tolist()) == [0, 1, 2, 3]


def test_ids_are_unique(read):
    with pytest.raises(DataError, match="annotation ids"):
        read(annotations=changed(id=2))
    with pytest.raises(DataError, match="image ids"):
        read(images=FILE["images"] + [FILE["images"][0]])
    with pytest.raises(DataError, match="category ids"):
        read(categories=FILE["categories"] + [dict(id=1, name="truck")])


def test_without_objects(read):
    "What filter_empty_gt leaves out"
    recs = read()
    assert recs.subset(recs.counts > 0).ids.tolist() == [0, 1, 3]
    cars = read(dict(vocab=["car"], on_unknown="drop"))
    assert len(cars) == 4 and cars.subset(cars.counts > 0).ids.tolist() == [0, 1]


def test_min_size(read):
    "What min_size 32 leaves out"
    recs = read()
    assert recs.subset(recs.sizes.min(1) >= 32).ids.tolist() == [0, 1, 2]
    both = recs.subset((recs.sizes.min(1) >= 32) & (recs.counts > 0))
    assert both.ids.tolist() == [0, 1] and both.labels.tolist() == [0, 1, 1] and both.ann_ids.tolist() == [1, 2, 3]


def test_label_order(read):
    "Given names fix the labels; otherwise ids do, however the file lists its classes"
    assert read().labels.tolist() == [0, 1, 1, 0]
    assert read(categories=FILE["categories"][::-1]).labels.tolist() == [0, 1, 1, 0]
    assert read(dict(vocab=["car", "bus"])).labels.tolist() == [1, 0, 0, 1]
    assert read(dict(vocab=["car", "bus"])).cat_ids == [2, 1]


def test_boxes(read):
    recs = read()
    assert recs[0].boxes.tolist() == [[100, 200, 150, 240], [0, 0, 20.5, 30]]
    assert recs.areas.tolist() == [2000, 615, 400, 100]


@pytest.mark.parametrize("flags,crowd", [(dict(iscrowd=1), True), (dict(ignore=1), True), (dict(iscrowd=0, ignore=0), False), (dict(iscrowd=1, ignore=1), True)])
def test_crowd(read, flags, crowd):
    recs = read(annotations=changed(**flags))
    assert recs.crowd.tolist() == [crowd, False, False, False] and len(recs.boxes) == 4
    assert any("ignore" in o for o in recs.report.notes) == (flags == dict(ignore=1))


@pytest.mark.parametrize(
    "change,why",
    [
        (dict(bbox=[900, 10, 50, 50]), "outside the image"),
        (dict(bbox=[-60, 10, 50, 50]), "outside the image"),
        (dict(bbox=[10, 10, 0, 50]), "no area"),
        (dict(bbox=[10, 10, 50, -3]), "no area"),
        (dict(bbox=[10, 10, 50]), "cannot be read"),
        (dict(category_id=9), "unknown category"),
        (dict(image_id=77), "unknown image"),
    ],
)
def test_dropped(read, change, why):
    "The object goes, with a row in the report; its image and the others stay"
    recs = read(dict(on_unknown="drop"), annotations=changed(**change))
    assert recs.ann_ids.tolist() == [2, 3, 4] and len(recs) == 4
    row = recs.report.df.iloc[0]
    assert row["action"] == "dropped" and why in row["why"] and row["ann"] == 1
    if "category_id" in change:
        with pytest.raises(DataError, match="9"):
            read(annotations=changed(**change))


def test_thin_and_clipped(read):
    "Half a pixel is an object; what reaches beyond the image is cut"
    assert read(annotations=changed(bbox=[10, 10, 0.5, 50]))[0].boxes[0].tolist() == [10, 10, 10.5, 60]
    recs = read(annotations=changed(bbox=[-10, 780, 50, 50]))
    assert recs[0].boxes[0].tolist() == [0, 780, 40, 800] and recs.report.clipped == 1


def test_written_back(read):
    "Ids of images, annotations and classes are the file's own"
    d = read(dict(vocab=["car", "bus"])).to_coco()
    assert [o["id"] for o in d["images"]] == [0, 1, 2, 3] and [o["id"] for o in d["annotations"]] == [1, 2, 3, 4]
    assert [o["category_id"] for o in d["annotations"]] == [1, 2, 2, 1]
    assert [o["bbox"] for o in d["annotations"]] == [o["bbox"] for o in FILE["annotations"]]
