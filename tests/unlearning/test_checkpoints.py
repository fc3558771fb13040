import json
import warnings

import pytest
import torch

from cliperase_fast.unlearning import checkpoints as ck

STATE = {
    "identity": {}, "seconds": 0.5, "looks": [], "best": None, "looks_without_better": 0, "stopped_early": False,
}  # fmt: skip
LOOK = {"step": 1, "epoch": 1, "forget": 0.5, "retain": 0.5, "forget_similarity": 0.1}
FILES = ["student.safetensors", "optimizer.safetensors", "trainer.pt", "metrics.jsonl", "state.json"]


def save(root, step, value, keep=2, best=None):
    student = {"weight": torch.full((3,), float(value)), "scale": torch.tensor(float(value))}
    moments = {moment: {"weight": torch.full((3,), value / 2)} for moment in ("exp_avg", "exp_avg_sq")}
    trainer = {"optimizer": {"step": step, **moments}, "scaler": {}, "random": {"torch": torch.get_rng_state()}}
    state = {**STATE, "seconds": float(value), "best": best}
    return ck.save_checkpoint(root, step, student, trainer, state, [{"step": step, "total": value / 3}], keep=keep)


def best_of(root, value, step=1):
    """Weights saved as the best, as a checkpoint's state names them."""
    return {
        "sha256": ck.save_best(root, {"weight": torch.full((2,), float(value))}),
        "candidate": {**LOOK, "step": step},
    }


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


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path):
    save(tmp_path, 1, 1)
    save(tmp_path, 12, 2)
    loaded = ck.load_newest(tmp_path)
    assert loaded.state["step"] == 12
    assert loaded.state["seconds"] == 2
    assert loaded.metrics == [{"step": 12, "total": 2 / 3}]
    assert torch.equal(loaded.student["weight"], torch.full((3,), 2.0))
    optimizer = loaded.trainer["optimizer"]
    assert optimizer["step"] == 12
    assert torch.equal(optimizer["exp_avg"]["weight"], torch.full((3,), 1.0))


def test_nothing_saved_means_nothing_loaded(tmp_path):
    assert ck.load_newest(tmp_path / "absent") is None


@pytest.mark.parametrize("file", [*FILES, "best.safetensors"])
@pytest.mark.parametrize("how", ["cut", "flip", "zero", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, how):
    best = best_of(tmp_path, 0)
    save(tmp_path, 1, 1, best=best)
    damage(save(tmp_path, 2, 2, best=best) / file, how)
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        loaded = ck.load_newest(tmp_path)
    assert loaded.state["step"] == 1
    assert torch.equal(ck.load_best(tmp_path, best["sha256"])["weight"], torch.zeros(2))


@pytest.mark.parametrize("field", ["step", "seconds", "looks", "best", "stopped_early", "identity"])
def test_an_edited_state_does_not_match_its_digest(tmp_path, field):
    path = save(tmp_path, 1, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, field: 0}))
    with pytest.warns(UserWarning, match="state.json does not match its digest"):
        assert ck.load_newest(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 7}, {"step": "1"}, {"step": True}, {"seconds": None}, {"seconds": "1"}, {"looks": {}}, {"looks": [3]},
        {"looks": [{**LOOK, "forget": "x"}]}, {"looks": [{"step": 1}]}, {"best": 3}, {"best": {"sha256": "0" * 64}},
        {"best": {"sha256": "0" * 64, "candidate": LOOK}}, {"identity": []}, {"files": {}}, {"files": None},
        {"files": dict.fromkeys(FILES[:-1], 1)}, {"stopped_early": 1}, {"looks_without_better": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_kind_is_one_clear_word(tmp_path, changes):
    edit_state(save(tmp_path, 1, 1), **changes)
    with pytest.warns(UserWarning, match="step-00000001 is damaged"):
        assert ck.load_newest(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", '{"digest": 1}', "[" * 100_000, "\x00"])
def test_a_state_that_is_no_state_counts_as_damaged(tmp_path, text):
    (save(tmp_path, 1, 1) / "state.json").write_text(text)
    with pytest.warns(UserWarning, match="state.json"):
        assert ck.load_newest(tmp_path) is None


def test_a_checkpoint_of_another_version_is_told_from_a_damaged_one(tmp_path):
    (save(tmp_path, 1, 1) / "state.json").write_text(json.dumps({"format": 2, "step": 1, "digests": {}}))
    with pytest.raises(ck.OtherFormat):
        ck.load_newest(tmp_path)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, 1, 1)
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / ".step-00000002.tmp" / "student.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.load_newest(tmp_path).state["step"] == 1
    save(tmp_path, 2, 2)  # and does not stand in the way of the next one
    assert ck.load_newest(tmp_path).state["step"] == 2


@pytest.mark.parametrize("at", ["write_tensors", "write_file", "flush_folder", "_make_way"])
def test_a_save_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch, at):
    save(tmp_path, 1, 1)
    working = getattr(ck, at)

    def interrupted(*arguments):
        working(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ck, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_newest_are_kept_each_with_the_best_weights_so_far(tmp_path):
    best = None
    for step in range(1, 5):
        best = best_of(tmp_path, step, step) if step in (1, 3) else best
        save(tmp_path, step, step, best=best)
    kept = ck.list_checkpoints(tmp_path)
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
    (tmp_path / "best.safetensors").unlink()
    damage(kept[0] / "best.safetensors", "flip")
    assert torch.equal(ck.load_best(tmp_path, best["sha256"])["weight"], torch.full((2,), 3.0))


def test_best_weights_that_are_altered_everywhere_are_an_error(tmp_path):
    best = best_of(tmp_path, 1)
    damage(save(tmp_path, 1, 1, best=best) / "best.safetensors", "flip")
    damage(tmp_path / "best.safetensors", "flip")
    with pytest.raises(ck.DamagedCheckpoint, match="best weights are missing or altered"):
        ck.load_best(tmp_path, best["sha256"])
    with pytest.raises(ck.DamagedCheckpoint, match="best weights are missing or altered"):
        save(tmp_path, 2, 2, best=best)


def test_what_is_no_checkpoint_neither_counts_nor_goes(tmp_path):
    (tmp_path / "step-99999999").mkdir()
    (tmp_path / "step-later").mkdir()
    (tmp_path / "step-00000000").write_text("a file")
    for step in (1, 2, 3):
        save(tmp_path, step, step)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert len(ck.list_foreign(tmp_path)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.load_newest(tmp_path).state["step"] == 3


def test_what_stands_where_a_checkpoint_goes_is_kept_under_another_name(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="is not a checkpoint of this run"):
        save(tmp_path, 1, 1)
    assert ck.load_newest(tmp_path).state["step"] == 1
    assert (tmp_path / "old-1-step-00000001" / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_does_not_count_and_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 1, 1)
    damage(save(tmp_path, 3, 3) / "state.json", "cut")
    save(tmp_path, 2, 2)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    save(tmp_path, 3, 3)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003"}


def test_checkpoints_hold_no_code(tmp_path):
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
