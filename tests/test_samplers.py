"Samplers: counts against a slow reading of the rules, in every situation an assigner can leave"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visdet.core.basics import ConfigError
from visdet.nn.assign import MaxIoUAssigner
from visdet.nn.sample import RandomSampler
from visdet.nn.sample_kinds import CombinedSampler, InstanceBalancedPosSampler, IoUBalancedNegSampler, OHEMSampler, PseudoSampler
from visdet.nn.score_hlr import ScoreHLRSampler, local_rank

PRIORS = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [32, 32, 38, 42]])
OBJECTS = torch.tensor([[0.0, 0, 10, 9], [0, 10, 10, 19]])
KINDS = [RandomSampler, OHEMSampler, IoUBalancedNegSampler, InstanceBalancedPosSampler, ScoreHLRSampler, lambda n, p: CombinedSampler(InstanceBalancedPosSampler(), IoUBalancedNegSampler(), n, p)]
NAMES = ["random", "ohem", "iou_balanced", "score_hlr", "instance_balanced", "combined"]


def draw(sampler, match, seed=0, overlap=None, loss=None):
    "Places of each image as lists, positives and negatives"
    g = torch.Generator().manual_seed(seed)
    B, N = match.shape
    loss = torch.rand(B, N, generator=g) if loss is None else loss
    if isinstance(sampler, RandomSampler):
        idx, ok = sampler(match, g)
    elif isinstance(sampler, ScoreHLRSampler):
        xy = torch.rand(B, N, 2, generator=g) * 50
        idx, ok, _ = sampler(match, g, boxes=torch.cat([xy, xy + 20], -1), scores=torch.rand(B, N, 3, generator=g), loss=loss)
    elif isinstance(sampler, PseudoSampler):
        idx, ok = sampler(match)
    else:
        idx, ok = sampler(match, g, overlap=torch.rand(B, N, generator=g) * 0.5 if overlap is None else overlap, loss=loss)
    rows = [i[o] for i, o in zip(idx, ok)]
    return [[m[i] for i in r.tolist()] for m, r in zip(match.tolist(), rows)], rows


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("objects,valid", [(OBJECTS, [True, True]), (OBJECTS, [True, False]), (OBJECTS[:0], [])], ids=["objects", "ignored", "none"])
def test_four_priors(kind, objects, valid):
    match = MaxIoUAssigner(0.5, 0.5, None)(PRIORS[None].expand(1, -1, -1), objects[None], torch.tensor([valid], dtype=torch.bool))
    (values,), (rows,) = draw(kind(10, 0.5), match)
    assert len(set(rows.tolist())) == len(rows) == int((match >= -1).sum())
    assert sum(v >= 0 for v in values) == int((match >= 0).sum())


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_no_places(kind):
    assert draw(kind(10, 0.5), torch.zeros(2, 0, dtype=torch.long))[0] == [[], []]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-2, 4), min_size=1, max_size=60), st.integers(1, 40), st.floats(0, 1), st.one_of(st.none(), st.floats(0, 3)), st.sampled_from(range(len(KINDS))), st.integers(0, 99))
def test_counts(match, num, share, bound, kind, seed):
    "Every kind takes as many positives as fit their share and as many negatives as are left, within the bound; positives first; nothing twice"
    s = KINDS[kind](num, share)
    s.neg_pos_ub = bound
    (values,), (rows,) = draw(s, torch.tensor([match]), seed)
    pos = min(sum(o >= 0 for o in match), int(num * share))
    want = num - pos if bound is None else min(num - pos, int(bound * max(pos, 1)))
    assert [v >= 0 for v in values] == [True] * pos + [False] * min(sum(o == -1 for o in match), want)
    assert len(set(rows.tolist())) == len(rows) and -2 not in values


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 99))
def test_instances_are_balanced(match, num, seed):
    "No object gives more than its part while another has positives to spare"
    (values,), _ = draw(InstanceBalancedPosSampler(num, 1.0), torch.tensor([match]), seed)
    objects = {o: match.count(o) for o in match if o >= 0}
    if not objects:
        return
    part = int(torch.tensor(num / len(objects)).round()) + 1
    if sum(min(part, n) for n in objects.values()) >= num:
        assert all(values.count(o) <= part for o in objects)
    else:
        assert all(values.count(o) >= min(part, n) for o, n in objects.items())


