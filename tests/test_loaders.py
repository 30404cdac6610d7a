"Loaders: the same batches for any number of workers, clean errors, every constructor, every verb of a fastai Learner"
import pickle
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # noqa: F403 (patches lr_find, fit_one_cycle into Learner)
from fastai.callback.hook import *  # noqa: F403 (patches summary)
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD
from PIL import Image

from visdet.core.basics import ConfigError, DataError
from visdet.data.coco import write_coco
from visdet.data.detections import Detections
from visdet.data.dl import DetDL
from visdet.data.items import RecordItems
from visdet.data.loaders import DetDataLoaders
from visdet.data.records import Records
from visdet.data.targets import Targets
from visdet.data.toy import toy_records
from visdet.data.transforms import RandomResize, Resize

warnings.filterwarnings("ignore", category=DeprecationWarning)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_records(20, tmp_path_factory.mktemp("toy"), seed=3)


def loaders(recs, **kw):
    return DetDataLoaders.from_records(recs, **{**dict(bs=4, num_workers=0, device="cpu", resize=64), **kw})


def passes(dl, n=1):
    return [[(x.clone(), t) for x, t in dl] for _ in range(n)]


def same(a, b):
    assert len(a) == len(b)
    for (xa, ta), (xb, tb) in zip(a, b):
        assert torch.equal(xa, xb)
        for fa, fb in zip(ta, tb):
            assert torch.equal(fa, fb)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(toy, workers):
    want = passes(loaders(toy, aug="strong").train, 2)
    got = passes(loaders(toy, aug="strong", num_workers=workers).train, 2)
    for a, b in zip(want, got):
        same(a, b)
    assert not torch.equal(want[0][0][1].ids, want[1][0][1].ids)


def test_resume_sees_the_same_batches(toy):
    a = loaders(toy)
    want = passes(a.train, 3)
    b = loaders(toy)
    b.one_batch(), b.show_batch(show=False), b.train.show_batch(unique=True, show=False)
    b.train.epoch = 2
    same(passes(b.train)[0], want[2])
    assert b.train.epoch == a.train.epoch == 3


def test_looking_in_the_middle_of_a_pass_changes_nothing(toy):
    want = passes(loaders(toy, aug="strong").train)[0]
    dls, got = loaders(toy, aug="strong"), []
    for x, t in dls.train:
        got.append((x, t))
        dls.one_batch()
    same(got, want)


def test_validation_is_plain_and_constant(toy):
    dls = loaders(toy, aug="strong")
    a, b = passes(dls.valid, 2)
    same(a, b)
    assert torch.cat([t.ids for _, t in a]).tolist() == list(range(len(dls.valid.records)))
    r = dls.train_eval
    ids, n = [], 0
    for x, t in r:
        for i, box, lab, s in zip(t.ids.tolist(), t.boxes, t.labels, t.scales):
            rec = dls.records[i]
            assert np.allclose(box[lab >= 0] / s.repeat(2), rec.boxes, atol=1e-3)
            ids.append(i), (n := n + len(rec))
    assert ids == list(range(len(dls.records))) and n == len(dls.records.boxes)


def test_every_object_reaches_a_training_epoch_without_crops(toy):
    dls = loaders(toy, aug="flip", bs=1)
    n = sum(int((t.labels >= 0).sum()) for _, t in dls.train)
    assert n == len(dls.records.boxes)
    assert sum(len(t.masks) for _, t in dls.train) == n
    assert (dls.records.counts == 0).any()


# ---------------------------------------------------------------- errors

