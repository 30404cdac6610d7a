"Necks against figures recorded from MMDetection"
import pytest
import torch

from golden import cases
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


@pytest.mark.parametrize("case", cases("necks", "FPN", "PAFPN"))
def test_pyramid(case):
    a = dict(case.args)
    start, extra = a.get("start_level", 0), a.get("add_extra_convs") or "pool"
    if extra == "on_lateral" or "upsample_cfg" in a:
        pytest.skip("extra levels from laterals and bilinear enlargement are not offered")
    norm = "gn" if a.get("norm_cfg", {}).get("type") == "GN" else None
    if norm:
        norm = lambda c: torch.nn.GroupNorm(a["norm_cfg"]["num_groups"], c)  # noqa: E731
    cs = a["in_channels"][start:]
    neck = {"FPN": FPN, "PAFPN": PAFPN}[case.component](cs, [4 * 2 ** (start + i) for i in range(len(cs))], a["out_channels"], a["num_outs"], extra, a.get("relu_before_extra_convs", False), norm)
    neck.load_state_dict(renamed(case.state(), len(cs)))
    xs = [o.requires_grad_() for o in case.inputs()]
    ys = neck.eval()(xs[start:])
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    sum(y.square().mean() for y in ys).backward()
    for i, x in enumerate(xs):
        case.check(f"grad.{i}", torch.zeros_like(x) if x.grad is None else x.grad)
