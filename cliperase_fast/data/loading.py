"""Load images for many epochs: batches from loader processes, and a cache of transformed images."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cliperase_fast.data.images import ImageStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.errors import InputError, UnlearningError, first_line


def load_batches(loader: DataLoader) -> Iterator[Any]:
    """Yield the loader's batches.

    Raises an `InputError` of a loader process without torch's copy of the traceback, and an `UnlearningError` if the
    processes cannot be started or one of them dies.
    """
    batches = _started(loader)
    try:
        yield from batches
    except InputError as error:
        text = str(error).rstrip()
        if "Original Traceback" not in text:
            raise
        raise InputError(text.rpartition("\n")[2].partition(": ")[2]) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # torch's words for one that died
            raise
        raise UnlearningError(
            f"a process that loads images died ({first_line(error)}): use num_workers=0 to see why, or fewer if "
            "memory ran out"
        ) from error


def _started(loader: DataLoader) -> Iterator[Any]:
    if loader.num_workers == 0:
        return iter(loader)
    try:
        with _interruption_held(loader):
            return iter(loader)
    except Exception as error:  # pickling runs the caller's code, and daemonic processes may have no children
        raise UnlearningError(
            f"the processes that load images cannot be started ({type(error).__name__}: {first_line(error)}): use "
            "num_workers=0, or a dataset and a transform that can be pickled (no lambdas, nothing of an interactive "
            "session)"
        ) from error


@contextmanager
def _interruption_held(loader: DataLoader) -> Iterator[None]:
    """Raise a KeyboardInterrupt only once the loader's processes have started.

    Python drops what a signal handler raises while it forks, and a new process that is interrupted prints a traceback.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    received: list[int] = []
    if loader.worker_init_fn is None:
        loader.worker_init_fn = _accept_interruption
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt


def _accept_interruption(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def transformed(transform: Callable[[Any], Any] | None, image: Any, name: str = "an image") -> Tensor:  # [3, H, W]
    """Apply `transform` to one PIL image; raise `InputError` unless the result is a finite float tensor [3, H, W]."""
    wanted = "it must turn a PIL image into a float tensor [3, H, W]"
    assert transform is not None
    try:
        pixels: Any = transform(image)
    except InputError:
        raise
    except Exception as error:  # the caller's own code
        raise InputError(
            f"the transform fails for {name} ({type(error).__name__}: {first_line(error)}); {wanted}"
        ) from error
    of = "" if name == "an image" else f" for {name}"
    if not isinstance(pixels, Tensor):
        raise InputError(f"the transform returned a {type(pixels).__name__}{of}; {wanted}")
    if pixels.ndim != 3 or not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.")
        scaled = "" if pixels.is_floating_point() else ", normalised with the model's mean and standard deviation"
        raise InputError(f"the transform returned a {kind} tensor {list(pixels.shape)}{of}; {wanted}{scaled}")
    if not pixels.sum().isfinite() and not pixels.isfinite().all():  # the sum takes a tenth of the time
        raise InputError(f"the transform returned values that are not finite (NaN or infinity){of}; {wanted}")
    return pixels


def name_of(pairs: PairDataset, index: int) -> str:
    return f"image {pairs.ids[index]!r} of {pairs.name}"


def stack_images(images: Sequence[Tensor]) -> Tensor:  # B of [3, H, W] -> [B, 3, H, W]
    """Copy images into a batch, so that neither writes to it nor gradients reach the caller's tensors."""
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise InputError(
            f"images of one batch have different shapes, {shapes[0]} and {shapes[-1]}: give tensors of one "
            "size, or PIL images and a transform that resizes them"
        )
    return torch.stack([image.detach() for image in images])


class PixelCache:
    """Keep images of any data sets under one deterministic transform, up to `budget` bytes.

    For one process: a cache in each loader process would multiply the memory and rarely hit.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._kept: dict[tuple[ImageStore, int], Tensor] = {}

    def pixels(self, pairs: PairDataset, index: int, transform: Callable[[Any], Tensor]) -> Tensor:
        """Return image `index` transformed, [3, H, W]; do not write to it. The caller's tensors are returned as is."""
        key = pairs.store, int(pairs.positions[index])
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        image = pairs.image(index)
        if isinstance(image, Tensor):
            return image
        pixels = transformed(transform, image, name_of(pairs, index))
        size = _size(pixels)
        if size <= self.left:
            self._kept[key] = pixels
            self.left -= size
        return pixels

    def room_without(self, pairs: PairDataset) -> int:
        """Return the bytes that would be left without the images of `pairs`."""
        return self.left + sum(_size(self._kept[key]) for key in self._keys(pairs))

    def make_room(self, wanted: PairDataset, unwanted: PairDataset) -> None:
        """Drop the images of `unwanted` unless all those of `wanted` fit beside them."""
        size = max((_size(pixels) for pixels in self._kept.values()), default=0)
        if (len(wanted) - len(self._keys(wanted))) * size > self.left:
            self.drop(unwanted, reserve=0)

    def drop(self, pairs: PairDataset, reserve: int) -> None:
        """Drop the images of `pairs` and reserve bytes for something else."""
        for key in self._keys(pairs):
            self.left += _size(self._kept.pop(key))
        self.left -= reserve

    def _keys(self, pairs: PairDataset) -> set[tuple[ImageStore, int]]:
        return {key for position in pairs.positions if (key := (pairs.store, int(position))) in self._kept}


def _size(pixels: Tensor) -> int:
    return pixels.numel() * pixels.element_size()
