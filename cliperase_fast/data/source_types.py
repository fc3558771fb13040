"""What the table of data sources is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cliperase_fast.data.classes import ClassSpace
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable


@dataclass
class Source:
    """What a name opens: training pairs, and test pairs if the data has a split of its own."""

    name: str
    train: PairDataset
    test: PairDataset | None


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
