"""The behaviours that MMDetection states for its samplers: four priors, with and without objects, priors, regions to ignore

A sampler takes an assigner's answer here and gives places; boxes are taken by them. That the objects themselves join the
priors is the business of the second stage, which appends them. `BEHAVIOURS` names the test of each behaviour, `WITHOUT`
what has no counterpart.
"""
import pytest
import torch

from visdet.nn.assign import IGNORED, MaxIoUAssigner
from visdet.nn.roi_head import sample_rois
from visdet.nn.sample import RandomSampler
from visdet.nn.sample_kinds import OHEMSampler, PseudoSampler
from visdet.nn.score_hlr import ScoreHLRSampler

BEHAVIOURS = {
    "random: as many boxes as places, with objects, without, without priors, with regions": "test_numbers",
    "hard examples: the same": "test_numbers",
    "ScoreHLR: without predictions": "test_numbers",
    "everything: the same": "test_numbers",
    "a sampled result agrees with itself": "test_agrees",
}
WITHOUT = {
    "random SamplingResult": "a sample is two tensors; property tests draw the matches instead (tests/test_samplers.py)",
    "hard examples from a context": "the losses of the places are an argument",
}

FOUR = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [32, 32, 38, 42]])
NEAR_REGION = torch.cat([FOUR[:3], torch.tensor([[30.0, 32, 40, 42]])])
GT, REGION = torch.tensor([[0.0, 0, 10, 9], [0, 10, 10, 19]]), torch.tensor([[30.0, 30, 40, 40]])
SCENES = {"objects": (FOUR, GT, False), "no objects": (FOUR, GT[:0], False), "no priors": (FOUR[:0], GT, False), "region": (NEAR_REGION, GT, True), "nothing": (FOUR[:0], GT[:0], False)}
SAMPLERS = {"random": RandomSampler(10, 0.5), "hard": OHEMSampler(10, 0.5), "hlr": ScoreHLRSampler(10, 0.5), "all": PseudoSampler()}


def scene(name, add=True):
    "Priors with the objects appended, and the object of each"
    p, g, region = SCENES[name]
    p = torch.cat([p, g]) if add else p
    boxes = torch.cat([g, REGION]) if region else g
    crowd = torch.arange(len(boxes)) >= len(g)
    a = MaxIoUAssigner(0.5, 0.5, ignore=0.5 if region else None, ignore_by="region")
    return p[None], a(p, boxes[None], ~crowd[None], crowd[None])


def facts(kind, p, match):
    "What the sampler ranks by"
    n = match.shape[1]
    loss = torch.linspace(1, 2, n)[None]
    return dict(hard=dict(loss=loss), hlr=dict(boxes=p, scores=torch.linspace(0, 1, n * 3).view(1, n, 3), loss=loss)).get(kind, {})


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_numbers(kind, name, add):
    "All of these few places are taken, except those to ignore; positives come first, and no place twice"
    p, match = scene(name, add)
    idx, ok, *_ = SAMPLERS[kind](match, torch.Generator().manual_seed(0), **facts(kind, p, match))
    got = match.gather(1, idx)[ok]
    pos, neg = (match >= 0).sum(), (match == -1).sum()
    assert (got >= 0).sum() == pos and (got == -1).sum() == neg and len(idx[ok].unique()) == len(idx[ok]) == pos + neg
    assert (got[:pos] >= 0).all() and (got != IGNORED).all()
    assert p[0][idx[ok]].shape == (pos + neg, 4)
    assert SCENES[name][2] == bool((match == IGNORED).any())
    # Objects that were added are positives of themselves
    if add and len(SCENES[name][1]):
        assert match[0, -len(SCENES[name][1]) :].tolist() == list(range(len(SCENES[name][1])))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", SAMPLERS)
def test_agrees(kind, seed):
    "Boxes, objects, weights and rows of a sample belong together"
    g = torch.Generator().manual_seed(seed)
    match = torch.randint(-2, 4, (3, 40), generator=g)
    boxes = torch.rand(3, 40, 4, generator=g)
    more = dict(hard=dict(loss=torch.rand(3, 40, generator=g)), hlr=dict(boxes=boxes, scores=torch.rand(3, 40, 2, generator=g), loss=torch.rand(3, 40, generator=g))).get(kind, {})
    s = sample_rois(boxes, match, SAMPLERS[kind], g, **more)
    img, col = s["row"] // 40, s["row"] % 40
    assert torch.equal(s["rois"][:, 0].long(), img) and torch.equal(s["rois"][:, 1:], boxes[img, col])
    assert torch.equal(s["match"], match[img, col].clamp(min=-1)) and (match[img, col] != IGNORED).all() and (s["weight"] == 1).all()
    if kind != "all":
        for i in range(3):
            pos, neg = int((match[i] >= 0).sum()), int((match[i] == -1).sum())
            assert (s["match"][img == i] >= 0).sum() == min(5, pos) and (img == i).sum() == min(5, pos) + min(10 - min(5, pos), neg)
