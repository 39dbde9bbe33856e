"""What processes exchange, in one process and in several."""

import numpy as np
import pytest
import torch

from pnmf_pyro.data.parallel import ALONE, Ranks, together, working_together
from tests.support.ranks import answers


def test_one_process_has_all_there_is():
    part = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert ALONE.total(part) is part
    assert ALONE.stacked(part, 1) is part
    assert ALONE.gathered("word") == ALONE.at_first("word") == ["word"]
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.mapped(str, [3, 4]) == ["3", "4"]
    ALONE.agree(anything=1)
    with pytest.raises(OSError, match="full"):
        ALONE.by_first(lambda: _fail(OSError("full")))
    with pytest.raises(ValueError, match="failed"):
        ALONE.all_or_none(lambda: _fail(ValueError()), ValueError)


def _fail(error):
    raise error


@pytest.mark.parametrize(("size", "n"), [(1, 4), (2, 5), (3, 3), (4, 2)])
def test_each_thing_is_for_one_rank(size, n):
    parts = [range(n)[Ranks(rank, size).part(n)] for rank in range(size)]
    assert [one for part in parts for one in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_work_together_in_a_block():
    ranks = Ranks(1, 3)
    with pytest.raises(OSError, match="full"), working_together(ranks):
        _fail(OSError("full") if together() is ranks else OSError("alone"))
    assert together() is ALONE


@pytest.mark.parametrize(("size", "n_slices"), [(1, 4), (2, 5), (3, 3), (4, 2)])
def test_each_row_is_of_one_rank(size, n_slices):
    cuts = [3 * k for k in range(n_slices + 1)]
    rows, shares = [], []
    for rank in range(size):
        own, of_own = Ranks(rank, size).sharing(cuts)
        assert (own.rows.start, own.rows.stop) == (of_own[0], of_own[-1])
        rows += range(own.rows.start, own.rows.stop)
        shares.append(of_own[-1] - of_own[0])
    assert rows == list(range(cuts[-1]))
    assert max(shares) - min(shares) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_in_the_order_of_ranks_and_send_less_than_two_of_them(size):
    ranks = answers(
        size,
        f"""
from pnmf_pyro.data.parallel import processes
from benchmarks.ranks import _count_bytes
sent = _count_bytes()
parts = np.random.default_rng(0).lognormal(sigma=9, size=({size}, 7, 3))
mine = torch.from_numpy(parts[RANK])
total, number = processes().totals(mine, torch.tensor(1.0))
expected = parts[0].copy()
for other in parts[1:]:
    expected += other
answer(
    same=bool((total.numpy() == expected).all()), number=float(number), sent=sum(sent),
    stacked=processes().stacked(torch.full((2, 1 + RANK), RANK), 1)[0].tolist(),
)
""",
    )
    for (one,) in ranks:
        assert one["same"]
        assert one["number"] == size
        assert one["sent"] <= 2 * 8 * (22 + size)
        assert one["stacked"] == np.repeat(range(size), range(1, size + 1)).tolist()
