"""The behaviours that MMDetection states for its residual networks and the other bodies: sizes, strides, frozen parts, refusals

Bodies are timm's networks, in the forms that detectors use, and visdet's own CSPDarknet, VGG and Darknet.
`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch
from torch import nn

from visdet.core.basics import CheckpointError, ConfigError
from visdet.nn.body import create_body
from visdet.nn.csp import CSPDarknet, CSPNeXt, csp_body
from visdet.nn.darknet import Darknet
from visdet.nn.vgg import SSDVGG

BEHAVIOURS = {
    "a stage keeps the size with stride 1 and halves it with stride 2": "test_stages",
    "avg_down puts a pooling into the shortcut": "test_deep_stem",
    "style: where the stride of a block is": "test_style",
    "a network of 20 layers is unknown": "test_refuses",
    "a style that does not exist is refused": "test_refuses",
    "weights that are no file are refused": "test_refuses",
    "a dilated last stage has no stride": "test_dilated",
    "frozen stages are in evaluation mode and do not learn": "test_frozen_stages",
    "norm_eval keeps batch norms still in training": "test_norm_eval",
    "ResNet-18 of a small image: 64, 128, 256, 512 channels": "test_resnet18",
    "ResNet-50: 256 to 2048 channels": "test_resnet50",
    "ResNetV1d has a stem of nine layers": "test_deep_stem",
    "the last norm of each block starts at zero": "test_last_norm_is_zero",
    "ResNeXt: 128 channels in 32 groups": "test_resnext",
    "Res2Net, RegNet, HRNet, EfficientNet: sizes": "test_sizes",
    "MobileNetV2 at 224 pixels": "test_mobilenet",
    "MobileNetV2 with half of the channels": "test_mobilenet_widths",
    "CSPDarknet P5 and P6": "test_cspdarknet",
    "CSPDarknet refuses stages that it has not": "test_csp_refuses",
}
WITHOUT = {
    "a norm of groups in ResNet": "timm's networks have batch norms",
    "plugins and deformable convolutions in blocks": "not here; the import of configurations refuses them",
    "num_stages, strides and dilations as lists of their own": "stages follow from the name, forms from words before it; see test_dilated",
    "with_cp": "activations are kept",
    "downsample_first": "belongs to HourglassNet, which is not here",
    "MobileNetV2 with twice the channels": "timm has no such network",
    "frozen_stages of MMDetection's count for CSPDarknet": "stages are counted by stride in every body",
}


def shapes(body, h=32, w=32, n=1, chans=3):
    body.eval()
    with torch.no_grad():
        return [tuple(o.shape[1:]) for o in body(torch.rand(n, chans, h, w))]


def squares(channels, sizes):
    return [(c, s, s) for c, s in zip(channels, sizes)]


def test_stages():
    net = create_body("resnet50").net
    x = torch.rand(1, 64, 56, 56)
    y = net.layer1(x)
    assert y.shape == (1, 256, 56, 56) and net.layer2(y).shape == (1, 512, 28, 28)
    assert [len(getattr(net, f"layer{i}")) for i in (1, 2, 3, 4)] == [3, 4, 6, 3]
    assert [b.downsample is None for b in net.layer2] == [False, True, True, True]


def test_style():
    for name, want in (("resnet50", ((1, 1), (2, 2))), ("caffe:resnet50", ((2, 2), (1, 1)))):
        b = create_body(name).net.layer2[0]
        assert (b.conv1.stride, b.conv2.stride) == want
    assert shapes(create_body("caffe:resnet50")) == shapes(create_body("resnet50"))


def test_refuses():
    with pytest.raises(ConfigError, match="unknown body 'resnet20'"):
        create_body("resnet20")
    with pytest.raises(ConfigError, match="form of a body"):
        create_body("tensorflow:resnet50")
    with pytest.raises(CheckpointError, match="no such file"):
        create_body("resnet18", weights="0")
    with pytest.raises(ConfigError, match="4 stages|stages"):
        create_body("resnet18", frozen_stages=6)
    with pytest.raises(ConfigError, match="no map of stride 64"):
        create_body("resnet18", out=(64,))


def test_dilated():
    b = create_body("dc5:resnet50", out=(4, 8, 16))
    assert b.strides == [4, 8, 16] and b.channels[-1] == 2048
    assert {o.dilation for o in b.net.layer4.modules() if isinstance(o, nn.Conv2d) and o.kernel_size == (3, 3)} == {(2, 2)}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_frozen_stages(n):
    b = create_body("resnet18", frozen_stages=n).train()
    learns = {k.split(".")[1] for k, p in b.named_parameters() if p.requires_grad}
    assert learns == {f"layer{i}" for i in range(n + 1, 5)}
    before = {k: v.clone() for k, v in b.state_dict().items()}
    b(torch.randn(4, 3, 64, 64))
    moved = {k.split(".")[1] for k, v in b.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == learns
    assert {id(p) for p in b.free_params()} == {id(p) for p in b.parameters() if p.requires_grad}


def test_norm_eval():
    b = create_body("resnet18", norm="frozen").train()
    before = {k: v.clone() for k, v in b.state_dict().items()}
    b(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    assert not any(isinstance(o, nn.BatchNorm2d) and o.training for o in b.modules())


def test_resnet18():
    assert shapes(create_body("resnet18")) == squares([64, 128, 256, 512], [8, 4, 2, 1])


def test_resnet50():
    assert shapes(create_body("resnet50")) == squares([256, 512, 1024, 2048], [8, 4, 2, 1])


def test_deep_stem():
    net = create_body("resnet50d").net
    assert len(net.conv1) + len([net.bn1, net.act1]) == 9
    down = net.layer2[0].downsample
    assert len(down) == 3 and isinstance(down[0], nn.AvgPool2d)


def test_last_norm_is_zero():
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        net = create_body(name).net
        assert all((getattr(b, last).weight == 0).all() for i in (1, 2, 3, 4) for b in getattr(net, f"layer{i}"))


def test_resnext():
    conv = create_body("resnext50_32x4d").net.layer1[0].conv2
    assert (conv.out_channels, conv.groups) == (128, 32)


@pytest.mark.parametrize(
    "name,channels",
    [
        ("det:res2net50d", [256, 512, 1024, 2048]),
        ("regnetx_004", [32, 64, 160, 384]),
        ("regnetx_032", [96, 192, 432, 1008]),
        ("det:hrnet_w18", [18, 36, 72, 144]),
        ("det:pvt_v2_b0", [32, 64, 160, 256]),
    ],
)
def test_sizes(name, channels):
    b = create_body(name)
    assert b.channels == channels and shapes(b, 64, 64) == squares(channels, [16, 8, 4, 2])


def test_efficientnet_sizes():
    b = create_body("tf_efficientnet_b0", out=(8, 16, 32))
    assert shapes(b, 64, 64) == squares([40, 112, 320], [8, 4, 2])


NODES = [*(f"blocks.{i}" for i in range(7)), "bn2"]


def test_mobilenet():
    b = create_body("mobilenetv2_100", NODES, None)
    assert shapes(b, 224, 224) == squares([16, 24, 32, 64, 96, 160, 320, 1280], [112, 56, 28, 14, 14, 7, 7, 7])


def test_mobilenet_widths():
    assert shapes(create_body("mobilenetv2_050", NODES, None), 224, 224) == squares([8, 16, 16, 32, 48, 80, 160, 1280], [112, 56, 28, 14, 14, 7, 7, 7])
    frozen = create_body("mobilenetv2_050", NODES, None, norm="frozen").train()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


@pytest.mark.parametrize("kind", [CSPDarknet, CSPNeXt])
def test_cspdarknet(kind):
    net = kind(0.33, 0.25, out=(1, 2, 3, 4))
    assert shapes(net, 64, 64) == squares([32, 64, 128, 256], [16, 8, 4, 2]) and net.stem(torch.rand(1, 3, 64, 64)).shape == (1, 16, 32, 32)
    assert shapes(kind(0.33, 0.25, out=(1, 2, 3, 4, 5), arch="P6"), 128, 128) == squares([32, 64, 128, 192, 256], [32, 16, 8, 4, 2])


def test_csp_refuses():
    for out in ((0,), (5,), ()):
        with pytest.raises(ConfigError, match="stages"):
            CSPDarknet(0.33, 0.25, out=out)
    with pytest.raises(ConfigError, match="stages"):
        create_body(csp_body(CSPDarknet(0.33, 0.25)).net, out=(8, 16, 32), frozen_stages=9)


def test_vgg_and_darknet():
    assert shapes(SSDVGG(), 300, 300) == squares([512, 1024], [38, 19])
    assert shapes(Darknet(), 64, 64) == squares([256, 512, 1024], [8, 4, 2])


def test_one_channel():
    for name in ("resnet18", "det:hrnet_w18_small", "det:pvt_v2_b0", "tf_efficientnet_b0"):
        b = create_body(name, out=(8, 16, 32), in_chans=1)
        assert len(shapes(b, 64, 64, chans=1)) == 3
