"Every fastai verb on every detector, and the claims of the learner that need a trained model"
import warnings

import pytest
import torch
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, SaveModelCallback
from fastai.learner import Learner, load_learner

from visdet.core.basics import ConfigError, seed_everything
from visdet.data.loaders import DetDataLoaders
from visdet.data.toy import toy_records
from visdet.engine.callbacks import TrainingError
from visdet.engine.learner import det_learner
from visdet.engine import show  # noqa: F401
from visdet.models.zoo import list_models

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
SMALL = dict(body="test_resnet", channels=16)
TINY = dict(
    retinanet=dict(num_convs=1),
    fcos=dict(num_convs=1),
    **{k: dict(num_convs=1) for k in ("atss", "gfl", "vfnet", "tood")},
    faster_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), roi_num=32, max_num=10),
    mask_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), roi_num=32, max_num=10, mask_channels=16, mask_convs=1),
    cascade_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), roi_num=32, max_num=10),
    cascade_mask_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), roi_num=32, max_num=10, mask_channels=16, mask_convs=1),
    double_head_rcnn=dict(hidden=32, head_channels=16, head_convs=1, pre=(100, 50), post=(50, 50), roi_num=32, max_num=10),
    mask_scoring_rcnn=dict(hidden=32, pre=(100, 50), post=(50, 50), roi_num=32, max_num=10, mask_channels=16, mask_convs=1, iou_channels=16, iou_hidden=32),
)


@pytest.fixture(scope="module")
def recs(tmp_path_factory):
    "Twelve drawn images"
    return toy_records(12, tmp_path_factory.mktemp("toy"), seed=2)


def loaders(recs, **kw):
    "Small loaders"
    return DetDataLoaders.from_records(recs, **dict(dict(resize=(96, 96), bs=3, num_workers=0, device="cpu", valid_pct=0.34), **kw))


@pytest.fixture(params=list_models())
def learn(request, recs, tmp_path):
    "A learner for each registered model"
    seed_everything(0)
    res = det_learner(loaders(recs), request.param, path=tmp_path, **SMALL, **TINY.get(request.param, {}))
    with res.no_bar(), res.no_logging():
        yield res


def test_verbs(learn):
    assert type(learn) is Learner
    learn.fit_one_cycle(1, slice(1e-4, 1e-3), cbs=[CSVLogger(), SaveModelCallback("valid_loss"), EarlyStoppingCallback("valid_loss"), GradientClip(1.0), GradientAccumulation(6)])
    assert "AP50" in (learn.path / "history.csv").read_text()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    assert learn.lr_find(end_lr=0.1, num_it=6, show_plot=False).valley > 0
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    learn.fine_tune(1, 1e-3)
    learn.to_bf16().fit(1)
    learn.to_fp32()
    learn.save("a")
    learn.load("a")
    learn.summary()
    row = learn.validate()
    assert len(row) == 1 + len(learn.metrics)
    learn.export()
    other = load_learner(learn.path / "export.pkl")
    path = learn.dls.valid.records[0].path
    with other.no_bar(), other.no_logging():
        a, b = learn.predict(path)[0], other.predict(path)[0]
    assert torch.allclose(a.boxes, b.boxes, atol=1e-3)


@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
def test_rate_finder_beyond_divergence(name, recs, tmp_path):
    "A search stops where the smoothed loss is four times the best, and fastai drops the last five losses: what is left must be enough for a suggestion"
    seed_everything(0)
    learn = det_learner(loaders(recs), name, path=tmp_path, **SMALL, **TINY[name])
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        assert learn.lr_find(end_lr=10, num_it=14, show_plot=False).valley > 0
    assert 5 < len(learn.recorder.losses) < 14
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_predictions_belong_to_their_images(learn):
    r = learn.dls.valid.records
    preds, targs, losses = learn.get_preds(with_loss=True)
    assert [o.size for o in preds] == [r[i].size for i in range(len(r))]
    assert [o["id"] for o in targs] == list(range(len(r)))
    for i, t in enumerate(targs):
        assert torch.allclose(t["boxes"], torch.tensor(r[i].boxes), atol=1e-2)
    assert losses.shape == (len(r),) and torch.isfinite(losses).all()


def test_show(learn):
    import matplotlib.pyplot as plt

    learn.show_results(max_n=2)
    assert len(learn.plot_top_losses(2)) == 2
    plt.close("all")


