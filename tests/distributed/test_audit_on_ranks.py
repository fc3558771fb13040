"""`audit()` on two ranks: the result of one process on both, written once; errors that name what differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parents[1] / "auditing"))
from small import SYNONYMS, make_model, training_and_test, without_red

import cliperase_fast as cf
from cliperase_fast.auditing import relearning


def audited(rank=0, changes=None, output_dir=None):
    """An audit with little relearning, as JSON. changes: options of some ranks."""
    forget, retain, test = training_and_test()
    options = {"synonyms": SYNONYMS, "depth": True, "progress": False, "batch_size": 5}
    options |= (changes or {}).get(rank, {})
    with mock.patch.multiple(relearning, STEPS=(0, 1, 3), DRAWS=2):
        found = cf.audit(
            make_model(), without_red(), forget, retain, test=test, oracle=[without_red(1)], output_dir=output_dir,
            **options,
        )  # fmt: skip
    return json.loads(json.dumps(found.to_dict()))


def test_two_ranks_return_the_audit_of_one_process(two, tmp_path):
    alone = audited()
    found = two.run(audited, None, tmp_path / "audit")
    assert found == [alone, alone]
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == alone


def test_ranks_share_the_attacks(two):
    assert sorted(two.run(attacks_on_rank)) == [6, 6]


def attacks_on_rank(rank):
    """How many copies this rank trains and rounds, of three models with two draws and two roundings each."""
    from cliperase_fast.auditing import depth

    with (
        mock.patch.object(depth, "relearn", wraps=depth.relearn) as trained,
        mock.patch.object(depth, "quantised", wraps=depth.quantised) as rounded,
    ):
        audited(rank)
    return trained.call_count + rounded.call_count


def test_ranks_that_were_told_different_things_stop(two):
    answers = two.try_all(audited, {1: {"seed": 3}})
    assert [(fine, answer[0]) for fine, answer in answers] == [(False, "InputError")] * 2
    assert all("ranks differ in seed" in answer[1] for _, answer in answers)


def test_wrong_input_on_one_rank_stops_all(two):
    answers = two.try_all(audited, {1: {"on_error": "ignore"}})
    assert [fine for fine, _ in answers] == [False, False]
    assert all("on_error='ignore' is not one of raise, skip" in answer[1] for _, answer in answers)
