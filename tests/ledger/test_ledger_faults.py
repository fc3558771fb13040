"""What a ledger refuses: other bases, changed files, wrong requests, a second writer, a full disk."""

import copy
import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from colours import MODEL, SETTINGS, copied, pairs_of

from cliperase_fast import InputError, Ledger, UnlearningError, storage
from cliperase_fast.ledger import apply_patch
from cliperase_fast.ledger.checking import summary
from cliperase_fast.tensor_files import read_tensors, write_tensors


@pytest.fixture
def ledger(three, tmp_path):
    return copied(three, tmp_path / "ledger")


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_another_base_is_refused(ledger):
    other = copy.deepcopy(MODEL)
    with torch.no_grad():
        other.logit_scale += 1e-6
    with pytest.raises(InputError, match=r"base is not the base of .*: its weights have the SHA-256"):
        Ledger(ledger.dir, other)


def test_a_base_that_was_given_as_an_object_must_be_given_again(ledger):
    found = Ledger(ledger.dir)
    assert found.head() == ledger.head()  # which needs no base
    with pytest.raises(InputError, match="was given as an object: pass it again as base="):
        found.model()


def test_a_base_that_is_not_where_it_was_is_named(tmp_path):
    from cliperase_fast.models import load_model

    load_model(MODEL).save(tmp_path / "base")
    folder = tmp_path / "ledger"
    Ledger(folder, f"local-dir:{tmp_path / 'base'}")
    assert Ledger(folder).verify()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"the base of .* cannot be loaded: .*; pass it as base="):
        Ledger(folder).model()
    assert Ledger(folder, f"local-dir:{tmp_path / 'moved'}").verify()


def test_a_model_that_cannot_be_saved_is_an_error_that_names_the_folder(ledger, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnlearningError, match=r"cannot write .*file/model: .*; a part of the path is a file"):
        ledger.save(tmp_path / "file" / "model")


def test_an_edited_line_is_found(ledger):
    replace_in(ledger.dir / "log.jsonl", '"id": "green", "date": "2026-03-01"', '"id": "green", "date": "2025-03-01"')
    with pytest.raises(UnlearningError, match="was changed: line 4 continues"):
        ledger.verify()
    with pytest.raises(UnlearningError, match="was changed: line 4 continues"):
        Ledger(ledger.dir, MODEL)


def test_an_edited_last_line_is_found_by_the_kept_head(ledger):
    kept = ledger.head()
    replace_in(ledger.dir / "log.jsonl", '"id": "blue", "date": "2026-03-01"', '"id": "blue", "date": "2025-03-01"')
    (ledger.dir / "ledger.json").unlink()
    assert ledger.verify()
    with pytest.raises(UnlearningError, match=f"does not have the head {kept[:12]}"):
        ledger.verify(kept)


def test_an_edited_last_line_is_found_by_ledger_json(ledger):
    replace_in(ledger.dir / "log.jsonl", '"id": "blue", "date": "2026-03-01"', '"id": "blue", "date": "2025-03-01"')
    with pytest.raises(UnlearningError, match="another chain than the log"):
        ledger.verify()


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda found: found["requests"][0]["then"]["forget_top1"].update(now=0.5), "requests.0.then.forget_top1.now"),
        (lambda found: found["requests"][1].update(by="nobody"), "requests.1.by"),
        (lambda found: found["requests"][0].pop("note"), "requests.0.note"),
        (lambda found: found["requests"].pop(), "requests"),
        (lambda found: found.update(weights="0" * 64), "weights"),
        (lambda found: found["base"].update(extra=1), "base.extra"),
    ],
)
def test_an_edit_of_ledger_json_is_found(ledger, edit, place):
    path = ledger.dir / "ledger.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    with pytest.raises(UnlearningError, match=rf"says something else than the log, at {place}: .*; remove it"):
        ledger.verify()
    path.unlink()
    assert ledger.verify()


@pytest.mark.parametrize("chain", [[], [{"hash": "0" * 64}]])
def test_a_ledger_json_with_another_chain_is_found(ledger, chain):
    path = ledger.dir / "ledger.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chain": chain}))
    with pytest.raises(UnlearningError, match="another chain than the log"):
        ledger.verify()


def test_a_ledger_json_of_before_a_kill_is_right(ledger):
    path = ledger.dir / "ledger.json"
    shorter = replace(ledger._log, entries=ledger._log.entries[:-1])
    path.write_text(json.dumps(summary(shorter)))
    assert ledger.verify()


def test_a_removed_line_is_found_by_the_kept_head(ledger):
    kept = ledger.head()
    log = ledger.dir / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UnlearningError, match="does not have the head"):
        ledger.verify(kept)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "line 5 is not JSON"),
        ('{"kind": "forget"}', "line 5 is not a line of a ledger"),
        ("[]", "line 5 is not a line"),
    ],
)
def test_a_line_that_is_not_of_a_ledger_is_found(ledger, text, why):
    with (ledger.dir / "log.jsonl").open("a") as file:
        file.write(f"{text}\n")
    with pytest.raises(UnlearningError, match=why):
        ledger.verify()