def test_loss_of_one_image_does_not_depend_on_its_batch(learn):
    if learn.model.needs_targets:
        pytest.skip("two-stage models sample regions at random")
    losses = learn.get_preds(with_loss=True)[-1]
    for i in range(len(losses)):
        dl = learn.dls.test_dl(learn.dls.valid.records.subset([i]))
        assert torch.allclose(learn.get_preds(dl=dl, with_loss=True)[-1][0], losses[i], atol=1e-4, rtol=1e-4)


def test_groups(learn):
    model = learn.model
    learn.create_opt()
    ids = [{id(p) for p in g} for g in learn.opt.param_lists]
    assert len(ids) == 3 and not ids[0] & ids[1] and not ids[1] & ids[2] and not ids[0] & ids[2]
    assert ids[0] <= {id(p) for p in model.body.parameters()} and ids[1] <= {id(p) for p in model.neck.parameters()}
    assert set.union(*ids) == {id(p) for p in model.parameters() if p.requires_grad}


def test_frozen_stages_stay_frozen_through_unfreeze(recs):
    learn = det_learner(loaders(recs), "retinanet", frozen_stages=1, num_convs=1, **SMALL)
    frozen = {k: p.clone() for k, p in learn.model.named_parameters() if not p.requires_grad}
    assert frozen
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.unfreeze()
        learn.fit(1, 1e-2)
    assert all(torch.equal(p, frozen[k]) for k, p in learn.model.named_parameters() if k in frozen)


def test_epoch_without_objects_stops(recs):
    dls = loaders(recs)
    learn = det_learner(dls, "retinanet", num_convs=1, **SMALL)
    dls.train.dataset.augs.append(type("Drop", (), dict(order=50, __call__=lambda s, o, rng: type(o)(o.image, id=o.id, orig_size=o.orig_size, scale=o.scale)))())
    dls.use_masks = False
    with learn.no_bar(), learn.no_logging(), pytest.raises(TrainingError, match="no object reached the loss"):
        learn.fit(1)


def test_loss_that_is_not_finite_stops_and_names_images(recs):
    learn = det_learner(loaders(recs), "retinanet", num_convs=1, **SMALL)
    with torch.no_grad():
        learn.model.head.cls.bias.fill_(float("nan"))
    w = learn.model.head.reg.weight.clone()
    with learn.no_bar(), learn.no_logging(), pytest.raises(TrainingError, match=r"'cls' is nan") as e:
        learn.fit(1)
    assert "id " in str(e.value) and ".png" in str(e.value)
    assert torch.equal(w, learn.model.head.reg.weight)


def test_masks_are_read_only_for_models_that_predict_them(recs):
    dls = loaders(recs)
    assert dls.use_masks
    det_learner(dls, "retinanet", num_convs=1, **SMALL)
    assert not dls.use_masks
    if "mask_rcnn" in list_models():
        learn = det_learner(dls, "mask_rcnn", **SMALL, **TINY["mask_rcnn"])
        assert dls.use_masks and "mask_AP" in learn.metrics.attrgot("name")


def test_ema_validates_and_stays(recs):
    seed_everything(0)
    learn = det_learner(loaders(recs), "retinanet", num_convs=1, ema=0.5, **SMALL)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
        valid = learn.recorder.values[-1][1]
        assert abs(learn.validate()[0] - valid) < 1e-5


def test_mismatches_are_errors(recs):
    dls = loaders(recs)
    learn = det_learner(dls, "retinanet", num_convs=1, **SMALL)
    other = loaders(recs, norm=None)
    with pytest.raises(ConfigError, match="normalised"):
        det_learner(other, learn.model)
    learn.model.vocab = learn.model.vocab[::-1]
    with pytest.raises(ConfigError, match="another order"):
        det_learner(dls, learn.model)


def test_workers_and_several_sets(recs):
    dls = DetDataLoaders.from_records(recs, dict(a=recs.subset([0, 1]), b=recs.subset([2])), resize=(96, 96), bs=3, num_workers=1, device="cpu")
    learn = det_learner(dls, "retinanet", num_convs=1, **SMALL)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert list(learn.validate_all().index) == ["a", "b"]


def test_augmented_images_are_not_evaluated(recs, capsys):
    learn = det_learner(loaders(recs), "retinanet", num_convs=1, **SMALL)
    with learn.no_bar(), learn.no_logging():
        row = dict(zip(["valid_loss", *learn.metrics.attrgot("name")], learn.validate(0)))
        assert row["AP"] != row["AP"] and "not computed on training images" in capsys.readouterr().out
        row = dict(zip(["valid_loss", *learn.metrics.attrgot("name")], learn.validate(dl=learn.dls.train_eval)))
        assert row["AP"] == row["AP"]
