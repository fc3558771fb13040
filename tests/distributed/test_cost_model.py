"""The cost model of `cliperase-fast plan` against what ranks are seen to do."""

from __future__ import annotations

import pytest
from ranks import Ranks

from cliperase_fast.benchmarks import sharded_products
from cliperase_fast.planning.cost_model import sweep_cost

pytestmark = pytest.mark.long
PAIRS = 2048  # a rank


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    ranks = Ranks(1, tmp_path_factory.mktemp("rank"))
    yield ranks
    ranks.stop()


def _counted(rank, way, loss):
    return sharded_products.counted(rank, way, loss, PAIRS)


@pytest.mark.parametrize("way", ["gathered", "ring"])
@pytest.mark.parametrize("loss", sharded_products.LOSSES)
@pytest.mark.parametrize("size", ["one", "two", "four"])
def test_the_model_is_what_ranks_do(request, size, loss, way):
    ranks = request.getfixturevalue(size)
    for counted in ranks.run(_counted, way, loss):
        sweep = sharded_products.sweep_of(ranks.size, loss, way, PAIRS)
        cost = sweep_cost(sweep)
        assert counted["operations"] == cost.operations
        assert counted["moved"] == cost.moved
        assert counted["received"] == cost.received
        left = counted["peak"] - sharded_products.strips_of(sweep)
        assert left == pytest.approx(cost.memory, rel=0.08)
