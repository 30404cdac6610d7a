"Necks against figures recorded from MMDetection"
import re

import pytest
import torch

from golden import cases
from visdet.nn.bfp import BFP
from visdet.nn.ct_neck import CTResNetNeck
from visdet.nn.dilated import DilatedEncoder
from visdet.nn.dyhead import DyHead
from visdet.nn.channel_mapper import ChannelMapper
from visdet.nn.fpn import FPN
from visdet.nn.hr_fpn import HRFPN
from visdet.nn.nas_fpn import NASFPN
from visdet.nn.pan import PAFPN
from visdet.nn.ssd_neck import SSDNeck
from visdet.nn.yolo_neck import YOLOV3Neck

NAMES = {"lateral_convs": "lateral", "fpn_convs": "smooth", "downsample_convs": "down", "pafpn_convs": "again"}


def renamed(state, n):
    "MMDetection's keys of a pyramid over `n` maps as visdet's"
    out = {}
    for k, v in state.items():
        part, i, rest = k.split(".", 2)
        name, i = ("more", int(i) - n) if part == "fpn_convs" and int(i) >= n else (NAMES[part], int(i))
        out[f"{name}.{i}.{rest.replace('gn.', 'norm.').replace('bn.', 'norm.')}"] = v
    return out


def norm_of(a):
    "The norm that MMDetection's `norm_cfg` asks for"
    cfg = dict(a.get("norm_cfg") or {})
    kind = cfg.pop("type", None)
    cfg.pop("requires_grad", None)
    if kind == "GN":
        return lambda c: torch.nn.GroupNorm(num_channels=c, **cfg)
    return None if kind is None else lambda c: torch.nn.BatchNorm2d(c, **cfg)


@pytest.mark.parametrize("case", cases("necks", "FPN", "PAFPN"))
def test_pyramid(case):
    a = dict(case.args)
    start, extra = a.get("start_level", 0), a.get("add_extra_convs") or "pool"
    norm = norm_of(a)
    end = a.get("end_level", -1)
    end = len(a["in_channels"]) if end in (-1, len(a["in_channels"]) - 1) else end + 1
    cs = a["in_channels"][start:end]
    more = {"act": {"ReLU": "relu", "SiLU": "silu", "Swish": "silu", "LeakyReLU": "lrelu"}[a["act_cfg"]["type"]]} if a.get("act_cfg") else {}
    mode = a.get("upsample_cfg", {}).get("mode", "nearest")
    extra = {True: "on_input"}.get(extra, extra)
    neck = {"FPN": FPN, "PAFPN": PAFPN}[case.component](
        cs, [4 * 2 ** (start + i) for i in range(len(cs))], a["out_channels"], a["num_outs"], extra, a.get("relu_before_extra_convs", False), norm, mode, not a.get("no_norm_on_lateral", False), **more
    )
    neck.load_state_dict(renamed(case.state(), len(cs)))
    xs = [o.requires_grad_() for o in case.inputs()]
    ys = neck.eval()(xs[start:end])
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    sum(y.square().mean() for y in ys).backward()
    for i, x in enumerate(xs):
        case.check(f"grad.{i}", torch.zeros_like(x) if x.grad is None else x.grad)


@pytest.mark.parametrize("case", cases("necks", "ChannelMapper"))
def test_channel_mapper(case):
    a = dict(case.args)
    kind = a.get("norm_cfg") or {}
    assert kind.get("type") in (None, "GN", "BN")
    norm = {"GN": lambda c: torch.nn.GroupNorm(kind["num_groups"], c), "BN": "bn", None: None}[kind.get("type")]
    act = "relu" if a.get("act_cfg", {"type": "ReLU"}) else None
    bias = None if a.get("bias", "auto") == "auto" else a["bias"]
    cs = a["in_channels"]
    neck = ChannelMapper(cs, [8 * 2**i for i in range(len(cs))], a["out_channels"], a.get("num_outs"), a.get("kernel_size", 3), norm, act, bias)
    neck.load_state_dict({k.replace("gn.", "norm.").replace("bn.", "norm."): v for k, v in case.state().items()})
    xs = [o.requires_grad_() for o in case.inputs()]
    ys = neck.eval()(xs)
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    sum(y.square().mean() for y in ys).backward()
    for i, x in enumerate(xs):
        case.check(f"grad.{i}", torch.zeros_like(x) if x.grad is None else x.grad)


NORM = (r"\.(bn|gn)\.", ".norm.")


def bfp(a):
    return BFP([a["in_channels"]] * a["num_levels"], [4 * 2**i for i in range(a["num_levels"])], a.get("refine_level", 2), a.get("refine_type"), norm_of(a)), [(r"refine\.conv_out\.", "refine.out."), NORM]


