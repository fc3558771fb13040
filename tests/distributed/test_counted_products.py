"""Over ranks each similarity is formed once: half of what open_clip forms, with the same gradients."""

from __future__ import annotations

import pytest

from cliperase_fast.benchmarks import sharded_products
from cliperase_fast.benchmarks.write_docs import load


def _both(rank: int, loss: str, pairs: int) -> dict[str, dict[str, float]]:
    sharded_products.check_same_gradients(rank, loss)
    return {way: sharded_products.counted(rank, way, loss, pairs) for way in sharded_products.WAYS}


@pytest.mark.parametrize("loss", sharded_products.LOSSES)
def test_each_similarity_is_formed_once(two, loss):
    kinds = 1 if loss == "contrastive" else 2  # the student's, and the teacher's
    for counted in two.run(_both, loss, 2048):
        for way in ("gathered", "ring"):
            assert counted[way]["forward"] == pytest.approx(kinds)
            assert counted["open_clip"]["forward"] == pytest.approx(2 * kinds)
            assert counted[way]["backward"] == pytest.approx(kinds + 2)  # formed again, and the two of the gradients
            assert counted[way]["largest"] <= 0.5 and counted["open_clip"]["largest"] >= 1


def test_the_committed_counts_are_of_every_loss_way_and_number_of_ranks():
    runs = load("sharded-products")["runs"]
    described = {(run["ranks"], run["loss"], run["way"]) for run in runs}
    assert len(runs) == len(described) == 18
    assert described == {
        (ranks, loss, way)
        for ranks in sharded_products.RANKS
        for loss in sharded_products.LOSSES
        for way in sharded_products.WAYS
    }
    for run in runs:
        if run["way"] == "open_clip":
            ours = [
                r for r in runs if r["way"] != "open_clip" and (r["ranks"], r["loss"]) == (run["ranks"], run["loss"])
            ]
            assert all(2 * r["forward"] == run["forward"] for r in ours)
