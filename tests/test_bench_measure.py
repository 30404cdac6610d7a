"""The measuring parts of visdet.bench that a notebook cannot hold: properties, processes, large models. No test asserts an absolute time."""
import gc
import os
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from visdet.bench.flops import flops
from visdet.bench.isolate import peak_rss, run_isolated
from visdet.bench.measure import Runner, effect, interleave, measure, pinned_threads
from visdet.bench.memory import Sampler, allocations, count_params, memory
from visdet.bench.stats import Effect, change_points, drift, human, outliers, ratio, spread, verdict
from visdet.core.basics import ConfigError, DataError, VisdetError

settings.register_profile('bench', deadline=None)
settings.load_profile('bench')
times = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=60)


# ---- statistics ----

@given(times)
def test_spread_is_ordered_and_scales(xs):
    s = spread(xs)
    assert min(xs) <= s.lo <= s.median <= s.hi <= max(xs) and s.q25 <= s.median <= s.q75 and s.n == len(xs)
    t = spread(4*np.array(xs))
    np.testing.assert_allclose([t.median, t.q25, t.q75, t.lo, t.hi], [4*o for o in (s.median, s.q25, s.q75, s.lo, s.hi)])
    assert spread(xs[::-1]) == s


@given(times, st.integers(0, 99))
@settings(max_examples=40)
def test_ratio_is_antisymmetric_and_sees_a_factor(xs, seed):
    ys = np.random.default_rng(seed).permutation(xs)
    a, b = ratio(xs, ys, n_boot=50), ratio(ys, xs, n_boot=50)
    assert a.lo <= a.ratio*(1+1e-9) and a.ratio <= a.hi*(1+1e-9)
    np.testing.assert_allclose(a.ratio*b.ratio, 1, rtol=1e-9)
    e = ratio(3*np.array(xs), xs, n_boot=50)
    np.testing.assert_allclose([e.lo, e.ratio, e.hi], 3, rtol=1e-9)


@given(st.floats(.3, 3), st.floats(0, 1), st.floats(0, 1), st.floats(0, .5))
def test_verdict_is_symmetric(r, down, up, threshold):
    e = Effect(r, r/(1+down), r*(1+up), 20)
    swap = dict(slower='faster', faster='slower')
    v = verdict(e, threshold)
    if min(abs(np.log(o)-s*np.log1p(threshold)) for o in (e.ratio, e.lo, e.hi) for s in (-1, 0, 1)) > 1e-9:
        assert verdict(e.inverse(), threshold) == swap.get(v, v)


@given(times, st.floats(1e-6, 1e6))
def test_outliers_do_not_depend_on_the_unit(xs, unit):
    xs = np.round(np.array(xs), 9)+1e-9
    assert outliers(xs).sum() <= max(0, len(xs)//2) and abs(int(outliers(xs).sum())-int(outliers(xs*2**int(np.log2(unit))).sum())) == 0


@pytest.mark.parametrize('f', [spread, outliers, drift, change_points])
def test_bad_values_are_named(f):
    for xs in ([], [1, float('nan')], [float('inf'), 1]):
        with pytest.raises(DataError): f(xs)


def test_change_points_of_planted_steps_and_bumps():
    rng = np.random.default_rng(1)
    hits = alarms = 0
    for i in range(40):
        x = np.exp(rng.normal(0, .02, 40))
        alarms += bool(change_points(x, n_perm=299, seed=i))
        x[22:] *= 1.08
        got = change_points(x, n_perm=299, seed=i)
        hits += len(got) == 1 and abs(got[0]-22) <= 2
    assert hits >= 36 and alarms <= 2
    bump = np.r_[np.ones(12), np.full(12, 1.2), np.ones(12)]*np.exp(rng.normal(0, .01, 36))
    assert change_points(bump) == [12, 24]


@given(st.floats(1e-12, 1e14))
def test_human_keeps_three_digits(x):
    text = human(x, 'B') if x >= 1 else human(x, 's')
    number, unit = text.split()
    scale = {'TiB': 2**40, 'GiB': 2**30, 'MiB': 2**20, 'KiB': 2**10, 'B': 1, 's': 1, 'ms': 1e-3, 'µs': 1e-6, 'ns': 1e-9}[unit]
    assert abs(float(number)*scale-x) <= max(.006*x, 1e-12 if unit == 'ns' else .5 if unit == 'B' else 0)


# ---- measure ----

class Nested(nn.Module):
    """Levels in lists and dicts, integers among them, one level without a gradient"""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x)
        return dict(levels=[y, (self.b(y), x.detach())], n=3, index=torch.arange(3))


