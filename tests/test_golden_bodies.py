"Bodies in the forms that detectors use, against figures recorded from MMDetection"
import types

import pytest
import torch

from golden import cases
from visdet.models.mmdet import load_mmdet, mmdet_args, to_mmdet
from visdet.models.mmdet_keys import KeyRow, _body_rules, _expand
from visdet.models.mmdet_model import body_name
from visdet.models.zoo import create_model
from visdet.nn.body import create_body
from visdet.nn.darknet import Darknet, darknet_body
from visdet.nn.vgg import SSDVGG, vgg_body

EFFICIENT = {"b" + str(i): f"tf_efficientnet_b{i}" for i in range(9)}
PVT = {(32, (2, 2, 2, 2)): "b0", (64, (2, 2, 2, 2)): "b1", (64, (3, 4, 6, 3)): "b2", (64, (3, 4, 18, 3)): "b3", (64, (3, 8, 27, 3)): "b4", (64, (3, 6, 40, 3)): "b5"}
MOBILE = [*(f"blocks.{i}" for i in range(7)), "bn2"]


def build(args):
    "The body that an MMDetection backbone is"
    t, out = args["type"], args.get("out_indices")
    if t == "SSDVGG":
        return vgg_body(SSDVGG(args["depth"], tuple(args["out_feature_indices"]), args.get("ceil_mode", True)))
    if t == "Darknet":
        return darknet_body(Darknet(args["depth"], tuple(out or (3, 4, 5))))
    if t == "MobileNetV2":
        return create_body(f"mobilenetv2_{round(100 * args.get('widen_factor', 1)):03d}", [MOBILE[i] for i in out or (1, 2, 4, 7)], None)
    if t == "EfficientNet":
        return create_body(EFFICIENT[args["arch"]], out=tuple(2**i for i in out))
    if t == "HRNet":
        return create_body(f"det:hrnet_w{args['extra']['stage4']['num_channels'][0]}")
    if t == "PyramidVisionTransformerV2":
        b = create_body(f"det:pvt_v2_{PVT[args['embed_dims'], tuple(args['num_layers'])]}", out=tuple(4 * 2**i for i in out or range(4)))
        return b
    words, name = [], body_name(args)
    if args.get("style") == "caffe" and args["depth"] >= 50:
        words.append("caffe")
    if args.get("dilations") == [1, 1, 1, 2]:
        words.append("dc5")
    if t in ("SwinTransformer", "Res2Net"):
        words.append("det")
    body = create_body(("+".join(words) + ":" if words else "") + name, out=None)
    maps = [i for i in range(len(body.strides)) if body.strides[i] >= 4][-4:]
    body.idx = [maps[i] for i in out]
    body._nhwc = [body._nhwc[i] for i in body.idx]
    return body


def fill(body, state):
    "Weights of MMDetection into the body; every one of them must have a place"
    rules, got, used = _body_rules(body.net)[0], {}, set()
    for k, v in body.net.state_dict().items():
        (t,), how = _expand(k, rules, types.SimpleNamespace(body=body))
        got[k] = KeyRow(t, k, how).take(state[t], v)
        used.add(t)
    assert {k for k in set(state) - used if not k.endswith("num_batches_tracked")} == set()
    body.net.load_state_dict(got)


KINDS = "ResNet", "ResNeXt", "SwinTransformer", "RegNet", "Res2Net", "HRNet", "MobileNetV2", "PyramidVisionTransformerV2", "EfficientNet", "SSDVGG", "Darknet"


@pytest.mark.parametrize("case", cases("bodies", *KINDS))
def test_body(case):
    body = build(case.args).eval()
    fill(body, case.state())
    x = case.inputs()[0].requires_grad_()
    ys = body(x)
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    assert not case.has(f"out.level.{len(ys)}.shape")
    sum(y.square().mean() for y in ys).backward()
    case.check("grad.0", x.grad, 1e-4)


def test_every_recorded_body_is_tested():
    from golden import ROOT, _group

    if not ROOT.is_dir():
        pytest.skip("the recorded figures are not here: set VISDET_GOLDEN")
    assert {c.component for c in _group("bodies")} <= {*KINDS, "CSPDarknet", "CSPNeXt"}


RETINA = dict(
    type="RetinaNet",
    neck=dict(type="FPN", in_channels=[8], out_channels=32, num_outs=5, add_extra_convs="on_input"),
    bbox_head=dict(type="RetinaHead", num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1, anchor_generator=dict(type="AnchorGenerator", octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128])),
)
FURTHER = dict(
    pvt=dict(type="PyramidVisionTransformerV2", embed_dims=32, num_layers=[2, 2, 2, 2], drop_path_rate=0.0),
    efficient=dict(type="EfficientNet", arch="b0", out_indices=[3, 4, 5], norm_cfg=dict(type="BN", eps=0.001, momentum=0.01)),
    mobile=dict(type="MobileNetV2", out_indices=[2, 4, 6], widen_factor=0.5),
    mobile_last=dict(type="MobileNetV2", out_indices=[2, 4, 7], norm_cfg=dict(type="BN", eps=0.001)),
)


@pytest.mark.parametrize("kind", FURTHER)
def test_a_detector_comes_over_with_its_body(kind):
    "Section and weights, in a checkpoint that was made here"
    config = {**RETINA, "backbone": FURTHER[kind], "neck": {**RETINA["neck"], "start_level": 1 if kind == "pvt" else 0}}
    name, kw, fates = mmdet_args(config)
    assert [o.key for o in fates if o.effect and not o.key.endswith("assigner")] == []
    a = create_model(name, **kw).eval()
    state = to_mmdet(a, bgr=False)
    b = load_mmdet(config, state).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for p, q in zip(a(x)["cls"], b(x)["cls"]):
            assert torch.allclose(p, q)
