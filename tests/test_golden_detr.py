"Deformable DETR and DINO as a whole against figures recorded from MMDetection: keys, maps, raw outputs, detections, loss terms, gradients"
import copy
import functools

import pytest
import torch

from golden import ROOT, DetectorCase, detectors
from visdet.core.basics import ConfigError
from visdet.data.targets import make_targets
from visdet.models.certificate import certificate, compare_golden
from visdet.models.mmdet import load_mmdet, mmdet_args
from visdet.models.mmdet_keys import key_table, to_mmdet
from visdet.models.mmdet_query import query_outputs

NAMES = "deformable-detr", "dino"
TOL = 2e-5


@functools.cache
def loaded(name):
    "The model with its weights, the normalised image, the image's size and what the model says of it"
    torch.set_num_threads(1)
    case = DetectorCase(name)
    model = load_mmdet(case.config, case.state(), dropout=0.0)
    x = (case.image()[None].float() / 255 - torch.tensor(model.norm[0])[:, None, None]) / torch.tensor(model.norm[1])[:, None, None]
    sizes = case.array("in0.img_shape")[None]
    with torch.no_grad():
        return model, x, sizes, model(x, sizes=sizes)


def ours(name):
    "A loss term of MMDetection in visdet's words"
    return name.replace("loss_", "").replace("bbox", "box")


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_keys(case):
    model = loaded(case.id)[0]
    assert not model.mmdet_report.problems()
    back, state = to_mmdet(model), case.state()
    assert set(back) == set(state)
    for k, v in state.items():
        assert torch.equal(back[k], v), k


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_maps(case):
    model, x, _, _ = loaded(case.id)
    with torch.no_grad():
        maps = model.body(x)
        for i, o in enumerate(maps):
            case.check(f"eval.backbone#0.{i}", o, TOL)
        for i, o in enumerate(model.neck(maps)):
            case.check(f"eval.neck#0.{i}", o, TOL)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_raw(case):
    model, x, _, raw = loaded(case.id)
    case.check("eval.bbox_head#0.0", torch.stack(raw["cls"]), TOL)
    case.check("eval.bbox_head#0.1", torch.stack(raw["reg"]), TOL)
    with torch.no_grad():
        for k, v in query_outputs(model, model.features(x), x).items():
            case.check(f"eval.{k}", v, TOL)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_predictions(case):
    "As sets: neighbours with almost equal scores may change places"
    model, x, sizes, raw = loaded(case.id)
    d = model.decode(raw, sizes)[0]
    b, s, c = (case.array(f"pred.own.0.{k}") for k in ("bboxes", "scores", "labels"))
    assert len(d) == len(s)
    assert (d.scores - s).abs().max() <= TOL
    cost = torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()
    near, row = cost.min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.05


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_losses_and_gradients(case):
    model, x, sizes, _ = loaded(case.id)
    t = make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], sizes)
    was = {m: m.training for m in model.modules()}
    try:
        model.train().zero_grad()
        terms = model.loss(model(x, t), t)
        sum(terms.values()).backward()
        assert set(terms) == {ours(k) for k in case.doc["loss_terms"]}
        for k, v in case.doc["loss_terms"].items():
            assert terms[ours(k)].item() == pytest.approx(v, rel=TOL), k
        theirs = {}
        for r in key_table(model):
            theirs.setdefault(r.mine, r.theirs)
        norms = {theirs[k]: float(p.grad.norm()) for k, p in model.named_parameters() if p.grad is not None}
        want = dict(zip(case.doc["grad_names"], case.array("grad.norms").tolist()))
        top = max(want.values())
        assert {k for k, v in want.items() if v} <= set(norms)
        for k, v in want.items():
            assert norms.get(k, 0.0) == pytest.approx(v, rel=2e-3, abs=1e-6 * top), k
    finally:
        model.zero_grad()
        for m, mode in was.items():
            m.training = mode


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_certificate(case):
    c = certificate(loaded(case.id)[0], golden=case._file.with_suffix(".npz"))
    assert c.ok and len(c["outputs"]) == 12 and c["worst"] <= TOL


@pytest.mark.parametrize("case", detectors("dino"))
def test_broken_weights_are_seen(case):
    def worst(config, state):
        return max(o["relative"] for o in compare_golden(load_mmdet(config, state), case._file.with_suffix(".npz")).values())

    state = case.state()
    k = "decoder.layers.2.cross_attn.sampling_offsets.bias"
    wrong = {**case.config, "positional_encoding": {**case.config["positional_encoding"], "offset": 0.25}}
    assert worst(case.config, {**state, k: state[k].flip(0)}) > 1e-3
    assert worst(wrong, state) > 1e-3


@pytest.mark.skipif(not ROOT.is_dir(), reason="the recorded figures are not here: set VISDET_GOLDEN")
def test_five_levels_over_a_large_body():
    "The section of DINO's largest published model: five levels, Swin-L with windows of twelve"
    c = copy.deepcopy(DetectorCase("dino").config)
    c.update(num_queries=900, num_feature_levels=5)
    body = dict(type="SwinTransformer", pretrain_img_size=384, embed_dims=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12, mlp_ratio=4, qkv_bias=True)
    c["backbone"] = dict(**body, qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.2, patch_norm=True, out_indices=(0, 1, 2, 3), with_cp=True, convert_weights=True)
    c["neck"].update(in_channels=[192, 384, 768, 1536], num_outs=5)
    for k, n in (("encoder", "self_attn_cfg"), ("decoder", "cross_attn_cfg")):
        c[k]["layer_cfg"][n]["num_levels"] = 5
    name, kw, fates = mmdet_args(c)
    assert name == "dino" and not [o for o in fates if o.effect]
    assert kw["body"] == "det+drop=0.2:swin_large_patch4_window12_384" and kw["out"] == [4, 8, 16, 32] and kw["levels"] == 5
    c["decoder"]["layer_cfg"]["cross_attn_cfg"]["num_levels"] = 4
    with pytest.raises(ConfigError, match="num_levels"):
        mmdet_args(c)
