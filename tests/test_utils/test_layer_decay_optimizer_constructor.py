"""The behaviours that MMDetection states for LearningRateDecayOptimizerConstructor, with its figures

The constructor takes a model and gives an optimizer of torch; here `layer_decay` gives the groups for one,
`LayerSplitter` and the optimizer `layerwise` do the same in a `Learner`. `BEHAVIOURS` names the test of each behaviour,
`WITHOUT` what has no counterpart.
"""
import pytest
import torch
from torch import nn

from visdet.core.basics import ConfigError, seed_everything
from visdet.core.registry import lookup
from visdet.data.loaders import DetDataLoaders
from visdet.data.toy import toy_records
from visdet.engine.layer_decay import LayerSplitter, layer_decay, layer_ids, layerwise
from visdet.engine.learner import det_learner
from visdet.engine.optim import FusedAdamW
from visdet.engine.optimizers import adamw
from visdet.nn.body import create_body

BEHAVIOURS = {
    "twelve groups by stage: order, weight decay, rates": "test_groups[stage]",
    "twelve groups by layer": "test_groups[layer]",
    "biases and parameters of one dimension have no decay": "test_no_decay",
    "frozen parameters are in no group": "test_frozen",
    "a model wrapped as `module`": "test_wrapped",
    "rates are the base rate times the scale": "test_rates",
    "ids of ConvNeXt by stage and by layer": "test_ids",
    "a body without such layers is refused": "test_other_bodies",
}
WITHOUT = {
    "bodies other than ConvNeXt are not implemented": "every body with stages is counted by the same rule, see test_other_bodies",
}

STAGE = [(0, 128), (0, 1), (0.05, 64), (0, 64), (0.05, 32), (0, 32), (0.05, 16), (0, 16), (0.05, 8), (0, 8), (0.05, 128), (0.05, 1)]
LAYER = [*STAGE[:8], (0.05, 2), (0, 2), *STAGE[10:]]


class ConvNeXt(nn.Module):
    "Names of MMDetection's ConvNeXt: tokens, stages, norms, and what leads from stage to stage; one block a stage"

    def __init__(self, blocks=(1, 1, 1, 1)):
        super().__init__()
        one = lambda: nn.Parameter(torch.ones(1))  # noqa: E731
        self.cls_token, self.mask_token, self.pos_embed, self.stem_norm = one(), one(), one(), one()
        self.downsample_norm0, self.downsample_norm1, self.downsample_norm2 = (nn.BatchNorm2d(2) for _ in range(3))
        self.lin = one()
        self.lin.requires_grad = False
        self.stages = nn.ModuleList(nn.Sequential(*(nn.Conv2d(3, 4, 1) for _ in range(n))) for n in blocks)
        self.norm0 = nn.BatchNorm2d(2)
        self.downsample_layers = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 1)) for _ in range(4))


