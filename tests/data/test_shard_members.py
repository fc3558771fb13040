"""Members of shards in any order and of any kind: each is read, counted, or an error that names it."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cliperase_fast.data import PairDataset, check_images, open_source
from cliperase_fast.errors import InputError

Member = tuple[str, bytes] | tarfile.TarInfo


def picture_bytes(shade: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), (shade, 200, 40), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., PairDataset]:
    def write(members: Sequence[Member], on_error: str = "raise") -> PairDataset:
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as tar:
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    tar.addfile(member)
                else:
                    header = tarfile.TarInfo(member[0])
                    header.size = len(member[1])
                    tar.addfile(header, io.BytesIO(member[1]))
        return open_source(f"wds:{path}", on_error=on_error).train

    return write


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "0.png"
    return member


WHOLE = [("0.png", picture_bytes(0)), ("0.txt", b"a dog")]


def test_members_may_come_in_any_order(shard) -> None:
    names = [f"{n}.{suffix}" for suffix in ("txt", "png") for n in (2, 0, 1)]
    pairs = shard([(name, picture_bytes(int(name[0])) if "png" in name else b"dog " + name.encode()) for name in names])
    assert pairs.ids == ["2", "0", "1"]
    assert [pairs.image(i).getpixel((0, 0))[0] for i in range(3)] == [2, 0, 1]
    assert pairs.captions[0] == ("dog 2.txt",)


@pytest.mark.parametrize("kind", ["png", "JPEG", "gif", "bmp", "tiff", "webp", "avif"])
def test_every_kind_of_image_that_pillow_reads_is_an_image(shard, kind: str) -> None:
    pairs = shard([(f"./a/b/x.{kind}", picture_bytes(0, kind)), ("a/b/x.TXT", b"\xef\xbb\xbf a dog\r\n")])
    assert pairs.ids == ["a/b/x"] and pairs.captions == [("a dog",)]
    assert check_images(pairs)[0].tolist() == [0]


def test_what_belongs_to_no_pair_is_counted(shard) -> None:
    directory = tarfile.TarInfo("a")
    directory.type = tarfile.DIRTYPE
    beside = [
        ("0.json", b"{}"), ("0.cls", b"3"), ("0.seg.png", b"?"), ("._0.png", b"?"), ("__MACOSX/0.png", b"?"),
        ("README", b"?"), ("stats.json", b"{}"), ("__meta__/x.txt", b"?"),
    ]  # fmt: skip
    pairs = shard([directory, *WHOLE, *beside])
    assert len(pairs) == 1 and len(pairs.intake.skipped) == 0
    assert pairs.intake.ignored.counts == {
        "member .json, which is not read": 2,
        "member .cls, which is not read": 1,
        "member .seg.png, which is not read": 1,
        "hidden or system file": 2,
        "member without a suffix": 1,
    }


@pytest.mark.parametrize(
    ("members", "message", "reason"),
    [
        ([("k.png", b"?")], r"sample 'k' in .*x\.tar has no caption", "image without a caption"),
        ([("k.png", b"?"), ("k.text", b"x")], r"has \.text: name such members \.txt", "image without a caption"),
        ([("k.png", b"?"), ("k.json", b"{}")], r"no caption \(\.txt; it has \.json", "image without a caption"),
        ([("k.txt", b"x")], "has no image", "caption without an image"),
        ([("k.heic", b"?"), ("k.txt", b"x")], r"has an image \(\.heic\) that Pillow", ".heic images are not read"),
        ([("k.png", b"?"), ("k.txt", b" \n")], "caption of sample 'k' in .* is empty", "empty caption"),
        ([("k.png", b"?"), ("k.txt", "x".encode("utf-16"))], "UTF-16 text", "caption is not Unicode"),
        ([("k.png", b"?"), ("k.txt", b"caf\xe9")], "not UTF-8", "caption is not Unicode"),
        ([("k.png", b"?"), ("k.txt", b"x" * (2 << 20))], "caption of 2 MiB, more than 1 MiB", "caption too long"),
        ([("k.png", b"?"), ("k.jpg", b"?"), ("k.txt", b"x")], r"2 images \(\.png, ", "sample with several images"),
        ([("k.png", b"?"), ("k.png", b"?"), ("k.txt", b"x")], r"two images \(\.png\)", "key that occurs twice"),
        ([("k.png", b"?"), ("k.txt", b"y"), ("k.txt", b"x")], "two captions", "key that occurs twice"),
        ([special("k.png", tarfile.SYMTYPE), ("k.txt", b"x")], "image that is a link", "member is not a plain file"),
        ([special("k.png", tarfile.LNKTYPE), ("k.txt", b"x")], "image that is a link", "member is not a plain file"),
        ([special("k.png", tarfile.CHRTYPE), ("k.txt", b"x")], "is a device or pipe", "member is not a plain file"),
        ([("k.png", b"?"), special("k.txt", tarfile.FIFOTYPE)], "is a device or pipe", "member is not a plain file"),
    ],
)  # fmt: skip
def test_samples_that_are_not_pairs_are_refused_or_counted(shard, members, message: str, reason: str) -> None:
    with pytest.raises(InputError, match=message):
        shard([*WHOLE, *members])
    pairs = shard([*WHOLE, *members], "skip")
    assert pairs.ids == ["0"] and pairs.intake.skipped.counts == {reason: 1}


def test_names_with_dots_are_refused_as_webdataset_would_cut_them(shard) -> None:
    members = [(f"a.{n}.{kind}", b"x") for n in range(3) for kind in ("jpg", "txt")]
    with pytest.raises(InputError, match=r"sample 'a' in .* members such as a\.0\.jpg: webdataset ends a key at"):
        shard([*WHOLE, *members])
    assert shard([*WHOLE, *members], "skip").intake.skipped.counts == {"name with dots": 3}


def test_a_caption_that_claims_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("k.txt")
    header.size = 10 << 30
    path = tmp_path / "x.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match=r"x\.tar is damaged"):
        open_source(f"wds:{path}")
    with open(path, "r+b") as file:
        file.truncate((10 << 30) + 2048)  # sparse
    with pytest.raises(InputError, match="has a caption of 10 GiB, more than 1 MiB"):
        open_source(f"wds:{path}")


def test_compressed_shards_are_detected_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    with pytest.raises(InputError, match=r"compressed with gzip, so .* decompress it first"):
        open_source(f"wds:{path}")


@pytest.mark.parametrize("pattern", ["{0..9999999}", "{0..999}{0..999}", "{0..99999999999999999999}", "{a,b}" * 20])
def test_braces_are_counted_before_they_are_expanded(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=r"the braces in .* shards, more than 100000; name fewer"):
        open_source(f"wds:{tmp_path}/{pattern}.tar")
