"""More runs of `open_clip_train.main` than `make test` has time for; part of `make long-check`."""

from __future__ import annotations

import open_clip_runs as runs
import pytest
from test_open_clip_training import assert_ranks_train_alike, distilling, folder  # noqa: F401 - a fixture

KINDS = {"clip": lambda place: [], "siglip": lambda place: ["--siglip"], "distillation": distilling}


def test_two_ranks_train_alike_in_every_kind_of_data_precision_and_accumulation(folder):  # noqa: F811
    ways = {
        "shards": ("webdataset", []),
        "accumulation": ("csv", ["--accum-freq", 2, "--batch-size", 8]),
        "bfloat16": ("csv", ["--precision", "amp_bf16"]),
    }
    cases = {
        f"{kind}-{way}": runs.arguments(folder, data, "--epochs", 1, *KINDS[kind](folder), *extra)
        for kind in KINDS
        for way, (data, extra) in ways.items()
        if (kind, way) != ("distillation", "accumulation")  # which open_clip refuses
    }
    assert_ranks_train_alike(folder, cases)


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_of_a_whole_run_is_the_stock_one(kind, folder):  # noqa: F811
    """54 steps."""
    words = runs.arguments(folder, "csv", *KINDS[kind](folder), "--epochs", 9)
    *stock, stock_package = runs.run(folder, f"{kind}-stock", False, words)
    *fused, fused_package = runs.run(folder, f"{kind}-fused", True, words)
    assert (stock_package["package"], fused_package["package"]) == ("open_clip", "cliperase_fast")
    assert len(fused) == len(stock) == 54
    for ours, theirs in zip(fused, stock, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert sum(fused[-1].values()) < sum(fused[0].values())
