"Padding is never learned from: slots without an object and the area beyond an image, for every registered model"
import inspect

import pytest
import torch
from test_models import SMALL, batch

from visdet.core.registry import lookup, names
from visdet.data.batch import Normalize, imagenet_stats
from visdet.cv.priors import AnchorGenerator, PointGenerator
from visdet.data.targets import Targets, make_targets
from visdet.models.zoo import create_model
from visdet.nn.assign import IGNORED, MaxIoUAssigner
from visdet.nn.atss import ATSSAssigner
from visdet.nn.dense import Levels, beyond
from visdet.nn.sample import RandomSampler

# Arguments that make any model small, for those that `test_models` does not list
TINY = dict(channels=32, num_convs=1, hidden=64, roi_num=64, mask_channels=16, mask_convs=1, post=(100, 50), pre=(200, 100), queries=20, enc_layers=1, dec_layers=2, heads=4, dropout=0.0)
MODELS = names("model")
SIZES = [(96, 128), (40, 60), (64, 96)]


def tiny(kind):
    kw = SMALL.get(kind) or {k: v for k, v in TINY.items() if k in inspect.signature(lookup("model", kind)).parameters}
    torch.manual_seed(0)
    return create_model(kind, 3, body="resnet18", **kw)


def unsampled(m):
    "The model with samplers that take everything: a draw depends on how many candidates there are, a loss must not"
    for o in [m, *m.modules()]:
        for v in vars(o).values():
            if isinstance(v, RandomSampler):
                v.num, v.neg_pos_ub = 1 << 20, None
    return m


def loss(m, xb, t):
    torch.manual_seed(1)
    return {k: v.detach().clone() for k, v in m.loss(m(xb, t), t).items()}


def with_slots(t, garbage, extra=0):
    "The targets with something in the slots that hold no object, and `extra` more such slots"
    B, M = t.labels.shape
    boxes = torch.cat([t.boxes, torch.zeros(B, extra, 4)], 1)
    labels = torch.cat([t.labels, torch.full((B, extra), -1)], 1)
    crowd = torch.cat([t.crowd, torch.zeros(B, extra, dtype=torch.bool)], 1)
    empty = labels < 0
    boxes[empty] = garbage(int(empty.sum()))
    return Targets([boxes, labels, crowd, *t[3:]])


GARBAGE = dict(
    inside=lambda n: torch.tensor([[5.0, 5, 35, 30]]).expand(n, 4),
    whole=lambda n: torch.tensor([[0.0, 0, 128, 96]]).expand(n, 4),
    huge=lambda n: torch.tensor([[-1e6, -1e6, 1e6, 1e6]]).expand(n, 4),
    inverted=lambda n: torch.tensor([[50.0, 50, 10, 10]]).expand(n, 4),
    nan=lambda n: torch.full((n, 4), float("nan")),
)


@pytest.mark.parametrize("kind", MODELS)
def test_slots_without_an_object_change_no_loss_term(kind):
    "To the last bit: whatever box stands beside a label of -1"
    m = tiny(kind).train()
    xb, t = batch((3, 0, 1), 3, sizes=SIZES)
    want = loss(m, xb, t)
    assert want and all(v.isfinite() for v in want.values())
    for name, g in GARBAGE.items():
        got = loss(m, xb, with_slots(t, g))
        assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in want.items()}, name


@pytest.mark.parametrize("kind", MODELS)
def test_more_empty_slots_change_no_loss_term(kind):
    m = unsampled(tiny(kind).train())
    xb, t = batch((3, 0, 1), 3, sizes=SIZES)
    want, got = loss(m, xb, t), loss(m, xb, with_slots(t, GARBAGE["inside"], 4))
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-6, msg=lambda e: f"{k}: {e}")


def test_pixels_beyond_an_image_are_zero_for_the_model():
    "Whatever collate or a jitter left there, the network sees zeros"
    t = make_targets([[], []], [[], []], [(20, 30), (32, 17)])
    xb = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    a = Normalize(*imagenet_stats)((xb.clone(), t), split_idx=0)[0]
    for o, (h, w) in zip(a, t.sizes.tolist()):
        assert not o[:, h:].any() and not o[:, :, w:].any() and o[:, :h, :w].any()


# ---------------------------------------------------------------- places in the padding

# What MMDetection does at places whose cell begins beyond an image (its size rounded up to the divisor of the batch): "ignored" is its valid flags,
# "classes" means that classes, or the presence of an object, learn background there and boxes learn nothing. Proposal networks ignore them. Models that predict no maps have no such places.
RULES = dict(retinanet="ignored", atss="ignored", gfl="ignored", tood="ignored", rtmdet="ignored", rtmdet_ins="ignored", ssd="ignored", fcos="classes", yolox="classes", vfnet="classes")


def rule(kind, m, raw):
    "What a model does in the padding; None if it has no places there. A new dense model says it in RULES"
    if hasattr(m, "rpn"):
        return "ignored"
    if raw["cls"][0].ndim != 4:
        return None
    assert kind in RULES, f"say in RULES what {kind} does with places beyond an image"
    return RULES[kind]