def test_a_log_that_is_cut_is_found(ledger):
    log = ledger.dir / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    with pytest.raises(UnlearningError, match="its last line is cut"):
        ledger.verify()


def test_a_newer_format_is_named(ledger):
    replace_in(ledger.dir / "log.jsonl", '"format": 1', '"format": 2')
    with pytest.raises(InputError, match="has format 2, and this version reads 1"):
        Ledger(ledger.dir)


def test_swapped_deltas_are_found(ledger):
    red, green = (ledger.dir / f"deltas/000{number}-{name}.safetensors" for number, name in ((1, "red"), (2, "green")))
    red.rename(ledger.dir / "swap"), green.rename(red), (ledger.dir / "swap").rename(green)
    for use in (ledger.verify, ledger.model):
        with pytest.raises(UnlearningError, match=r"the delta .*0001-red.safetensors was changed"):
            use()


def test_a_changed_delta_is_found(ledger):
    path = ledger.dir / "deltas/0002-green.safetensors"
    tensors, _ = read_tensors(path)
    tensors["logit_scale:add"] = torch.tensor(1.0)
    write_tensors(path, tensors)
    with pytest.raises(UnlearningError, match=r"0002-green.safetensors was changed"):
        ledger.verify()
    path.unlink()
    with pytest.raises(UnlearningError, match=r"0002-green.safetensors cannot be read"):
        ledger.model()


def test_a_changed_prepared_delta_is_found(ledger):
    path = ledger.dir / "deltas/0003-blue-without-red.safetensors"
    path.write_bytes((ledger.dir / "deltas/0003-blue.safetensors").read_bytes())
    with pytest.raises(UnlearningError, match=r"0003-blue-without-red.safetensors was changed"):
        ledger.verify()


def test_a_changed_audit_is_found(ledger):
    path = ledger.dir / "audits/0003-red.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UnlearningError, match=r"0003-red.json of request 'red' was changed"):
        ledger.verify()
    path.unlink()
    with pytest.raises(UnlearningError, match=r"0003-red.json cannot be read"):
        ledger.verify()


def test_an_unknown_request_is_named_with_the_known_ones(ledger):
    for use in (ledger.undo, ledger.export):
        with pytest.raises(InputError, match="has no request 'pink'; its requests are: red, green, blue"):
            use("pink")


def test_a_request_is_undone_once(ledger):
    ledger.undo("blue", date="2026-04-01")
    for use in (ledger.undo, ledger.export):
        with pytest.raises(InputError, match="request 'blue' was undone on 2026-04-01"):
            use("blue")
    with pytest.raises(InputError, match="request 'blue' was undone on 2026-04-01"):
        ledger.forget(**pairs_of("blue"), id="blue", **SETTINGS)


def test_the_id_of_an_undone_request_is_not_used_again(ledger):
    ledger.undo("blue")
    with pytest.raises(InputError, match=r"request 'blue' was undone on .*: give another id, such as blue-2"):
        ledger.forget(**pairs_of("blue"), id="blue", **SETTINGS)


def test_an_id_that_is_the_name_of_a_prepared_state_is_refused(ledger):
    with pytest.raises(InputError, match="id='blue-without-red' has '-without-'"):
        ledger.forget(**pairs_of("grey"), id="blue-without-red", **SETTINGS)


def test_wrong_arguments_change_nothing(ledger):
    head = ledger.head()
    for arguments, why in (
        ({"id": "a/b"}, "id='a/b' is not usable"),
        ({"date": "yesterday"}, "date='yesterday' is not a date"),
        ({"audit": True}, "audit= is not for a ledger"),
        ({"method": "calibratd"}, "calibratd"),
        ({"epochs": -1}, "epochs=-1"),
    ):
        with pytest.raises(InputError, match=why):
            ledger.forget(**{**pairs_of("blue"), "id": "new", **arguments})
    with pytest.raises(InputError, match="how='fast' is not one of auto, prepared, replay, merge"):
        ledger.undo("blue", how="fast")
    with pytest.raises(InputError, match="these are not the pairs of request 'red'"):
        ledger.supply("red", **pairs_of("green"))
    with pytest.raises(InputError, match="every retain pair belongs to an earlier request"):
        ledger.forget(**{**pairs_of("grey"), "retain": pairs_of("red")["forget"]}, **SETTINGS)
    assert ledger.head() == head and ledger.verify()


