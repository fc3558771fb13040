from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliperase_fast.data import PairDataset, open_source
from cliperase_fast.errors import InputError

NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def python2_pickle(value: Any) -> bytes:
    """A pickle as Python 2 wrote the published files: protocol 2, byte strings, numpy.core."""

    def put(value: Any) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(put(k) + put(v) for k, v in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(put, value)) + b"e"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(put, value)) + b"t"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, str):
            return b"U" + bytes([len(value)]) + value.encode()
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        dtype = b"cnumpy\ndtype\n" + put(("u1", 0, 1)) + b"R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + put((0,)) + put("b") + b"tR"
        state = b"(K\x01" + put(value.shape) + dtype + put(False) + put(value.tobytes()) + b"t"
        return empty + state + b"b"

    return b"\x80\x02" + put(value) + b"."


def python3_pickle(protocol: int, keys: type) -> Any:
    def convert(value: dict[str, Any]) -> bytes:
        return pickle.dumps({(k.encode() if keys is bytes else k): v for k, v in value.items()}, protocol)

    return convert


def batch(labels: list[int], key: str = "labels") -> dict[str, Any]:
    data = np.zeros((len(labels), 3072), dtype=np.uint8)
    data[:, :1024] = np.array(labels)[:, None]  # red plane tells the label
    data[:, 2048 + 32 + 5] = 77  # blue, row 1, column 5
    return {"batch_label": "batch", key: labels, "data": data, "filenames": [f"{n}.png" for n in labels]}


def write_cifar10(folder: Path, dump: Any = python2_pickle) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(dump(batch([number, number - 1, 0])))
    (folder / "test_batch").write_bytes(dump(batch([9, 8])))
    (folder / "batches.meta").write_bytes(dump({"num_cases_per_batch": 3, "label_names": NAMES10, "num_vis": 3072}))
    return folder


@pytest.mark.parametrize(
    "dump",
    [python2_pickle, *(python3_pickle(protocol, keys) for protocol in (2, 4, 5) for keys in (str, bytes))],
)
def test_cifar10_is_read_as_python_2_or_3_wrote_it(tmp_path: Path, dump: Any) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", dump)
    for path in (tmp_path, folder):
        source = open_source(f"cifar10:{path}")
        train, test = source.train, source.test
        assert isinstance(test, PairDataset)
        assert (len(train), len(test)) == (15, 2)
        assert train.classes == tuple(NAMES10)
        assert train.labels is not None and train.labels[:6].tolist() == [1, 0, 0, 2, 1, 0]
        assert train.captions[3] == ("a photo of a bird",)
        assert (train.ids[14], test.ids[1]) == ("train/14", "test/1")
        image = np.asarray(test.image(0))
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert (image[:, :, 0] == 9).all() and image[1, 5, 2] == 77 and image[:, :, 2].sum() == 77


def test_cifar100_uses_fine_labels_and_spaces_in_names(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, labels in (("train", [0, 2, 1]), ("test", [2])):
        content = batch(labels, "fine_labels") | {"coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(python2_pickle(content))
    meta = {"fine_label_names": ["apple", "aquarium_fish", "pear"], "coarse_label_names": ["food"]}
    (folder / "meta").write_bytes(python2_pickle(meta))
    source = open_source(f"cifar100:{tmp_path}", templates=["a {}", "one {}"])
    assert source.train.classes == ("apple", "aquarium fish", "pear")
    assert source.train.captions[2] == ("a aquarium fish", "one aquarium fish")
    assert source.test is not None and source.test.labels is not None and source.test.labels.tolist() == [2]


class _Touch:
    def __init__(self, path: Path, how: Any) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how(self.path)


ATTACKS = {
    "system": lambda path: (os.system, (f"touch '{path}'",)),
    "eval": lambda path: (eval, (f"open({str(path)!r}, 'w')",)),
    "getattr": lambda path: (getattr, (path, "touch")),
    "numpy": lambda path: (np.save, (str(path), np.zeros(1))),
}


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path, attack: str, file: str, protocol: int) -> None:
    folder = write_cifar10(tmp_path / "data")
    trace = tmp_path / "trace.npy"
    content = {"data": _Touch(trace, ATTACKS[attack]), "labels": [0], "label_names": NAMES10}
    (folder / file).write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(InputError, match=rf"{file} asks for \w+\.\w+.*would run code"):
        open_source(f"cifar10:{folder}")
    assert not trace.exists()


def test_an_allowed_name_with_unusual_arguments_is_refused(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "data")
    objects = {"data": np.array([[None] * 3072], dtype=object), "labels": [0]}
    (folder / "test_batch").write_bytes(pickle.dumps(objects, 2))
    with pytest.raises(InputError, match="test_batch"):
        open_source(f"cifar10:{folder}")
    (folder / "test_batch").write_bytes(b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.")
    with pytest.raises(InputError, match="hex"):
        open_source(f"cifar10:{folder}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data_batch_3", None, "has data_batch_3.*cifar-10-python.tar.gz"),
        ("batches.meta", None, "has batches.meta"),
        ("test_batch", b"", "cannot read .*test_batch: EOFError"),
        ("test_batch", b"no pickle", "cannot read .*test_batch"),
        ("test_batch", python2_pickle(batch([1, 2]))[:3000], "cannot read .*test_batch"),
        ("test_batch", python2_pickle([1]), "test_batch holds a list"),
        ("test_batch", python2_pickle({"labels": [0]}), "test_batch has no uint8 images"),
        ("test_batch", pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}), "float64"),
        ("test_batch", pickle.dumps({"data": np.zeros((1, 30), np.uint8), "labels": [0]}), "no uint8 images"),
        ("test_batch", python2_pickle(batch([1, 2]) | {"labels": [1]}), "1 of them, 2 images"),
        ("test_batch", python2_pickle(batch([1, 10])), "10 classes"),
        ("test_batch", python2_pickle(batch([1], "fine_labels")), "no list of labels"),
        ("batches.meta", python2_pickle({"label_names": []}), "batches.meta has no list of class names"),
    ],
)
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(f"cifar10:{tmp_path}")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a directory"):
        open_source(f"cifar10:{tmp_path / 'nowhere'}")
