"""Class names and the captions that stand for them: from templates, or derived from the captions that occur."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliperase_fast.errors import InputError

DEFAULT_TEMPLATES = ("a photo of a {}",)
MAX_DERIVED_CLASSES = 1000
GENERAL = "general"  # the kind of classes that are not facts about somebody


@dataclass(frozen=True)
class ClassSpace:
    """Class names and, for each, the captions that stand for it in zero-shot classification.

    kinds: what each class answers, such as "phone" and "city" [K]: an image that is right for several classes of
        different kinds is asked about one kind at a time, so zero-shot classification compares only classes of the
        kind of the label. None: all classes are of one kind.
    paraphrases: other captions of each class, which no pair has [K], equally many for each; the audit asks under them
        in place of templates. None: class names fit into templates.

    Raises `InputError` if the data's own names are empty or if selectors could not tell them apart.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    derived: bool = False  # from the captions, not named by the data
    kinds: tuple[str, ...] | None = None
    paraphrases: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        for optional in (self.kinds, self.paraphrases):
            if optional is not None and len(optional) != len(self.names):
                raise ValueError("kinds and paraphrases must have one entry for each class")
        if not self.derived:
            check_names(self.names)

    @property
    def kind_ids(self) -> np.ndarray | None:
        """The kind of each class as a number; int64 [K]. None if all are of one kind."""
        return None if self.kinds is None else np.unique(self.kinds, return_inverse=True)[1].astype(np.int64)

    @classmethod
    def from_templates(cls, names: Sequence[str], templates: Sequence[str]) -> ClassSpace:
        prompts = tuple(tuple(template.replace("{}", name) for template in templates) for name in names)
        return cls(tuple(names), prompts)


def check_names(names: Sequence[str]) -> None:
    """Raise `InputError` if a class name is empty, or if two differ only in case, spaces or underscores."""
    alike: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        if not name.strip():
            raise InputError(f"class {number} of {len(names)} has an empty name; give each class a name of its own")
        alike.setdefault(folded(readable(name)), []).append(name)
    double = next((group for group in alike.values() if len(group) > 1), None)
    if double is not None:
        shown = " and ".join(dict.fromkeys(repr(name) for name in double))
        raise InputError(
            f"{len(double)} classes are called {shown}, which a selector cannot tell apart; give each class a name of "
            "its own"
        )


def folded(text: str) -> str:
    """Return a text that is equal for texts that differ only in case or in the encoding of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def check_templates(templates: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return caption templates as a tuple; each must have one "{}" for the class name. None stays None."""
    if templates is None:
        return None
    if not isinstance(templates, Iterable):
        raise InputError(f"templates is a {type(templates).__name__}; give a list such as ['a photo of a {{}}']")
    checked = (templates,) if isinstance(templates, str) else tuple(templates)
    if not checked:
        raise InputError("templates is empty; give at least one, for example 'a photo of a {}'")
    for template in checked:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(f"the template {template!r} must be text with one '{{}}' for the class name")
    return checked


def readable(name: str) -> str:
    """Return a class or folder name in the form used in a caption."""
    return " ".join(name.replace("_", " ").split())


def derive_classes(captions: Sequence[tuple[Any, ...]]) -> tuple[np.ndarray, ClassSpace] | None:
    """Return labels int64 [n] and classes if captions are few and repeated, else None.

    Few and repeated means at most 1000 different ones, and at most half as many as pairs. Each different caption (or
    tuple of captions) is a class, named by `class_names`. Captions that are token ids give no classes.
    """
    if any(not isinstance(caption, str) for group in captions for caption in group):
        return None
    if 2 * len(set(captions)) > len(captions):
        return None
    return label_by_caption(captions)


