"""What the table of data sources is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cliperase_fast.data.classes import ClassSpace
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable

if TYPE_CHECKING:
    from cliperase_fast.data.streams import PairStream


MOST_DRAWN = {"train": 10**6, "test": 10**6, "size": 4096}  # options of sources that draw their images
_DIGITS = 1000  # of a number; Python does not read numbers of many thousands


@dataclass
class Source:
    """What a name opens: training pairs, and test pairs if the data has a split of its own.

    hold_out: from pairs of the source and the forget pairs among them (bool [n]) to further pairs that unlearning must
        not see, by which the audit measures what it does to them: bool [n] under "association" and "identity". None
        for sources without holdouts.
    stream: the pairs behind `train`, which are its head, if the source is a stream.
    """

    name: str
    train: PairDataset
    test: PairDataset | None
    hold_out: Callable[[PairDataset, np.ndarray], dict[str, np.ndarray]] | None = field(default=None, kw_only=True)
    stream: PairStream | None = field(default=None, kw_only=True)

    @property
    def measured(self) -> tuple[PairDataset, PairDataset | None]:
        """The split to measure on, test if there is one, and the other one, whose ids a selector may name too."""
        return (self.train, None) if self.test is None else (self.test, self.train)

    def holdouts(self, pairs: PairDataset, forget: np.ndarray) -> dict[str, PairDataset]:
        """Return the held-out pairs among `pairs` by name; forget: bool [n]. Empty without holdouts."""
        masks = {} if self.hold_out is None else self.hold_out(pairs, forget)
        return {name: pairs.subset(mask) for name, mask in masks.items()}

    def rest(self, pairs: PairDataset, forget: np.ndarray) -> np.ndarray:
        """Return which of `pairs` are neither forget pairs nor held out; bool [n]. forget: bool [n]."""
        masks = {} if self.hold_out is None else self.hold_out(pairs, forget)
        return ~np.any([forget, *masks.values()], axis=0)

    def has(self, pairs: PairDataset) -> bool:
        """Return whether `pairs` have the classes of this source, so that `rest` tells what is held out of them."""
        return self.train.space is not None and pairs.space == self.train.space


@dataclass(frozen=True)
class Request:
    """A name to open, split into its parts.

    spec: the whole name. path: what follows "KIND:". options: those after "?". templates: caption templates, if given.
    seed: for sources that draw. intake: decides about items that cannot be used.
    """

    spec: str
    path: str
    options: Mapping[str, str]
    templates: tuple[str, ...] | None
    seed: int
    intake: Intake

    @property
    def name(self) -> str:
        return printable(self.spec)

    def numbers(
        self, defaults: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Return the options as whole numbers, with `defaults` for those not given.

        least, most: bounds by name; without them at least 1.
        Raises `InputError` for other values.
        """
        found = dict(defaults)
        for key, text in self.options.items():
            low, high = least.get(key, 1), (most or {}).get(key)
            if (
                not text.isdecimal()
                or len(text) > _DIGITS
                or int(text) < low
                or (high is not None and int(text) > high)
            ):
                bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
                raise InputError(f"{self.spec!r}: ?{key}={text!r} must be a whole number {bounds}")
            found[key] = int(text)
        return found

    def prompted(self, pairs: PairDataset) -> PairDataset:
        """Return `pairs` with prompts from the templates, if given. Data with its own captions keeps them."""
        if self.templates is None:
            return pairs
        if pairs.space is None:
            raise InputError(f"{pairs.name} has no classes for the templates to name; leave the templates out")
        pairs.space = ClassSpace.from_templates(pairs.space.names, self.templates)
        return pairs


@dataclass(frozen=True)
class Option:
    """An option of a source: "?name=value"."""

    name: str
    help: str


@dataclass(frozen=True)
class SourceType:
    """An entry in the table of sources.

    usage: the form of its name, such as "csv:FILE" or "demo". help: one line. open: opens a request.
    """

    usage: str
    help: str
    open: Callable[[Request], Source]
    options: tuple[Option, ...] = ()

    @property
    def kind(self) -> str:
        return self.usage.partition(":")[0]

    @property
    def needs_path(self) -> bool:
        return ":" in self.usage
