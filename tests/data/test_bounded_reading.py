"""Only regular files are read, up to a size: no pipe, device or bomb can block a run."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
from pathlib import Path

import numpy as np
import pytest

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import check_images, open_source, select
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable_data, read_text


@pytest.fixture
def special(tmp_path: Path):
    """Makes things that are not regular files."""

    def make(kind: str, path: Path) -> Path:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path must be short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
            os.chdir(here)
        return path

    return make


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_images_that_are_not_regular_files_are_named(tmp_path: Path, picture, special, kind: str) -> None:
    picture(tmp_path / "c" / "x.png")
    special(kind, tmp_path / "c" / "y.png")
    pairs = open_source(f"folder:{tmp_path}").train
    with pytest.raises(
        InputError, match=rf"y\.png: .*a {'named ' if kind == 'pipe' else ''}{kind}, not a regular file"
    ):
        check_images(pairs)
    assert check_images(pairs, on_error="skip")[0].tolist() == [0]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "directory"])
def test_tables_lists_and_shards_that_are_not_regular_files_are_refused(tmp_path: Path, special, kind: str) -> None:
    path = special(kind, tmp_path / "x")
    demo = open_source("demo").train
    for read in (
        lambda: open_source(f"csv:{path}"),
        lambda: open_source(f"wds:{path}"),
        lambda: select(demo, f"ids:{path}"),
        lambda: UnlearnConfig.from_file(path),
        lambda: read_text(path, 10),
    ):
        with pytest.raises(InputError, match=r"cannot read .*not a regular file"):
            read()


def test_flickr_files_and_class_names_that_are_pipes_are_refused(tmp_path: Path, picture, special) -> None:
    special("pipe", tmp_path / "results.csv")
    with pytest.raises(InputError, match=r"neither dataset_flickr30k\.json nor results\.csv"):
        open_source(f"flickr30k:{tmp_path}")
    picture(tmp_path / "data" / "n01440764" / "x.png")
    special("pipe", tmp_path / "names.txt")
    with pytest.raises(InputError, match=r"class names .*named pipe, not a regular file"):
        open_source(f"folder:{tmp_path / 'data'}?classnames={tmp_path / 'names.txt'}")


@pytest.mark.parametrize("spec", ["csv:a\0b", "folder:a\0b", "wds:a\0b", "flickr30k:a\0b", "cifar10:a\0b"])
def test_a_nul_in_a_source_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="contains a NUL character"):
        open_source(spec)


def test_paths_that_cannot_exist_are_input_errors(tmp_path: Path) -> None:
    demo = open_source("demo").train
    for name in ("a\0b", "a\ud800b", "x" * 5000):
        with pytest.raises(InputError, match="cannot read the file of ids"):
            select(demo, f"ids:{name}")
    for spec in ("csv:a\ud800b", "wds:a\ud800b", "folder:a\ud800b", "csv:~nobody-is-called-this/x"):
        with pytest.raises(InputError):
            open_source(spec)


@pytest.mark.parametrize("kind", ["folder", "csv", "flickr30k", "wds", "cifar100"])
def test_names_that_the_system_refuses_are_input_errors(kind: str) -> None:
    with pytest.raises(InputError, match=r"File name too long|do not exist|is not a directory"):
        open_source(f"{kind}:/tmp/{'x' * 5000}")


def test_a_folder_without_permission_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    for kind in ("folder", "flickr30k", "cifar10"):
        with pytest.raises(InputError, match=rf"cannot open '{kind}:.*Permission denied: .*{tmp_path.name}"):
            open_source(f"{kind}:{tmp_path}")


def test_files_larger_than_their_kind_are_refused_unread(tmp_path: Path, picture) -> None:
    path = picture(tmp_path / "c" / "x.png")
    with open(path, "r+b") as file:
        file.truncate(10 << 30)  # sparse
    with pytest.raises(InputError, match=r"x\.png has 10 GiB, more than 256 MiB"):
        open_source(f"folder:{tmp_path}").train.image(0)
    (tmp_path / "big.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InputError, match=r"big\.yaml: it is larger than 1 MiB; is it the right file"):
        UnlearnConfig.from_file(tmp_path / "big.yaml")
    with open(tmp_path / "zeros.csv", "wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(InputError, match="NUL characters"):
        open_source(f"csv:{tmp_path}/zeros.csv")


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-not-be-made",)


def cifar(tmp_path: Path, batch: bytes, names: list[object]) -> str:
    for name in ("batches.meta", *(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        content = {"label_names": names} if name == "batches.meta" else None
        (tmp_path / name).write_bytes(batch if content is None else pickle.dumps(content))
    return f"cifar10:{tmp_path}"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pickle.dumps(_Evil()), "would run code, so it was not loaded"),
        (pickle.dumps({"data": _Evil()}), "would run code"),
        (b"\x80\x04r" + struct.pack("<I", 2**31 - 1) + b".", "cannot read .*data_batch_1"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "cannot read .*data_batch_1"),
        (b"(" * 100_000 + b".", "cannot read .*data_batch_1"),
        (pickle.dumps([1]), "holds a list where a CIFAR file has a dict"),
    ],
)
def test_a_pickle_neither_runs_code_nor_takes_the_memory(tmp_path: Path, batch: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(cifar(tmp_path, batch, ["a", "b"]))
    assert not Path("/tmp/this-must-not-be-made").exists()


def test_cifar_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"batches\.meta has a class name that is not UTF-8"):
        open_source(cifar(tmp_path, b"", [b"caf\xe9"]))


def test_an_ids_file_is_split_at_line_ends_only(tmp_path: Path, picture) -> None:
    for name in ("a\u2028b.png", "c.png"):
        picture(tmp_path / "data" / "cat" / name)
    pairs = open_source(f"folder:{tmp_path / 'data'}").train
    (tmp_path / "ids.txt").write_text("\ufeffcat/a\u2028b.png\r\n", encoding="utf-8")
    assert select(pairs, f"ids:{tmp_path / 'ids.txt'}").tolist() == [True, False]
    (tmp_path / "ids.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"cannot read the file of ids .*not UTF-8 text; save it as UTF-8 \(line 1\)"):
        select(pairs, f"ids:{tmp_path / 'ids.txt'}")


def test_printable_data_is_what_every_file_takes() -> None:
    data = {"caf\udce9": ["a\ud800", ("ä", 1, None)], "n": np.float64(2)}
    made = printable_data(data)
    assert made == {"caf\\udce9": ["a\\ud800", ["ä", 1, None]], "n": 2}
    io.StringIO().write(str(made).encode("utf-8").decode())
