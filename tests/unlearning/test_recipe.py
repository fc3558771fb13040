"""The decisions of the automatic recipe, from made-up measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cliperase_fast.config import PROBE_STEPS
from cliperase_fast.evaluation import Divergence
from cliperase_fast.unlearning import recipe
from cliperase_fast.unlearning.recipe import Probe
from cliperase_fast.unlearning.selection import Candidate, Target, TargetSelection, wilson

TARGET = Target(0.0, 100)  # association at most 0.05
BEFORE = Candidate(0, 0, 1.0, 0.9, 0.8)


def candidate(step, forget=0.0, association=0.0, divergence=0.05, retain=0.9, worst=None, error=0.0):
    worst = divergence if worst is None else worst
    return Candidate(step, 1, forget, retain, association, Divergence(divergence, 0.0, 50, "cat", worst, error, 10))


def search(outcome, first=-8, most=recipe.BUDGET_UNREACHED):
    """Run the search on a function from a rate's place on the grid to (steps, divergence, reached, progress)."""
    probes = []
    while (rate := recipe.next_rate(probes, recipe.rate_at(first), most)) is not None:
        steps, divergence, reached, progress = outcome(round(2 * torch.tensor(rate).log10().item()))
        stopped = "" if steps == PROBE_STEPS else "too slow"
        probes.append(Probe(rate, steps, 0.0, 0.9, 0.0, divergence, progress, reached, stopped))
        assert len(probes) < 20, "the search does not end"
    return [probe.index for probe in probes], recipe.choose(probes)[0].index


def world(index):
    """Rates from 1e-4 on reach the target; the divergence grows with the rate."""
    if index < -9:
        return 10, 0.001, False, 0.005
    if index < -8:
        return 10, 0.01, False, 0.08
    divergence = 0.02 * 2 ** (index + 8)
    return (30, divergence, True, 1.0) if divergence < 1 else (10, divergence, False, 1.0)


@pytest.mark.parametrize(
    ("first", "tried"),
    [(-8, [-8, -9]), (-7, [-7, -8, -9]), (-9, [-9, -8]), (-11, [-11, -9, -8]), (0, [0, -2, -4, -5, -6])],
)
def test_the_search_goes_down_while_the_target_is_reached_and_up_while_it_is_not(first, tried):
    assert search(world, first)[0] == tried


@pytest.mark.parametrize("first", [-11, -10, -9, -8, -7])
def test_the_lowest_divergence_at_the_target_is_found_from_any_start_nearby(first):
    assert search(world, first)[1] == -8


def test_without_a_rate_at_the_target_the_highest_gentle_one_is_taken():
    tried, chosen = search(lambda index: (30, 10.0 ** (index + 7) * 0.05, False, 0.4))
    assert max(tried) == -6
    assert chosen == -7  # 0.05 nats; -6 diverges by 0.5


def test_a_rate_on_its_way_may_diverge_more_as_that_heals():
    def outcome(index):  # 1e-4 comes half way, 1e-3 reaches the target; both disturb the rest
        return 30, 0.3 if index < -6 else 0.2, index >= -6, 0.1 if index < -8 else 0.7

    assert search(outcome) == ([-8, -7, -6], -6)

    def never(index):
        return 30, 0.3 if index < -6 else 0.2, False, 0.1 if index < -8 else 0.7

    assert search(never)[1] == -6  # it diverges least of those on their way


def test_a_gentle_rate_on_its_way_is_taken_before_a_higher_one_that_disturbs():
    def outcome(index):
        return 30, {-8: 0.05, -7: 0.08}.get(index, 0.4), False, 0.8

    tried, chosen = search(outcome)
    assert chosen == -7 and max(tried) > -7


def test_a_gentle_rate_is_taken_before_one_that_is_there_but_disturbs_unless_it_was_too_slow():
    def outcome(index):
        return (steps, 0.02, False, 0.2) if index == -8 else (30, 0.3, index == -7, 1.0)

    steps = 30
    assert search(outcome) == ([-8, -7], -8)
    steps = 10
    assert search(outcome) == ([-8, -7], -7)


