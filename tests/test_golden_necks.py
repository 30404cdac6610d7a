"Necks against figures recorded from MMDetection"
import pytest
import torch

from golden import cases
from visdet.nn.channel_mapper import ChannelMapper
from visdet.nn.fpn import FPN
from visdet.nn.pan import PAFPN

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
