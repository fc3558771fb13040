"""The table of model families, and their adapters behind one interface.

To add a family: a file here with a `ClipAdapter` and its `Family`, and a line in `FAMILIES`.
"""

from __future__ import annotations

from cliperase_fast.models.adapters import bert_towers, open_clip_loading, siglip, transformers
from cliperase_fast.models.adapters.base import Family

# In the order in which they are asked whether a string or a module is theirs.
FAMILIES: tuple[Family, ...] = (
    open_clip_loading.FAMILY,
    transformers.FAMILY,
    siglip.FAMILY,
    siglip.FAMILY_2,
    bert_towers.CHINESE_CLIP,
    bert_towers.BLIP,
)


def accepted_strings() -> str:
    """Return all strings that name a model, for messages and the docs."""
    *most, last = [text for family in FAMILIES for text in family.strings]
    return f"{', '.join(most)}, or {last}"


def accepted_instances() -> str:
    """Return all models that can be passed as they are, for messages."""
    return ", ".join(family.instance for family in FAMILIES)
