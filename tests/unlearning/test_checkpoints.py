import json
import warnings

import pytest
import torch

from cliperase_fast.unlearning import checkpoints as ck


def save(root, step, value, keep=2, best=None):
    student = {"weight": torch.full((3,), float(value)), "scale": torch.tensor(float(value))}
    trainer = {"optimizer": {"lr": 0.1}, "random": {"torch": torch.get_rng_state()}}
    return ck.save_checkpoint(root, step, student, trainer, {"best": best, "note": value}, keep=keep)


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path):
    save(tmp_path, 1, 1)
    save(tmp_path, 12, 2)
    loaded = ck.load_newest(tmp_path)
    assert loaded.state["step"] == 12
    assert loaded.state["note"] == 2
    assert torch.equal(loaded.student["weight"], torch.full((3,), 2.0))
    assert loaded.trainer["optimizer"] == {"lr": 0.1}


def test_nothing_saved_means_nothing_loaded(tmp_path):
    assert ck.load_newest(tmp_path / "absent") is None


@pytest.mark.parametrize("file", ["student.safetensors", "trainer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    save(tmp_path, 1, 1)
    path = save(tmp_path, 2, 2)
    content = bytearray((path / file).read_bytes())
    if damage == "remove":
        (path / file).unlink()
    else:
        if damage == "cut":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 0xFF
        (path / file).write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        loaded = ck.load_newest(tmp_path)
    assert loaded.state["step"] == 1


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, 1, 1)
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / ".step-00000002.tmp" / "student.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.load_newest(tmp_path).state["step"] == 1
    save(tmp_path, 2, 2)  # and does not stand in the way of the next one
    assert ck.load_newest(tmp_path).state["step"] == 2


@pytest.mark.parametrize("at", ["_save_tensors", "file_digest", "_flush"])
def test_a_save_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch, at):
    save(tmp_path, 1, 1)
    working = getattr(ck, at)

    def interrupted(*arguments):
        working(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ck, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 2)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000001"]
    with pytest.raises(KeyboardInterrupt):
        ck.save_best(tmp_path, 2, {"weight": torch.ones(2)})
    assert at == "file_digest" or not list(tmp_path.glob("best-*.safetensors"))


def test_only_the_newest_are_kept_with_the_best_weights_they_name(tmp_path):
    weights = {"weight": torch.ones(2)}
    best = None
    for step in range(1, 5):
        best = {"weights": ck.save_best(tmp_path, step, weights), "candidate": {}} if step in (1, 3) else best
        save(tmp_path, step, step, best=best)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-00000003.safetensors"]


def test_a_checkpoint_whose_best_weights_are_altered_counts_as_damaged(tmp_path):
    save(tmp_path, 1, 1)
    reference = ck.save_best(tmp_path, 2, {"weight": torch.ones(2)})
    save(tmp_path, 2, 2, best={"weights": reference, "candidate": {}})
    (tmp_path / reference["file"]).write_bytes(b"altered")
    with pytest.warns(UserWarning, match="best-00000002"):
        assert ck.load_newest(tmp_path).state["step"] == 1


def test_checkpoints_hold_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = save(tmp_path, 1, 1)
    torch.save({"optimizer": Payload()}, path / "trainer.pt")
    state = json.loads((path / "state.json").read_text())
    state["digests"]["trainer.pt"] = ck.file_digest(path / "trainer.pt")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="damaged"):
        assert ck.load_newest(tmp_path) is None
    assert not (tmp_path / "ran").exists()


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    ck.write_text_atomically(path, "one")
    ck.write_text_atomically(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
