"""Images of every mode, the same from a file, a shard and memory."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cliperase_fast.data import as_pairs, check_images, open_source
from cliperase_fast.errors import InputError


def in_memory(image: object) -> np.ndarray:
    return np.asarray(as_pairs([(image, "x")], "mine").image(0))


def from_file(image: Image.Image, path: Path, **options) -> np.ndarray:
    path.parent.mkdir(exist_ok=True, parents=True)
    image.save(path, **options)
    return np.asarray(open_source(f"folder:{path.parent.parent}").train.image(0))


RAMP16 = np.linspace(0, 65535, 12).reshape(3, 4).astype(np.uint16)
RAMP8 = np.round(RAMP16 / 257).astype(np.uint8)


MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B",
    "I;16L", "F",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_8_bit_rgb(mode: str) -> None:
    assert in_memory(Image.new(mode, (4, 3))).shape == (3, 4, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_gray_is_scaled_from_a_file(tmp_path: Path, suffix: str) -> None:
    read = from_file(Image.fromarray(RAMP16), tmp_path / "c" / f"x.{suffix}")
    assert (read == RAMP8[:, :, None]).all()


def test_dark_16_bit_gray_stays_dark(tmp_path: Path) -> None:
    dark = np.full((3, 4), 200, dtype=np.uint16)
    assert (from_file(Image.fromarray(dark), tmp_path / "c" / "x.png") == 1).all()
    assert (in_memory(Image.fromarray(dark)) == 1).all()


def test_integers_and_floats_are_scaled_by_their_range() -> None:
    assert (in_memory(Image.fromarray(RAMP16)) == RAMP8[:, :, None]).all()
    assert (in_memory(Image.fromarray(RAMP16.astype(np.int32))) == RAMP8[:, :, None]).all()
    assert (in_memory(Image.fromarray(RAMP8.astype(np.int32))) == RAMP8[:, :, None]).all()
    assert (in_memory(Image.fromarray(RAMP8.astype(np.float32))) == RAMP8[:, :, None]).all()
    assert (in_memory(Image.fromarray(RAMP8.astype(np.float32) / 255)) == RAMP8[:, :, None]).all()


@pytest.mark.parametrize("value", [-1.0, 256.0, float("nan"), float("inf")])
def test_floats_out_of_range_are_refused_with_the_item(value: float) -> None:
    values = np.full((3, 4), value, dtype=np.float32)
    with pytest.raises(InputError, match=r"image 0 of mine has float values .*scale them to 0\.\.1 or 0\.\.255"):
        in_memory(Image.fromarray(values))


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(InputError, match="neither 8 nor 16 bits"):
        in_memory(Image.fromarray(np.full((3, 4), value, dtype=np.int32)))


def test_white_is_zero_is_applied_at_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "c" / "x.tif"
    from_file(Image.fromarray(RAMP16), path)
    read = from_file(Image.fromarray(RAMP16), path, tiffinfo={262: 0})
    with Image.open(path) as image:
        inverted = image.tag_v2[262] == 0
    assert inverted and (read == 255 - RAMP8[:, :, None]).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, turn: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # the upper left quarter
    back = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    methods = [
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270,
    ]  # fmt: skip
    stored = Image.fromarray(upright)
    if turn > 1:
        stored = stored.transpose(methods[back[turn]])
    exif = Image.Exif()
    exif[274] = turn
    for suffix, options in (("jpg", {"quality": 100}), ("png", {}), ("webp", {"lossless": True})):
        folder = tmp_path / suffix
        read = from_file(stored, folder / "c" / f"x.{suffix}", exif=exif, **options)
        assert read.shape == upright.shape and np.abs(read.astype(int) - upright).max() < 16
        lazy = Image.open(folder / "c" / f"x.{suffix}")
        assert (in_memory(lazy) == read).all()
        assert (in_memory(Image.open(folder / "c" / f"x.{suffix}").convert("RGB")) == read).all()
    again = as_pairs([(lazy, "x")], "mine").image(0)
    assert isinstance(again, Image.Image) and again.getexif().get(274) is None


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    broken = b"Exif\0\0II*\0\xff\xff\xff\xff"
    read = from_file(Image.new("RGB", (4, 3), (9, 9, 9)), tmp_path / "c" / "x.png", exif=broken)
    assert (read == 9).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_transparent_pixels_are_white_in_every_form(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([1, 2, 3, 10, 20, 30, 4, 5, 6])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 0
    key = Image.new("RGB", (2, 1), (10, 20, 30))
    key.putpixel((0, 0), (7, 7, 7))
    key.info["transparency"] = (7, 7, 7)
    for image in (clear, palette, key):
        assert in_memory(image).tolist() == [[[255, 255, 255], [10, 20, 30]]]
        assert from_file(image, tmp_path / image.mode / "c" / "x.png").tolist() == in_memory(image).tolist()
    half = Image.new("LA", (1, 1), (0, 128))
    assert in_memory(half).tolist() == [[[127] * 3]]
    row = b"\0" + struct.pack(">HH", 1000, 65535)
    keyed = png(2, 1, 16, 0, row, chunk(b"tRNS", struct.pack(">H", 1000)))
    assert in_memory(Image.open(io.BytesIO(keyed))).tolist() == [[[255] * 3, [255] * 3]]


def test_opaque_pixels_keep_their_colours() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    opaque = np.concatenate([noise, np.full((8, 8, 1), 255, dtype=np.uint8)], axis=2)
    assert (in_memory(Image.fromarray(opaque)) == noise).all()


def test_lab_is_converted_by_its_colours() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    colour = Image.new("RGB", (2, 2), (200, 60, 30))
    stored = ImageCms.applyTransform(colour, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert stored is not None and stored.mode == "LAB"
    assert np.abs(in_memory(stored).astype(int) - [200, 60, 30]).max() < 6


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    read = from_file(frames[0], tmp_path / "c" / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(read.astype(int) - [255, 0, 0]).max() < 16


# --- what is refused


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        ((0, 4), r"has no pixels \(0 x 4\)"),
        ((1, 400), "1 x 400 pixels, a ratio above 200 to 1; crop it"),
        ((9000, 8000), r"9000 x 8000 pixels, more than 64 megapixels; .*CLIPERASE_MAX_MEGAPIXELS"),
    ],
)
def test_extents_that_cannot_be_used_are_refused(size: tuple[int, int], fault: str) -> None:
    pairs = as_pairs([(Image.new("1", size), "x"), (Image.new("L", (4, 4)), "y")], "mine")
    with pytest.raises(InputError, match=f"image 0 of mine .*{fault}"):
        check_images(pairs)
    assert check_images(pairs, on_error="skip")[0].tolist() == [1]


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_from_its_header(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bomb.png").write_bytes(png(width, height, 8, 2, b"\0" * 10))
    with pytest.raises(InputError, match=r"bomb\.png .*make it smaller"):
        open_source(f"folder:{tmp_path}").train.image(0)


def test_the_limit_of_pixels_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (100, 100))
    monkeypatch.setenv("CLIPERASE_MAX_MEGAPIXELS", "0.01")
    assert in_memory(image).shape == (100, 100, 3)
    monkeypatch.setenv("CLIPERASE_MAX_MEGAPIXELS", "0.009")
    with pytest.raises(InputError, match=r"more than 0\.009 megapixels"):
        in_memory(image)
    monkeypatch.setenv("CLIPERASE_MAX_MEGAPIXELS", "1000")
    with pytest.raises(InputError, match="CLIPERASE_MAX_MEGAPIXELS='1000' must be a number above 0 and at most 178"):
        in_memory(image)


def test_huge_metadata_are_refused_with_the_file(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(70 << 20)))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(png(1, 1, 8, 0, b"\0\0", text))
    with pytest.raises(InputError, match=r"cannot read the image .*x\.png"):
        open_source(f"folder:{tmp_path}").train.image(0)


def test_postscript_under_another_name_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(InputError, match=r"the image .*x\.png is damaged, or of a format"):
        open_source(f"folder:{tmp_path}").train.image(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"is an empty file; download it again"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page, not an image; download it again"),
        (b"\xef\xbb\xbf\n<html>", "is a web page, not an image; download it again"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', r"is an SVG drawing, .*; convert it to \.png"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, .*; run 'git lfs pull'"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"is a HEIC image, .*; convert it to \.png or \.jpg"),
        (b"anything", r"is damaged, or of a format that Pillow does not read here; convert it to \.png or \.jpg"),
    ],
)
def test_a_file_that_is_only_named_like_an_image_is_described(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.jpg").write_bytes(content)
    with pytest.raises(InputError, match=rf"^the image .*x\.jpg {said}$"):
        open_source(f"folder:{tmp_path}").train.image(0)


def test_a_directory_named_like_an_image_is_reported_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("filepath\ttitle\n.\ta dog\n")
    with pytest.raises(InputError, match=r"^cannot read the image .*: it is a directory, not a regular file$"):
        open_source(f"csv:{tmp_path / 't.csv'}").train.image(0)


# --- arrays and tensors


def test_uint8_arrays_are_images() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    assert (in_memory(noise) == noise).all()
    assert (in_memory(noise[::-1, ::2]) == noise[::-1, ::2]).all()
    assert (in_memory(noise[:, :, 0]) == noise[:, :, :1]).all()
    assert (in_memory(noise[:, :, :1]) == noise[:, :, :1]).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8), np.zeros((8, 8, 3), np.uint16),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_with_the_remedy(array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"image 0 of mine is an ndarray of \w+ \[.*\]; pass uint8 \[H, W, 3\]"):
        in_memory(array)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 8, 8, device="meta"), "is on the meta device and has no values"),
        (torch.zeros(3, 8, 8).to_sparse(), r"is a sparse_coo tensor; .*\.to_dense"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "is a complex64 tensor"),
        (torch.zeros(3, 8, 8).to(torch.float8_e4m3fn), "is a float8_e4m3fn tensor"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "is a bool tensor"),
        (torch.nested.nested_tensor([torch.zeros(8, 8)] * 3), "is a nested tensor"),
        (torch.zeros(3, 0, 8), r"is a tensor \[3, 0, 8\]"),
    ],
)
def test_tensors_without_usable_pixels_are_named(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"image '0' of mine {message}"):
        check_images(as_pairs([(tensor, "x")], "mine"))
