"""Decode images of every kind to 8-bit RGB, by one set of rules for files, shards and the caller's own images.

The EXIF orientation is applied. Transparent pixels become white. 16-bit gray is scaled from 0..65535. The first frame
of an animation is used. Colour profiles are not applied. 32-bit integers count as 8-bit values if none exceeds 255,
else as 16-bit; floats count as fractions if none exceeds 1, else as 8-bit values. Larger values are refused.
"""

from __future__ import annotations

import io
import os
import re
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cliperase_fast.data.intake import ItemError
from cliperase_fast.errors import InputError
from cliperase_fast.reading import in_bytes, open_regular

MAX_IMAGE_BYTES = 256 << 20  # of an encoded image
MAX_ASPECT = 200  # resizing the short side to a model's size would make the long side enormous
_PILLOWS_LIMIT = 178  # megapixels; Pillow itself refuses more
# Formats that need another program to decode, or that Pillow can only identify.
_NOT_DECODED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"})
_OTHER_IMAGES = frozenset(
    (
        ".ai", ".arw", ".avif", ".cr2", ".cr3", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heif", ".jxl",
        ".jxr", ".nef", ".orf", ".ps", ".psb", ".raf", ".raw", ".rw2", ".svg", ".wdp", ".webp", ".wmf", ".xcf",
    )
)  # fmt: skip
_STARTS = (
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the image; run 'git lfs pull'"),
    (rb"(\xef\xbb\xbf)?\s*(<\?xml.*)?<svg", "is an SVG drawing, which Pillow does not read; convert it to .png"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype )?html", "is a web page, not an image; download it again"),
    (rb".{4}ftyp(hei|hev|mif|msf)", "is a HEIC image, which Pillow does not read here; convert it to .png or .jpg"),
)  # how files begin that are named like images and are something else
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # EXIF and TIFF tags


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _NOT_DECODED)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, lower case with the dot, of files that can be decoded here."""
    known = set(_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def is_other_image(suffix: str) -> bool:
    """Return whether a suffix (lower case, with the dot) is of an image format that cannot be decoded here."""
    return suffix in _OTHER_IMAGES and suffix not in image_suffixes()


def max_megapixels() -> float:
    """Return the size of the largest image to decode: 64 megapixels, or CLIPERASE_MAX_MEGAPIXELS."""
    text = os.environ.get("CLIPERASE_MAX_MEGAPIXELS", "64")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _PILLOWS_LIMIT:
        raise InputError(f"CLIPERASE_MAX_MEGAPIXELS={text!r} must be a number above 0 and at most {_PILLOWS_LIMIT}")
    return value


class _Unusable(Exception):
    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(fault)
        self.reason, self.fault = reason, fault


def decode(file: str | io.BytesIO, name: str, remedy: str = "") -> Image.Image:
    """Decode a whole image to RGB.

    remedy: what to do if the file does not exist. Raises `ItemError` with the name if the image is missing, damaged,
    too large or has values of unclear range.
    """
    try:
        with _opened(file) as stream:
            try:
                opened = Image.open(stream, formats=_formats())
            except UnidentifiedImageError as error:
                raise _Unusable("image cannot be decoded", _what_it_is(stream)) from error
            with opened as image:
                return to_rgb(image)
    except FileNotFoundError as error:
        raise ItemError(f"the image {name} does not exist{remedy}", "image does not exist") from error
    except _Unusable as error:
        raise ItemError(f"the image {name} {error.fault}", error.reason) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError(f"the image {name} is too large ({error}); make it smaller", "image too large") from error
    except InputError:
        raise
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged files
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise ItemError(f"cannot read the image {name}: {said}", "image cannot be decoded") from error


def _what_it_is(stream: BinaryIO) -> str:
    """Return what a file that Pillow cannot identify is, judged by its first bytes, and what to do."""
    stream.seek(0)
    start = stream.read(512)
    if not start:
        return "is an empty file; download it again"
    known = next((found for pattern, found in _STARTS if re.match(pattern, start, re.DOTALL | re.IGNORECASE)), None)
    return known or "is damaged, or of a format that Pillow does not read here; convert it to .png or .jpg"


def _opened(file: str | io.BytesIO) -> Any:
    if not isinstance(file, str):
        return file
    stream = open_regular(file)
    size = os.fstat(stream.fileno()).st_size
    if size > MAX_IMAGE_BYTES:
        stream.close()
        raise _Unusable("image too large", f"has {in_bytes(size)}, more than {in_bytes(MAX_IMAGE_BYTES)}")
    return stream


def item_image(item: Any, name: str) -> Image.Image | Tensor:
    """Return an image of the caller as PIL in RGB (from PIL or uint8 arrays) or as a tensor. name: for `ItemError`."""
    if isinstance(item, Tensor):
        return item
    try:
        if isinstance(item, Image.Image):
            return to_rgb(item)
        if isinstance(item, np.ndarray):
            return to_rgb(_from_array(item))
    except _Unusable as error:
        raise ItemError(f"{name} {error.fault}", error.reason) from error
    except InputError:
        raise
    except Exception as error:  # lazily opened images may raise anything
        raise ItemError(
            f"cannot read {name}: {type(error).__name__}: {error}",
            "image cannot be decoded",
        ) from error
    raise ItemError(
        f"{name} is a {type(item).__name__}; pass a PIL image, a uint8 array [H, W, 3], or a float tensor [3, H, W] "
        "that is already transformed",
        "image of an unknown type",
    )


def _from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped or array.size == 0:
        raise _Unusable(
            "image of an unknown type",
            f"is an ndarray of {array.dtype} {list(array.shape)}; pass uint8 [H, W, 3] (or [H, W], [H, W, 4]), or a "
            "float tensor [3, H, W] that is already transformed",
        )
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy in 8-bit RGB, upright, without transparency; the rules are at the top of this file."""
    _check_extent(*image.size)
    # These belong to the file; images made from it do not have them.
    kind, tags = image.format, getattr(image, "tag_v2", None) or {}
    image.load()
    _check_extent(*image.size)  # an icon file has several sizes
    turned = image.transpose(_TURNS[turn]) if (turn := _orientation(image)) in _TURNS else image
    if turned.mode == "F":
        rgb = _from_floats(turned)
    elif turned.mode == "I" or turned.mode.startswith("I;16"):
        rgb = _from_integers(turned, kind, tags)
    elif turned.mode == "LAB":
        rgb = _from_lab(turned)
    else:
        rgb = _on_white(turned)
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "transparency"):  # they no longer apply
        rgb.info.pop(key, None)
    return rgb


