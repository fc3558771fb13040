import dataclasses
import json
import warnings

import pytest
import torch

from cliperase_fast.evaluation import Divergence
from cliperase_fast.unlearning import checkpoints as ck
from cliperase_fast.unlearning.selection import Candidate

CANDIDATE = {"step": 1, "epoch": 1, "forget": 0.5, "retain": 0.5, "forget_similarity": 0.1}
FILES = ["student.safetensors", "optimizer.safetensors", "trainer.pt", "metrics.jsonl", "state.json"]


def save(root, step, value, keep=2, best=None, **fields):
    """best: what `best_of` returned."""
    weights = {"weight": torch.full((3,), float(value)), "scale": torch.tensor(float(value))}
    moments = {moment: {"weight": torch.full((3,), value / 2)} for moment in ("exp_avg", "exp_avg_sq")}
    state = ck.TrainState(
        step=step,
        seconds=float(value),
        metrics=[{"step": step, "total": value / 3}],
        best=best and best[0],
        best_weights=best and best[1],
        weights=weights,
        optimizer=ck.OptimizerState(step, moments),
        random={"torch": torch.get_rng_state()},
        **fields,
    )
    return ck.save_checkpoint(root, state, keep=keep)


def best_of(root, value, step=1):
    """The best candidate so far and the digest of its weights, which are saved."""
    return Candidate(**{**CANDIDATE, "step": step}), ck.save_best(root, {"weight": torch.full((2,), float(value))})


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    elif how == "zero":
        path.write_bytes(bytes(len(content)))
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def edit_state(path, **changes):
    """Change fields of a checkpoint's state, its own digest made right again."""
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    (path / "state.json").write_bytes(ck._sealed({**state, **changes}))


def test_the_newest_checkpoint_is_loaded_unchanged(tmp_path):
    save(tmp_path, 1, 1)
    save(tmp_path, 12, 2)
    loaded = ck.load_newest(tmp_path)
    assert loaded.state.step == 12
    assert loaded.state.seconds == 2
    assert loaded.state.metrics == [{"step": 12, "total": 2 / 3}]
    assert torch.equal(loaded.state.weights["weight"], torch.full((3,), 2.0))
    optimizer = loaded.state.optimizer
    assert optimizer.step == 12
    assert torch.equal(optimizer.moments["exp_avg"]["weight"], torch.full((3,), 1.0))


def test_an_absent_folder_has_no_checkpoint(tmp_path):
    assert ck.load_newest(tmp_path / "absent") is None