@pytest.mark.parametrize('mode', ['forward', 'backward', 'both'])
def test_modes_leave_no_trace(mode):
    net, x, grad = Nested().train(), torch.randn(4, 8, requires_grad=True), torch.is_grad_enabled()
    before = [p.clone() for p in net.parameters()]
    t = measure(net, (x,), mode=mode, budget=.05, warmup=.02)
    assert t.mode == mode and t.n_blocks == len(t.blocks) >= 3 and min(t.blocks) > 0
    assert net.training and gc.isenabled() and torch.is_grad_enabled() == grad and x.grad is None
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(net.parameters(), before))


def test_an_exception_leaves_no_trace_either():
    def broken(x): raise RuntimeError('inside')
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match='inside'): measure(broken, (1,), threads=threads+1)
    assert gc.isenabled() and torch.is_grad_enabled() and torch.get_num_threads() == threads
    gc.disable()
    try:
        measure(len, ([],), budget=.02, warmup=.01)
        assert not gc.isenabled()
    finally: gc.enable()


def test_gradients_are_fresh_in_every_call():
    seen, x = [], torch.ones(3, requires_grad=True)
    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x*2
        @staticmethod
        def backward(ctx, g):
            seen.append(None if leaf.grad is None else leaf.grad.clone())
            return g*2
    leaf = x
    r = Runner(Spy.apply, (x,), mode='backward')
    r.n = 4
    r.block()
    assert seen == [None]*4


def test_models_hidden_in_a_function_keep_no_gradients():
    net, x = nn.Linear(8, 8), torch.randn(4, 8)
    measure(lambda o: net(o).sum(), (x,), mode='both', budget=.03, warmup=.01)
    assert net.weight.grad is None
    assert memory(lambda o: net(o).sum(), (x,), mode='both').grads == 4*(64+8)
    seen = []
    net.register_forward_hook(lambda m, i, o: seen.append(m.training))
    measure(net.forward, (x,), budget=.02, warmup=.01)
    Runner(net.__call__, (x,)).block()
    assert seen == [False] and net.training


def test_backward_times_only_the_backward():
    calls = []
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append(sum(range(400_000)))
            return x*2
        @staticmethod
        def backward(ctx, g): return g*2
    x = torch.ones(3, requires_grad=True)
    back, both = (measure(Slow.apply, (x,), mode=m, budget=.3, warmup=.05) for m in ('backward', 'both'))
    assert back.cpu.median < both.cpu.median/4


def test_interleave_alternates_and_pairs():
    log = []
    res = interleave({k: (log.append, (k,)) for k in 'ab'}, budget=.3, warmup=.02, threads=1)
    assert res['a'].n_blocks == res['b'].n_blocks and res['a'].blocks != res['b'].blocks and set(log) == {'a', 'b'}
    assert verdict(effect(res['a'], res['b']), .3) in ('same', 'not enough data')


@pytest.mark.parametrize('kw', [dict(budget=-1), dict(rel=0), dict(min_blocks=0), dict(clock='atomic'), dict(clock='cuda'), dict(mode='fw'), dict(threads=0)])
def test_bad_arguments(kw):
    with pytest.raises(ConfigError): measure(len, ([],), **kw)


def test_threads_are_restored():
    n = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        with pinned_threads(n+1): 1/0
    assert torch.get_num_threads() == n


# ---- memory ----

def test_activations_are_what_autograd_saves():
    import torchvision
    torch.manual_seed(0)
    net, x = torchvision.models.resnet18().train(), torch.randn(2, 3, 64, 64)
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers(), x]}
    saved = {}
    def keep(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own: saved[s.data_ptr()] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): y = net(x)
    m = memory(net, (x,), mode='both')
    assert m.activations == sum(saved.values()), (m.activations, sum(saved.values()))
    assert m.params == m.grads == 4*count_params(net).params and m.peak > m.activations
    assert memory(net, (x,), mode='both') == m
    del y


def test_backward_is_counted_from_the_end_of_the_forward():
    lin, x = nn.Linear(100, 100), torch.randn(50, 100)
    m = memory(lin, (x,), mode='backward')
    assert m.grads == 4*(100*100+100) and m.grads <= m.peak <= m.grads+4*50*100
    assert memory(lambda: None).peak == 0


def test_allocations_end_where_they_began():
    net = nn.Sequential(nn.Linear(10, 10), nn.Tanh())
    df = allocations(net, (torch.randn(5, 10),), mode='both')
    assert df.held.min() >= 0 and df.held.iloc[-1] == 4*(100+10)  # the gradients stay


def test_sampler_survives_an_exception():
    with pytest.raises(ValueError):
        with Sampler(.002) as s:
            s.mark('here')
            raise ValueError
    assert 'here' in set(s.df['mark']) and not s._thread.is_alive()


# ---- flops ----

