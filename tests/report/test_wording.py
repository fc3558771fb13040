from __future__ import annotations

import re

import pytest
from report_sample import sample_result, scores

from cliperase_fast.evaluation import METRICS
from cliperase_fast.report import verdict
from cliperase_fast.report.wording import before_after, change, percent, shown_metrics, signed


@pytest.mark.parametrize(
    ("forget", "retain", "level", "words"),
    [
        (
            (0.98, 0.0),
            (0.97, 0.965),
            "good",
            ["Forgotten, and the rest kept", "0.0%", "98.0% before", "96.5%"],
        ),
        ((0.98, 0.0), (0.97, 0.99), "good", ["Forgotten, and the rest kept"]),
        ((0.98, 0.05), (0.97, 0.97), "good", ["Almost forgotten", "now recognises 5.0%"]),
        ((0.98, 0.5), (0.97, 0.97), "mixed", ["Only partly forgotten", "still recognises 50.0%"]),
        ((0.98, 0.97), (0.97, 0.97), "bad", ["Not forgotten", "still recognises 97.0%"]),
        ((0.98, 0.0), (0.97, 0.92), "mixed", ["Forgotten, but at a price", "only 92.0%", "5.0 points fewer"]),
        ((0.98, 0.0), (0.97, 0.22), "bad", ["Forgotten, but at a heavy price", "75.0 points fewer"]),
        ((0.98, 0.99), (0.97, 0.22), "bad", ["Not forgotten, and the rest suffered badly"]),
        ((0.98, 0.5), (0.97, 0.92), "bad", ["Only partly forgotten, and the rest suffered"]),
        ((0.0, 0.0), (0.97, 0.97), "nothing", ["There was nothing to forget: the model already scored 0.0%"]),
        ((0.25, 0.0), (0.97, 0.97), "nothing", ["There was little to forget", "no better than chance (25.0%)"]),
        ((0.0, 0.0), (0.97, 0.5), "bad", ["There was nothing to forget, and the rest suffered badly"]),
        ((0.0, 0.3), (0.97, 0.97), "bad", ["went the wrong way"]),
    ],
)
def test_the_verdict_follows_from_the_scores(forget, retain, level, words):
    found = verdict(sample_result(forget, retain))
    assert found.level == level
    for word in words:
        assert word in found.sentence
    assert found.sentence.count(". ") == 0  # one sentence


def test_classes_without_test_pairs_count_among_those_to_choose_from():
    result = sample_result((0.25, 0.0))
    for when in ("before", "after"):
        result[when]["forget"]["gallery_classes"] = 10  # of which four have test pairs
    assert verdict(result).level == "good"


@pytest.mark.parametrize(
    ("forget", "retain", "changes", "advice"),
    [
        ((0.98, 0.0), (0.97, 0.965), {}, None),
        ((0.98, 0.97), (0.97, 0.97), {}, r"Raise learning_rate \(now 0.0001\) or epochs \(now 20\)"),
        ((0.98, 0.97), (0.97, 0.97), {"lambda_forget": 0.0}, "lambda_forget=0 nothing pushes"),
        ((0.98, 0.97), (0.97, 0.97), {"epochs": "auto", "steps": 50}, r"or steps \(now 50\)"),
        ((0.98, 0.0), (0.97, 0.92), {}, r"Lower learning_rate \(now 0.0001\)"),
        ((0.98, 0.97), (0.97, 0.5), {}, "Lower learning_rate .* raise epochs"),
        ((0.0, 0.0), (0.97, 0.97), {}, "Choose forget pairs that the model gets right"),
        ((0.98, 0.24), (0.97, 0.97), {}, r"no better than chance \(25.0%\): judge"),
        ((0.98, 0.26), (0.97, 0.97), {}, "Raise learning_rate"),
        ((0.2, 0.2), (0.25, 0.25), {}, "model, its transform and the captions belong together"),
    ],
)
def test_the_advice_names_the_settings_to_change(forget, retain, changes, advice):
    result = sample_result(forget, retain)
    result["config"].update({"epochs": 20, **changes})
    found = verdict(result)
    if advice is None:
        assert found.advice == ""
    else:
        assert re.search(advice, found.advice)
    assert found.text.startswith(found.sentence)
    assert found.text.endswith(found.advice)
    assert found.short.startswith(found.opening)


def test_a_retain_floor_that_prevented_forgetting_is_named():
    result = sample_result((0.98, 0.97), (0.97, 0.97))
    result["selection"] = {
        "validation": {"forget": 0.97, "retain": 0.97},
        "lowest": {"epoch": 7, "forget": 0.1, "retain": 0.8},
    }
    assert re.search(r"epoch 7 forgot more \(forget 10.0%\).*raise retain_floor \(now 0.02\)", verdict(result).advice)