class Toy(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.backbone, self.head = ConvNeXt(**kw), nn.Conv2d(2, 2, 1)


def found(model, by, layers=6):
    return [(o["weight_decay"], o["lr"]) for o in layer_decay(model, 2.0, 1.0, 0.05, by, layers)]


@pytest.mark.parametrize("by,want", [("stage", STAGE), ("layer", LAYER)], ids=["stage", "layer"])
def test_groups(by, want):
    assert found(Toy(), by) == want
    opt = torch.optim.AdamW(layer_decay(Toy(), 2.0, 1.0, 0.05, by, 6), lr=1.0, weight_decay=0.05)
    assert [(o["weight_decay"], o["lr"]) for o in opt.param_groups] == want


@pytest.mark.parametrize("by", ["stage", "layer"])
def test_wrapped(by):
    assert found(nn.ModuleDict(dict(module=Toy())), by) == found(Toy(), by)


def test_no_decay():
    for g in layer_decay(Toy(), 0.9):
        assert all((p.ndim <= 1 or n.endswith("bias")) == (g["weight_decay"] == 0) for n, p in zip(g["names"], g["params"]))


def test_frozen():
    m = Toy()
    names = [n for g in layer_decay(m, 0.9) for n in g["names"]]
    assert len(names) == len(set(names)) and set(names) == {k for k, p in m.named_parameters() if p.requires_grad} and "backbone.lin" not in names


@pytest.mark.parametrize("lr", [1.0, 1e-4])
def test_rates(lr):
    for g in layer_decay(Toy(), 0.7, lr):
        assert g["lr"] == lr * g["lr_scale"]
    scales = {g["lr_scale"] for g in layer_decay(Toy(), 0.7, lr)}
    assert max(scales) == 1 and min(scales) == pytest.approx(0.7**5)


def test_ids():
    "ConvNeXt-T and ConvNeXt-B, whose third stages have 9 and 27 blocks"
    for n, last in ((9, 6), (27, 12)):
        m = Toy(blocks=(3, 3, n, 3))
        ids, end = layer_ids(m, "layer")
        assert end == last + 1 and layer_ids(m, "layer", last) == (ids, end)
        stage = lambda i: [ids[f"backbone.stages.{i}.{b}.weight"] for b in range((3, 3, n, 3)[i])]  # noqa: E731
        assert stage(0) == [1] * 3 and stage(1) == [2] * 3 and stage(2) == [3 + b // 3 for b in range(n)] and stage(3) == [last] * 3
        assert [ids[f"backbone.downsample_layers.{i}.0.weight"] for i in range(4)] == [0, 2, 3, last]
        assert ids["backbone.cls_token"] == 0 and ids["backbone.norm0.weight"] == ids["head.weight"] == ids["backbone.stem_norm"] == last + 1
        ids, end = layer_ids(m, "stage")
        assert end == 5 and [ids[f"backbone.stages.{i}.0.weight"] for i in range(4)] == [1, 2, 3, 4]
        assert {ids[f"backbone.downsample_layers.{i}.0.weight"] for i in range(4)} == {0}


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224", "resnet18", "regnetx_002", "efficientnet_b0", "pvt_v2_b0"])
@pytest.mark.parametrize("by", ["stage", "layer"])
def test_other_bodies(name, by):
    "The stem comes first, numbers rise along the body, nothing but norms shares the head's"
    m = nn.ModuleDict(dict(body=create_body(name), head=nn.Conv2d(3, 4, 1)))
    ids, last = layer_ids(m, by)
    assert sorted(set(ids.values())) == list(range(last + 1))
    body = [v for k, v in ids.items() if k.startswith("body") and v <= last and "downsample" not in k]
    assert body == sorted(body) and body[0] == 0
    assert all("norm" in k for k, v in ids.items() if v == last and k.startswith("body"))


def test_body_without_stages():
    with pytest.raises(ConfigError, match="stages"):
        layer_ids(nn.ModuleDict(dict(body=create_body("vgg11"))))
    with pytest.raises(ConfigError, match="at least 12"):
        layer_decay(Toy(blocks=(3, 3, 27, 3)), layers=6)


@pytest.fixture(scope="module")
def dls(tmp_path_factory):
    recs = toy_records(4, tmp_path_factory.mktemp("toy"), seed=1)
    return DetDataLoaders.from_records(recs, recs, resize=(64, 64), bs=2, num_workers=0, device="cpu", aug=None)


def learner(dls, **kw):
    seed_everything(0)
    return det_learner(dls, "retinanet", body="test_convnext", channels=16, num_convs=1, metrics=None, ema=False, precision="fp32", **kw)


@pytest.mark.parametrize("how", ["splitter", "optimizer"])
def test_learner(dls, how):
    "With a decay that is almost nothing the stem stands still while the head learns, whatever the schedule says"
    kw = dict(splitter=LayerSplitter(1e-3, "stage")) if how == "splitter" else dict(opt_func=layerwise(adamw(lr=1e-3), 1e-3, "stage"))
    learn = learner(dls, **kw)
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
    moved = {k: float((v.detach() - before[k].detach()).abs().max()) for k, v in learn.model.named_parameters()}
    assert max(moved["head.cls.weight"], moved["head.reg.weight"]) > 1e-3
    assert max(v for k, v in moved.items() if "stem" in k) < 1e-9 < min(v for k, v in moved.items() if k.startswith("head"))
    assert {round(h["lr"], 12) for h in learn.opt.hypers} == {round(learn.opt.hypers[-1]["lr"], 12)}


def test_freeze(dls, tmp_path):
    "freeze stops all groups of the body and nothing else; the state of the optimizer comes back"
    learn = learner(dls, opt_func=lookup("optimizer", "layerwise")(decay=0.5), path=tmp_path)
    learn.freeze()
    assert not any(p.requires_grad for p in learn.model.body.parameters() if p.ndim > 1)
    assert all(p.requires_grad for m in (learn.model.neck, learn.model.head) for p in m.parameters())
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3)
        learn.save("a")
        again = learner(dls, opt_func=lookup("optimizer", "layerwise")(decay=0.5), path=tmp_path)
        again.load("a")
        again.fit(1)
    assert len(again.opt.hypers) == len(learn.opt.hypers)


def test_one_splitter_each(dls):
    "The same optimizer function may serve several learners; two splitters for one are refused"
    f = layerwise(None, 0.5)
    a, b = learner(dls, opt_func=f), learner(dls, opt_func=f)
    assert a.splitter is not b.splitter and a.splitter.decay == 0.5
    with pytest.raises(ConfigError, match="another one"):
        learner(dls, opt_func=f, splitter=LayerSplitter(0.9))
    assert learner(dls, opt_func=FusedAdamW).opt_func is FusedAdamW