def nas(a):
    start, names = a.get("start_level", 0), {"gp_64_4": "a", "sum_44_4": "b", "sum_43_3": "p3", "sum_34_4": "p4", "sum_55_5": "p5", "sum_77_7": "p7", "gp_75_6": "p6"}
    rules = [(r"lateral_convs", "lateral"), (r"extra_downsamples\.(\d+)\.0", r"more.\1"), (r"fpn_stages", "stacks"), *((rf"\.{k}\.out_conv", f".{v}.out") for k, v in names.items()), NORM]
    cs = a["in_channels"][start:]
    return NASFPN(cs, [4 * 2 ** (start + i) for i in range(len(cs))], a["out_channels"], a["stack_times"], norm_of(a)), rules


def hr(a):
    pool = {"AVG": "mean", "MAX": "max"}[a.get("pooling_type", "AVG")]
    n = len(a["in_channels"])
    return HRFPN(a["in_channels"], [4 * 2**i for i in range(n)], a["out_channels"], a.get("num_outs", 5), pool, a.get("stride", 1)), [("reduction_conv", "mix"), ("fpn_convs", "smooth")]


def dyhead(a, n=4):
    rules = [(r"dyhead_blocks", "blocks"), (r"spatial_conv_(high|mid|low)\.conv", r"\1.0"), (r"spatial_conv_(high|mid|low)\.norm", r"\1.1"), ("spatial_conv_offset", "places")]
    rules += [(r"scale_attn_module\.1", "level"), (r"task_attn_module\.conv(\d)\.conv", r"channel.conv\1")]
    return DyHead([a["in_channels"]] * n, [8 * 2**i for i in range(n)], a["out_channels"], a.get("num_blocks", 6), a.get("zero_init_offset", True)), rules


def yolo(a):
    n, five = a["num_scales"], lambda m: f"blocks.{a['num_scales'] - int(m[1])}.{int(m[2]) - 1}."
    rules = [(r"^detect(\d)\.conv(\d)\.", five), (r"^conv(\d)\.", lambda m: f"up.{n - 1 - int(m[1])}."), NORM]
    return YOLOV3Neck(a["in_channels"][::-1], [8 * 2**i for i in range(n)], a["out_channels"][::-1]), rules


def dilated(a):
    rules = [(r"(lateral|fpn)_conv\.", lambda m: f"{FINE[m[1]]}.conv."), (r"(lateral|fpn)_norm\.", lambda m: f"{FINE[m[1]]}.norm."), (r"dilated_encoder_blocks\.(\d+)\.conv(\d)\.", lambda m: f"blocks.{m[1]}.{int(m[2]) - 1}."), NORM]
    return DilatedEncoder([a["in_channels"]], [32], a["out_channels"], a["block_mid_channels"], a["block_dilations"]), rules


FINE = {"lateral": "lateral", "fpn": "smooth"}


def ssd(a):
    n = len(a["in_channels"])
    act = {"ReLU": "relu", "ReLU6": "relu6"}[(a.get("act_cfg") or {"type": "ReLU"})["type"]]
    rules = [(r"l2_norm", "length"), (r"extra_layers", "more"), (r"depthwise_conv", "0"), (r"pointwise_conv", "1"), NORM]
    neck = SSDNeck(a["in_channels"], [8 * 2**i for i in range(n)], a["out_channels"][n:], a["level_strides"], a["level_paddings"], a.get("l2_norm_scale", 20), a.get("last_kernel_size", 3), a.get("use_depthwise", False), norm_of(a), act)
    return neck, rules


def centre(a):
    part = lambda m: f"steps.{int(m[1]) // 2}.{('up_' if int(m[1]) % 2 else '') + 'norm' if m[2] == 'bn' else 'up' if int(m[1]) % 2 else 'conv'}."  # noqa: E731
    return CTResNetNeck([a["in_channels"]], [32], a["num_deconv_filters"], a["num_deconv_kernels"], a.get("use_dcn", True)), [(r"deconv_layers\.(\d+)\.(conv|bn)\.", part), ("conv_offset", "places")]


BUILD = {"BFP": bfp, "NASFPN": nas, "HRFPN": hr, "DyHead": dyhead, "YOLOV3Neck": yolo, "DilatedEncoder": dilated, "SSDNeck": ssd, "CTResNetNeck": centre}


@pytest.mark.parametrize("case", cases("necks", *BUILD))
def test_neck(case):
    neck, rules = BUILD[case.component](case.args)
    state = {}
    for k, v in case.state().items():
        for pattern, new in rules:
            k = re.sub(pattern, new, k)
        state[k] = v
    neck.load_state_dict(state)
    xs = [o.requires_grad_() for o in case.inputs()]
    start = case.args.get("start_level", 0)
    ys = neck.eval()(xs[start:])
    order = reversed(range(len(ys))) if case.component == "YOLOV3Neck" else range(len(ys))
    for i, j in enumerate(order):
        case.check(f"level.{i}", ys[j])
    assert not case.has(f"out.level.{len(ys)}.shape")
    sum(y.square().mean() for y in ys).backward()
    for i, x in enumerate(xs):
        case.check(f"grad.{i}", torch.zeros_like(x) if x.grad is None else x.grad)
    assert [tuple(y.shape[1:2]) for y in ys] == [(c,) for c in neck.channels]