def test_unchanged_scores_are_reported_as_unchanged():
    result = sample_result((0.98, 0.98), (0.97, 0.97))
    result["after"] = result["before"]
    assert "exactly as before: raise learning_rate" in verdict(result).advice


def test_the_retain_floor_decides_what_counts_as_a_drop():
    result = sample_result((0.98, 0.0), (0.97, 0.95))
    assert verdict(result).level == "good"  # 2 points, allowed
    result["config"]["retain_floor"] = 0.01
    assert "at a price" in verdict(result).sentence


def test_a_drop_just_beyond_the_floor_does_not_read_as_the_floor():
    assert "2.04 points fewer where retain_floor allows 2" in verdict(sample_result((0.98, 0.0), (0.97, 0.9496))).text


def test_without_classes_the_verdict_is_about_retrieval():
    result = sample_result()
    for when in ("before", "after"):
        for which in ("forget", "retain"):
            result[when][which]["zero_shot_top1"] = None
    assert "finds the right caption of 10.0% of the forget images (50.0% before)" in verdict(result).sentence


def test_without_scores_there_is_no_verdict():
    assert verdict({}).level == "unknown"
    assert verdict({"before": {}, "after": {}}).level == "unknown"


def test_without_retain_scores_only_the_forgetting_is_judged():
    result = sample_result()
    result["after"]["retain"] = scores(0, None, None, None)
    found = verdict(result)
    assert found.level == "good"
    assert "others" not in found.sentence


def test_percentages_do_not_round_to_none_or_all():
    assert [percent(share) for share in (0.0, 0.0001, 0.123, 0.9999, 1.0, None)] == [
        "0.0%", "<0.1%", "12.3%", ">99.9%", "100.0%", "–"]  # fmt: skip


def test_changes_are_signed_points_and_zero_has_no_sign():
    accuracy, association = METRICS["zero_shot_top1"], METRICS["association"]
    assert change(accuracy, 0.98, 0.0) == "−98.0"
    assert change(accuracy, 0.5, 0.525) == "+2.5"
    assert change(association, 0.31, -0.104) == "−0.414"
    assert change(accuracy, None, 0.5) == "–"
    assert signed(-0.0001, 1) == "0.0"


def test_recalls_that_are_one_by_definition_are_not_shown():
    few = {**scores(10, 0.5, 1.0, 0.3), "gallery_captions": 5, "gallery_images": 360}
    shown = [metric.name for metric in shown_metrics(few)]
    assert "image_to_text_r@1" in shown
    assert "image_to_text_r@5" not in shown
    assert "text_to_image_r@10" in shown


def test_nan_counts_as_missing():
    result = sample_result()
    result["after"]["forget"]["zero_shot_top1"] = float("nan")
    assert before_after(result, "forget", METRICS["zero_shot_top1"]) is None


def test_advice_names_the_rate_and_the_steps_that_the_run_found():
    result = sample_result((0.98, 0.0), (0.97, 0.92))
    result["config"].update(learning_rate="auto", epochs="auto")
    result["recipe"] = {"learning_rate": 3.16228e-05, "steps": 60}
    assert "Lower learning_rate (found: 3.16e-05) or epochs (found: 60 steps)" in verdict(result).advice


def missed(forget=(0.98, 0.0), retain=(0.97, 0.965), **selection):
    """A run that did not reach its target, by the method `calibrated` and without numbers."""
    result = sample_result(forget, retain)
    result["config"] = {
        "method": "calibrated", "learning_rate": "auto", "epochs": "auto", "retain_floor": 0.02,
        "method_options": {"lambda_level": 33.0},
    }  # fmt: skip
    target = {"background": 0.09, "association": 0.14, "forget": 0.05}
    result["recipe"] = {"target": target, "learning_rate": 3.16228e-05, "steps": 60}
    result["selection"].update(
        {"target_reached": False, "target": target, "association": 0.2231, "within_floor": True, "outside_floors": 0}
    )
    result["selection"].update(selection)
    return result


def test_a_score_that_fell_without_reaching_the_target_is_not_called_forgotten():
    found = verdict(missed())
    assert found.opening == (
        "The score fell, but the forget pairs are still more similar than the target (on the validation split "
        "association 0.22, target 0.14)"
    )
    assert found.sentence == (
        f"{found.opening}: the model now recognises 0.0% of the forget images (98.0% before) and 96.5% of the others "
        "(97.0% before)."
    )
    assert found.level == "mixed"
    assert 'method_options={"lambda_level": 100}' in found.advice


