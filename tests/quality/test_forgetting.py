"""What the library is for: chosen associations go, the rest stays. On the demo's data, seeded."""

import pytest

from benchmarks.quality import kinship
from cliperase_fast.demo import run_demo

ALONE = {"lambda_retain": 0.0, "lambda_consistency": 0.0, "select": "last"}


def accuracies(result, part):
    return (scores[part]["zero_shot_top1"] for scores in (result.before, result.after))


@pytest.mark.parametrize("digit", ["seven", "zero", "three"])
def test_a_digit_is_forgotten_and_the_others_stay(tmp_path, model_cache, digit):
    result = run_demo(f"demo#class:{digit}", tmp_path / "run", cache_dir=model_cache, report=False)
    known, forgotten = accuracies(result, "forget")
    assert known >= 0.9
    assert forgotten <= 0.01
    before, after = accuracies(result, "retain")
    assert after >= before - 0.01


def test_forgetting_alone_destroys_what_the_three_losses_keep(tmp_path, model_cache):
    result = run_demo(
        "demo#class:seven", tmp_path / "run", cache_dir=model_cache, report=False, epochs=40, evaluate_every=40, **ALONE
    )
    before, after = accuracies(result, "retain")
    assert after < 0.5 < before


def test_an_association_goes_and_neither_its_colour_nor_its_shape(tmp_path, model_cache):
    source = "shapes?train=60&test=20"
    result = run_demo(f"{source}#class:red circle", tmp_path / "run", cache_dir=model_cache, report=False)
    groups = kinship(result.record["per_class"])
    assert groups["forgotten"]["before"] >= 0.8
    assert groups["forgotten"]["after"] <= 0.01
    for kin in ("red", "circle", "others"):
        assert groups[kin]["after"] >= groups[kin]["before"] - 0.03, kin
