"YOLOX as a whole against figures recorded from MMDetection: raw outputs, detections, loss terms, gradients"
import json

import numpy as np
import pytest
import torch

from golden import ROOT, weight
from visdet.core.testing import close
from visdet.data.targets import make_targets
from visdet.models.yolox import load_yolox, yolox, yolox_mmdet_key

pytestmark = pytest.mark.skipif(not (ROOT / "detectors/yolox_s.npz").exists(), reason="the recorded figures are not here: set VISDET_GOLDEN")


@pytest.fixture(scope="module")
def case():
    "JSON, arrays, a model with the recorded weights, and its input: red, green, blue, grey subtracted"
    d = ROOT / "detectors"
    meta, keys = json.loads((d / "yolox_s.json").read_text()), json.loads((d / "keys/yolox_s.json").read_text())
    kw = {k: meta["recipe"][k] for k in ("backbone", "neck", "head", "norm", "bias", "cls_bias", "shifts", "scales")}
    with np.load(d / "yolox_s.npz") as z:
        arrays = {k: torch.from_numpy(z[k]) for k in z.files}
    model = yolox(80, size="s", max_num=None)
    load_yolox(model, {k: weight(k, s, **kw) for k, s, kind in keys if kind == "recipe"})
    return meta, arrays, model, arrays["in0.image"].flip(0)[None].float() - 114


def off(arrays, name, x, tol):
    "Compare a tensor with a stored summary, relative to its largest stored value"
    assert tuple(x.shape) == tuple(arrays[f"{name}.shape"].tolist())
    want, got = arrays[f"{name}.val"], x.flatten()[arrays[f"{name}.idx"]]
    top = float(want.abs().max())
    assert float((got - want).abs().max()) <= tol * top, f"{name}: off by {float((got - want).abs().max()) / top:.1e}"
    mean, std = arrays[f"{name}.stats"][:2].tolist()
    assert abs(x.double().mean().item() - mean) <= tol * top and abs(x.double().std(correction=0).item() - std) <= tol * top, name


@torch.no_grad()
def test_raw(case):
    _, arrays, model, x = case
    fs = model.eval().body(x)
    ns = model.neck(fs)
    raw = model(x)
    for i in range(3):
        off(arrays, f"eval.backbone#0.{i}", fs[i], 1e-4)
        off(arrays, f"eval.neck#0.{i}", ns[i], 1e-4)
        for j, k in enumerate(("cls", "reg", "obj")):
            off(arrays, f"eval.bbox_head#0.{j}.{i}", raw[k][i], 1e-4)


@pytest.mark.parametrize("name,thr", [("own", 0.01), ("thr0", 0.0)])
@torch.no_grad()
def test_detections(case, name, thr):
    "As sets: neighbours with almost equal scores may change places, and boxes at the edge of an overlap may come or go"
    _, arrays, model, x = case
    model.eval().head.score_thr = thr
    d = model.decode(model(x), [(10**6, 10**6)])[0]
    boxes, scores, labels = (arrays[f"pred.{name}.0.{k}"] for k in ("bboxes", "scores", "labels"))
    assert abs(len(d) - len(boxes)) <= 3
    boxes = boxes.clamp(min=0)
    far = (d.boxes[:, None] - boxes).abs().amax(-1) / (1 + boxes.abs().amax(-1)) + (d.scores[:, None] - scores).abs() * 10
    far = far.masked_fill(d.labels[:, None] != labels, 9.0)
    assert int((far.min(1)[0] > 2e-3).sum()) <= 3 and int((far.min(0)[0] > 2e-3).sum()) <= 3
    close(d.scores[:50], scores[:50], 1e-4)


def test_loss(case):
    meta, arrays, model, x = case
    t = make_targets([arrays["in0.gt_bboxes"]], [arrays["in0.gt_labels"]], [x.shape[-2:]])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train().zero_grad()
    terms = model.loss(model(x), t)
    sum(terms.values()).backward()
    model.load_state_dict(state)
    for k, v in zip(("cls", "box", "obj"), arrays["loss.values"]):
        assert terms[k].item() == pytest.approx(v.item(), rel=1e-4), k
    norms = {yolox_mmdet_key(k): p.grad.norm() for k, p in model.named_parameters()}
    got, want = torch.stack([norms[k] for k in meta["grad_names"]]), arrays["grad.norms"]
    assert float(((got - want).abs() / (want + 1e-3 * want.max())).max()) < 1e-2