def label_by_caption(
    captions: Sequence[tuple[str, ...]], known: Iterable[tuple[str, ...]] = ()
) -> tuple[np.ndarray, ClassSpace] | None:
    """Return labels and classes, with one class for each different tuple of captions and each known one.

    None if there would be too many classes, or several with the same first caption.
    """
    groups = sorted({*captions, *known})
    firsts = [group[0] for group in groups]
    if not 0 < len(groups) <= MAX_DERIVED_CLASSES or len(set(firsts)) < len(groups):
        return None
    number = {group: label for label, group in enumerate(groups)}
    labels = np.array([number[group] for group in captions], dtype=np.int64)
    return labels, ClassSpace(class_names(firsts), tuple(groups), derived=True)


# A word runs to its last letter or digit, so that "T-shirt" is one and the full stop after it is another.
_TOKEN = re.compile(r"\w(?:\S*\w)?|[^\w\s]")
_ARTICLES = frozenset({"a", "an", "the"})


def class_names(captions: Sequence[str]) -> tuple[str, ...]:
    """Return a short name for each caption: the words left without those that all share at both ends.

    "a photo of a dog." and "a photo of an owl." give "dog" and "owl". If two names would be equal or one empty, the
    captions keep their full text, as does a single caption.
    """
    spans = [[(match.group().casefold(), *match.span()) for match in _TOKEN.finditer(caption)] for caption in captions]
    shortest = min(len(words) for words in spans)
    if len(captions) < 2 or shortest == 0:
        return tuple(captions)
    head = _shared([[word[0] for word in words] for words in spans], shortest - 1)
    tail = _shared([[word[0] for word in reversed(words)] for words in spans], shortest - 1 - head)
    names = []
    for caption, words in zip(captions, spans, strict=True):
        middle = words[head : len(words) - tail]
        if len(middle) > 1 and middle[0][0] in _ARTICLES:
            middle = middle[1:]
        names.append(caption[middle[0][1] : middle[-1][2]])
    different = {name.casefold() for name in names}
    return tuple(names) if len(different) == len(names) else tuple(captions)


def _shared(rows: list[list[str]], limit: int) -> int:
    """Return how many words all rows begin with, at most `limit`."""
    count = 0
    while count < limit and len({row[count] for row in rows}) == 1:
        count += 1
    return count


def merge_classes(
    parts: Sequence[tuple[list[tuple[Any, ...]], np.ndarray | None, ClassSpace | None]],
) -> tuple[np.ndarray | None, ClassSpace | None]:
    """Merge the classes of several data sets (captions, labels, classes); return int64 labels of all pairs and classes.

    Equal spaces stay. Spaces derived from captions are derived again from all captions, so that a single class ("a
    photo of a dog") and the rest get matching names. Otherwise classes with the same name become one, and
    the classes of a part without kinds are a kind of their own if another part has kinds. Returns None, None without
    a common space.
    """
    spaces = [space for _, _, space in parts]
    first = spaces[0]
    if first is not None and all(space == first for space in spaces):
        return np.concatenate([labels for _, labels, _ in parts if labels is not None]), first
    captions = [group for part, _, _ in parts for group in part]
    if all(space is None or space.derived for space in spaces):
        text = all(isinstance(caption, str) for group in captions for caption in group)
        known = [group for space in spaces if space is not None for group in space.prompts]
        found = label_by_caption(captions, known) if text and known else derive_classes(captions)
        return found or (None, None)
    names: dict[str, int] = {}
    prompts: list[tuple[str, ...]] = []
    kinds: list[str] = []
    labels_of_parts = []
    for _, labels, space in parts:
        if space is None or labels is None:
            return None, None
        for name, prompt, kind in zip(space.names, space.prompts, space.kinds or [""] * len(space.names), strict=True):
            if name not in names:
                names[name] = len(prompts)
                prompts.append(prompt)
                kinds.append(kind)
        labels_of_parts.append(np.array([names[name] for name in space.names], dtype=np.int64)[labels])
    merged = ClassSpace(tuple(names), tuple(prompts), kinds=tuple(kinds) if any(kinds) else None)
    return np.concatenate(labels_of_parts), merged