@pytest.mark.parametrize("file", [*FILES, "best.safetensors"])
@pytest.mark.parametrize("how", ["cut", "flip", "zero", "remove"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_loaded(tmp_path, file, how):
    best = best_of(tmp_path, 0)
    save(tmp_path, 1, 1, best=best)
    damage(save(tmp_path, 2, 2, best=best) / file, how)
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        loaded = ck.load_newest(tmp_path)
    assert loaded.state.step == 1
    assert torch.equal(ck.load_best(tmp_path, best[1])["weight"], torch.zeros(2))


@pytest.mark.parametrize("field", ["step", "seconds", "evaluations", "best", "stopped_early", "identity"])
def test_an_edited_state_does_not_match_its_digest(tmp_path, field):
    path = save(tmp_path, 1, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, field: 0}))
    with pytest.warns(UserWarning, match="state.json does not match its digest"):
        assert ck.load_newest(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 7}, {"step": "1"}, {"step": True}, {"seconds": None}, {"seconds": "1"}, {"evaluations": {}},
        {"evaluations": [3]}, {"evaluations": [{**CANDIDATE, "forget": "x"}]}, {"evaluations": [{"step": 1}]},
        {"best": 3}, {"best": {"sha256": "0" * 64}},
        {"best": {"sha256": "0" * 64, "candidate": CANDIDATE}}, {"identity": []}, {"files": {}}, {"files": None},
        {"files": dict.fromkeys(FILES[:-1], 1)}, {"stopped_early": 1}, {"evaluations_without_improvement": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_the_wrong_type_counts_as_damage(tmp_path, changes):
    edit_state(save(tmp_path, 1, 1), **changes)
    with pytest.warns(UserWarning, match="step-00000001 is damaged"):
        assert ck.load_newest(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", '{"digest": 1}', "[" * 100_000, "\x00"])
def test_an_invalid_state_counts_as_damage(tmp_path, text):
    (save(tmp_path, 1, 1) / "state.json").write_text(text)
    with pytest.warns(UserWarning, match="state.json"):
        assert ck.load_newest(tmp_path) is None


def test_every_field_survives_a_round_trip(tmp_path):
    best = best_of(tmp_path, 3)
    measured = Candidate(2, 1, 0.25, 0.75, -0.5, Divergence(0.1, 0.01, 20, "red", 0.3, None, 1), moved=0.02)
    fields = {
        "identity": {"model": "m"}, "evaluations": [best[0], measured], "evaluations_without_improvement": 1,
        "stopped_early": True, "probes": [{"rate": 1e-4, "steps": 30}], "rate": 1e-4, "stop": "the target was reached",
    }  # fmt: skip
    save(tmp_path, 5, 2, best=best, **fields)
    state = ck.load_newest(tmp_path).state
    expected = {"step": 5, "seconds": 2.0, "metrics": [{"step": 5, "total": 2 / 3}], "best": best[0], **fields}
    assert {name: getattr(state, name) for name in expected} == expected
    assert state.best_weights == best[1]
    assert state.optimizer.step == 5
    assert torch.equal(state.random["torch"], torch.get_rng_state())
    filled = {spec.name for spec in dataclasses.fields(state) if getattr(state, spec.name)}
    assert filled == {spec.name for spec in dataclasses.fields(ck.TrainState)}, "a field is not written or not read"


def as_format(number, path):
    """Write the state as an earlier format had it."""
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    candidates = [*state["evaluations"], *([state["best"]["candidate"]] if state["best"] else [])]
    for candidate in candidates:
        if number < 6:
            del candidate["association_error"]
    if number < 5:
        for name in ("probes", "rate", "stop"):
            del state[name]
        for candidate in candidates:
            del candidate["divergence"]
    if number == 3:
        state["looks"] = state.pop("evaluations")
        state["looks_without_better"] = state.pop("evaluations_without_improvement")
    (path / "state.json").write_bytes(ck._sealed({**state, "format": number}))


@pytest.mark.parametrize("number", [3, 4, 5, 6])
def test_earlier_formats_are_migrated(tmp_path, number):
    best = best_of(tmp_path, 3)
    config = {"epochs": 2} if number == 3 else {"method": "cliperase", "method_options": {}, "epochs": 2}
    if number >= 5:
        config["worst_class_floor"] = 0.3
    if number == 6:
        config["steps"] = 0
    path = save(tmp_path, 1, 1, best=best, identity={"model": "m", "config": config}, evaluations=[best[0]],
                evaluations_without_improvement=4)  # fmt: skip
    as_format(number, path)
    assert len(ck.list_checkpoints(tmp_path)) == 1
    state = ck.load_newest(tmp_path).state
    assert (state.evaluations, state.evaluations_without_improvement) == ([best[0]], 4)
    assert (state.best, state.best_weights) == best
    assert (state.probes, state.rate, state.stop) == ([], 0.0, "")
    assert state.identity["config"] == {
        "method": "cliperase", "method_options": {}, "epochs": 2, "worst_class_floor": 0.3, "steps": 0,
        "forget_level": "unrelated",
    }  # fmt: skip
    assert torch.equal(state.weights["weight"], torch.ones(3))


@pytest.mark.parametrize(("options", "level"), [({}, "auto"), ({"levels": "unrelated"}, "unrelated")])
def test_the_level_of_calibrated_was_an_option_in_format_6(tmp_path, options, level):
    config = {"method": "calibrated", "method_options": {"lambda_held": 1.0, **options}, "epochs": 2}
    path = save(tmp_path, 1, 1, best=best_of(tmp_path, 3), identity={"model": "m", "config": config})
    as_format(6, path)
    assert ck.load_newest(tmp_path).state.identity["config"] == {
        "method": "calibrated", "method_options": {"lambda_held": 1.0}, "epochs": 2, "forget_level": level,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "says"),
    [(2, "has format 2 and this version reads formats 3 to 7: resume with the version that wrote it, or start again"),
     (8, "has format 8 and this version reads formats 3 to 7: upgrade cliperase_fast, or start again"),
     ("4", "has format '4'")],
)  # fmt: skip
@pytest.mark.parametrize("sealed", [True, False])
def test_an_unreadable_format_is_an_error_with_the_remedy(tmp_path, found, says, sealed):
    path = save(tmp_path, 1, 1)
    state = {"format": found, "step": 1, "digests": {}}
    (path / "state.json").write_bytes(ck._sealed(state) if sealed else json.dumps(state).encode())
    with pytest.raises(ck.UnsupportedFormat, match=says):
        ck.load_newest(tmp_path)


def test_a_partially_written_checkpoint_is_ignored(tmp_path):
    save(tmp_path, 1, 1)
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / ".step-00000002.tmp" / "student.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.load_newest(tmp_path).state.step == 1
    save(tmp_path, 2, 2)  # and does not stand in the way of the next one
    assert ck.load_newest(tmp_path).state.step == 2


@pytest.mark.parametrize("at", ["write_tensors", "write_file", "flush_folder", "_make_way"])
def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch, at):
    save(tmp_path, 1, 1)
    working = getattr(ck, at)

    def interrupted(*arguments):
        working(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ck, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_newest_checkpoints_are_kept_with_the_best_weights_so_far(tmp_path):
    best = None
    for step in range(1, 5):
        best = best_of(tmp_path, step, step) if step in (1, 3) else best
        save(tmp_path, step, step, best=best)
    kept = ck.list_checkpoints(tmp_path)
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
    (tmp_path / "best.safetensors").unlink()
    damage(kept[0] / "best.safetensors", "flip")
    assert torch.equal(ck.load_best(tmp_path, best[1])["weight"], torch.full((2,), 3.0))


def test_best_weights_altered_in_every_copy_are_an_error(tmp_path):
    best = best_of(tmp_path, 1)
    damage(save(tmp_path, 1, 1, best=best) / "best.safetensors", "flip")
    damage(tmp_path / "best.safetensors", "flip")
    with pytest.raises(ck.DamagedCheckpoint, match="best weights are missing or altered"):
        ck.load_best(tmp_path, best[1])
    with pytest.raises(ck.DamagedCheckpoint, match="best weights are missing or altered"):
        save(tmp_path, 2, 2, best=best)


def test_other_files_are_not_counted_or_removed(tmp_path):
    (tmp_path / "step-99999999").mkdir()
    (tmp_path / "step-later").mkdir()
    (tmp_path / "step-00000000").write_text("a file")
    for step in (1, 2, 3):
        save(tmp_path, step, step)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert len(ck.list_foreign(tmp_path)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.load_newest(tmp_path).state.step == 3


def test_other_files_in_the_place_of_a_checkpoint_are_renamed(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="is not a checkpoint of this run"):
        save(tmp_path, 1, 1)
    assert ck.load_newest(tmp_path).state.step == 1
    assert (tmp_path / "old-1-step-00000001" / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_not_counted_and_is_replaced(tmp_path):
    save(tmp_path, 1, 1)
    damage(save(tmp_path, 3, 3) / "state.json", "cut")
    save(tmp_path, 2, 2)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    save(tmp_path, 3, 3)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003"}


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = save(tmp_path, 1, 1)
    torch.save({"optimizer": Payload()}, path / "trainer.pt")
    files = json.loads((path / "state.json").read_text())["files"]
    digest = {"sha256": ck.file_digest(path / "trainer.pt"), "bytes": (path / "trainer.pt").stat().st_size}
    edit_state(path, files={**files, "trainer.pt": digest})
    with pytest.warns(UserWarning, match="damaged"):
        assert ck.load_newest(tmp_path) is None
    assert not (tmp_path / "ran").exists()
