"""Read images from memory, files, tar shards or a dataset of the caller."""

from __future__ import annotations

import bisect
import hashlib
import io
import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from cliperase_fast.data.decoding import MAX_IMAGE_BYTES, decode, item_image
from cliperase_fast.data.intake import ItemError
from cliperase_fast.errors import InputError
from cliperase_fast.reading import open_regular


class ImageStore:
    """Images by position. Stores keep no open files, so they can be pickled for loader processes."""

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, position: int) -> Image.Image | Tensor:
        """Return the decoded image: PIL in RGB, or the caller's tensor. An `InputError` names an unreadable one."""
        raise NotImplementedError

    def origin(self, position: int) -> str:
        """Return the collection of this image; inside one, different identities are different images."""
        raise NotImplementedError

    def identity(self, position: int) -> Hashable:
        """Return a key that is equal for the same image, even if it was opened twice."""
        raise NotImplementedError

    def content(self, position: int) -> Hashable:
        """Return a key that is equal for equal images, of any store; None where that takes more than a look-up."""
        return None

    def decoded(self, position: int) -> bool:
        """Return whether the pixels are already in memory, so that reading them cannot fail."""
        return False

    def thread_safe(self) -> bool:
        return True

    def redrawn(self) -> bool:
        """Return whether images differ each time they are read."""
        return False


class ArrayStore(ImageStore):
    """uint8 pixels [n, H, W, 3] in memory."""

    def __init__(self, pixels: np.ndarray, origin: str) -> None:
        self.pixels, self._origin = pixels, origin

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, position: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[position]))

    def origin(self, position: int) -> str:
        return self._origin

    def identity(self, position: int) -> Hashable:
        return self._origin, position

    def decoded(self, position: int) -> bool:
        return True


class FileStore(ImageStore):
    """Image files. remedy: what to do if one does not exist."""

    def __init__(self, paths: Sequence[str], origin: str, remedy: str = "") -> None:
        self.paths, self._origin, self.remedy = list(paths), origin, remedy

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, position: int) -> Image.Image:
        return decode(self.paths[position], self.paths[position], self.remedy)

    def origin(self, position: int) -> str:
        return self._origin

    def identity(self, position: int) -> Hashable:
        return "file", os.path.realpath(self.paths[position])

    def content(self, position: int) -> Hashable:
        return "path", os.path.normpath(self.paths[position])


class TarStore(ImageStore):
    """Members of uncompressed tar files, read at their offsets."""

    def __init__(
        self,
        shards: Sequence[str],
        shard_of: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        members: Sequence[str],
    ) -> None:
        self.shards, self.members = list(shards), list(members)
        self.origins = [os.path.realpath(shard) for shard in shards]
        self.shard_of, self.offsets, self.sizes = shard_of, offsets, sizes  # int64 [n] each

    def __len__(self) -> int:
        return len(self.members)

    def image(self, position: int) -> Image.Image:
        shard, name = self.shards[self.shard_of[position]], self.members[position]
        try:
            with open_regular(shard) as file:
                file.seek(self.offsets[position])
                data = file.read(min(int(self.sizes[position]), MAX_IMAGE_BYTES))
        except OSError as error:
            raise ItemError(f"cannot read {name} from the shard {shard}: {error.strerror or error}") from error
        return decode(io.BytesIO(data), f"{name} in the shard {shard}")

    def origin(self, position: int) -> str:
        return self.origins[self.shard_of[position]]

    def identity(self, position: int) -> Hashable:
        return self.origin(position), int(self.offsets[position])


class ItemStore(ImageStore):
    """The first element of each item of a map-style dataset or sequence."""

    is_redrawn = False  # set by `as_pairs`

    def __init__(self, items: Any, name: str) -> None:
        self.items, self.name = items, name
        self.contents: dict[int, Hashable] = {}  # by position, filled by `as_pairs`

    def __len__(self) -> int:
        return len(self.items)

    def image(self, position: int) -> Image.Image | Tensor:
        try:
            image = self.items[position][0]
        except InputError:
            raise
        except Exception as error:  # the caller's code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ItemError(
                f"cannot read image {position} of {self.name}: {reason}", "the dataset raised an error"
            ) from error
        return item_image(image, f"image {position} of {self.name}")

    def origin(self, position: int) -> str:
        return f"object {id(self.items)}"

    def identity(self, position: int) -> Hashable:
        return self.origin(position), position

    def content(self, position: int) -> Hashable:
        return self.contents.get(position)

    def thread_safe(self) -> bool:
        return False

    def redrawn(self) -> bool:
        return self.is_redrawn


class JoinedStore(ImageStore):
    """Several stores, concatenated."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores = list(stores)
        self.starts = [0]
        for store in stores:
            self.starts.append(self.starts[-1] + len(store))

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, position: int) -> tuple[ImageStore, int]:
        which = bisect.bisect_right(self.starts, position) - 1
        return self.stores[which], position - self.starts[which]

    def image(self, position: int) -> Image.Image | Tensor:
        store, inner = self._find(position)
        return store.image(inner)

    def origin(self, position: int) -> str:
        store, inner = self._find(position)
        return store.origin(inner)

    def identity(self, position: int) -> Hashable:
        store, inner = self._find(position)
        return store.identity(inner)

    def content(self, position: int) -> Hashable:
        store, inner = self._find(position)
        return store.content(inner)

    def decoded(self, position: int) -> bool:
        store, inner = self._find(position)
        return store.decoded(inner)

    def thread_safe(self) -> bool:
        return all(store.thread_safe() for store in self.stores)

    def redrawn(self) -> bool:
        return any(store.redrawn() for store in self.stores)


def content_key(image: Any) -> Hashable:
    """Return a key that is equal for equal images of the caller; None where it is not known."""
    if isinstance(image, ImageFile.ImageFile):  # not decoded yet, which takes longer than everything else here
        return ("file", os.path.realpath(image.filename)) if image.filename else None
    try:
        plain = isinstance(image, Image.Image) and image.mode == "RGB" and not image.info  # there is nothing to convert
        return hashlib.sha256(pixel_bytes(image if plain else item_image(image, "an image"))).digest()
    except Exception:  # neither an image nor a tensor with values; its use says so
        return None


def pixel_bytes(image: Image.Image | Tensor) -> bytes:
    """Return size, type and values of an image as bytes: equal for equal pixels, however the image is stored."""
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    flat = image.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{image.dtype} {tuple(image.shape)}".encode() + flat.numpy().tobytes()
