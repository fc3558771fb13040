"""The table of model families, and their adapters behind one interface.

To add a family (BLIP, SigLIP): a file here with a `ClipAdapter` and its `FAMILY`, and a line in `FAMILIES`.
"""

from __future__ import annotations

from cliperase_fast.models.adapters import open_clip_loading, transformers
from cliperase_fast.models.adapters.base import Family

# In the order in which they are asked whether a string or a module is theirs.
FAMILIES: tuple[Family, ...] = (
    open_clip_loading.FAMILY,
    transformers.FAMILY,
)


def accepted_strings() -> str:
    """Return all strings that name a model, for messages and the docs."""
    *most, last = [text for family in FAMILIES for text in family.strings]
    return f"{', '.join(most)}, or {last}"


def accepted_instances() -> str:
    """Return all models that can be passed as they are, for messages."""
    return ", ".join(family.instance for family in FAMILIES)
