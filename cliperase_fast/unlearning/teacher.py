"""The frozen teacher's features of retain pairs: computed once and kept, or computed in every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cliperase_fast.data import PairDataset
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.batches import Batch, CaptionTable, PixelDataset
from cliperase_fast.unlearning.checkpoints import write_text_atomically
from cliperase_fast.unlearning.runtime import Runtime

MEMORY_LIMIT = 2**30  # bytes of cached features above which `auto` keeps them in a file


class Teacher(Protocol):
    """Teacher features of a batch's retain pairs: image [N, D°] and text [N, D°], float32, on the training device."""

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]: ...


class LiveTeacher:
    """Encodes every batch: right for random transforms, where the teacher must see the student's view."""

    def __init__(self, adapter: ClipAdapter, runtime: Runtime) -> None:
        self.adapter, self.runtime = adapter, runtime

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        count, device = len(batch.retain_indices), self.runtime.device
        unique, inverse = torch.unique(batch.text_of_pair[-count:], return_inverse=True)
        with self.runtime.inference(self.adapter):
            image = self._encode(self.adapter.encode_image, batch.pixels[-count:])
            text = self._encode(self.adapter.encode_text, batch.tokens[unique])
        return image, text[inverse.to(device)]

    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:  # [B, ...] -> [B, D°]
        parts = inputs.split(self.runtime.batch_size)
        return torch.cat([encode(part.to(self.runtime.device)).float() for part in parts])


class CachedTeacher:
    """Features encoded once for the retain pairs a run will visit, in memory or in a memory-mapped file."""

    def __init__(self, image: np.ndarray, text: Tensor, row_of_index: np.ndarray, device: torch.device) -> None:
        self.image = image  # [rows, D°] float32, perhaps a memory map
        self.text = text  # [U, D°] float32
        self.row_of_index = row_of_index
        self.device = device

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = self.row_of_index[batch.retain_indices]
        image = torch.from_numpy(np.ascontiguousarray(self.image[rows]))
        text = self.text[torch.as_tensor(batch.caption_of_pair[-len(rows) :])]
        return image.to(self.device), text.to(self.device)


def cache_teacher(
    adapter: ClipAdapter,
    retain: PairDataset,
    captions: CaptionTable,
    used: np.ndarray,
    runtime: Runtime,
    *,
    transform: Callable[[Any], Tensor] | None,
    where: str,
    directory: Path | None,
) -> CachedTeacher:
    """Encode the `used` retain pairs (indices, sorted) and all captions.

    where: "memory", "disk" (a file in `directory`), or "auto" (a file above `MEMORY_LIMIT` bytes when there is a
    directory). A complete file left by an interrupted run is used again when it was made from the same things.
    """
    text = _encode_captions(adapter, captions, runtime)  # [U, D°]
    shape = (len(used), text.shape[1])
    row_of_index = np.full(len(retain), -1, dtype=np.int64)
    row_of_index[used] = np.arange(len(used))
    large = shape[0] * shape[1] * 4 > MEMORY_LIMIT
    if directory is None or where == "memory" or (where == "auto" and not large):
        image = np.empty(shape, dtype=np.float32)
        _encode_images(adapter, retain, used, image, transform, runtime)
        return CachedTeacher(image, text, row_of_index, runtime.device)

    directory.mkdir(parents=True, exist_ok=True)
    file, note = directory / "teacher_image_features.f32", directory / "teacher_image_features.json"
    made_from = {
        "model": adapter.identity(),
        "data": retain.fingerprint(),
        "transform": repr(transform),
        "precision": runtime.precision,
        "shape": list(shape),
        "used": hashlib.sha256(used.tobytes()).hexdigest(),
    }
    if not (note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_from):
        note.unlink(missing_ok=True)
        image = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        _encode_images(adapter, retain, used, image, transform, runtime)
        image.flush()
        write_text_atomically(note, json.dumps(made_from))  # its presence says that the file is complete
    return CachedTeacher(np.memmap(file, dtype=np.float32, mode="r", shape=shape), text, row_of_index, runtime.device)


def _encode_captions(adapter: ClipAdapter, captions: CaptionTable, runtime: Runtime) -> Tensor:
    parts = torch.arange(len(captions)).split(runtime.batch_size)
    with runtime.inference(adapter):
        return torch.cat([adapter.encode_text(captions.rows(part).to(runtime.device)).float().cpu() for part in parts])


def _encode_images(
    adapter: ClipAdapter,
    retain: PairDataset,
    used: np.ndarray,
    out: np.ndarray,
    transform: Callable[[Any], Tensor] | None,
    runtime: Runtime,
) -> None:
    parts = np.split(used, range(runtime.batch_size, len(used), runtime.batch_size))
    loader = DataLoader(
        PixelDataset(retain, transform, None),
        batch_sampler=[[(int(index), 0) for index in part] for part in parts],
        num_workers=runtime.num_workers,
        collate_fn=torch.stack,
    )
    row = 0
    with runtime.inference(adapter):
        for pixels in tqdm(loader, desc="teacher features", unit="batch", disable=not runtime.progress, leave=False):
            features = adapter.encode_image(pixels.to(runtime.device)).float().cpu().numpy()
            out[row : row + len(features)] = features
            row += len(features)
