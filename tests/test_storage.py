"""Atomic files, locks, and one line for each error of the file system."""

import errno
import os
import resource
import signal
import time

import pytest
import torch
from models.tiny_models import tiny_open_clip
from processes import apart, context
from safetensors.torch import load_file, save_file

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearningError, storage
from cliperase_fast.models import load_model
from cliperase_fast.tensor_files import FileTensors, Pieces, join, read_tensors, write_tensors

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4), "scale": torch.tensor(2.5), "none": torch.empty(0, 4),
    "half": torch.tensor([1.0, 2.0, 3.0]).bfloat16(), "flags": torch.tensor([True, False, True]),
    "turned": torch.arange(6).reshape(2, 3).t(), "double": torch.tensor([1e-300], dtype=torch.float64),
}  # fmt: skip


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name])


def test_tensors_are_written_and_read_as_the_safetensors_library_does(tmp_path):
    digest = write_tensors(tmp_path / "ours", TENSORS)
    assert_equal(load_file(tmp_path / "ours"), TENSORS)
    assert_equal(read_tensors(tmp_path / "ours")[0], TENSORS)
    assert read_tensors(tmp_path / "ours")[1] == digest == storage.file_digest(tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    assert_equal(read_tensors(tmp_path / "theirs")[0], TENSORS)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_file_of_tensors_that_is_cut_short_is_an_error(tmp_path, size):
    write_tensors(tmp_path / "file", TENSORS)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:size])
    with pytest.raises(ValueError, match="file"):
        read_tensors(tmp_path / "file")
    (tmp_path / "file").write_bytes(content + b"more")
    with pytest.raises(ValueError, match="has data after its end"):
        read_tensors(tmp_path / "file")


def test_text_is_replaced_atomically(tmp_path):
    path = tmp_path / "a.json"
    storage.write_text_atomically(path, "one")
    storage.write_text_atomically(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "link").symlink_to(path)
    storage.write_text_atomically(tmp_path / "link", "three")
    assert path.read_text() == "three" and (tmp_path / "link").is_symlink()


def test_a_folder_in_the_place_of_a_file_leaves_no_draft(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write_text_atomically(tmp_path / "a.json", "one")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_draft(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    storage.write_text_atomically(path, "one")

    def full(handle, chunk):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", full)
    says = f"cannot write {path}: {os.strerror(number)}.*; (free|check)"
    with pytest.raises(UnlearningError, match=says), storage.writing(path):
        storage.write_text_atomically(path, "two")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_in_the_safetensors_library_gives_the_same_message(tmp_path):
    from safetensors import SafetensorError

    says = r"No space left on device.*free some space"
    with pytest.raises(UnlearningError, match=says), storage.writing(tmp_path):
        raise SafetensorError('Error while serializing: I/O error: "No space left on device (os error 28)"')


@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EINVAL, None])
def test_room_is_taken_before_it_is_filled(tmp_path, monkeypatch, refusal):
    def refuse(*arguments):
        raise OSError(refusal, os.strerror(refusal))

    if refusal is not None:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "file").open("wb") as file:
        storage.reserve(file.fileno(), 3 * 2**20 + 1)
        assert os.fstat(file.fileno()).st_size == 3 * 2**20 + 1
        assert os.fstat(file.fileno()).st_blocks * 512 >= 3 * 2**20


def test_a_full_disk_is_an_error_when_room_is_reserved(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="No space left"):
        storage.reserve(file.fileno(), 10)


def _beyond_the_limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    told = []
    for work in (lambda: storage.check_room(path.parent, 10, 2000, ""), lambda: _write(path)):
        try:
            work()
        except (InputError, UnlearningError) as error:
            told.append(str(error))
    return told


def _write(path):
    with storage.writing(path):
        storage.write_file(path, [bytes(2000)])


