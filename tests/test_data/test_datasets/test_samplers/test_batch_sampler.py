"The behaviours that MMDetection states for batches of like orientation: a hundred images, batches of five and of seven"
import numpy as np
import pytest
from PIL import Image

from visdet.core.basics import ConfigError
from visdet.data.dl import DetDL
from visdet.data.items import RecordItems
from visdet.data.records import Records
from visdet.data.samplers import EpochSampler, cut
from visdet.data.transforms import Resize

N = 100


@pytest.fixture(scope="module")
def sizes():
    "(height, width) of a hundred images, of which a multiple of five is taller than wide; squares count as wide"
    rng = np.random.default_rng(0)
    s = rng.integers(1, 600, (N, 2))
    s[:7] = 300
    for i in np.flatnonzero(s[:, 0] > s[:, 1])[:int((s[:, 0] > s[:, 1]).sum()) % 5]:
        s[i] = s[i, ::-1]
    return s


@pytest.fixture(scope="module")
def items(sizes, tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "0.png")
    return RecordItems(Records.build(["0.png"] * N, sizes, [[]] * N, [[]] * N, ["a"], root=root), Resize(32), train=True)


def plan(items, **kw):
    dl = DetDL(items, shuffle=True, group=True, num_workers=0, **kw)
    return dl, [[e[0] for e in b] for b in dl._batches()]


def kinds(batch, sizes): return {bool(h > w) for h, w in sizes[batch]}


def test_whole_batches(items, sizes):
    dl, batches = plan(items, bs=5, drop_last=True)
    assert len(dl) == len(batches) == 20
    assert all(len(kinds(b, sizes)) == 1 and len(b) == 5 for b in batches)
    assert sorted(sum(batches, [])) == list(range(N))


@pytest.mark.parametrize("drop_last,n", [(False, 15), (True, 14)])
def test_only_the_last_batches_mix(items, sizes, drop_last, n):
    dl, batches = plan(items, bs=7, drop_last=drop_last)
    assert len(dl) == len(batches) == n
    mixed = [i for i, b in enumerate(batches) if len(kinds(b, sizes)) > 1]
    assert all(i >= len(batches) - 2 for i in mixed)
    shown = sum(batches, [])
    assert len(shown) == len(set(shown)) == (98 if drop_last else N)


def test_leftovers_come_tall_first(sizes):
    tall = sizes[:, 0] > sizes[:, 1]
    rows = EpochSampler(N).rows(0)
    got = cut(rows, 7, False, tall[rows])
    full = [b for b in got if len(b) == 7 and len(kinds(b, sizes)) == 1]
    rest = [r for b in got[len(full):] for r in b] if len(full) < len(got) else []
    flags = [bool(tall[r]) for r in rest]
    assert flags == sorted(flags, reverse=True)


def test_negative_batch_size(items):
    with pytest.raises(ConfigError, match="positive number"):
        DetDL(items, shuffle=True, group=True, bs=-1, num_workers=0)
    with pytest.raises(ConfigError, match="positive number"):
        cut([0, 1], -1)


@pytest.mark.parametrize("what", [3, "random", [1, 2, 3]])
def test_what_is_no_sampler(items, what):
    with pytest.raises(ConfigError, match="not a sampler"):
        DetDL(items, shuffle=True, sampler=what, bs=5, num_workers=0)
