"""Images with captions: sources, selectors, splits and checks."""

from cliperase_fast.data.checks import check_images, overlap, same_pairs, split, trained_on_notes
from cliperase_fast.data.classes import ClassSpace
from cliperase_fast.data.pairs import PairDataset, as_pairs, caption_key, concat
from cliperase_fast.data.selectors import make_reference, parse_reference, select, select_holdouts
from cliperase_fast.data.source_types import Source
from cliperase_fast.data.sources import open_source

__all__ = [
    "ClassSpace",
    "PairDataset",
    "Source",
    "as_pairs",
    "caption_key",
    "check_images",
    "concat",
    "make_reference",
    "open_source",
    "overlap",
    "parse_reference",
    "same_pairs",
    "select",
    "select_holdouts",
    "split",
    "trained_on_notes",
]