def test_no_lower_rate_is_tried_where_the_divergence_is_negligible():
    assert search(lambda index: (30, 0.009, True, 1.0)) == ([-8], -8)
    assert len(search(lambda index: (30, 0.011, True, 1.0))[0]) > 1


def test_a_rate_that_ruins_the_model_does_not_reach_the_target():
    assert recipe.reaches(candidate(30, divergence=0.9), TARGET)
    assert not recipe.reaches(candidate(30, divergence=1.1), TARGET)
    assert not recipe.reaches(candidate(30, divergence=float("nan")), TARGET)
    assert not recipe.reaches(candidate(30, association=0.2), TARGET)


def test_where_every_rate_ruins_the_model_the_gentlest_is_taken():
    tried, chosen = search(lambda index: (10, 5.0 + index / 100, False, 1.0))
    assert chosen == min(tried)


def test_the_search_keeps_to_its_budget():
    tried, _ = search(lambda index: (30, 0.05 + 0.001 * index, True, 1.0))
    assert 30 * (len(tried) - 1) <= recipe.BUDGET
    assert search(world, -8, most=0)[0] == [-8]


def test_the_first_rate_is_a_thousandth_of_a_typical_weight():
    matrices = [nn.Parameter(torch.full((4, 4), size)) for size in (0.001, 0.03, 0.04)]
    assert recipe.first_rate([*matrices, nn.Parameter(torch.ones(4))]) == pytest.approx(10**-4.5, rel=1e-4)
    assert recipe.first_rate([nn.Parameter(torch.zeros(2, 2)), *matrices[2:]]) == pytest.approx(10**-4.5, rel=1e-4)


@pytest.mark.parametrize(
    ("found", "why"),
    [(candidate(10, 1.0, 0.77), "too slow"), (candidate(10, 1.0, 0.75), ""), (candidate(10, 0.0, 0.0, 1.5), "diverged"),
     (candidate(10, 0.0, 0.0, float("nan")), "diverged")],
)  # fmt: skip
def test_a_hopeless_probe_ends_early(found, why):
    assert recipe.early_end(found, TARGET, BEFORE) == why


@pytest.mark.parametrize(
    ("forget", "association", "reached"),
    [(0.03, 0.05, True), (0.04, 0.05, False), (0.03, 0.06, False), (0.0, -0.9, True), (float("nan"), 0.0, False),
     (0.0, float("nan"), False)],
)  # fmt: skip
def test_the_target_needs_the_association_and_the_score(forget, association, reached):
    assert TARGET.reached(candidate(1, forget, association)) is reached


def course(*evaluations, within=True, patience=3):
    found = list(evaluations)
    return recipe.course(found, TARGET, patience, [within] * len(found))


def stages(evaluations, **options):
    """The stage after each evaluation, up to the stop."""
    found = [course(*evaluations[: count + 1], **options) for count in range(len(evaluations))]
    return [len(one.lowered) for one in found if not one.stop], next((one.stop for one in found if one.stop), "")


def test_training_goes_on_at_its_rate_while_the_divergence_at_the_target_falls():
    falling = [candidate(10, 1.0, 0.5), *(candidate(20 + 10 * i, divergence=0.1 * 0.8**i) for i in range(14))]
    assert stages(falling) == ([0] * 15, "")
    minute = [candidate(20 + 10 * i, divergence=0.001 * 0.5**i) for i in range(4)]
    assert stages(minute)[0][-1] == 1


def test_the_rate_falls_twice_and_training_ends_when_the_divergence_stops_improving():
    falling = [candidate(10, 1.0, 0.5), *(candidate(20 + 10 * i, divergence=0.1 * 0.8**i) for i in range(4))]
    flat = [*falling, *(candidate(60 + 10 * i, divergence=0.0512) for i in range(9))]
    assert stages(flat) == (
        [0] * 7 + [1] * 3 + [2] * 3,
        "the target was reached at step 20, and the divergence from the original stopped improving at step 50",
    )
    assert course(*flat[:10]).lowered == (80,)
    assert [recipe.Course((10,) * count).factor for count in range(3)] == [1.0, 0.3, 0.1]


