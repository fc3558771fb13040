"""The run directory: what it takes, what a crash may leave in it, and whom it is told to when two want it."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import context
from safetensors.torch import load_file
from test_checkpoints import as_format
from tiny import make_pairs, make_tiny_clip, split_pairs

from cliperase_fast import InputError, UnlearningError, storage, unlearn
from cliperase_fast.unlearning import teacher as teacher_module

SETTINGS = {
    "epochs": 2, "batch_size": 24, "learning_rate": 1e-3, "checkpoint_every": 1, "report": False, "progress": False,
    "device": "cpu",
}  # fmt: skip
PAIRS = split_pairs(make_pairs(), "red")
CLIP = make_tiny_clip()


def run(output, resume=False, pairs=PAIRS, **changes):
    return unlearn(CLIP, *pairs, output_dir=output, resume=resume, **{**SETTINGS, **changes})


def weights(output):
    return load_file(Path(output) / "model" / "open_clip_model.safetensors")


def assert_same_run(left, right):
    """The same bits, and the same files: nothing that a crash left stays."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = [{path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (left, right)]
    assert files[0] == files[1]


class Crashes:
    """Copies of a folder as a kill would leave it before each operation on a file in it, each state once."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies, self.busy, self.seen = folder, copies, False, set()
        self.found: list[Path] = []

    def look(self, event: str) -> None:
        if self.busy or not self.folder.exists():
            return
        self.busy = True
        try:
            state = tuple(
                (path.relative_to(self.folder).as_posix(), path.is_file() and path.read_bytes())
                for path in sorted(self.folder.rglob("*"))
            )
            if hash(state) not in self.seen:
                self.seen.add(hash(state))
                self.found.append(self.copies / f"{len(self.found):04d}-{event}")
                shutil.copytree(self.folder, self.found[-1])
        finally:
            self.busy = False


def crashes_of(tmp_path, monkeypatch, **changes) -> list[Path]:
    """Every state that a run passes through, and its end in tmp_path/run."""
    crashes = Crashes(tmp_path / "run", tmp_path / "copies")
    active = [crashes]

    def hook(event, arguments):
        if active and event in (
            "open",
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "shutil.rmtree",
            "os.truncate",
        ):
            active[0].look(event.replace(".", "-"))

    sys.addaudithook(hook)  # for good, so it looks at nothing once `active` is empty
    for name in ("write", "fsync", "replace", "unlink", "close"):
        working = getattr(os, name)

        def before(*arguments, working=working, name=name, **named):
            if active:
                active[0].look(name)
            return working(*arguments, **named)

        monkeypatch.setattr(os, name, before)
    try:
        run(tmp_path / "run", **changes)
    finally:
        active.clear()
        monkeypatch.undo()
    return crashes.found


def go_on_from(state: Path) -> None:
    """As a user would: resume, or where nothing was begun start."""
    begun = (state / "config.json").exists()
    run(state, resume=begun, **CRASHING)


CRASHING = {"teacher_cache": "disk", "keep_checkpoints": 1}


@pytest.mark.parametrize("resumed", [6, pytest.param(None, marks=pytest.mark.long)], ids=["six", "every"])
def test_a_run_killed_between_file_operations_resumes_to_the_same_bits(tmp_path, monkeypatch, resumed):
    states = crashes_of(tmp_path, monkeypatch, **CRASHING)
    assert len(states) > 60
    for state in states[:: len(states) // resumed if resumed else 1]:
        go_on_from(state)
        assert_same_run(state, tmp_path / "run")


@pytest.mark.parametrize("left", [".config.json.tmp", ".lock", ".model.abc.tmp", ".probe-1.tmp"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_only_drafts_can_be_used(tmp_path, left, resume):
    from cliperase_fast.unlearning.run_directory import RunDirectory

    output = tmp_path / "run"
    output.mkdir()
    (output / left).mkdir() if "model" in left else (output / left).write_text("{")
    with RunDirectory(output, resume) as directory:
        directory.check()
        assert directory.open(_config()) == output
        assert {path.name for path in output.iterdir()} == {".lock", "config.json"}
    assert {path.name for path in output.iterdir()} == {"config.json"}


def _config():
    from cliperase_fast import UnlearnConfig

    return UnlearnConfig()


def _one_run(output, number, answers):
    try:
        run(output)
        answers.put((number, "done"))
    except InputError as error:
        answers.put((number, str(error)))


def test_a_locked_folder_is_an_error_that_names_the_holder(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with storage.lock(output / ".lock"):
        ours = context()
        answers = ours.Queue()
        process = ours.Process(target=_one_run, args=(output, 0, answers), daemon=True)
        process.start()
        _, told = answers.get(timeout=300)
        process.join()
    assert f"is in use by process {os.getpid()} on " in told
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_an_unusable_output_dir_is_an_error_before_data_are_read(tmp_path, resume):
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path / "file" / "run", "Not a directory"), (tmp_path / "file", "is a file"), (tmp_path / "a\0b", "a NUL"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"output_dir=.*{says}"):
            run(path, resume, pairs=("nothing", "of the kind"))


def test_too_little_disk_space_is_an_error_before_the_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_space", lambda folder: 1000)
    with pytest.raises(
        InputError, match=r"needs .* and the disk has 1000 bytes left; free some space.*keep_checkpoints"
    ):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def disk_fills_after(monkeypatch, count):
    """os.write fails as on a full disk from the call with that number on."""
    working, calls = os.write, []

    def write(handle, chunk):
        calls.append(handle)
        if len(calls) > count:
            raise OSError(28, os.strerror(28))
        return working(handle, chunk)

    monkeypatch.setattr(os, "write", write)
    return calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    run(output, **CRASHING)
    return output


def test_a_full_disk_is_one_line_and_the_run_resumes_afterwards(tmp_path, monkeypatch, whole):
    calls = disk_fills_after(monkeypatch, 1 << 30)
    run(tmp_path / "counted", **CRASHING)
    total = len(calls)
    for count in (total // 5, total // 2, total - 2):
        monkeypatch.undo()
        disk_fills_after(monkeypatch, count)
        output = tmp_path / f"run-{count}"
        with pytest.raises(
            UnlearningError, match=r"cannot write .*: No space left on device .*free some space"
        ) as told:
            run(output, **CRASHING)
        assert "\n" not in str(told.value)
        assert not list(output.rglob("*.tmp"))
        monkeypatch.undo()
        run(output, resume=True, **CRASHING)
        assert_same_run(output, whole)


def damaged_cache(monkeypatch, output, damage):
    """Stop a run in its first step, when the teacher's features are kept, and damage the files of the cache."""

    def stop(self, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher_module.CachedTeacher, "features", stop)
        run(output, **CRASHING)
    damage(output / "cache" / "teacher_image_features.f32", output / "cache" / "teacher_image_features.json")


