"""A stream of retain pairs that two ranks share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "unlearning"))
from stream_shards import forget_red, watched, weights, write_shard

from cliperase_fast.data import open_source


def _train(rank: int, source: str, settings: dict[str, Any]) -> tuple[list[list[str]], bytes]:
    result, seen = watched(forget_red, source, **settings)
    return [list(captions) for captions in seen], weights(result).numpy().tobytes()


def test_two_ranks_share_a_stream_and_go_on_at_their_places(two, tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", range(15 * number, 15 * number + 15))
    source = f"stream:{tmp_path}/{{0..3}}.tar?head=20&buffer=8"
    settings = {"output_dir": tmp_path / "run", "checkpoint_every": 1, "keep_checkpoints": 9, "steps": 5}
    found = two.run(_train, source, settings)
    behind = open_source(source).stream
    read = []
    for reader, (batches, _) in enumerate(found):
        count = 2 - reader  # of the three retain pairs of a batch
        expected = [pair.caption for pair, _ in zip(behind.pairs(reader, 2), range(5 * count), strict=False)]
        assert [caption for captions in batches for caption in captions] == expected
        assert {len(captions) for captions in batches} == {count}
        read += expected
    assert len(set(read)) == len(read) == 15
    assert found[0][1] == found[1][1]
    for step in (3, 4, 5):  # as if the run had been killed after step 2
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "run" / "result.json").unlink()
    resumed = two.run(_train, source, {**settings, "resume": True})
    assert [batches for batches, _ in resumed] == [batches[2:] for batches, _ in found]
    assert resumed[0][1] == found[0][1]