def test_a_limit_on_file_size_is_an_error_and_not_a_crash(tmp_path):
    early, late = apart(_beyond_the_limit, tmp_path / "file")
    assert "ulimit -f" in early and "ulimit -f" in late
    assert "File too large" in late
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"needs .*TiB and the disk has .* left; make room"):
        storage.check_room(tmp_path, 2**60, 1, "make room")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("file/run", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("loop/run", "symbolic link"),
        ("/proc/run", ""),
    ],
)
def test_a_folder_that_cannot_be_created_is_an_error_and_leaves_nothing(tmp_path, path, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=f"output_dir=.*{says}"):
        storage.check_writable(tmp_path / path, "output_dir=")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "loop"}


def test_a_folder_may_be_made_below_others_that_are_missing_and_nothing_is_left(tmp_path):
    storage.check_writable(tmp_path / "a" / "b", "output_dir=")
    assert list(tmp_path.iterdir()) == []


def _hold(path, seconds):
    with storage.lock(path):
        (path.parent / "held").write_text("")
        time.sleep(seconds)


def held_by_another(path, seconds):
    process = context().Process(target=_hold, args=(path, seconds), daemon=True)
    process.start()
    while not (path.parent / "held").exists():
        assert process.is_alive()
        time.sleep(0.005)
    return process


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    process = held_by_another(tmp_path / "lock", 600)
    with pytest.raises(storage.Locked, match=f"process {process.pid} on ."), storage.lock(tmp_path / "lock"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ours = pytest.raises(storage.Locked, match=f"process {os.getpid()} on .")
    with storage.lock(tmp_path / "lock"), ours, storage.lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_lock_can_be_waited_for(tmp_path):
    process = held_by_another(tmp_path / "lock", 0.3)
    told = []
    with storage.lock(tmp_path / "lock", told.append):
        assert told == [told[0]] and str(process.pid) in told[0]
    process.join()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(storage.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="has no locks"), storage.lock(tmp_path / "lock"):
        pass


def _pieces(tensors, assembled):
    def assemble(name):
        assembled.append(name)
        return tensors[name]

    return Pieces({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, assemble)


def test_pieces_are_assembled_once_in_the_order_of_the_file_which_is_that_of_whole_tensors(tmp_path):
    groups = {
        "b": {"small": torch.arange(3, dtype=torch.int8), "large": torch.ones(2, 2)},
        "a": {"half": torch.ones(5, dtype=torch.float16)},
    }
    expected = write_tensors(tmp_path / "whole", join(groups))
    assembled: list[str] = []
    pieces = join({group: _pieces(tensors, assembled) for group, tensors in groups.items()})
    assert write_tensors(tmp_path / "pieces", pieces) == expected
    assert assembled == ["large", "half", "small"]
    read = FileTensors(tmp_path / "pieces")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in join(groups).items()
    }


def test_pieces_that_were_not_read_are_still_assembled(tmp_path):
    assembled: list[str] = []
    pieces = _pieces({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, assembled)
    assert pieces["a"].item() == 1
    pieces.skip_rest()
    assert assembled == ["a", "b", "c"]
    with pytest.raises(KeyError):
        pieces["a"]


def test_a_user_without_a_home_directory_is_told_to_name_a_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(storage.Path, "home", homeless)
    monkeypatch.delenv("CLIPERASE_CACHE", raising=False)
    with pytest.raises(InputError, match=r"no home directory.*name a folder with CLIPERASE_CACHE"):
        storage.cache_root()
    monkeypatch.setenv("CLIPERASE_CACHE", "caches")
    assert str(storage.cache_root()) == "caches"


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = (
        lambda: cf.unlearn("m", "demo#class:one", "rest", output_dir=""),
        lambda: cf.audit("m", "m", "demo#class:one", "rest", output_dir=""),
        lambda: cf.compare("m", "demo#class:one", output_dir=""),
        lambda: cf.Ledger("", "m"),
        lambda: storage.make_folder("", "the result"),
        lambda: load_model(tiny_open_clip()).save(""),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"='' names no folder; give one, or '\.' for"):
            call()
    assert not list(tmp_path.iterdir())