DAMAGE = {
    "zeroed": lambda file, note: file.write_bytes(bytes(file.stat().st_size)),
    "cut short": lambda file, note: os.truncate(file, 10),
    "missing": lambda file, note: file.unlink(),
    "note cut": lambda file, note: note.write_text(note.read_text()[:20]),
    "note of another kind": lambda file, note: note.write_text("[1]"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_teacher_cache_is_reported_and_recomputed(tmp_path, monkeypatch, whole, how):
    damaged_cache(monkeypatch, tmp_path / "run", DAMAGE[how])
    with pytest.warns(UserWarning, match=r"teacher_image_features.f32 is damaged or missing"):
        run(tmp_path / "run", resume=True, **CRASHING)
    assert_same_run(tmp_path / "run", whole)


def test_a_complete_teacher_cache_is_reused(tmp_path, monkeypatch, whole):
    damaged_cache(monkeypatch, tmp_path / "run", lambda file, note: None)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "_encode_images", None)
        run(tmp_path / "run", resume=True, **CRASHING)
    assert_same_run(tmp_path / "run", whole)


def test_a_teacher_cache_truncated_in_use_is_an_error(tmp_path, monkeypatch):
    working = teacher_module.CachedTeacher.features

    def cut(self, batch):
        os.truncate(self.image.path, 4)
        return working(self, batch)

    monkeypatch.setattr(teacher_module.CachedTeacher, "features", cut)
    with pytest.raises(UnlearningError, match="was cut short while it was used"):
        run(tmp_path / "run", **CRASHING)


def test_a_teacher_cache_too_large_for_the_disk_is_an_error_and_removed(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnlearningError, match=r"teacher_image_features.f32: No space left .*teacher_cache='memory'"):
        run(tmp_path / "run", **CRASHING)
    assert list((tmp_path / "run" / "cache").iterdir()) == []


IMAGES = split_pairs(
    [
        (Image.fromarray(np.full((8, 8, 3), (80 * c, 9 * i, 7), dtype=np.uint8)), f"a {colour} square")
        for c, colour in enumerate(("red", "green", "blue"))
        for i in range(12)
    ],
    "red",
)


def plain(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def flipped(image):  # which pictures of one colour do not tell
    return plain(image).flip(-1)


def jittered(image):
    return plain(image) + torch.rand(1, dtype=torch.float32)


class OfItsOwn:
    """Random, from a generator that no seed reaches."""

    def __init__(self):
        self.generator = torch.Generator("cpu").manual_seed(int(time.time_ns()) % 2**31)

    def __call__(self, image):
        return plain(image) + torch.rand(1, dtype=torch.float32, device="cpu", generator=self.generator)


def words(texts, end=9):
    return torch.tensor([[1, *(len(word) + 2 for word in text.split()), end][:8] + [0] * 3 for text in texts])[:, :8]


@pytest.mark.parametrize("transform", [plain, jittered, OfItsOwn()], ids=["fixed", "random", "of its own"])
def test_resume_compares_transforms_and_tokenizers_by_their_outputs(tmp_path, transform):
    first = {"transform": transform, "tokenizer": words, "pairs": IMAGES, "epochs": 1}
    run(tmp_path / "run", **first)
    again = OfItsOwn() if isinstance(transform, OfItsOwn) else lambda image: transform(image)
    run(tmp_path / "run", True, **{**first, "transform": again, "tokenizer": lambda texts: words(texts)})
    with pytest.raises(InputError, match="another transform"):
        run(tmp_path / "run", True, **{**first, "transform": flipped})
    with pytest.raises(InputError, match="another tokenizer"):
        run(tmp_path / "run", True, **{**first, "tokenizer": lambda texts: words(texts, end=10)})


def test_a_run_does_not_resume_with_other_tensors_of_the_same_captions(tmp_path):
    run(tmp_path / "run", epochs=1)
    run(tmp_path / "run", True, pairs=split_pairs(make_pairs(), "red"), epochs=1)
    with pytest.raises(InputError, match="other images"):
        run(tmp_path / "run", True, pairs=split_pairs(make_pairs(seed=1), "red"), epochs=1)


def test_checkpoints_of_an_older_format_are_an_error(tmp_path, whole):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for path in output.glob("checkpoints/step-*"):
        (path / "state.json").write_text(json.dumps({"format": 2, "step": 1, "digests": {}}))
    with pytest.raises(InputError, match=r"has format 2 and this version reads .* start again in another output_dir"):
        run(output, resume=True, **CRASHING)


def test_a_run_of_format_3_continues_to_the_same_bits(tmp_path, whole):
    output = tmp_path / "run"
    run(output, **{**CRASHING, "keep_checkpoints": 9})
    shutil.rmtree(output / "model")
    for path in sorted(output.glob("checkpoints/step-*"))[2:]:
        shutil.rmtree(path)
    for path in output.glob("checkpoints/step-*"):
        as_format(3, path)
    run(output, resume=True, **CRASHING)
    assert_same_run(output, whole)


def test_altered_metrics_are_restored_from_the_checkpoint(tmp_path, whole):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "metrics.jsonl").write_text('{"step": 1, "total": "x"')
    run(output, resume=True, **CRASHING)
    assert (output / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_resuming_a_finished_run_keeps_only_the_requested_checkpoints(tmp_path, whole):
    run(tmp_path / "run", **{**CRASHING, "keep_checkpoints": 3})
    assert len(list((tmp_path / "run").glob("checkpoints/step-*"))) == 3
    run(tmp_path / "run", resume=True, **CRASHING)
    assert_same_run(tmp_path / "run", whole)


def test_other_folders_among_checkpoints_are_reported_and_kept(tmp_path, whole):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "checkpoints" / "step-99999999").mkdir()
    with pytest.warns(UserWarning, match="step-99999999 is not a checkpoint and is left alone"):
        run(output, resume=True, **CRASHING)
    assert (output / "checkpoints" / "step-99999999").is_dir()
    assert weights(output).keys() == weights(whole).keys()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path, resume):
    (tmp_path / "config.json").write_text('{"model_type": "clip", "projection_dim": 16}')  # a transformers model's
    with pytest.raises(InputError, match=r"give another folder$"):
        run(tmp_path, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "model_type" in (tmp_path / "config.json").read_text()


def test_a_run_without_config_json_resumes_from_its_checkpoints(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    run(tmp_path / "run", resume=True, **CRASHING)
    assert_same_run(whole, tmp_path / "run")


def test_resuming_an_empty_folder_logs_that_it_starts_over(tmp_path, caplog):
    caplog.set_level("INFO", logger="cliperase_fast")
    run(tmp_path / "run", resume=True)
    said = f"nothing to resume in {tmp_path / 'run'} yet: starting from the beginning"
    assert caplog.messages.count(said) == 1
    caplog.clear()
    run(tmp_path / "run", resume=True)
    assert said not in caplog.messages
