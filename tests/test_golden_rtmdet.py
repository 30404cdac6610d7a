"RTMDet, with masks and without, against figures recorded from MMDetection: raw outputs, detections, loss terms, gradients"
import copy
import functools
import re

import pytest
import torch

from golden import DetectorCase, detectors
from visdet.data.targets import make_targets
from visdet.models.rtmdet import rtmdet
from visdet.models.rtmdet_ins import rtmdet_ins

NAMES = "rtmdet_s", "rtmdet-ins_s"
NECK = dict(reduce="reduce_layers", top="top_down_blocks", down="downsamples", bottom="bottom_up_blocks", outs="out_convs")
STEPS = dict(norm="bn", main="main_conv", short="short_conv", final="final_conv", depth="depthwise_conv", point="pointwise_conv", gate="attention")


def steps(k):
    return ".".join(STEPS.get(o, o) for o in k.split("."))


def names(k, n=3, split=True):
    "Names in MMDetection of a tensor of ours; the first is where it is kept, the others repeat it"
    part, rest = k.split(".", 1)
    if part == "body":
        return ["backbone." + steps(re.sub(r"^net\.(?:stages\.(\d+))?", lambda m: f"stage{int(m[1]) + 1}" if m[1] else "", rest))]
    name, i, rest = rest.split(".", 2)
    if part == "neck":
        return [f"neck.{NECK[name]}.{n - 2 - int(i) if name in ('reduce', 'top') else i}.{steps(rest)}"]
    if name in ("cls", "reg", "kernel"):
        return [f"bbox_head.rtm_{name}.{i}.{rest}"]
    if name == "mask":
        last = f"{i}.{rest}"
        return ["bbox_head.mask_head." + steps(last.replace("fuse", "fusion_conv").replace("tower", "stacked_convs").replace("out.", "projection."))]
    kind, (level, j, rest) = i, rest.split(".", 2)
    tower = name.replace("_tower", "_convs")
    levels = range(n) if kind == "convs" and name != "kernel_tower" else [level]
    got = [f"bbox_head.{tower}.{v}.{j}.{'conv' if kind == 'convs' else 'bn'}.{rest}" for v in levels]
    return got + [o.replace("cls_convs", "reg_convs") for o in got if not split and name == "cls_tower"]


@functools.cache
def loaded(name):
    "The case, the model with its weights, the normalised image, and what the model says of it"
    torch.set_num_threads(1)
    case, split = DetectorCase(name), "ins" not in name
    model = (rtmdet if split else rtmdet_ins)(80, size="s")
    state, new, left = case.state(), {}, set(case.state())
    for k in model.state_dict():
        if k == "body.net.shift":
            new[k] = torch.zeros(())
            continue
        ns = names(k, split=split)
        assert all(torch.equal(state[o], state[ns[0]]) for o in ns), k
        new[k] = state[ns[0]]
        left -= set(ns)
    assert not left, left
    stem = "body.net.stem.0.conv.weight"
    new[stem] = new[stem].flip(1)
    model.load_state_dict(new)
    mean, std = (torch.tensor(o)[:, None, None] for o in model.norm)
    x = (case.image()[None].float() / 255 - mean) / std
    with torch.no_grad():
        return case, model.eval(), x, model(x)


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_maps(case):
    case, model, x, raw = loaded(case.id)
    with torch.no_grad():
        maps = model.body(x)
        for i, (o, p) in enumerate(zip(maps, model.neck(maps))):
            case.check(f"eval.backbone#0.{i}", o, 1e-4)
            case.check(f"eval.neck#0.{i}", p, 1e-4)
    for j, k in enumerate(k for k in ("cls", "reg", "kernel") if k in raw):
        for i, o in enumerate(raw[k]):
            case.check(f"eval.bbox_head#0.{j}.{i}", o, 1e-4)
    if "mask" in raw:
        case.check("eval.bbox_head#0.3", raw["mask"], 1e-4)
    assert sum(p.numel() for p in model.parameters()) == case.doc["num_params"]


@pytest.mark.parametrize("kind", ["own", "thr0"])
@pytest.mark.parametrize("case", detectors(*NAMES))
def test_predictions(case, kind):
    case, model, x, raw = loaded(case.id)
    old = model.head.score_thr
    model.head.score_thr = 0.0 if kind == "thr0" else old
    d = model.decode(raw, [case.array("in0.img_shape").tolist()])[0]
    model.head.score_thr = old
    b, s, c = (case.array(f"pred.{kind}.0.{k}") for k in ("bboxes", "scores", "labels"))
    assert len(d) == len(s) and (d.scores - s).abs().max() <= 1e-4
    cost = torch.cdist(d.boxes, b, p=1) + 1e4 * (d.labels[:, None] != c[None]) + 1e3 * (d.scores[:, None] - s[None]).abs()
    near, row = cost.min(1)
    assert len(row.unique()) == len(row) and near.max() <= 0.1
    if not case.has(f"pred.{kind}.0.mask_areas"):
        return
    masks, area = d.masks, case.array(f"pred.{kind}.0.mask_areas")[row]
    assert (masks.flatten(1).sum(1) - area).abs().max() <= 4
    top = case.bits(f"pred.{kind}.0.masks_top10_bits", masks.shape[-1])
    for i, r in enumerate(row.tolist()):
        if r < len(top):
            assert (masks[i] != top[r]).sum() <= 4


@pytest.mark.parametrize("case", detectors(*NAMES))
def test_losses_and_gradients(case):
    "Batch norms learn here, in batches of one image; the reference itself moves by 1e-4 in its terms, and by 1e-2 and more in small gradients"
    case, model, x, _ = loaded(case.id)
    h, w = case.array("in0.img_shape").tolist()
    masks = case.bits("in0.gt_masks_bits", w).to(torch.uint8) if case.has("in0.gt_masks_bits") else None
    t = make_targets([case.array("in0.gt_bboxes")], [case.array("in0.gt_labels")], [(h, w)], masks=masks)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train().zero_grad()
    terms = model.loss(model(x), t)
    sum(terms.values()).backward()
    model.load_state_dict(state)
    model.eval()
    want = {}
    for k, v in zip(case.doc["loss_names"], case.array("loss.values").tolist()):
        k = dict(loss_cls="cls", loss_bbox="box", loss_mask="mask")[k.split(".")[0]]
        want[k] = want.get(k, 0.0) + v
    assert set(terms) == set(want)
    for k, v in want.items():
        assert terms[k].item() == pytest.approx(v, rel=3e-4), k
    twin, y = copy.deepcopy(model).double().train(), x.double()
    with torch.no_grad():
        exact = twin.loss(twin(y), t)
    for k, v in want.items():
        assert exact[k].item() == pytest.approx(v, rel=5e-5), k
    norms = {names(k, split="ins" not in case.id)[0]: p.grad.norm() for k, p in model.named_parameters()}
    got, want = torch.stack([norms[k] for k in case.doc["grad_names"]]), case.array("grad.norms")
    assert len(norms) == len(want)
    off = (got - want).abs() / (want + 1e-3 * want.max())
    assert off.max() < 1e-2 and off.median() < 1e-3