def slow_balanced(overlap, want, floor, share, bins, taken):
    "Whether the taken negatives obey the rule of bins; read place by place"
    top = [o > 0 if floor == 0 else o >= floor for o in overlap]
    n, start = int(want * (1 - share)), max(floor, 0)
    high = [o for o, t in zip(overlap, top) if t]
    if len(high) <= n:
        return all(i in taken for i, t in enumerate(top) if t)
    width = (max(high) - start) / bins
    per = [0] * bins
    have = [0] * bins
    for i, (o, t) in enumerate(zip(overlap, top)):
        if t:
            b = min(int((o - start) / width), bins - 1) if width else 0
            have[b] += 1
            per[b] += i in taken
    return all(p >= min(h, n // bins) for p, h in zip(per, have))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=60), st.integers(1, 40), st.sampled_from([-1.0, 0.0, 0.25]), st.floats(0, 1), st.integers(1, 4), st.integers(0, 99))
def test_overlaps_are_balanced(overlap, num, floor, share, bins, seed):
    match = torch.full((1, len(overlap)), -1)
    _, (rows,) = draw(IoUBalancedNegSampler(num, 0.0, floor, share, bins), match, seed, torch.tensor([overlap]))
    assert len(rows) == min(num, len(overlap)) and slow_balanced(overlap, num, floor, share, bins, set(rows.tolist()))


def test_hard_places_are_the_hardest():
    g = torch.Generator().manual_seed(1)
    match, loss = torch.randint(-2, 3, (4, 100), generator=g), torch.rand(4, 100, generator=g)
    _, rows = draw(OHEMSampler(20, 0.25), match, loss=loss)
    for m, x, r in zip(match, loss, rows):
        pos, neg = ((k).nonzero()[:, 0] for k in (m >= 0, m == -1))
        assert r.tolist() == pos[x[pos].argsort(descending=True)][:5].tolist() + neg[x[neg].argsort(descending=True)][:15].tolist()


@pytest.mark.parametrize("kind,name", [(OHEMSampler, "loss"), (IoUBalancedNegSampler, "overlap"), (ScoreHLRSampler, "scores")])
def test_says_what_it_lacks(kind, name):
    with pytest.raises(ConfigError, match=name):
        kind(10, 0.5)(torch.zeros(1, 4, dtype=torch.long) - 1)


def test_pseudo_takes_all():
    (values, more), _ = draw(PseudoSampler(), torch.tensor([[0, -1, -2, 3], [-1, -1, -1, 0]]))
    assert sorted(values) == [-1, 0, 3] and more == [0, -1, -1, -1]


def slow_rank(boxes, scores, labels, thr):
    "Rank within greedy suppression, one box after another"
    from torchvision.ops import box_iou

    order, iou = scores.argsort(descending=True, stable=True).tolist(), box_iou(boxes, boxes)
    heads, rank = [], {}
    for i in order:
        home = next((h for h in heads if labels[h[0]] == labels[i] and iou[h[0], i] > thr), None)
        if home is None:
            heads.append([i])
            rank[i] = 0
        else:
            rank[i] = len(home)
            home.append(i)
    return sorted(order, key=lambda i: (rank[i], -scores[i].item()))


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_local_rank(n):
    g = torch.Generator().manual_seed(n)
    xy = torch.rand(n, 2, generator=g) * 40
    boxes, scores, labels = torch.cat([xy, xy + 20], 1), torch.rand(n, generator=g), torch.randint(0, 2, (n,), generator=g)
    assert local_rank(boxes, scores, labels, 0.4).tolist() == slow_rank(boxes, scores, labels, 0.4)


def test_hlr_takes_firsts_before_seconds():
    "Of two groups of three, two wanted negatives are the two firsts, and weights keep the loss"
    b = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[50.0, 50, 60, 60]] * 3)[None]
    s = torch.tensor([[0.9, 0.8, 0.7, 0.3, 0.2, 0.1]])[..., None]
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    i, ok, w = ScoreHLRSampler(2, 0.0)(torch.full((1, 6), -1), boxes=b, scores=s, loss=x)
    assert i.tolist() == [[0, 3]] and ok.all() and torch.isclose((w * x.gather(1, i)).sum(), x.gather(1, i).sum())