def test_a_stage_that_improves_lasts():
    flat = [candidate(10 * i, divergence=0.1) for i in range(1, 5)]
    settling = [candidate(50 + 10 * i, divergence=0.09 * 0.9**i) for i in range(6)]
    assert stages([*flat, *settling]) == ([0] * 3 + [1] * 7, "")


def test_an_evaluation_that_leaves_the_target_does_not_count_as_an_improvement():
    found = [candidate(10, divergence=0.1), *(candidate(20 + 10 * i, 1.0, 0.5, 0.01) for i in range(3))]
    assert stages(found)[0] == [0, 0, 0, 1]


def test_training_ends_when_the_forget_pairs_stop_coming_closer():
    stuck = [candidate(10 * (i + 1), 0.5, 0.6 - 0.1 * min(i, 2)) for i in range(15)]
    found, why = stages(stuck)
    assert found == [0] * 8 + [1] * 3 + [2] * 3
    assert "was not reached: the forget pairs stopped coming closer to it at step 30" in why


def test_training_ends_when_the_rest_suffers_before_the_target_is_reached():
    nearing = [candidate(10 * (i + 1), 0.5, 0.8 * 0.8**i, 0.6) for i in range(6)]
    assert not course(*nearing).stop
    assert "before the rest suffered more" in course(*nearing, within=False).stop
    gentle = [replace(one, divergence=candidate(1, divergence=0.4).divergence) for one in nearing]
    assert not course(*gentle, within=False).stop, "the rest may heal once the forgetting is done"
    stuck = [candidate(10 * (i + 1), 0.5, 0.8 - 0.005 * i, 0.01) for i in range(6)]
    assert not course(*stuck).stop
    assert "before the rest suffered more" in course(*stuck, within=False).stop
    healing = [candidate(10 * (i + 1), 0.5, 0.8 * 0.8**i, 0.5 - 0.05 * i) for i in range(6)]
    assert not course(*healing, within=False).stop


def measured(step, association, divergence=0.05):
    """A candidate whose association is known to 0.01."""
    return replace(candidate(step, 0.0, association, divergence), association_error=0.01)


def pressing(evaluations, within=None):
    """The steps after which the forget terms get more weight, and the rate falls."""
    within = [True] * len(evaluations) if within is None else within
    found = recipe.course(evaluations, TARGET, 3, within, recipe.PRESSES)
    return found.pressed, found.lowered


def test_forgetting_that_stands_still_above_the_target_gets_more_weight_before_the_rate_falls():
    stuck = [candidate(10 * (i + 1), 0.5, 0.6) for i in range(19)]
    assert pressing(stuck) == ((70, 130, 190), ())
    assert recipe.course(stuck, TARGET, 3, [True] * 19, recipe.PRESSES).pressure == recipe.PRESSURE**3
    longer = [*stuck, *(candidate(200 + 10 * i, 0.5, 0.6) for i in range(12))]
    assert pressing(longer) == ((70, 130, 190), (250, 280))
    assert "was not reached" in recipe.course(longer, TARGET, 3, [True] * 31, recipe.PRESSES).stop


def test_forgetting_that_only_the_error_brings_to_the_target_gets_more_weight():
    near = [measured(10 * (i + 1), 0.055) for i in range(4)]
    assert TARGET.reached(near[0]) and not TARGET.reached_safely(near[0])
    assert pressing(near) == ((40,), ())
    spare = [*near[:3], measured(40, 0.04)]
    assert TARGET.reached_safely(spare[3])
    assert pressing(spare) == ((), (40,))
    assert pressing(spare, [True] * 3 + [False]) == ((40,), ())


def test_forgetting_that_comes_closer_gets_no_more_weight():
    nearing = [candidate(10 * (i + 1), 0.5, 0.8 * 0.9**i) for i in range(12)]
    assert pressing(nearing) == ((), ())