def test_a_directory_that_is_not_a_ledger_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a ledger yet: give the model"):
        Ledger(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a ledger and holds other files"):
        Ledger(tmp_path / "other", MODEL)
    with pytest.raises(InputError, match="is a file; a ledger is a directory"):
        Ledger(tmp_path / "other" / "notes.txt", MODEL)


def test_a_ledger_in_use_is_refused(ledger):
    with storage.lock(ledger.dir / ".lock"):
        for use in (lambda: ledger.undo("blue"), lambda: ledger.forget(**pairs_of("grey"), **SETTINGS)):
            with pytest.raises(InputError, match=r"the ledger .* is in use by process \d+"):
                use()
        assert ledger.verify()  # reading needs no lock
    assert ledger.undo("blue")


@pytest.mark.parametrize("part", ["0004-undo-red.safetensors", "0004-red.json", "log.jsonl"])
def test_a_full_disk_leaves_the_ledger_as_it_was(ledger, monkeypatch, part):
    head, write_all = ledger.head(), storage.write_all

    def full(handle, chunk):
        if part in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(handle, chunk)

    monkeypatch.setattr(storage, "write_all", full)
    with pytest.raises(UnlearningError, match=r"cannot write .*No space left"):
        ledger.undo("red", how="merge")
    monkeypatch.undo()
    assert Ledger(ledger.dir, MODEL).head() == head and ledger.verify(head)
    assert ledger.undo("red", how="merge").content["how"] == "merge" and ledger.verify(head)


@pytest.fixture
def two(ledger):
    """The ledger with two requests in force and five lines; `blue` can be requested again."""
    ledger.undo("blue")
    return ledger


def test_a_disk_that_is_too_small_names_the_ledger_and_what_can_be_done(two, monkeypatch):
    monkeypatch.setattr(storage, "free_space", lambda folder: 1000)
    with pytest.raises(InputError, match="the disk has 1000 bytes left; free some space, or move the ledger") as told:
        two.forget(**pairs_of("blue"), id="grey", **SETTINGS)
    assert str(two.dir) in str(told.value)
    assert not [name for name in ("output", "keep_checkpoints", "resume") if name in str(told.value)]


def test_a_request_that_fails_on_a_full_disk_is_made_again_and_not_resumed(two, monkeypatch):
    monkeypatch.setattr("cliperase_fast.unlearning.checkpoints.write_file", lambda *_: full_disk())
    with pytest.raises(UnlearningError, match=r"No space left.*: make the same request again"):
        two.forget(**pairs_of("blue"), id="grey", **SETTINGS)


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


class Stop(Exception):
    pass


def stop_while_preparing(two, monkeypatch, id):
    """Make a request that ends after its own delta is written, as if it were killed there."""

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(type(two), "_prepare", stop)
        with pytest.raises(Stop):
            two.forget(**pairs_of("blue"), id=id, **SETTINGS)


def test_files_of_an_unfinished_request_are_named_and_removed_by_the_next_one(two, monkeypatch):
    stop_while_preparing(two, monkeypatch, "first")
    left = "deltas/0005-first.safetensors"
    (two.dir / "deltas" / ".0005-first.safetensors.tmp").write_text("a draft")
    mine = two.dir / "deltas" / "0005-mine.safetensors"
    mine.write_text("a file of the user's, which only looks like one of the ledger's")
    assert two.verify() and left in two.unnamed()
    two.undo("green")
    assert two.verify() and two.unnamed() == ["deltas/0005-mine.safetensors"]
    assert mine.is_file() and not (two.dir / "work").exists()


def test_a_request_that_goes_on_keeps_its_files(two, monkeypatch):
    stop_while_preparing(two, monkeypatch, "grey")
    digest = storage.file_digest(two.dir / "deltas" / "0005-grey.safetensors")
    assert two.forget(**pairs_of("blue"), id="grey", **SETTINGS).steps[-1].sha256 == digest
    assert two.verify() and two.unnamed() == []


def test_only_files_that_the_ledger_noted_and_no_line_names_are_removed(ledger):
    (ledger.dir / "work").mkdir()
    outside = ledger.dir.parent / "0004-x.json"
    outside.write_text("")
    noted = ["deltas/0001-red.safetensors", "audits/../../0004-x.json", "../0004-x.json", "log.jsonl"]
    (ledger.dir / "work" / "files.txt").write_text("\n".join(noted))
    ledger.undo("blue")
    assert outside.is_file() and ledger.verify()


def test_a_changed_patch_is_refused(ledger, tmp_path):
    patch = ledger.export("red", tmp_path / "patch")
    shutil.copytree(patch, tmp_path / "copy")
    (patch / "delta.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(UnlearningError, match="was changed or is damaged"):
        apply_patch(patch, MODEL)
    content = json.loads((tmp_path / "copy" / "patch.json").read_text())
    (tmp_path / "copy" / "patch.json").write_text(json.dumps({**content, "weights": "0" * 64}))
    with pytest.raises(UnlearningError, match="leads to other weights than it says"):
        apply_patch(tmp_path / "copy", MODEL)
    for text in ("{}", "[]", "no"):
        (patch / "patch.json").write_text(text)
        with pytest.raises(InputError, match="is not a patch"):
            apply_patch(patch, MODEL)
    with pytest.raises(InputError, match="holds something else"):
        ledger.export("red", ledger.dir)
