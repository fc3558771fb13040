"""Tell a text tower that knows words from elsewhere from one trained on the captions of a few classes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.models import ClipAdapter

# Common nouns and another word for each, with no stem in common: a tokenizer that cuts words into pieces must not help.
SYNONYMS = (
    ("couch", "sofa"), ("stone", "rock"), ("child", "kid"), ("street", "road"), ("forest", "woods"), ("ocean", "sea"),
    ("infant", "baby"), ("cup", "mug"), ("rabbit", "bunny"), ("gift", "present"), ("lady", "woman"),
    ("doctor", "physician"), ("film", "movie"), ("shop", "store"), ("garbage", "trash"), ("donkey", "mule"),
    ("sweater", "pullover"), ("trousers", "pants"), ("hill", "mountain"), ("bucket", "pail"), ("carpet", "rug"),
    ("path", "trail"), ("money", "cash"), ("lawyer", "attorney"),
)  # fmt: skip


def known_synonyms(adapter: ClipAdapter) -> int:
    """Return for how many of `SYNONYMS` the text tower finds the second word nearest to the first of its own pair.

    Chance is one of them. A tokenizer that cannot read the words knows none.
    """
    try:
        tokens = adapter.tokenize([word for pair in SYNONYMS for word in pair], truncate=False)
    except Exception:  # a caller's tokenizer may raise anything for words that it lacks
        return 0
    features = adapter.encode_text(tokens)
    return count_known(features[::2], features[1::2])


def count_known(first: Tensor, second: Tensor) -> int:
    """Count the pairs whose second word is nearest to its first. first, second: normalized features [pairs, D]."""
    nearest = (second @ first.T).argmax(1)
    return int((nearest == torch.arange(len(first), dtype=torch.int64, device=first.device)).sum())


def knows_words(adapter: ClipAdapter) -> bool:
    """Return whether the text tower knows at least half of `SYNONYMS`. The caller sets evaluation mode."""
    return known_synonyms(adapter) >= len(SYNONYMS) / 2
