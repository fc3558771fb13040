"""The benchmark of preparation: its data, its table and its picture."""

from __future__ import annotations

import pytest

from cliperase_fast.benchmarks import preparation
from cliperase_fast.benchmarks.machine import resident
from cliperase_fast.data import open_source, select


def test_the_table_has_ten_captions_for_each_image_and_some_zebras(tmp_path):
    pairs = open_source(f"csv:{preparation.write_table(tmp_path, 2000)}").train
    assert len(pairs) == 200 and all(len(captions) == 10 for captions in pairs.captions)
    assert select(pairs, "caption:zebra").sum() == 2
    assert pairs.image(199).size == (32, 32)


def test_a_record_is_shown_as_a_table_and_a_picture(tmp_path):
    run = {"rows": 10_000, "images": 1000, "seconds": 12.3, "cpu_seconds": 3.2, "mib": 1234.5, "load": 2.0}
    record = {"runs": [run, {**run, "rows": 100_000}]}
    assert "| 10,000 | 1,000 | 12 s | 3 s | 1,234 MiB | 2.0 |" in preparation.preparation_table(record)
    preparation.draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_resident_memory_is_that_of_this_process():
    before = resident("VmRSS")
    held = bytearray(b"x" * (64 << 20))
    assert resident("VmHWM") >= resident("VmRSS") >= before + len(held) // 2
    with pytest.raises(LookupError):
        resident("VmNothing")
