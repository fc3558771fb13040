"""Stored deltas: their forms, what they lose, and merging."""

import pytest
import torch

from cliperase_fast import InputError
from cliperase_fast.ledger.deltas import (
    TOLERANCE,
    apply_delta,
    describe_delta,
    digest_of,
    encode_delta,
    merge_undone,
)


def noise(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(change, tolerance=TOLERANCE):
    """(delta, the largest error of the weights) of one tensor to which a change is added."""
    before = {"w": noise(*change.shape, seed=1)}
    after = {"w": before["w"] + change}
    delta = encode_delta(before, after, tolerance)
    found = dict(before)
    apply_delta(found, delta)
    return delta, float((found["w"] - after["w"]).abs().max())


def test_equal_weights_need_nothing():
    assert stored(torch.zeros(40, 30)) == ({}, 0)


def test_a_few_changed_rows_are_stored_as_rows():
    change = torch.zeros(400, 30)
    change[[3, 17]] = noise(2, 30)
    delta, error = stored(change)
    assert set(delta) == {"w:rows", "w:index"} and delta["w:index"].tolist() == [3, 17] and error < 1e-6


def test_a_few_changed_entries_are_stored_as_entries():
    change = torch.zeros(40, 30)
    change[[3, 17, 39], [2, 4, 29]] = 1.0
    delta, error = stored(change)
    assert set(delta) == {"w:entries", "w:index"} and len(delta["w:index"]) == 3 and error < 1e-6


def test_a_change_of_low_rank_is_stored_in_factors_within_the_tolerance():
    change = noise(60, 3, scale=0.01) @ noise(3, 50, seed=2)
    delta, error = stored(change)
    assert delta["w:left"].shape == (60, 3) and delta["w:right"].shape == (3, 50)
    assert error <= TOLERANCE * float(change.abs().max()) + 1e-6
    assert set(stored(change, tolerance=0)[0]) == {"w:add"}


def test_a_convolution_of_low_rank_is_stored_in_factors():
    change = (noise(60, 2, scale=0.01) @ noise(2, 5 * 3 * 3, seed=2)).reshape(60, 5, 3, 3)
    delta, error = stored(change)
    assert delta["w:right"].shape == (2, 45) and error <= TOLERANCE * float(change.abs().max()) + 1e-6


def test_a_change_of_full_rank_is_stored_whole():
    delta, error = stored(noise(60, 50))
    assert set(delta) == {"w:add"} and error < 1e-6
    described = describe_delta(delta, {"w": noise(60, 50)})
    assert described == {"forms": {"add": 1}, "bytes": 12000, "whole_bytes": 12000}


def test_integers_are_stored_as_they_become():
    before, after = {"n": torch.tensor(3), "w": noise(2)}, {"n": torch.tensor(7), "w": noise(2)}
    delta = encode_delta(before, after)
    found = dict(before)
    apply_delta(found, delta)
    assert set(delta) == {"n:set"} and found["n"] == 7 and digest_of(found) == digest_of(after)


def test_states_of_different_models_have_no_delta():
    with pytest.raises(InputError, match="other names or shapes"):
        encode_delta({"w": noise(2)}, {"w": noise(3)})


@pytest.mark.parametrize(
    ("delta", "why"),
    [
        ({"v:add": noise(2)}, "changes 'v'"),
        ({"w:add": noise(3)}, "of shape"),
        ({"w:left": noise(2, 1)}, "does not fit"),
        ({"w": noise(2)}, "unknown part"),
    ],
)
def test_a_delta_that_does_not_fit_is_an_error(delta, why):
    with pytest.raises(ValueError, match=why):
        apply_delta({"w": noise(2)}, delta)


def test_the_digest_depends_on_values_names_and_shapes():
    state = {"w": noise(2, 3)}
    others = [{"v": state["w"]}, {"w": state["w"].reshape(3, 2)}, {"w": state["w"] + 1}]
    assert len({digest_of(one) for one in (state, *others)}) == 4
    assert digest_of({"b": noise(1), "a": noise(2)}) == digest_of({"a": noise(2), "b": noise(1)})


def test_merging_takes_a_change_back_and_keeps_what_followed():
    before, after = {"w": noise(5), "n": torch.tensor(1)}, {"w": noise(5, seed=1), "n": torch.tensor(1)}
    later = noise(5, seed=2)
    merged = merge_undone(before, after, {"w": after["w"] + later, "n": torch.tensor(2)})
    torch.testing.assert_close(merged["w"], before["w"] + later)
    assert merged["n"] == 2


def test_merging_the_last_change_is_undoing_it():
    before, after = {"w": noise(5, 4)}, {"w": noise(5, 4, seed=1)}
    assert torch.equal(merge_undone(before, after, after)["w"], before["w"])
