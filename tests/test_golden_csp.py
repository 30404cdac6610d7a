"CSP bodies and their necks against figures recorded from MMDetection"
import re

import pytest

from golden import cases
from visdet.nn.csp import CSPDarknet, CSPNeXt


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
