"CSP bodies and their necks against figures recorded from MMDetection"
import re

import pytest

from golden import cases
from visdet.nn.csp import CSPDarknet, CSPNeXt
from visdet.nn.yolox_neck import CSPNeXtPAFPN, YOLOXPAFPN

NECK = {"reduce_layers": "reduce", "top_down_blocks": "top", "downsamples": "down", "bottom_up_blocks": "bottom", "out_convs": "outs"}


def settings(a):
    "Norm, activation and depthwise of MMDetection's arguments"
    norm, act = a.get("norm_cfg", {}), a.get("act_cfg", {}).get("type")
    res = {o: norm[o] for o in ("eps", "momentum") if o in norm}
    if "norm_cfg" in a:
        res = {"eps": 1e-5, "momentum": 0.1, **res}
    if act:
        res["act"] = {"Swish": "silu", "SiLU": "silu", "ReLU": "relu"}[act]
    if "use_depthwise" in a:
        res["depthwise"] = a["use_depthwise"]
    return res


def block_key(k):
    "MMDetection's names inside a partial stage as visdet's"
    for was, new in (("depthwise_conv", "depth"), ("pointwise_conv", "point"), ("main_conv", "main"), ("short_conv", "short"), ("final_conv", "final"), ("attention.fc", "gate.fc"), (".bn.", ".norm.")):
        k = k.replace(was, new)
    return k


def body_key(k):
    return block_key(re.sub(r"^stage(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.", k))


def build_body(a):
    kw = settings(a)
    for was, new in (("deepen_factor", "depth"), ("widen_factor", "width"), ("out_indices", "out"), ("arch", "arch"), ("expand_ratio", "expand"), ("channel_attention", "gate"), ("spp_kernal_sizes", "sizes"), ("spp_kernel_sizes", "sizes")):
        if was in a:
            kw[new] = tuple(a[was]) if isinstance(a[was], list) else a[was]
    return {"CSPDarknet": CSPDarknet, "CSPNeXt": CSPNeXt}[a["type"]](**kw)


@pytest.mark.parametrize("case", cases("bodies", "CSPDarknet", "CSPNeXt"))
def test_body(case):
    net = build_body(dict(case.args))
    net.load_state_dict({"shift": net.shift, **{body_key(k): v for k, v in case.state().items()}})
    (x,) = [o.requires_grad_() for o in case.inputs()]
    ys = net.eval()(x)
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    sum(y.square().mean() for y in ys).backward()
    case.check("grad.0", x.grad)


def neck_key(k, n):
    "MMDetection's names in the neck of `n` maps as visdet's; its way from coarse to fine counts from the coarsest map"
    part, i, rest = k.split(".", 2)
    return block_key(f"{NECK[part]}.{n - 2 - int(i) if part in ('reduce_layers', 'top_down_blocks') else i}.{rest}")


def build_neck(a):
    kw = {**settings(a), **({"expand": a["expand_ratio"]} if "expand_ratio" in a else {})}
    return {"YOLOXPAFPN": YOLOXPAFPN, "CSPNeXtPAFPN": CSPNeXtPAFPN}[a["type"]](a["in_channels"], [8 * 2**i for i in range(len(a["in_channels"]))], a["out_channels"], a.get("num_csp_blocks", 3), **kw)


@pytest.mark.parametrize("case", cases("necks", "YOLOXPAFPN", "CSPNeXtPAFPN"))
def test_neck(case):
    a = dict(case.args)
    neck = build_neck(a)
    neck.load_state_dict({neck_key(k, len(a["in_channels"])): v for k, v in case.state().items()})
    xs = [o.requires_grad_() for o in case.inputs()]
    ys = neck.eval()(xs)
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    sum(y.square().mean() for y in ys).backward()
    for i, x in enumerate(xs):
        case.check(f"grad.{i}", x.grad)
