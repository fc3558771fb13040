"""An association goes, and neither of the things it is made of. On rendered shapes, seeded."""

import pytest

from cliperase_fast.benchmarks.quality import kinship
from cliperase_fast.demo import run_demo


@pytest.mark.long
def test_an_association_goes_and_neither_its_colour_nor_its_shape(tmp_path, model_cache):
    source = "shapes?train=60&test=20"
    result = run_demo(f"{source}#class:red circle", tmp_path / "run", cache_dir=model_cache, report=False)
    groups = kinship(result.record["per_class"])
    assert groups["forgotten"]["before"] >= 0.8
    assert groups["forgotten"]["after"] <= 0.01
    for kin in ("red", "circle", "others"):
        assert groups[kin]["after"] >= groups[kin]["before"] - 0.03, kin
