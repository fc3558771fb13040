"""Test the bound on the speedup over eager, on a tiny case."""

from __future__ import annotations

import json

from cliperase_fast.benchmarks import product_bound


def test_the_record_contains_everything_the_table_needs(tmp_path, capsys):
    path = tmp_path / "bound.json"
    product_bound.main(["--sizes", "64", "--widths", "16", "--seconds", "0.05", "--json", str(path)])
    (row,) = json.loads(path.read_text())["runs"]
    eager, peak = row["eager_ms"]["median"], row["peak_ms"]["median"]
    assert 0 < peak < eager, "four products alone take less than the whole of eager"
    assert f"{eager / peak:.2f}x" in capsys.readouterr().out
