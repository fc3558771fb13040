from __future__ import annotations

import io
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from cliperase_fast.data import check_images, open_source, select
from cliperase_fast.errors import InputError

Sample = dict[str, Any]


def pixels(shade: int) -> np.ndarray:
    return np.full((8, 6, 3), (shade, 200, 40), dtype=np.uint8)


def pets(start: int, count: int, kind: str = "png") -> list[Sample]:
    return [
        {
            "__key__": f"{number:06d}",
            kind: pixels(number),
            "txt": f"a photo of a {'cat' if number % 2 else 'dog'}",
            "cls": number % 2,
        }
        for number in range(start, start + count)
    ]


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, samples: list[Sample]) -> Path:
        path = tmp_path / name
        with webdataset.TarWriter(str(path)) as writer:
            for sample in samples:
                writer.write(sample)
        return path

    return write


def test_braces_name_several_shards_and_images_are_read_at_random(tmp_path: Path, shard) -> None:
    for number in range(3):
        shard(f"pets-{number:05d}.tar", pets(4 * number, 4))
    source = open_source(f"wds:{tmp_path}/pets-{{00000..00002}}.tar")
    pairs = source.train
    assert source.test is None and len(pairs) == 12
    assert pairs.ids[5] == "000005" and pairs.captions[5] == ("a photo of a cat",)
    assert pairs.classes == ("cat", "dog")
    for index in (11, 0, 7, 4):
        assert (np.asarray(pairs.image(index)) == pixels(index)).all()
    assert select(pairs, "class:cat").sum() == 6
    some = open_source(f"wds:{tmp_path}/pets-{{00000,00002}}.tar").train
    assert len(some) == 8 and some.image(7).getpixel((0, 0))[0] == 11


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_every_image_kind_is_read(tmp_path: Path, shard, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(100)).save(buffer, {"jpg": "jpeg"}.get(kind.lower(), kind))
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        for suffix, data in (
            ("json", b"{}"),
            (kind, buffer.getvalue()),
            ("seg.png", b"not me"),
            ("txt", b" a dog\n"),
        ):
            member = tarfile.TarInfo(f"some/dir/x.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pairs = open_source(f"wds:{path}").train
    assert pairs.ids == ["some/dir/x"] and pairs.captions == [("a dog",)]
    assert np.abs(np.asarray(pairs.image(0)).astype(int) - pixels(100)).max() < 40


def test_shards_hold_no_open_file_and_travel_to_loader_processes(shard) -> None:
    pairs = open_source(f"wds:{shard('a.tar', pets(0, 8))}").train
    pairs.image(0)
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.image(6).tobytes() == pairs.image(6).tobytes()
    (batch,) = DataLoader(pairs, batch_size=8, num_workers=1, collate_fn=list)
    assert [image.getpixel((0, 0))[0] for image, _ in batch] == list(range(8))


def test_images_stay_on_disk(tmp_path: Path, shard) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = shard("big.tar", [{"__key__": str(n), "png": noise, "txt": "noise"} for n in range(10)])
    assert len(pickle.dumps(open_source(f"wds:{path}").train)) < path.stat().st_size / 20


def test_keys_that_repeat_between_shards_get_the_shards_name(tmp_path: Path, shard) -> None:
    shard("a.tar", pets(0, 2))
    shard("b.tar", pets(0, 2))
    pairs = open_source(f"wds:{tmp_path}/{{a,b}}.tar").train
    assert pairs.ids == ["a/000000", "a/000001", "b/000000", "b/000001"]
    with pytest.raises(InputError, match="'a/000000' occurs 2 times"):
        open_source(f"wds:{tmp_path}/{{a,a}}.tar")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "k", "png": pixels(1)}, r"sample 'k' in .*bad\.tar has no caption"),
        ({"__key__": "k", "txt": "a dog"}, r"sample 'k' in .*bad\.tar has no image \(\.jpg, "),
        ({"__key__": "k", "png": pixels(1), "txt": "  "}, r"caption of sample 'k' in .*bad\.tar is empty"),
        (
            {"__key__": "k", "png": pixels(1), "txt": b"\xff\xfe"},
            r"sample 'k' in .*bad\.tar \(k\.txt\) is unusable: it is UTF-16",
        ),
    ],
)
def test_an_incomplete_sample_is_named(shard, sample: Sample, message: str) -> None:
    path = shard("bad.tar", [*pets(0, 2), sample])
    with pytest.raises(InputError, match=message):
        open_source(f"wds:{path}")


def test_an_image_that_cannot_be_decoded_is_named(shard) -> None:
    whole = pets(0, 2)
    path = shard("bad.tar", [*whole, {"__key__": "broken", "jpg": b"\xff\xd8\xff no jpeg", "txt": "a dog"}])
    pairs = open_source(f"wds:{path}").train
    with pytest.raises(InputError, match=r"broken\.jpg in the shard .*bad\.tar"):
        check_images(pairs)
    good, bad = check_images(pairs, on_error="skip")
    assert good.tolist() == [0, 1] and len(bad) == 1


def test_missing_shards_are_counted_and_named(tmp_path: Path, shard) -> None:
    shard("s-0.tar", pets(0, 2))
    with pytest.raises(InputError, match=r"2 of the 3 shards of .* the first is .*s-1\.tar"):
        open_source(f"wds:{tmp_path}/s-{{0..2}}.tar")


def test_damaged_shards_are_named(tmp_path: Path, shard) -> None:
    path = shard("x.tar", pets(0, 8))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = next(member.offset for member in tar if member.name.startswith("000002"))
    for content, message in [
        (b"", "empty file"),
        (b"no tar at all" * 100, "uncompressed tar"),
        (whole[: third + 600], "(unexpected end of data|empty header)"),
        (whole[: third + 100], f"unreadable header at byte {third}"),
        (whole[:third] + b"\x01" * 512 + whole[third + 512 :], f"unreadable header at byte {third}"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"x\.tar is damaged .*{message}"):
            open_source(f"wds:{path}")


def test_a_shard_that_shrank_after_it_was_opened_is_named(shard) -> None:
    path = shard("x.tar", pets(0, 8))
    pairs = open_source(f"wds:{path}").train
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"000007\.png in the shard .*x\.tar"):
        pairs.image(7)
    path.unlink()
    with pytest.raises(InputError, match=r"000007\.png from the shard .*x\.tar: No such file"):
        pairs.image(7)


def test_compressed_and_remote_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(InputError, match=r"x\.tar\.gz is damaged or not an uncompressed tar"):
        open_source(f"wds:{tmp_path}/x.tar.gz")
    for url in ("https://host/x.tar", "pipe:cat x.tar", "s3://bucket/x.tar"):
        with pytest.raises(InputError, match="not a local file"):
            open_source(f"wds:{url}")


def test_shards_that_cannot_be_expanded_are_named(tmp_path: Path, shard) -> None:
    with pytest.raises(InputError, match="cannot expand the shards"):
        open_source(f"wds:{tmp_path}/x-{{0..2.tar")
    with pytest.raises(InputError, match="cannot expand the shards"):
        open_source("wds:${NOT_SET_ANYWHERE}/x.tar")


def test_shards_without_samples_are_an_error(shard) -> None:
    with pytest.raises(InputError, match="no samples"):
        open_source(f"wds:{shard('empty.tar', [])}")


def test_without_the_library_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch, shard) -> None:
    path = shard("a.tar", pets(0, 2))
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(InputError, match=r"pip install '\.\[webdataset\]'"):
        open_source(f"wds:{path}")
