"""The behaviours that MMDetection states for necks: sizes and channels of the levels, and arguments that are refused

There several sizes are compared without an assertion, and for `start_level=1` with the wrong numbers; here they are asserted as they are.
A body hands over the maps that a neck takes, so the first and the last level are chosen there (`out`) and not in the neck.
`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.nn.bfp import BFP
from visdet.nn.channel_mapper import ChannelMapper
from visdet.nn.ct_neck import CTResNetNeck
from visdet.nn.dilated import DilatedEncoder
from visdet.nn.dyhead import DyHead
from visdet.nn.fpn import FPN
from visdet.nn.hr_fpn import HRFPN
from visdet.nn.nas_fpn import NASFPN
from visdet.nn.pan import PAFPN
from visdet.nn.ssd_neck import SSDNeck
from visdet.nn.yolo_neck import YOLOV3Neck
from visdet.nn.yolox_neck import CSPNeXtPAFPN, YOLOXPAFPN

BEHAVIOURS = {
    "five levels from the maps of 64, 32, 16 and 8 cells": "test_fpn_levels",
    "from the second map on: 32, 16, 8, 4 and 2 cells": "test_fpn_from_the_second_map",
    "fewer levels than maps are refused": "test_fpn_refuses",
    "another word for added levels is refused": "test_fpn_refuses",
    "as many levels as maps: none is added": "test_fpn_without_added_levels",
    "added levels from input, lateral and output have convolutions of stride 2": "test_fpn_added_levels",
    "added levels by pooling have no weights": "test_fpn_pooled_levels",
    "norms on lateral convolutions can be left out": "test_fpn_norms",
    "maps are enlarged by repetition or bilinearly": "test_fpn_enlarges",
    "channel mapper: channels at unchanged sizes, added levels halve": "test_channel_mapper",
    "channel mapper: a number for the channels and another number of maps are refused": "test_channel_mapper_refuses",
    "YOLOv3: each level has its channels, whatever they are": "test_yolov3",
    "YOLOv3: lists of unequal length are refused": "test_yolov3_refuses",
    "SSD: 16, 8 and 6 cells": "test_ssd",
    "SSD: lists of unequal length are refused": "test_ssd_refuses",
    "dilated encoder: one map of the same size": "test_dilated_encoder",
    "YOLOX and CSPNeXt pyramids: one width at unchanged sizes": "test_csp_pyramids",
    "dynamic head keeps sizes": "test_dyhead",
    "CenterNet's neck enlarges eightfold": "test_ct_neck",
    "NAS-FPN gives five levels": "test_nas_fpn",
    "balanced and high-resolution pyramids keep and make sizes": "test_bfp_and_hrfpn",
}
WITHOUT = {
    "start_level and end_level of a neck, with their errors": "the maps are chosen by `out` of the body; a stride that the body lacks is refused there",
    "add_extra_convs=True": "the four ways have names; the import of configurations reads True as on_input",
    "in_channels that are a tuple": "any sequence will do",
    "scale_factor 2 of the enlargement": "a map always gets the size of the finer one, which is the same where sizes double and also right where they do not",
    "FPG, RFP, SSH, FPN_CARAFE, FPN_DropBlock and NASFCOS_FPN": "not here",
}

CS, SIZES = [8, 16, 32, 64], [64, 32, 16, 8]


def maps(channels=CS, sizes=SIZES, grad=False):
    return [torch.randn(1, c, s, s, generator=torch.Generator().manual_seed(s)).requires_grad_(grad) for c, s in zip(channels, sizes)]


def shapes(ys):
    return [tuple(y.shape[1:]) for y in ys]


def squares(channels, sizes):
    return [(c, s, s) for c, s in zip(channels, sizes)]


def learns(neck, xs):
    "Every weight and every map has a finite gradient"
    sum(y.square().mean() for y in neck(xs)).backward()
    return all(o.grad is not None and bool(o.grad.isfinite().all()) for o in (*neck.parameters(), *xs))


@pytest.mark.parametrize("kind", [FPN, PAFPN])
@pytest.mark.parametrize("extra", ["pool", "on_input", "on_lateral", "on_output"])
def test_fpn_levels(kind, extra):
    neck = kind(CS, [4, 8, 16, 32], 8, 5, extra)
    assert shapes(neck(maps())) == squares([8] * 5, [64, 32, 16, 8, 4])
    assert neck.strides == [4, 8, 16, 32, 64] and neck.channels == [8] * 5


@pytest.mark.parametrize("extra", ["pool", "on_input", "on_lateral", "on_output"])
def test_fpn_from_the_second_map(extra):
    neck = FPN(CS[1:], [8, 16, 32], 8, 5, extra)
    assert shapes(neck(maps()[1:])) == squares([8] * 5, [32, 16, 8, 4, 2])
    assert learns(neck, maps(grad=True)[1:])


def test_fpn_refuses():
    for n in (1, 2):
        with pytest.raises(ConfigError, match="less than"):
            FPN(CS[1:], [8, 16, 32], 8, n)
    with pytest.raises(ConfigError, match="did you mean 'on_output'"):
        FPN(CS, [4, 8, 16, 32], 8, 5, "on_outputs")


def test_fpn_without_added_levels():
    for extra in ("pool", "on_input", "on_lateral", "on_output"):
        neck = FPN(CS, [4, 8, 16, 32], 8, 4, extra)
        assert len(neck.more) == 0 and shapes(neck(maps())) == squares([8] * 4, SIZES)


def test_fpn_added_levels():
    for extra, ni in (("on_input", 64), ("on_lateral", 8), ("on_output", 8)):
        neck = FPN(CS, [4, 8, 16, 32], 8, 6, extra)
        assert [(o.conv.in_channels, o.conv.stride) for o in neck.more] == [(ni, (2, 2)), (8, (2, 2))]


def test_fpn_pooled_levels():
    neck = FPN(CS, [4, 8, 16, 32], 8, 5)
    ys = neck(maps())
    assert len(neck.more) == 0 and torch.equal(ys[4], ys[3][..., ::2, ::2])


def test_fpn_norms():
    neck = FPN(CS, [4, 8, 16, 32], 8, 5, "on_output", norm="bn", lateral_norm=False)
    assert [len(o) for o in (neck.lateral[0], neck.smooth[0], neck.more[0])] == [1, 2, 2]
    assert neck.lateral[0].conv.bias is not None and neck.smooth[0].conv.bias is None
    assert len(FPN(CS, [4, 8, 16, 32], 8, 5, norm="bn").lateral[0]) == 2


def test_fpn_enlarges():
    a = FPN(CS, [4, 8, 16, 32], 8, 5)
    b = FPN(CS, [4, 8, 16, 32], 8, 5, upsample="bilinear")
    b.load_state_dict(a.state_dict())
    x, y = a(maps()), b(maps())
    assert shapes(x) == shapes(y) and [bool((p != q).any()) for p, q in zip(x, y)] == [True, True, True, False, False]


def test_channel_mapper():
    assert shapes(ChannelMapper(CS, [4, 8, 16, 32], 8, kernel=3)(maps())) == squares([8] * 4, SIZES)
    assert shapes(ChannelMapper(CS, [4, 8, 16, 32], 8, 6)(maps())) == squares([8] * 6, [64, 32, 16, 8, 4, 2])


def test_channel_mapper_refuses():
    with pytest.raises((ConfigError, TypeError)):
        ChannelMapper(10, [4], 8)
    for kind in (ChannelMapper, FPN, PAFPN):
        with pytest.raises(ValueError, match="zip"):
            kind(CS, [4, 8, 16, 32], 8)(maps()[:2])


@pytest.mark.parametrize("ins,outs", [([4, 8, 16], [2, 4, 8]), ([16, 8, 32], [5, 21, 19])])
def test_yolov3(ins, outs):
    sizes = [32, 16, 8]
    neck = YOLOV3Neck(ins, [8, 16, 32], outs)
    assert shapes(neck(maps(ins, sizes))) == squares(outs, sizes)
    assert learns(neck, maps(ins, sizes, True))


def test_yolov3_refuses():
    for ins, strides, outs in (([4, 8], [8, 16], [4]), ([4], [8, 16], [4, 4])):
        with pytest.raises(ConfigError, match="one of each"):
            YOLOV3Neck(ins, strides, outs)


def test_ssd():
    neck = SSDNeck([4], [8], [8, 16], [2, 1], [1, 0])
    ys = neck([torch.rand(1, 4, 16, 16)])
    assert shapes(ys) == squares([4, 8, 16], [16, 8, 6])
    assert torch.allclose(ys[0].norm(dim=1), torch.tensor(20.0))
    assert shapes(SSDNeck([4], [8], [8, 16], [2, 1], [1, 0], None, depthwise=True, norm="bn", act="relu6")([torch.rand(2, 4, 16, 16)])) == squares([4, 8, 16], [16, 8, 6])


def test_ssd_refuses():
    for strides, pads in (([2], [1, 0]), ([2, 1], [1])):
        with pytest.raises(ConfigError, match="one of each"):
            SSDNeck([4], [8], [8, 16], strides, pads)


def test_dilated_encoder():
    neck = DilatedEncoder([16], [32], 32, 8)
    assert shapes(neck([torch.rand(1, 16, 34, 34)])) == [(32, 34, 34)]


@pytest.mark.parametrize("kind", [YOLOXPAFPN, CSPNeXtPAFPN])
@pytest.mark.parametrize("depthwise", [False, True])
def test_csp_pyramids(kind, depthwise):
    neck = kind([8, 16, 32], [8, 16, 32], 24, 1, depthwise)
    assert shapes(neck(maps([8, 16, 32], [64, 32, 16]))) == squares([24] * 3, [64, 32, 16])


def test_dyhead():
    neck = DyHead([8] * 3, [8, 16, 32], 16, 2)
    assert shapes(neck(maps([8] * 3, [16, 8, 4]))) == squares([16] * 3, [16, 8, 4])
    assert learns(DyHead([8] * 3, [8, 16, 32], 16, 1, False), maps([8] * 3, [16, 8, 4], True))


@pytest.mark.parametrize("deform", [False, True])
def test_ct_neck(deform):
    neck = CTResNetNeck([16], [32], [8, 8, 4], [4, 4, 4], deform)
    assert shapes(neck([torch.rand(1, 16, 4, 4)])) == [(4, 32, 32)] and neck.strides == [4]
    with pytest.raises(ConfigError, match="kernels"):
        CTResNetNeck([16], [32], [8, 8], [4])


def test_nas_fpn():
    assert shapes(NASFPN(CS[1:], [8, 16, 32], 8, 2)(maps()[1:])) == squares([8] * 5, [32, 16, 8, 4, 2])
    with pytest.raises(ConfigError, match="five levels"):
        NASFPN([8] * 6, [4, 8, 16, 32, 64, 128])


def test_bfp_and_hrfpn():
    assert shapes(BFP([8] * 4, [4, 8, 16, 32], 2, "non_local")(maps([8] * 4))) == squares([8] * 4, SIZES)
    assert shapes(HRFPN(CS, [4, 8, 16, 32], 8)(maps())) == squares([8] * 5, [64, 32, 16, 8, 4])
