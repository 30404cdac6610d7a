"Bodies of timm, in the forms that detectors use, against figures recorded from MMDetection"
import re

import pytest

from golden import cases
from visdet.models.mmdet_keys import KeyRow, _body_rules, _expand
from visdet.models.mmdet_model import body_name
from visdet.nn.body import create_body

STRIDES = 4, 8, 16, 32


def build(args):
    "The body that an MMDetection backbone is"
    words, name = [], body_name(args)
    if args.get("style") == "caffe" and args["depth"] >= 50:
        words.append("caffe")
    if args.get("dilations") == [1, 1, 1, 2]:
        words.append("dc5")
    if args["type"] in ("SwinTransformer", "Res2Net"):
        words.append("det")
    body = create_body(("+".join(words) + ":" if words else "") + name, out=None)
    maps = [i for i in range(len(body.strides)) if body.strides[i] >= 4][-4:]
    body.idx = [maps[i] for i in args["out_indices"]]
    body._nhwc = [body._nhwc[i] for i in body.idx]
    return body.eval()


def fill(body, state):
    "Weights of MMDetection into the body; every one of them must have a place"
    rules, got, used = _body_rules(body.net), {}, set()
    for k, v in body.net.state_dict().items():
        t = _expand(k, rules)
        how = "merge" if re.search(r"layers_\d\.downsample\.", k) else "same"
        got[k] = KeyRow(t, k, how).take(state[t], v)
        used.add(t)
    assert used == set(state)
    body.net.load_state_dict(got)


@pytest.mark.parametrize("case", cases("bodies", "ResNet", "ResNeXt", "SwinTransformer", "RegNet", "Res2Net"))
def test_body(case):
    body = build(case.args)
    fill(body, case.state())
    x = case.inputs()[0].requires_grad_()
    ys = body(x)
    for i, y in enumerate(ys):
        case.check(f"level.{i}", y)
    sum(y.square().mean() for y in ys).backward()
    case.check("grad.0", x.grad, 1e-4)