def test_a_candidate_with_an_error_to_spare_goes_before_one_that_diverges_less():
    near, spare = measured(1, 0.045, 0.01), measured(2, 0.03, 0.05)
    assert not replace(RULE, safely=True).better(near, spare) and replace(RULE, safely=True).better(spare, near)
    assert RULE.better(near, spare)
    words = [replace(RULE, safely=safely).reason(spare, [near, spare]) for safely in (False, True)]
    assert ["with a standard error to spare" in reason for reason in words] == [False, True]


def test_the_association_counts_up_to_its_standard_error():
    above = candidate(1, 0.0, 0.08)
    assert not TARGET.reached(above)
    assert TARGET.reached(replace(above, association_error=0.03))
    assert not TARGET.reached(replace(above, association_error=0.02))


@pytest.mark.parametrize(
    ("left", "pairs", "reached"),
    [(2, 60, False), (3, 60, False), (3, 100, True), (1, 20, True), (1, 19, False), (0, 4, True)],
)
def test_the_forget_score_counts_with_its_standard_error_on_top_unless_a_single_pair_is_left(left, pairs, reached):
    assert Target(0.0, pairs).reached(candidate(1, left / pairs)) is reached


def test_of_candidates_about_as_close_to_the_target_the_gentler_one_is_selected():
    near, gentle = candidate(1, association=0.11, divergence=0.2), candidate(2, association=0.14, divergence=0.1)
    far = candidate(3, association=0.3, divergence=0.01)
    assert chosen(near, gentle, far) is gentle


RULE = TargetSelection(0.9, 400, TARGET, floor=0.02, class_floor=0.3)


def chosen(*candidates):
    best = None
    for one in candidates:
        best = one if RULE.better(one, best) else best
    return best


def test_the_least_divergence_at_the_target_is_selected():
    far, near, gentle = candidate(1, association=0.3, divergence=0.01), candidate(2), candidate(3, divergence=0.04)
    assert chosen(far, near, gentle) is gentle
    assert "Epoch 1 (step 3) diverges least from the original (0.040 nats)" in RULE.reason(gentle, [far, near, gentle])


def test_a_class_that_diverges_too_much_is_not_selected():
    worst, near = candidate(1, worst=0.4, divergence=0.01), candidate(2, divergence=0.2)
    assert chosen(worst, near) is near
    uncertain = candidate(3, worst=0.4, error=0.15, divergence=0.01)
    assert chosen(uncertain, near) is uncertain  # within one standard error of the floor


def test_a_large_drop_of_the_retain_score_is_not_selected():
    assert chosen(candidate(1, retain=0.8, divergence=0.01), candidate(2)).step == 2


def test_the_result_says_whether_the_target_or_the_floor_gave_way():
    inside, outside = candidate(1, 0.5, 0.4), candidate(2, worst=0.9)
    assert chosen(inside, outside) is inside
    said = RULE.reason(inside, [inside, outside])
    assert "The target gave way; epoch 1 (step 1) came closest to it" in said
    assert "and kept the rest" in said and "Allow more with worst_class_floor" in said
    assert "The floor gave way; epoch 1 (step 2) diverges least" in RULE.reason(outside, [outside])


def test_an_association_just_above_the_target_does_not_read_as_the_target():
    near = candidate(1, association=0.05024)
    said = RULE.reason(near, [near])
    assert "association at most 0.0500," in said and "(association 0.0502)" in said
    below = candidate(1, forget=0.5, association=-0.0001)
    assert "(association 0.000)" in RULE.reason(below, [below])


@pytest.mark.parametrize(
    ("unused", "advice"),
    [((), "more weight (lambda_forget, method_options)"), (("lambda_forget",), "Give a higher learning_rate"),
     (("lambda_forget", "learning_rate"), "Change method_options")],
)  # fmt: skip
def test_where_nothing_left_the_floor_the_advice_is_not_to_lower_it(unused, advice):
    far = candidate(1, 0.5, 0.4)
    said = RULE.reason(far, [far, candidate(2, 0.5, 0.5)], unused_settings=frozenset(unused))
    assert "though all kept the rest" in said and said.endswith(f"{advice}, or choose another method.")


def test_wilson_intervals_are_those_of_the_textbook():
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
