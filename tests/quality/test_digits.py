"""A digit goes and the others stay. On the demo's data, seeded."""

import pytest

from cliperase_fast.demo import run_demo

FORGETTING_ALONE = {"method": "cliperase", "lambda_retain": 0.0, "lambda_consistency": 0.0, "select": "last"}


def accuracies(result, part):
    return (scores[part]["zero_shot_top1"] for scores in (result.before, result.after))


def assert_forgotten_and_others_kept(digit, output, model_cache, fall=0.01):
    result = run_demo(f"demo#class:{digit}", output, cache_dir=model_cache, report=False)
    known, forgotten = accuracies(result, "forget")
    assert known >= 0.9
    assert forgotten <= 0.01
    before, after = accuracies(result, "retain")
    assert after >= before - fall


def test_a_digit_is_forgotten_and_the_others_are_kept(tmp_path, quick_model_cache):
    """With a model trained for fewer epochs than the demo's, within the floor that `unlearn()` keeps."""
    assert_forgotten_and_others_kept("seven", tmp_path / "run", quick_model_cache, fall=0.02)


@pytest.mark.long
@pytest.mark.parametrize("digit", ["seven", "zero", "three"])
def test_the_demo_model_forgets_a_digit_and_keeps_the_others(tmp_path, model_cache, digit):
    assert_forgotten_and_others_kept(digit, tmp_path / "run", model_cache)


def test_forgetting_alone_destroys_the_retain_accuracy(tmp_path, quick_model_cache):
    result = run_demo(
        "demo#class:seven",
        tmp_path / "run",
        cache_dir=quick_model_cache,
        report=False,
        learning_rate=1e-4,
        batch_size=64,
        epochs=20,
        evaluate_every=20,
        **FORGETTING_ALONE,
    )
    before, after = accuracies(result, "retain")
    assert after < 0.5 < before
