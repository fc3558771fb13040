"""A ledger's requests: what they forget, how they are taken back, and what is stored."""

import copy
import hashlib
import json

import pytest
import torch
from colours import MODEL, REQUESTS, SETTINGS, copied, make_ledger, pairs_of
from small import make_pairs

from cliperase_fast import InputError, Ledger, UnlearnConfig
from cliperase_fast.data.pair_sets import Opener
from cliperase_fast.ledger import apply_patch
from cliperase_fast.ledger.deltas import digest_of, state_of
from cliperase_fast.ledger.pairs import open_request
from cliperase_fast.report import ledger_table
from cliperase_fast.report.ledger import _status


def weights_of(model):
    return digest_of(state_of(model))


def top1(entry, colour, state="now"):
    return entry.audits[colour]["forget_top1"][state]


def test_all_requests_are_forgotten_after_the_last(three):
    last = three.entries[-1]
    assert set(last.audits) == set(REQUESTS) and three.active == list(REQUESTS)
    assert all(top1(last, colour, "base") == 1 and top1(last, colour) <= 0.2 for colour in REQUESTS)
    assert all(audit["retain_top1"]["now"] >= audit["retain_top1"]["base"] - 0.02 for audit in last.audits.values())
    assert last.content["held"] == ["red", "green"]


def test_the_base_is_left_as_it_is(three):
    assert weights_of(MODEL) == three.entries[0].weights != three.entries[-1].weights == weights_of(three.model())


def test_the_head_is_the_digest_of_the_last_line_which_holds_that_of_the_line_before(three):
    lines = (three.dir / "log.jsonl").read_bytes().splitlines()
    digests = [hashlib.sha256(line).hexdigest() for line in lines]
    assert three.head() == digests[-1]
    assert [json.loads(line)["previous"] for line in lines[1:]] == digests[:-1]
    assert json.loads((three.dir / "ledger.json").read_text())["head"] == three.head()
    assert three.verify() and three.verify(three.head()) and three.verify(digests[1])


def test_no_caption_is_stored(three):
    captions = {caption for _, caption in make_pairs()}
    for path in three.dir.rglob("*"):
        if path.is_file():
            assert not any(caption.encode() in path.read_bytes() for caption in captions), path


