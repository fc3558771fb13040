import pytest

from cliperase_fast.unlearning.selection import Candidate, Selection


def candidate(step, forget, retain, similarity=0.0):
    return Candidate(step=step, epoch=step, forget=forget, retain=retain, forget_similarity=similarity)


def choose(candidates, before=0.98, floor=0.02):
    rule, best = Selection(before, floor), None
    for candidate in candidates:
        if rule.better(candidate, best):
            best = candidate
    return rule, best


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        (
            [candidate(1, 0.5, 0.98), candidate(2, 0.1, 0.97), candidate(3, 0.0, 0.90)],
            2,
        ),  # the last one fell below the floor
        ([candidate(1, 0.0, 0.97), candidate(2, 0.0, 0.98)], 2),  # a tie goes to the higher retain score
        ([candidate(1, 0.0, 0.98, 0.3), candidate(2, 0.0, 0.98, 0.1)], 2),  # then to the lower similarity
        ([candidate(1, 0.0, 0.98), candidate(2, 0.0, 0.98)], 1),  # then to the earlier
        ([candidate(1, 0.0, 0.96)], 1),  # exactly on the floor
        ([candidate(1, 0.0, 0.5), candidate(2, 0.3, 0.7)], 2),  # nothing within: the smallest drop
        ([candidate(1, 0.0, 0.5), candidate(2, 0.9, 0.97)], 2),  # within beats more forgetting outside
    ],
)
def test_the_lowest_forget_score_within_the_floor_is_chosen(candidates, chosen):
    assert choose(candidates)[1].step == chosen


def test_the_reason_names_the_choice_and_its_scores():
    rule, best = choose([candidate(1, 0.5, 0.98), candidate(2, 0.125, 0.97)])
    reason = rule.reason(best, [best, best])
    for part in ("Epoch 2 (step 2)", "2 checkpoints", "2 points", "12.5%", "97.0%", "98.0%"):
        assert part in reason


def test_the_reason_says_if_nothing_is_within_the_floor():
    rule, best = choose([candidate(1, 0.0, 0.5)])
    assert not rule.within(best)
    assert rule.reason(best, [best]).startswith("None of 1 checkpoint kept")
    assert "retain_floor" in rule.reason(best, [best])


def test_a_lower_similarity_alone_is_better_but_not_progress():
    rule = Selection(0.98, 0.02)
    assert rule.better(candidate(2, 0.0, 0.98, 0.1), candidate(1, 0.0, 0.98, 0.2))
    assert not rule.progresses(candidate(2, 0.0, 0.98, 0.1), candidate(1, 0.0, 0.98, 0.2))
    assert rule.progresses(candidate(2, 0.0, 0.99, 0.2), candidate(1, 0.0, 0.98, 0.2))


def test_the_last_is_chosen_on_request():
    rule = Selection(0.98, 0.02, last=True)
    assert rule.better(candidate(2, 0.9, 0.1), candidate(1, 0.0, 0.98))
    assert "the last" in rule.reason(candidate(2, 0.9, 0.1), [])
