"The behaviours that MMDetection states for batches from several sources: one part of the first, four of the second"
import numpy as np
import pytest

from visdet.core.basics import ConfigError
from visdet.data.samplers import SourceSampler, cut, share

A, B = 60, 40


def source(rows): return [int(r >= A) for r in rows]


def test_one_to_four():
    s = SourceSampler([A, B], [1, 4], 5)
    for epoch in range(3):
        assert [source(b) for b in cut(s.rows(epoch), 5)] == [[0, 1, 1, 1, 1]] * 20
    assert len(s) == A + B


def test_every_source_is_a_stream_of_its_own():
    "Twenty batches hold twenty rows of the first source and two passes over the second"
    s = SourceSampler([A, B], [1, 4], 5)
    rows = np.concatenate([s.rows(e) for e in range(3)])
    count = np.bincount(rows, minlength=A + B)
    assert (count[:A] == 1).all() and (count[A:] == 6).all()
    assert np.array_equal(s.rows(2), SourceSampler([A, B], [1, 4], 5).rows(2)) and not np.array_equal(s.rows(0), s.rows(1))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_processes_keep_the_pattern(world):
    s = SourceSampler([A, B], [1, 4], 5, world=world)
    for rank in range(world):
        assert {tuple(source(b)) for b in cut(share(s.rows(0), rank, world), 5)} == {(0, 1, 1, 1, 1)}


@pytest.mark.parametrize("counts,ratio,bs", [([A, B], [1, 4], -5), ([A, B], [1, 4], 0), ([A, B], [1, 2, 4], 5), ([A], [1, 4], 5), ([A, 0], [1, 4], 5), ([A, B], [1, -4], 5)])
def test_what_cannot_be_mixed(counts, ratio, bs):
    with pytest.raises(ConfigError):
        SourceSampler(counts, ratio, bs)