def _check_extent(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise _Unusable("image without pixels", f"has no pixels ({width} x {height})")
    limit = max_megapixels()
    if width * height > limit * 1e6:
        raise _Unusable(
            "image too large",
            f"has {width} x {height} pixels, more than {limit:g} megapixels; make it smaller, or set "
            f"CLIPERASE_MAX_MEGAPIXELS (at most {_PILLOWS_LIMIT})",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Unusable(
            "image too elongated",
            f"has {width} x {height} pixels, a ratio above {MAX_ASPECT} to 1; crop it",
        )


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata do not affect the pixels
        return None
    return value if isinstance(value, int) else None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if not (image.mode.endswith(("A", "a")) or "transparency" in image.info):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    made = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    assert made is not None  # None only if the image is changed in place
    return made


def _from_integers(image: Image.Image, kind: str | None, tags: Any) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    top = 65535
    if image.mode == "I" and kind not in ("PNG", "PPM"):  # these two store 16 bits in it
        top = 255 if high <= 255 else 65535
    elif tags.get(_BITS) == (12,):
        top = 4095
    if low < 0 or high > top:
        raise _Unusable(
            "pixel values out of range",
            f"has gray values from {low} to {high}, which fit neither 8 nor 16 bits; scale them to 0..65535",
        )
    transparent = image.info.get("transparency")
    if image.mode != "I" and tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow handles this only for 8 bits
        values = top - values
    gray = (values * 255 + top // 2) // top
    if isinstance(transparent, int):
        gray[np.asarray(image) == transparent] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 255:  # false for NaN as well
        raise _Unusable(
            "pixel values out of range",
            f"has float values from {low:g} to {high:g}; scale them to 0..1 or 0..255",
        )
    gray = np.rint(values * 255 if high <= 1 else values)
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


_TENSORS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor_fault(image: Tensor) -> str | None:
    """Return what is wrong with the form of an already transformed image, or None. Values are not checked."""
    if image.is_nested or image.layout != torch.strided:
        layout = "nested" if image.is_nested else str(image.layout).removeprefix("torch.")
        return f"is a {layout} tensor; tensor images must be dense [3, H, W]; call .to_dense()"
    if image.is_meta:
        return "is on the meta device and has no values; pass a tensor on the CPU"
    if image.dtype not in _TENSORS:
        dtype = str(image.dtype).removeprefix("torch.")
        pixels = image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] in (1, 3, 4)
        other = "; pass image.permute(1, 2, 0).numpy() to have pixels transformed here" if pixels else ""
        return f"is a {dtype} tensor; tensor images must be float and already transformed{other}"
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        return f"is a tensor {list(image.shape)}; tensor images must be [3, H, W]{_reshaped(image)}"
    return None


def _reshaped(image: Tensor) -> str:
    if image.ndim == 3 and image.shape[0] == 1:
        return "; pass image.expand(3, -1, -1) for a single channel"
    if image.ndim == 3 and image.shape[2] == 3:
        return "; pass image.permute(2, 0, 1)"
    return "; pass image.expand(3, -1, -1) for a gray image" if image.ndim == 2 else ""
