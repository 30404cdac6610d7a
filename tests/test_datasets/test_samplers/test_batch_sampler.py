"""The behaviours that MMDetection states for its samplers of batches: orientation, and shares of several sources

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import numpy as np
import pytest

from visdet.core.basics import ConfigError
from visdet.data.loaders import DetDataLoaders
from visdet.data.samplers import EpochSampler, SourceSampler, cut
from visdet.data.toy import toy_records

BEHAVIOURS = {
    "a hundred images, five a batch: twenty batches of one orientation": "test_orientation",
    "seven a batch: fifteen, or fourteen without the last, of which only the last may mix": "test_orientation",
    "a negative batch size is refused": "test_batch_size",
    "what is not a sampler is refused": "test_no_sampler",
    "one of one source and four of another": "test_sources",
    "ratios that do not fit the sources are refused": "test_wrong_ratios",
}
WITHOUT = {"sources are the parts of a concatenated data set": "sources are counts of rows behind each other"}


@pytest.mark.parametrize("bs,drop_last,n", [(5, True, 20), (5, False, 20), (7, False, 15), (7, True, 14)])
@pytest.mark.parametrize("seed", range(3))
def test_orientation(bs, drop_last, n, seed):
    rng = np.random.default_rng(seed)
    tall = (rng.random(100) < rng.random(100)).tolist()
    rows = EpochSampler(100, seed).rows(0).tolist()
    got = cut(rows, bs, drop_last, [tall[r] for r in rows])
    assert len(got) == n and all(len(b) == bs for b in got[:-1])
    mixed = [i for i, b in enumerate(got) if len({tall[r] for r in b}) > 1]
    assert all(i >= len(got) - 2 for i in mixed)
    shown = [r for b in got for r in b]
    assert len(set(shown)) == len(shown) == (n * bs if drop_last or bs == 5 else 100)


@pytest.mark.parametrize("bs", [-1, 0])
def test_batch_size(bs):
    with pytest.raises(ConfigError, match="bs"):
        cut(range(10), bs)


def test_no_sampler(tmp_path):
    recs = toy_records(4, tmp_path, seed=0)
    dl = DetDataLoaders.from_records(recs, recs, resize=(32, 32), bs=2, num_workers=0, device="cpu", aug=None).train
    with pytest.raises(ConfigError, match="sampler"):
        dl.new(sampler=range(4))
    with pytest.raises(ConfigError, match="bs"):
        dl.new(bs=-1)


@pytest.mark.parametrize("counts", [[10, 40], [7, 93]])
@pytest.mark.parametrize("epoch", [0, 3])
def test_sources(counts, epoch):
    s = SourceSampler(counts, [1, 4], 5)
    rows = s.rows(epoch).reshape(-1, 5)
    assert ((rows >= counts[0]).sum(1) == 4).all() and (rows[:, 0] < counts[0]).all() and (rows < sum(counts)).all()
    assert len(s) == rows.size and (rows == SourceSampler(counts, [1, 4], 5).rows(epoch).reshape(-1, 5)).all()
    assert (rows != s.rows(epoch + 1).reshape(-1, 5)).any()


@pytest.mark.parametrize("counts,ratio,bs", [([10, 40], [1, 4, 2], 5), ([10, 40], [1], 5), ([10, 40], [1, 4], -5), ([10, 40], [0, 4], 5), ([0, 40], [1, 4], 5)])
def test_wrong_ratios(counts, ratio, bs):
    with pytest.raises(ConfigError):
        SourceSampler(counts, ratio, bs)