def places(shape, sizes, stride, pad=32):
    "(B,h,w) bool: cells beyond each image, by the rule in words"
    h, w = shape
    res = torch.zeros(len(sizes), h, w, dtype=torch.bool)
    for b, (ih, iw) in enumerate(sizes):
        rows, cols = (-(-(-(-o // pad) * pad) // stride) for o in (ih, iw))
        res[b, rows:] = True
        res[b, :, cols:] = True
    return res


def stride_of(w, full=256):
    "The power of two whose map of an image of `full` pixels is `w` wide"
    return next(s for s in (4, 8, 16, 32, 64, 128, 256) if -(-full // s) == w)


@pytest.mark.parametrize("kind", MODELS)
def test_places_beyond_an_image(kind):
    "No loss term has a gradient there, or only those of classes; and inside the image there is one"
    m = unsampled(tiny(kind).train())
    xb, t = batch((3, 2, 1), 3, sizes=[(96, 256), (40, 60), (64, 96)], size=(96, 256))
    raw = m(xb, t)
    what = rule(kind, m, raw)
    if what is None:
        pytest.skip("predicts no maps")
    maps = raw.get("rpn", raw)
    keys = [k for k in ("cls", "reg", "ctr", "obj") if k in maps]
    leaves = {k: [o.detach().requires_grad_() for o in maps[k]] for k in keys}
    new = {**maps, **leaves}
    terms = m.loss({**raw, "rpn": new} if "rpn" in raw else new, t)
    terms = {k: v for k, v in terms.items() if "rpn" not in raw or k.startswith("rpn")}
    pad = 1 if kind.startswith("rtmdet") else 32  # the divisor of its batches in MMDetection
    seen = {}
    for k in keys:
        grads = torch.autograd.grad(sum(terms.values()), leaves[k], allow_unused=True, retain_graph=True)
        there = here = 0.0
        for g in grads:
            if g is None:
                continue
            out = places(g.shape[2:], t.sizes.tolist(), stride_of(g.shape[3]), pad)[:, None].expand_as(g)
            there, here = max(there, g[out].abs().max().item() if out.any() else 0), max(here, g[~out].abs().max().item())
        assert here > 0, k
        seen[k] = there
    assert {k for k, v in seen.items() if v} <= ({"cls", "obj"} if what == "classes" else set()), seen
    assert any(seen.values()) == (what == "classes"), seen


@pytest.mark.parametrize("size", [(96, 128), (40, 60), (33, 97), (1, 1), (64, 64)])
def test_flags_against_the_rule_in_words(size):
    for stride, hw in ((8, (12, 16)), (16, (6, 8)), (32, (3, 4)), (64, (2, 2))):
        raw = dict(cls=[torch.zeros(1, 3, *hw)], shape=torch.tensor([[96, 128]]))
        got = beyond(Levels(PointGenerator([stride])), raw, torch.tensor([size]))
        assert torch.equal(got.view(hw), places(hw, [size], stride)[0])
        per = AnchorGenerator([stride], [(8.0 * stride,)], (0.5, 1.0, 2.0))
        assert torch.equal(beyond(Levels(per), raw, torch.tensor([size])).view(*hw, 3), places(hw, [size], stride)[0][..., None].expand(*hw, 3))


def test_an_image_is_assigned_as_if_alone():
    "With the padding left out, ATSS and the overlap rule give each image of a mixed batch what they give it in a batch of its own"
    strides = [8, 16, 32, 64]
    gen = AnchorGenerator(strides, [(8 * s,) for s in strides], (1.0,))
    full, size = (128, 192), (64, 96)
    feats = lambda hw: [(-(-hw[0] // s), -(-hw[1] // s)) for s in strides]
    boxes = torch.tensor([[[5.0, 6, 60, 62], [30, 10, 95, 40], [70, 40, 90, 63]]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    big, own = gen.grid(feats(full)), gen.grid(feats(size))
    raw = dict(cls=[torch.zeros(1, 1, *o) for o in feats(full)], shape=torch.tensor([full]))
    out = beyond(Levels(gen), raw, torch.tensor([size]))
    where = [(y * F[1] + x) + at for f, F, at in zip(feats(size), feats(full), [0, *torch.tensor([len(o) for o in big]).cumsum(0).tolist()]) for y in range(f[0]) for x in range(f[1])]
    assert out.sum() == out.numel() - len(where) and not out[0, where].any()
    for topk in (9, 3):
        a = ATSSAssigner(topk)
        alone = a.match(torch.cat(own), [len(o) for o in own], boxes, valid)
        mixed = a.match(torch.cat(big), [len(o) for o in big], boxes, valid, None, out)
        assert torch.equal(mixed.index[0, where], alone.index[0]) and torch.allclose(mixed.iou[0, where], alone.iou[0])
        assert (mixed.index[out] == IGNORED).all()
    a = MaxIoUAssigner(0.7, 0.3, min_pos=0.0)
    p = torch.where(out[..., None], -1e6, torch.cat(big))
    assert torch.equal(a(p, boxes, valid)[0, where], a(torch.cat(own), boxes, valid)[0])