def broken(tmp_path, n=6, bad=(3,)):
    for i in range(n):
        Image.fromarray(np.full((30, 40, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
        if i in bad:
            (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:70])
    return Records.build([f"{i}.png" for i in range(n)], [(30, 40)] * n, [[[1, 1, 20, 20]]] * n, [[0]] * n, ["a"], root=tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_one_clean_line(tmp_path, workers):
    dl = DetDL(RecordItems(broken(tmp_path), Resize(32)), bs=2, num_workers=workers)
    with pytest.raises(DataError) as e:
        list(dl)
    msg = str(e.value)
    assert "3.png" in msg and "image id 3" in msg and "on_error='skip'" in msg
    assert "Traceback" not in msg and "\n" not in msg


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_reported_and_move_no_batch(tmp_path, workers):
    dl = DetDL(RecordItems(broken(tmp_path, 7, bad=(3, 4, 5)), Resize(32)), bs=2, num_workers=workers, on_error="skip")
    with pytest.warns(UserWarning, match="3 of 7 images do not decode.*3.png.*4.png.*5.png"):
        got = [t.ids.tolist() for _, t in dl]
    assert got == [[0, 1], [2], [6]]
    assert [o for o, _ in dl.skipped] and len(dl.skipped) == 3


def test_size_mismatch_is_an_error_even_when_skipping(tmp_path):
    recs = broken(tmp_path, bad=())
    recs.sizes[2] = (60, 80)
    dl = DetDL(RecordItems(recs, Resize(32)), bs=2, num_workers=0, on_error="skip")
    with pytest.raises(DataError, match=r"2.png.*40x30 pixels but is annotated as 80x60"):
        list(dl)


def test_missing_image(tmp_path):
    recs = broken(tmp_path, bad=())
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match="0.png"):
        DetDL(RecordItems(recs), bs=2, num_workers=0).one_batch()


def test_arguments_are_checked(toy):
    for kw, match in ((dict(batch_size=3), "unknown argument 'batch_size'"), (dict(num_worker=3), "num_workers"), (dict(aug="storng"), "strong"),
                      (dict(resize="large"), "unknown resize"), (dict(norm="coco"), "unknown normalisation"), (dict(masks="yes"), "masks="),
                      (dict(on_error="ignore"), "on_error"), (dict(norm=((123.0, 116, 103), (58.0, 57, 57))), "divide by 255")):
        with pytest.raises(ConfigError, match=match):
            loaders(toy, **kw)


def test_class_tables_must_agree(toy):
    with pytest.raises(DataError, match="class tables differ"):
        loaders(toy, valid=toy.with_vocab(toy.vocab[::-1]))
    with pytest.raises(DataError, match="no box to learn from"):
        loaders(toy.subset(np.flatnonzero(toy.counts == 0)), valid=toy)


# ---------------------------------------------------------------- kinds of images and sets

def test_grey_and_sixteen_bit_images(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path / "0.png")
    Image.fromarray(a.astype(np.uint16) * 257).save(tmp_path / "1.png")
    recs = Records.build(["0.png", "1.png"], [(40, 50)] * 2, [[[1, 1, 20, 20]]] * 2, [[0]] * 2, ["a"], root=tmp_path)
    dls = loaders(recs, valid=recs, in_chans=1, resize=40, bs=2)
    x, t = dls.valid.one_batch()
    assert x.shape[1] == 1 and torch.allclose(x[0], x[1], atol=0.02)
    assert dls.one_batch()[0].shape[1] == 1 and dls.in_chans == 1 and len(dls.norm[0]) == 1
    assert loaders(recs, valid=recs, bs=2).one_batch()[0].shape[1] == 3


def test_exif_orientation_moves_nothing(tmp_path):
    "A turned photograph, annotated as people see it, gives the same batch as an upright copy"
    img = np.zeros((40, 60, 3), np.uint8)
    img[5:25, 10:30] = 255, 0, 0
    Image.fromarray(img).save(tmp_path / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees: to be rotated clockwise when shown
    Image.fromarray(np.rot90(img)).save(tmp_path / "1.png", exif=exif)
    recs = Records.build(["0.png", "1.png"], [(40, 60)] * 2, [[[10, 5, 30, 25]]] * 2, [[0]] * 2, ["a"], root=tmp_path)
    x, t = loaders(recs, valid=recs, bs=2).valid.one_batch()
    assert torch.equal(x[0], x[1])


def test_named_validation_sets(toy):
    train, rest = toy.split(0.5, 0)
    dls = loaders(train, valid=dict(old=rest.subset(slice(0, 4)), new=rest))
    assert list(dls.valids) == ["old", "new"] and dls.valid is dls.valids["old"] and len(dls.loaders) == 3
    assert len(dls.valids["new"].records) == len(rest)
    assert "old" in repr(dls) and "new" in repr(dls)
    assert list(dls.with_size(32).valids) == ["old", "new"]


def test_batches_have_the_canvas_of_a_letterbox(toy):
    dls = loaders(toy, resize=Resize((100, 200), "letterbox"))
    assert {tuple(x.shape[2:]) for dl in dls for x, _ in dl} == {(128, 224)}
    free = loaders(toy, resize=Resize(64, "letterbox"), aug=[RandomResize((40, 90))])
    assert max(max(x.shape[2:]) for x, _ in free.train) <= 160


def test_masks_switch(toy):
    dls = loaders(toy)
    assert dls.use_masks and len(dls.one_batch()[1].masks)
    dls.use_masks = False
    assert not dls.use_masks and len(dls.one_batch()[1].masks) == 0 and len(dls.valid.one_batch()[1].masks) == 0
    assert not loaders(toy, masks=False).use_masks


def test_grouped_batches_hold_one_orientation(tmp_path):
    n, sizes = 23, []
    for i in range(n):
        h, w = (30, 60) if i % 3 else (60, 30)
        Image.fromarray(np.zeros((h, w, 3), np.uint8)).save(tmp_path / f"{i}.png")
        sizes.append((h, w))
    recs = Records.build([f"{i}.png" for i in range(n)], sizes, [[[1, 1, 20, 20]]] * n, [[0]] * n, ["a"], root=tmp_path)
    tall = recs.sizes[:, 0] > recs.sizes[:, 1]
    dls = loaders(recs, valid=recs, group=True, aug=None)
    seen = [t.ids.tolist() for _, t in dls.train]
    assert sum(len(set(tall[o].tolist())) > 1 for o in seen) <= 1
    assert [t.ids.tolist() for _, t in dls.train] != seen


# ---------------------------------------------------------------- constructors

def test_from_coco(toy, tmp_path):
    train, valid = toy.split(0.4, 0)
    write_coco(train, tmp_path / "t.json"), write_coco(valid, tmp_path / "v.json")
    kw = dict(bs=2, num_workers=0, device="cpu", resize=64, verbose=False)
    dls = DetDataLoaders.from_coco(tmp_path / "t.json", toy.root, tmp_path / "v.json", **kw)
    assert len(dls.records) == len(train) and len(dls.valid.records) == len(valid) and dls.vocab == toy.vocab
    assert np.allclose(dls.records.boxes, train.boxes) and dls.use_masks
    two = DetDataLoaders.from_coco(tmp_path / "t.json", toy.root, dict(a=tmp_path / "v.json", b=tmp_path / "t.json"), **kw)
    assert list(two.valids) == ["a", "b"]
    assert len(DetDataLoaders.from_coco(tmp_path / "t.json", toy.root, masks=False, **kw).one_batch()[1].masks) == 0
    with pytest.raises(ConfigError, match="on_missing"):
        DetDataLoaders.from_coco(tmp_path / "t.json", toy.root, on_mising="drop", **kw)


def test_from_yolo(toy, tmp_path):
    from visdet.data.yolo import write_yolo
    write_yolo(toy, tmp_path / "y", split="train", masks="drop", drop_crowd=True, images="copy")
    dls = DetDataLoaders.from_yolo(tmp_path / "y", valid=None, bs=2, num_workers=0, device="cpu", resize=64, verbose=False)
    assert len(dls.records) + len(dls.valid.records) == len(toy) and dls.vocab == toy.vocab
    dls.one_batch()
    with pytest.raises(DataError, match="val"):
        DetDataLoaders.from_yolo(tmp_path / "y", bs=2, verbose=False)


def test_from_voc(toy, tmp_path):
    from visdet.data.voc import write_voc
    write_voc(toy, tmp_path, drop_masks=True)
    dls = DetDataLoaders.from_voc(tmp_path, img_dir=toy.root/"images" if (toy.root/"images").is_dir() else toy.root, bs=2, num_workers=0, device="cpu", resize=64, verbose=False)
    assert len(dls.records) + len(dls.valid.records) == len(toy) and set(dls.vocab) == set(toy.vocab)
    dls.one_batch()


def test_from_df(toy):
    from visdet.data.frame import write_df
    train, valid = toy.split(0.4, 0)
    dls = DetDataLoaders.from_df(write_df(train), write_df(valid), img_dir=toy.root, bs=2, num_workers=0, device="cpu", resize=64, verbose=False)
    assert len(dls.records.boxes) == len(train.boxes) and set(dls.vocab) == set(toy.vocab) and dls.valid.vocab == dls.vocab
    dls.one_batch()


# ---------------------------------------------------------------- a plain fastai Learner

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.c = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.c(x).mean((2, 3))


def tiny_loss(p, t, reduction="mean"):
    n = Targets(t).valid.sum(1, keepdim=True).float() / 10
    e = (p - n).abs().mean(1)
    return e.mean() if reduction == "mean" else e


class Join:
    "What an engine puts into `learn.pred`: one `Detections` an image"
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        from visdet.data.dl import _Joined
        return _Joined(o for b in args[0] for o in b.items)


class Detect(Callback):
    "Finds the whole file in every image"
    run_train, order = False, -5
    def after_batch(self):
        t = Targets(self.yb[0])
        self.learn.pred = Join([Detections(torch.tensor([[0.0, 0, w, h]]), torch.tensor([0.9]), torch.tensor([0]), (h, w)) for h, w in t.orig_sizes.tolist()])


@pytest.fixture
def learn(toy, tmp_path):
    dls = loaders(toy, path=tmp_path)
    ln = Learner(dls, Tiny(), loss_func=tiny_loss, opt_func=SGD, lr=1e-2, path=tmp_path)
    with ln.no_logging():
        yield ln
    plt.close("all")


def test_fit_validate_find_summary(learn):
    learn.fit(1)
    learn.fit_one_cycle(1)
    assert learn.dls.train.epoch == 2
    assert np.isfinite(learn.validate()[0])
    learn.lr_find(num_it=6, show_plot=False)
    assert "Tiny" in str(learn.summary())


def test_get_preds(learn):
    dls = learn.dls
    p, t = learn.get_preds()
    assert len(p) == len(t) == len(dls.valid.records) and [o["id"] for o in t] == list(range(len(t)))
    p, t = learn.get_preds(ds_idx=0)
    assert len(p) == len(dls.records) and [o["id"] for o in t] == list(range(len(t)))
    for o, rec in zip(t, (dls.records[i] for i in range(len(t)))):
        assert np.allclose(o["boxes"] / torch.tensor(o["scale"]).repeat(2), rec.boxes, atol=1e-3)
    x, p, t, l = learn.get_preds(with_input=True, with_loss=True)
    assert len(x) == len(t) == len(l)
    learn.add_cb(Detect())
    d, t = learn.get_preds()
    assert [o.size for o in d] == [o["orig_size"] for o in t]


def test_predict_and_show(learn, toy):
    learn.add_cb(Detect())
    for item in (toy.paths[0], np.zeros((50, 90, 3), np.uint8), torch.zeros(3, 50, 90), Image.new("RGB", (90, 50))):
        d, dec, raw = learn.predict(item)
        assert isinstance(d, Detections) and len(d) == 1 and d is dec is raw
        assert d.size == (toy[0].size if isinstance(item, str) else (50, 90))
    img, d, *_ = learn.predict(np.full((64, 64, 3), 77, np.uint8), with_input=True)
    assert (img == 77).all()
    learn.show_results(max_n=3)
    learn.show_results(ds_idx=0, max_n=2)
    learn.dls.show_batch(max_n=2)
    learn.dls.valid.show_batch(max_n=9)
    dl = learn.dls.test_dl([toy.paths[i] for i in (3, 1, 2)], bs=2)
    d, _ = learn.get_preds(dl=dl)
    assert [o.size for o in d] == [toy[i].size for i in (3, 1, 2)]
    dl.show_batch()


def test_export_and_load(learn, toy, tmp_path):
    learn.fit(1)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = load_learner(tmp_path / "export.pkl")
    assert len(back.dls.train) == 0 and back.dls.vocab == toy.vocab
    with back.no_logging():
        a = back.get_preds(dl=back.dls.test_dl([toy.paths[0]]))[0]
        b = learn.get_preds(dl=learn.dls.test_dl([toy.paths[0]]))[0]
    assert torch.allclose(a, b, atol=1e-6)
    assert (tmp_path / "export.pkl").stat().st_size < 200_000


def test_export_holds_no_annotations(toy):
    dls = loaders(toy)
    assert len(pickle.dumps(dls.new_empty())) < 60_000
    assert toy.paths[0].encode() not in pickle.dumps(dls.new_empty())


def test_progressive_resizing_goes_on_where_it_was(toy):
    dls = loaders(toy)
    passes(dls.train)
    big = dls.with_size(96, bs=2)
    assert big.train.epoch == 1 and big.train.bs == 2 and big.resize.scale[1] == 96
    assert [i for _, t in big.train for i in t.ids.tolist()] == [i for i in [i for _, t in loaders_at(toy, 1).train for i in t.ids.tolist()]]


def loaders_at(toy, epoch):
    d = loaders(toy, bs=2)
    d.train.epoch = epoch
    return d


def test_real_coco(real_data):
    d = real_data / "coco_mini"
    if not d.is_dir():
        pytest.skip("coco_mini is not here")
    dls = DetDataLoaders.from_coco(d / "annotations/instances_val2017.json", d / "val2017", bs=4, num_workers=0, device="cpu", resize=(1333, 800), aug="flip", verbose=False)
    x, t = next(iter(dls.train))
    for i, s, (sx, sy), lab, box in zip(t.ids.tolist(), t.sizes.tolist(), t.scales.tolist(), t.labels, t.boxes):
        assert min(s) == 800 or max(s) == 1333
        assert len(dls.records[i]) == int((lab >= 0).sum())
    assert len(t.masks) == int((t.labels >= 0).sum())
