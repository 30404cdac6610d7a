"Every registered component says what to measure of it, and what it says can be run"
import dataclasses

import numpy as np
import pytest
import torch

import visdet.all  # noqa: F401  registers the components
import visdet.bench.peers  # noqa: F401  and what stands beside them
from visdet.core.cases import BENCH_KINDS, case_id, cases, uncovered
from visdet.core.registry import KINDS, lookup, names, params

QUICK = {case_id(c, p): (c, p) for c, p in cases(tier="quick")}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def leaves(o):
    "All tensors and arrays in nested containers, dataclasses included"
    if isinstance(o, (torch.Tensor, np.ndarray)):
        yield torch.as_tensor(o)
    elif dataclasses.is_dataclass(o):
        yield from leaves(vars(o))
    elif isinstance(o, (dict, list, tuple)):
        for v in o.values() if isinstance(o, dict) else o:
            yield from leaves(v)


def made(case, p, device="cpu"):
    "Function, positional and named arguments of a case"
    f, args, *kw = case.make(device, **p)
    assert callable(f) and isinstance(args, tuple)
    return f, args, kw[0] if kw else {}


def run(f, args, kw, mode):
    "One call in `mode`, checked; inputs and parameters get a gradient where the mode says so"
    with torch.set_grad_enabled(mode != "forward"):
        out = f(*args, **kw)
    found = [o for o in leaves(out) if o.is_floating_point()]
    assert all(o.detach().isfinite().all() for o in found)
    if mode == "forward":
        return out
    ins = [o for o in leaves((args, kw)) if o.requires_grad]
    ins += list(f.parameters()) if isinstance(f, torch.nn.Module) else []
    sum(o.float().sum() for o in found if o.requires_grad).backward()
    got = [o.grad for o in ins if o.grad is not None]
    assert got and all(g.isfinite().all() for g in got)
    return out


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_every_component_has_a_case():
    assert uncovered() == []


def test_peers_are_there():
    kinds = {c.kind for c, _ in cases()}
    assert {"activation", "norm", "attention", "data", "system"} <= kinds <= set(BENCH_KINDS)


def test_names_of_measurements_are_unique_and_params_are_plain():
    ids = [case_id(c, p) for c, p in cases()]
    assert len(ids) == len(set(ids))
    for c, p in cases():
        assert c.doc, f"{c.kind}/{c.component} does not say what its figure means"
        assert all(isinstance(v, (bool, int, float, str)) for v in p.values()), case_id(c, p)


@pytest.mark.parametrize("kind", KINDS)
def test_schema_of_components(kind):
    for n in names(kind):
        rows = params(lookup(kind, n))
        bare = [r["name"] for r in rows if not r["doc"] or not r["type"]]
        assert not bare, f"{kind}/{n}: parameters without a description: {bare}"
        assert "self" not in [r["name"] for r in rows]
        assert lookup(kind, n).__doc__


def test_kinds_are_filled():
    assert [k for k in KINDS if not names(k)] == []


@pytest.mark.parametrize("name", QUICK)
def test_quick_case_runs(name):
    case, p = QUICK[name]
    call = made(case, p)
    for mode in case.modes:
        run(*call, mode)


@pytest.mark.parametrize("name", ["head/BoxHead", "op/batched_nms", "model/faster_rcnn", "transform/RandomCrop", "metric/coco"])
def test_made_twice_is_the_same(name):
    "Inputs, weights and results come from fixed seeds"
    case, p = next(v for k, v in QUICK.items() if k.startswith(name))
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        outs.append([o.detach().double() for o in leaves(run(*made(case, p), "forward"))])
    assert len(outs[0]) == len(outs[1]) and all(torch.equal(a, b) for a, b in zip(*outs))


def test_making_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    here = torch.rand(1)
    torch.manual_seed(5)
    for name in ("head/RPN", "loss/focal_loss", "op/roi_align", "body/create_body"):
        made(*next(v for k, v in QUICK.items() if k.startswith(name)))
    assert torch.equal(torch.rand(1), here)


@CUDA
@pytest.mark.parametrize("name", QUICK)
def test_quick_case_runs_on_gpu(name):
    case, p = QUICK[name]
    call = made(case, p, "cuda")
    for mode in case.modes:
        run(*call, mode)
