"A saved model gives the same detections as the learner it came from, whatever form its images come in"
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import visdet
from visdet.core.basics import CheckpointError, DataError, seed_everything
from visdet.data.loaders import DetDataLoaders
from visdet.data.toy import toy_records
from visdet.data.transforms import Resize
from visdet.deploy.predict import as_predictor, load
from visdet.deploy.save import load_model, read_card, save_model
from visdet.engine.learner import det_learner
from visdet.models.zoo import create_model, list_models

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
SMALL = dict(body="test_resnet", channels=16)
TINY = dict(
    retinanet=dict(num_convs=1),
    fcos=dict(num_convs=1),
    faster_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), max_num=10),
    mask_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), max_num=10, mask_channels=16, mask_convs=1),
    cascade_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), max_num=10),
    cascade_mask_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), max_num=10, mask_channels=16, mask_convs=1),
)


@pytest.fixture(scope="module")
def recs(tmp_path_factory):
    "Ten drawn images of several sizes"
    return toy_records(10, tmp_path_factory.mktemp("toy"), seed=4)


@pytest.fixture(scope="module")
def trained(recs):
    "A RetinaNet that has learned something"
    seed_everything(0)
    dls = DetDataLoaders.from_records(recs, recs, resize=(128, 128), bs=5, num_workers=0, device="cpu", aug=None)
    learn = det_learner(dls, "retinanet", num_convs=1, **SMALL)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(8, 1e-2)
    return learn


@pytest.mark.parametrize("name", list_models())
def test_round_trip(name, recs, tmp_path):
    seed_everything(0)
    model = create_model(name, vocab=recs.vocab, **SMALL, **TINY.get(name, {}))
    path = save_model(model, tmp_path / "m", resize=Resize((160, 128)))
    again, card = load_model(path)
    assert card["spec"][0] == name and again.vocab == recs.vocab
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    a, b = as_predictor(model, Resize((160, 128))), load(path)
    for p in recs.paths[:3]:
        x, y = a.predict(p, score=0.05), b.predict(p, score=0.05)
        assert torch.equal(x.boxes, y.boxes) and torch.equal(x.scores, y.scores)
        assert (x.masks is None) == (y.masks is None)


def test_learner_and_predictor_agree(trained, recs, tmp_path):
    m = visdet.load(save_model(trained, tmp_path / "m.safetensors"))
    assert m.card["metrics"] and m.vocab == recs.vocab
    with trained.no_bar(), trained.no_logging():
        dets = trained.get_preds(dl=trained.dls.valid)[0]
    found = 0
    for d, p in zip(dets, recs.paths):
        e = m.predict(p, score=0.05)
        assert len(d) == len(e) and d.size == e.size
        torch.testing.assert_close(d.boxes, e.boxes, atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(d.scores, e.scores, atol=1e-4, rtol=1e-4)
        found += len(e)
    assert found


@pytest.mark.parametrize("resize", [Resize((160, 120)), Resize((128, 128), "letterbox"), Resize((96, 128), "stretch")])
def test_batches_equal_single_images(trained, recs, resize):
    m = as_predictor(trained.model, resize)
    paths = list(recs.paths)
    one = [m.predict(p, score=0.05) for p in paths]
    for bs in (2, 8):
        for a, b in zip(one, m.predict(paths, score=0.05, bs=bs)):
            assert len(a) == len(b)
            torch.testing.assert_close(a.boxes, b.boxes, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-4)


def test_forms_of_an_image(trained, recs):
    m = as_predictor(trained)
    path = recs.paths[0]
    img = np.asarray(Image.open(path).convert("RGB"))
    t = torch.from_numpy(img.copy()).permute(2, 0, 1)
    want = m.predict(path, score=0.05)
    for form in (img, Image.fromarray(img), t, t / 255, np.ascontiguousarray(img), open(path, "rb").read()):
        got = m.predict(form, score=0.05)
        torch.testing.assert_close(got.boxes, want.boxes, atol=1e-3, rtol=1e-4)
        assert got.draw().shape[:2] == img.shape[:2]


def test_load_needs_nothing_else(trained, recs, tmp_path):
    path = save_model(trained, tmp_path / "m.safetensors")
    code = f"import visdet, sys; m = visdet.load({str(path)!r}); d = m.predict({recs.paths[0]!r}, score=.05); print(len(d), d.size, *m.vocab)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    want = as_predictor(trained).predict(recs.paths[0], score=0.05)
    assert out.stdout.split()[0] == str(len(want))


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -1])
def test_damaged_files(trained, tmp_path, cut):
    path = save_model(trained, tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError) as e:
        load(path)
    assert "m.safetensors" in str(e.value) and "\n" not in str(e.value)


def test_files_of_others(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    for p in (tmp_path / "w.pth", tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError):
            read_card(p)


def test_unreadable_images_are_named(trained, recs, tmp_path):
    (tmp_path / "a.png").write_bytes(open(recs.paths[0], "rb").read())
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.jpg").write_bytes(open(recs.paths[1], "rb").read()[:700])
    m = as_predictor(trained)
    with pytest.raises(DataError, match="b.png"):
        m.predict(tmp_path)
    with pytest.warns(UserWarning, match="2 of 3 images.*b.png"):
        res = m.predict(tmp_path, on_error="skip")
    assert [o is None for o in res] == [False, True, True]
