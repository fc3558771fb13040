"""The source `demo`: scikit-learn's handwritten digits, 8 x 8 pixels."""

from __future__ import annotations

import numpy as np

from cliperase_fast.data.checks import split
from cliperase_fast.data.classes import ClassSpace
from cliperase_fast.data.images import ArrayStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Request, Source, SourceType

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {}",
    "a scan of a handwritten {}",
)


def _open(request: Request) -> Source:
    """Open the digits. The test split is always the same fifth of them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], from values 0 to 16
    labels = digits.target.astype(np.int64)
    space = ClassSpace.from_templates(NAMES, request.templates or TEMPLATES)
    everything = PairDataset(
        request.spec,
        ArrayStore(np.repeat(pixels[:, :, :, None], 3, axis=3), "demo"),
        [space.prompts[label] for label in labels],
        [f"digit/{number}" for number in range(len(labels))],
        labels=labels,
        space=space,
    )
    train, test = (everything.subset(indices) for indices in split(everything, 0.2, seed=0))
    train.name, test.name = f"{request.spec} train", f"{request.spec} test"
    return Source(request.spec, train, test)


SOURCE = SourceType("demo", "handwritten digits that come with scikit-learn, classes zero to nine", _open)