def test_retinanet_at_full_size():
    """RetinaNet R50-FPN with 80 classes at 1280x800: published are 239.32 GMACs and 37.74 M trainable parameters, stem and first stage frozen"""
    from visdet.models.retinanet import retinanet
    with torch.device('meta'): net, x = retinanet(80, body='resnet50', pretrained=False), torch.randn(1, 3, 800, 1280)
    c = flops(net, (x,))
    assert abs(c.macs/1e9/239.32-1) < .01, c.macs
    frozen = sum(p.numel() for n, p in net.body.net.named_parameters() if n.split('.')[0] in ('conv1', 'bn1', 'layer1'))
    assert count_params(net).params == 37_968_692 and round((count_params(net).params-frozen)/1e6, 2) == 37.74, frozen


# ---- a process of its own ----

@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that declares a case and offers ways to die"""
    (tmp_path/'fatal_cases.py').write_text(textwrap.dedent('''
        import os, signal
        import torch
        from torch import nn
        from visdet.core.cases import bench_case
        print("noise on standard output")

        @bench_case("op", "fatal_linear", quick=dict(n=16), full=dict(n=32), modes=("forward", "both"))
        def linear(device, n=8):
            torch.manual_seed(0)
            return nn.Linear(n, n), (torch.randn(4, n, device=device),)

        @bench_case("op", "fatal_huge", quick=dict(gib=64))
        def huge(device, gib=64): return torch.ones, (gib*2**28,)

        def raises(): raise KeyError("lost")
        def killed(): os.kill(os.getpid(), signal.SIGKILL)
        def leaves(): os._exit(0)
        def exits(): raise SystemExit(7)
        def weird(): return object()
    '''))
    monkeypatch.syspath_prepend(str(tmp_path))
    return 'fatal_cases'


def test_a_case_with_all_words(module):
    r = run_isolated('op/fatal_linear[n=16]', what='call time memory flops rss', imports=module, mode='both', threads=1, budget=.1, warmup=.05, timeout=500)
    assert r['status'] == 'ok' and 'noise' in r['output'], r
    res = r['result']
    assert res['call'] is None and res['time']['threads'] == 1 and res['time']['mode'] == 'both' and len(res['time']['blocks']) == res['time']['n_blocks']
    assert res['memory']['params'] == 4*(16*16+16) == res['memory']['grads'] and res['flops']['macs'] == 4*16*16 and res['rss']['peak'] > 2**24


def test_memory_limit_gives_oom(module):
    r = run_isolated('op/fatal_huge', dict(gib=4), imports=[module], memory_limit=2**30, timeout=500)
    assert r['status'] == 'oom' and r['result'] is None and 'memory' in r['message'], r
    py = run_isolated('random:randbytes', dict(n=2**27), what='rss', memory_limit=2**26)
    assert py['status'] == 'oom' and py['message'].startswith('MemoryError'), py


@pytest.mark.parametrize('name,status,text', [('raises', 'error', "KeyError: 'lost'"), ('killed', 'oom', 'SIGKILL'), ('leaves', 'crash', 'code 0'), ('exits', 'error', 'SystemExit: 7'), ('weird', 'error', 'JSON')])
def test_fates(tmp_path, monkeypatch, name, status, text):
    (tmp_path/'fates_without_torch.py').write_text('import os, signal\ndef raises(): raise KeyError("lost")\ndef killed(): os.kill(os.getpid(), signal.SIGKILL)\n'
                                                   'def leaves(): os._exit(0)\ndef exits(): raise SystemExit(7)\ndef weird(): return object()\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    r = run_isolated(f'fates_without_torch:{name}')
    assert r['status'] == status and text in r['message'], r


def test_unknown_case_names_the_remedy():
    r = run_isolated('op/fatal_lineer')
    assert r['status'] == 'error' and 'imports' in r['message']
    with pytest.raises(VisdetError, match='peak_rss of op/nothing'): peak_rss('op/nothing')


def test_a_timeout_ends_the_whole_family(tmp_path):
    mark = tmp_path/'pid'
    r = run_isolated('subprocess:getoutput', dict(cmd=f'echo $$ > {mark}; sleep 600'), timeout=8)
    assert r['status'] == 'timeout' and mark.exists()
    pid = int(mark.read_text())
    try: state = open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0]
    except FileNotFoundError: state = 'gone'
    assert state in ('gone', 'Z', 'X')


# ---- on a GPU ----

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_clock_and_memory():
    a = torch.randn(4096, 4096, device='cuda')
    ev, wall = (measure(torch.mm, (a, a), budget=.5, clock=o) for o in ('cuda', 'wall'))
    assert ev.clock == 'cuda' and .7 < ev.median/wall.median < 1.2
    lin = nn.Linear(4096, 4096, device='cuda')
    b = measure(lin, (a,), mode='backward', budget=.5)
    assert b.device.startswith('cuda') and b.median > .5*ev.median
    m = memory(torch.mm, (a, a))
    assert m.peak >= 4096*4096*4