def test_undoing_the_last_request_restores_the_weights_before_it(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger")
    entry = ledger.undo("blue")
    assert entry.content["how"] == "exact" and entry.weights == three.entries[2].weights
    assert ledger.active == ["red", "green"] and entry.audits["blue"]["undone"]
    assert ledger.undo("green").weights == three.entries[1].weights and ledger.verify()


def test_undoing_an_earlier_request_replays_the_later_ones(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger")
    entry = ledger.undo("green", progress=False)
    assert entry.content["how"] == "replay" and [step.id for step in entry.steps] == ["red", "blue"]
    assert top1(entry, "green") == 1 and top1(entry, "red") <= 0.6 and top1(entry, "blue") <= 0.6
    assert ledger.verify()
    assert ledger.undo("blue").weights == three.entries[1].weights


def test_undoing_what_later_requests_prepared_needs_no_pairs_and_finds_what_a_replay_finds(three, tmp_path):
    ledger, replayed = copied(three, tmp_path / "ledger", supplied=[]), copied(three, tmp_path / "replayed")
    entry, again = ledger.undo("red"), replayed.undo("red", how="replay", progress=False)
    assert entry.content["how"] == "prepared" and again.content["how"] == "replay" and entry.weights == again.weights
    assert entry.content["unaudited"] == {} and ledger.verify()
    for colour in REQUESTS:  # measured while the pairs were at hand
        assert {**entry.audits[colour], "file": "", "sha256": ""} == {**again.audits[colour], "file": "", "sha256": ""}
    assert top1(entry, "red") == 1 and top1(entry, "green") <= 0.6 and entry.audits["red"]["undone"]
    assert ledger.undo("blue").content["how"] == "exact" and ledger.active == ["green"]


def test_only_what_was_asked_for_is_prepared(three, tmp_path):
    assert [list(entry.prepared) for entry in three.entries] == [[], [], ["red"], ["red"]]
    ledger = copied(three, tmp_path / "ledger")
    with pytest.raises(InputError, match="'green' was not prepared for undoing"):
        ledger.undo("green", how="prepared")
    ledger.undo("blue")  # after which the state is the one that green left
    assert ledger.undo("red").content["how"] == "prepared" and ledger.active == ["green"] and ledger.verify()
    with pytest.raises(InputError, match="'red' was undone on"):
        ledger.forget(**pairs_of("grey"), undoable=["red"], **SETTINGS)


def test_undoing_without_the_pairs_of_later_requests_merges_deltas(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger", supplied=["green"])
    entry = ledger.undo("green")
    assert entry.content["how"] == "merge" and [step.kind for step in entry.steps] == ["forget"] * 3 + ["merge"]
    assert top1(entry, "green") >= 0.9
    assert set(entry.content["unaudited"]) == {"red", "blue"} and "supply()" in entry.content["unaudited"]["red"]
    assert ledger.active == ["red", "blue"] and ledger.verify()


def test_a_request_is_at_the_target_where_its_run_accepted_it():
    from cliperase_fast.ledger.work import _accepted

    run = {"target": 0.05, "association": 0.06, "target_reached": True}
    assert _accepted(run) == 0.06 and _accepted({**run, "association": 0.01}) == 0.05
    assert _accepted({**run, "target_reached": False}) == 0.05
    assert _accepted({**run, "target": None, "target_reached": None}) is None


def test_merging_works_without_any_data(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger", supplied=[])
    with pytest.raises(InputError, match="'green' cannot be undone by replaying later ones: request 'blue'"):
        ledger.undo("green", how="replay")
    entry = ledger.undo("green")
    assert entry.content["how"] == "merge" and entry.audits == {} and len(entry.content["unaudited"]) == 3


def test_a_recorded_request_is_not_made_twice(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger", supplied=[])
    head = ledger.head()
    again = ledger.forget(**pairs_of("green"), id="green", **SETTINGS)
    assert again.number == 2 and ledger.head() == head
    assert ledger.undo("blue").audits.keys() == {"green"}  # its pairs are at hand now
    with pytest.raises(InputError, match="'green' is recorded with other settings: give"):
        ledger.forget(**pairs_of("green"), id="green", **{**SETTINGS, "learning_rate": 2e-3})
    with pytest.raises(InputError, match="'green' is recorded with other pairs"):
        ledger.forget(**pairs_of("red"), id="green", **SETTINGS)


def test_a_patch_leads_from_the_base_to_the_weights_with_one_request(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger")
    patch = ledger.export("red", tmp_path / "patch")
    content = json.loads((patch / "patch.json").read_text())
    assert content["bytes"] == (patch / "delta.safetensors").stat().st_size
    assert content["alone"]["forget_top1"]["now"] <= 0.2
    assert weights_of(apply_patch(patch, MODEL).module) == three.entries[1].weights == content["weights"]
    with pytest.raises(InputError, match="is not the base of"):
        apply_patch(patch, ledger.model())


def test_the_model_comes_for_other_libraries(three):
    state = three.model("state_dict")
    assert all(torch.equal(state[name], value) for name, value in three.model().state_dict().items())
    assert type(three.model("transformers")).__name__ == "CLIPModel"
    with pytest.raises(InputError, match="library='jax' is not one of"):
        three.model("jax")


def test_the_page_tells_each_request_then_and_now(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger")
    ledger.undo("blue", by="<b>Ann</b>", note="a mistake", date="2026-04-01")
    page = ledger.report().read_text()
    assert all(entry.hash in page for entry in ledger.entries)
    assert "2 of 3 requests are in force" in page and "undone 2026-04-01" in page and "a mistake" in page
    assert "How far it is from the base" in page and "images named 100.0% (100.0% in the base)" in page
    assert "&lt;b&gt;Ann&lt;/b&gt;" in page and "<b>Ann</b>" not in page


def test_scores_of_other_weights_are_not_shown_as_those_of_now(three, tmp_path):
    merged = copied(three, tmp_path / "merged", supplied=["red"])
    merged.undo("green")
    requests = {one["id"]: one["now"] for one in merged.summary()["requests"]}
    assert requests["red"] == merged.entries[-1].audits["red"] and requests["green"] is requests["blue"] is None
    assert set(merged.summary()["unaudited"]) == {"green", "blue"}
    told = ledger_table(merged.summary())
    assert "request blue is not measured: its pairs were given as objects" in told and told.count("–") == 6
    assert "not measured: its pairs were not at hand" in merged.report().read_text()


def test_scores_are_those_of_now_where_the_weights_are_those_that_were_measured(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger", supplied=[])
    ledger.undo("blue")
    requests = {one["id"]: one["now"] for one in ledger.summary()["requests"]}
    assert {id: requests[id] for id in ("red", "green")} == three.entries[2].audits and requests["blue"] is None
    assert set(ledger.summary()["unaudited"]) == {"blue"}


def test_a_request_warns_of_earlier_ones_whose_pairs_are_not_at_hand(three, tmp_path):
    ledger = copied(three, tmp_path / "ledger", supplied=["red", "blue"])
    with pytest.warns(UserWarning, match="request 'green' is neither held down nor measured") as told:
        ledger.forget(**pairs_of("grey"), id="grey", undoable=False, **{**SETTINGS, "steps": 2})
    assert sum("neither held down" in str(one.message) for one in told) == 1


def test_a_request_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    from cliperase_fast.ledger import work

    quick = {**pairs_of("red"), **SETTINGS, "steps": 2, "id": "red", "date": "2026-03-01"}
    whole, ledger = Ledger(tmp_path / "whole", MODEL), Ledger(tmp_path / "killed", MODEL)
    whole.forget(**quick)
    unlearn = work.unlearn

    def interrupted(*arguments, **keywords):
        unlearn(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "unlearn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.forget(**quick)
    assert len(list((ledger.dir / "work").iterdir())) == 1 and ledger.verify() and ledger.active == []
    monkeypatch.setattr(work, "unlearn", unlearn)
    ledger.forget(**quick)
    assert ledger.head() == whole.head() and not (ledger.dir / "work").exists()


def test_a_base_in_half_precision_is_the_same_base_when_widened(tmp_path):
    half = copy.deepcopy(MODEL).half()
    assert Ledger(tmp_path, half).model().logit_scale.dtype == torch.float32
    assert Ledger(tmp_path, copy.deepcopy(half).float()).verify()


def test_pairs_that_a_run_skips_are_left_out_of_the_request():
    pairs = pairs_of("red")
    broken = torch.full((3, 8, 8), float("nan")), "a red square"
    settings = UnlearnConfig(on_error="skip")
    forget = [*pairs["forget"][:2], broken, *pairs["forget"][2:]]
    opened = [
        open_request(one, pairs["retain"], pairs["test"], None, settings, None, Opener(on_error="skip"))
        for one in (forget, pairs["forget"])
    ]
    assert opened[0].counts() == opened[1].counts()
    assert all(bool(opened[0].forget.image(row).isfinite().all()) for row in range(len(opened[0].forget)))


def test_requests_get_numbers_where_no_id_is_given(tmp_path):
    ledger = Ledger(tmp_path, MODEL)
    quick = {**SETTINGS, "steps": 1}
    entry = ledger.forget(**pairs_of("red"), by="Ann", note="letter of 1 March", **quick)
    assert entry.id == "0001" and entry.content["by"] == "Ann" and entry.content["note"] == "letter of 1 March"
    assert entry.returned == ["0001"]  # one step forgets nothing, and the entry says so
    assert Ledger(tmp_path, MODEL).entries[-1].hash == entry.hash


def test_earlier_requests_are_left_out_of_what_other_methods_keep(tmp_path, monkeypatch):
    from cliperase_fast.ledger import work

    seen = []
    unlearn = work.unlearn

    def spied(model, forget, retain, **keywords):
        kept = retain.captions + keywords["test"][1].captions
        seen.append({caption for captions in kept for caption in captions})
        return unlearn(model, forget, retain, **keywords)

    monkeypatch.setattr(work, "unlearn", spied)
    make_ledger(tmp_path, ("red", "green"), method="cliperase", steps=1)
    assert seen == [
        {"a green square", "a blue square", "a grey square"}, {"a blue square", "a grey square"}
    ]  # fmt: skip


def test_a_single_request_is_in_force():
    one = {"undone": None, "now": {"at_target": True}}
    assert _status([one]).startswith("1 of 1 request is in force. 1 of the 1 whose pairs could be measured is at")
    assert _status([one, one]).startswith("2 of 2 requests are in force. 2 of the 2 whose pairs could be measured are")