@pytest.mark.parametrize("reached", [True, None])
def test_a_target_that_was_reached_or_does_not_exist_changes_no_word(reached):
    found = verdict(missed(target_reached=reached))
    assert (found.level, found.advice) == ("good", "")
    assert found.opening == "Forgotten, and the rest kept"


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"association": 0.1431}, "(on the validation split association 0.143, target 0.140)"),
        ({"validation": {"forget": 0.125}},
         "(on the validation split association 0.22, target 0.14; forget score 12.5%, target 5.0%)"),
        ({"association": 0.12, "validation": {"forget": 0.125}},
         "but the target was not reached (on the validation split forget score 12.5%, target 5.0%)"),
        ({"association": None}, "but the target was not reached: the model"),
        ({"target": None}, "association 0.22, target 0.14"),  # an earlier record, which has it in the recipe
    ],
)  # fmt: skip
def test_what_is_left_above_the_target_is_named(selection, says):
    assert says in verdict(missed(**selection)).sentence


def test_a_missed_target_at_a_price_is_both():
    found = verdict(missed(retain=(0.97, 0.7)))
    assert found.level == "bad"
    assert "target 0.14), and the rest suffered badly: " in found.sentence
    assert "Give more retain pairs" in found.advice
    assert verdict(missed(retain=(0.97, 0.92))).level == "mixed"


@pytest.mark.parametrize(
    ("forget", "config", "selection", "advice"),
    [
        (0.0, {}, {"outside_floors": 4}, "Allow more with worst_class_floor or retain_floor (now 0.02), or forget"),
        (0.0, {}, {"within_floor": False}, "Allow more with worst_class_floor"),
        (0.0, {"method_options": {"lambda_level": 100.0}}, {},
         'Give forgetting more weight with method_options={"lambda_level": 300}'),
        (0.0, {"method": "gradient_ascent"}, {}, 'Use method="calibrated".'),
        (0.0, {"method": "cliperase", "lambda_forget": 3.0}, {},
         'Raise lambda_forget (now 3), or use method="calibrated".'),
        (0.0, {"learning_rate": 1e-4, "epochs": 3}, {},
         "Raise learning_rate (now 0.0001) or epochs (now 3), or leave out learning_rate and epochs so that the run "
         "finds them."),
        (0.0, {"learning_rate": 1e-4}, {}, "Raise learning_rate (now 0.0001), or leave out learning_rate so that the "
         "run finds it."),
        (0.97, {}, {}, "Give forgetting more weight"),  # not forgotten at all
    ],
)  # fmt: skip
def test_advice_after_a_missed_target_is_what_the_run_can_still_change(forget, config, selection, advice):
    result = missed((0.98, forget), **selection)
    result["config"].update(config)
    assert verdict(result).advice.startswith(advice)


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"method": "calibrated", "learning_rate": 1e-3, "epochs": 3},
         "Leave out learning_rate and epochs so that the run finds them, or give more retain pairs."),
        ({"method": "calibrated", "learning_rate": "auto", "epochs": "auto", "steps": 50},
         "Leave out steps so that the run finds it, or give more retain pairs."),
        ({"method": "calibrated", "learning_rate": "auto", "epochs": "auto"},
         "Give more retain pairs, or forget fewer classes at once; the reason of the choice says which limit gave "
         "way."),
        ({"method": "gradient_ascent", "learning_rate": 1e-3, "epochs": 3},
         'Use method="calibrated", which holds the retain pairs, and leave out learning_rate and epochs so that the '
         "run finds them."),
        ({"method": "gradient_ascent", "learning_rate": "auto", "epochs": "auto"},
         'Use method="calibrated", which holds the retain pairs; give more retain pairs, or forget fewer classes at '
         'once.'),
        ({"method": "cliperase", "learning_rate": "auto", "epochs": "auto"}, 'Use method="calibrated"'),
        ({"method": "cliperase", "learning_rate": 1e-3, "epochs": 3}, "Lower learning_rate (now 0.001) and raise"),
    ],
)  # fmt: skip
def test_training_that_forgot_nothing_and_damaged_the_rest_is_not_told_to_do_less(config, advice):
    result = sample_result((0.98, 0.97), (0.97, 0.5))
    result["config"].update(config)
    found = verdict(result)
    assert found.opening == "Not forgotten, and the rest suffered badly"
    assert found.advice.startswith(advice)


@pytest.mark.parametrize(
    ("config", "trained", "advice"),
    [
        ({"method": "calibrated"}, True, "or leave out learning_rate and epochs so that the run finds them."),
        ({"method": "calibrated", "learning_rate": "auto", "epochs": "auto"}, True, "or give more retain pairs."),
        ({"method": "gradient_ascent"}, True, 'or use method="calibrated", which holds the retain pairs.'),
        ({"method": "ssd"}, False, 'Change method_options, or use method="calibrated", which holds the retain pairs.'),
    ],
)
def test_the_method_that_keeps_the_rest_is_not_advised_to_its_own_user(config, trained, advice):
    result = sample_result((0.98, 0.0), (0.97, 0.92))
    result["config"].update({"epochs": 3, **config})
    result["pairs_per_second"] = 500.0 if trained else None
    assert verdict(result).advice.endswith(advice)
