"""Select pairs by text: `class:apple`, `caption:apple,apples`, `ids:FILE`."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import numpy as np

from cliperase_fast.data.classes import folded, readable
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Source
from cliperase_fast.errors import InputError
from cliperase_fast.plurals import counted
from cliperase_fast.reading import read_lines, user_path

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNDIVIDED = (
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_ALIKE = str.maketrans({"\u2019": "'", "\u02bc": "'", "\u2010": "-", "\u2011": "-", "\xad": None})
_KINDS = {"class": "class:NAME,NAME", "caption": "caption:WORD,SYNONYM", "ids": "ids:FILE"}


def parse_reference(reference: str) -> tuple[str, str | None]:
    """Split "SOURCE#SELECTOR" into (source, selector); the selector is None if there is none.

    A path may contain '#', unless the name of a selector and a colon follow.
    """
    known = re.search(rf"#(?:{'|'.join(_KINDS)}):", reference)
    if known:
        return reference[: known.start()], reference[known.start() + 1 :]
    unknown = re.search(r"#(\w+):", reference)
    if unknown:
        raise InputError(f"unknown selector {unknown.group(1)!r} in {reference!r}; use {_usage()}")
    return reference, None


def make_reference(source: str, selector: str) -> str:
    """Join a source and a selector to "SOURCE#SELECTOR".

    Raises `InputError` if the source has a selector already, or for a text that is not a selector.
    """
    require_whole(source)
    _split_selector(selector)
    return f"{source}#{selector}"


def require_whole(source: str) -> None:
    """Raise `InputError` for a source with a selector, where others are to select from it."""
    if parse_reference(source)[1] is not None:
        raise InputError(f"data={source!r} has a selector: give the source alone, and the selector as forget=")


def _split_selector(selector: str) -> tuple[str, str]:
    """Return the kind of a selector and what follows the colon."""
    kind, colon, value = selector.partition(":")
    if not colon or kind not in _KINDS:
        raise InputError(f"{selector!r} is not a selector; use {_usage()}")
    return kind, value


def select(pairs: PairDataset, selector: str, *, other: PairDataset | None = None) -> np.ndarray:
    """Return a mask, bool [n], of the selected pairs: never none of them and never all.

    class:a,b    pairs of these classes, by name (in any case, with spaces or underscores) or by a caption of the class;
                 "*", "?" and "[0-4]" stand for parts of names, as in file names, where no class is called so literally
    caption:a,b  images with a caption that contains one of these words or phrases as whole words, in any case;
                 of scripts without spaces between words, such as Chinese, at any place
    ids:FILE     the ids in a text file, one per line

    other: the other split of the same source, whose ids the file may list too.
    """
    kind, value = _split_selector(selector)
    if kind != "ids" and not any(part.strip() for part in value.split(",")):
        raise InputError(f"the selector {selector!r} is empty; use {_KINDS[kind]}")
    if kind == "class":
        mask = _by_class(pairs, value)
    elif kind == "caption":
        mask = _by_caption(pairs, value)
    else:
        mask = _by_ids(pairs, value, other)
    if not mask.any():
        hint = " (only whole words match; list other forms too: 'caption:apple,apples')" if kind == "caption" else ""
        raise InputError(f"{selector!r} matches none of the {counted(len(pairs), 'pair')} of {pairs.name}{hint}")
    if mask.all():
        raise InputError(
            f"{selector!r} matches all {counted(len(pairs), 'pair')} of {pairs.name}; nothing would be left to keep"
        )
    return mask


def select_holdouts(source: Source | None, selector: str | None) -> dict[str, PairDataset]:
    """Return what the source holds out when `selector` is forgotten, among its test pairs if it has a test split.

    Empty for sources without holdouts, and without a source or selector.
    """
    if source is None or selector is None or source.hold_out is None:
        return {}
    pairs, other = (source.train, None) if source.test is None else (source.test, source.train)
    return source.holdouts(pairs, select(pairs, selector, other=other))


def _usage() -> str:
    return ", ".join(_KINDS.values())


def _by_class(pairs: PairDataset, value: str) -> np.ndarray:
    if pairs.space is None or pairs.labels is None:
        raise InputError(
            f"{pairs.name} has no classes, so 'class:{value}' selects nothing; use 'caption:{value}' or ids:FILE"
        )
    names = pairs.space.names
    by_name: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        by_name.setdefault(folded(readable(name)), []).append(number)
    by_prompt: dict[str, set[int]] = {}  # a caption may stand for several classes
    for number, prompts in enumerate(pairs.space.prompts):
        for prompt in prompts:
            by_prompt.setdefault(folded(prompt), set()).add(number)

    def find(text: str) -> int | None:
        if text in names:
            return names.index(text)
        same = by_name.get(folded(readable(text))) or sorted(by_prompt.get(folded(text), ()))
        if len(same) > 1:
            raise InputError(f"{text!r} could be any of the classes {_listed([names[number] for number in same])}")
        return same[0] if same else None

    whole = find(value.strip())  # a class name may contain a comma
    wanted: list[int] = []
    for part in [value] if whole is not None else value.split(","):
        if not part.strip():
            continue
        found = find(part.strip())
        matches = _matching(part.strip(), names) if found is None else [found]
        if not matches:
            raise InputError(f"{pairs.name} has no class {part.strip()!r}; {_nearest(part.strip(), names)}")
        wanted += matches
    return np.isin(pairs.labels, wanted)


def _matching(pattern: str, names: tuple[str, ...]) -> list[int]:
    """Return the numbers of the classes whose names match a pattern with "*", "?" or "[...]"; none for a plain text."""
    if not set("*?[") & set(pattern):
        return []
    wanted = folded(readable(pattern))
    return [number for number, name in enumerate(names) if fnmatchcase(folded(readable(name)), wanted)]


def _nearest(text: str, names: tuple[str, ...]) -> str:
    by_text = {folded(readable(name)): name for name in names}
    near = difflib.get_close_matches(folded(readable(text)), by_text, n=3, cutoff=0.5)
    if near:
        return f"did you mean {_listed([by_text[name] for name in near])}?"
    shown = names[:20]
    return f"there are {_listed(shown)}" + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def _by_caption(pairs: PairDataset, value: str) -> np.ndarray:
    phrases = {part.strip(): _phrase(part) for part in value.split(",") if part.strip()}
    pattern = re.compile("|".join(phrases.values()))
    in_ascii = re.compile(rf"(?<!\w)(?:{'|'.join(map(_words, phrases))})(?!\w)")  # the same there, and much faster
    known: dict[str, bool] = {}

    def matches(caption: object) -> bool:
        if not isinstance(caption, str):
            raise InputError(
                f"captions of {pairs.name} are token ids, which 'caption:{value}' cannot search; use ids:FILE"
            )
        if caption not in known:
            text = _searchable(caption)
            known[caption] = (in_ascii if text.isascii() else pattern).search(text) is not None
        return known[caption]

    mask = np.array([any(matches(caption) for caption in captions) for captions in pairs.captions], dtype=bool)
    for part, phrase in phrases.items():
        if "*" in part and mask.any() and not any(re.search(phrase, _searchable(caption)) for caption in known):
            raise InputError(
                f"no caption of {pairs.name} contains {part!r}: '*' stands for parts of names of classes only, so list "
                "the words that are meant, as in 'caption:dog,dogs'"
            )
    return mask


def _searchable(text: str) -> str:
    return folded(text) if text.isascii() else folded(text).translate(_ALIKE)


def _words(text: str) -> str:
    """Return a pattern of the words of a text, with any space between them."""
    return r"\s+".join(map(re.escape, _searchable(text).split()))


def _phrase(text: str) -> str:
    """Return a pattern of a text that is not inside of a longer word.

    Where words are not divided by spaces, as in Chinese, any place will do.
    """
    # Not \b: it would never match at the end of a phrase like "c++".
    start, end = (
        "" if re.match(f"[{_UNDIVIDED}]", edge) else rf"(?{sign}[^\W{_UNDIVIDED}])"
        for sign, edge in (("<!", text[0]), ("!", text[-1]))
    )
    return rf"{start}(?<!{_mark()}){_words(text)}(?!{_mark()}){end}"


@cache
def _mark() -> str:
    """Return a pattern of the signs that continue a word without being letters, such as the vowels of Hindi."""
    signs = (chr(code) for code in range(0x20000) if not 0xFE00 <= code <= 0xFE0F)  # those choose a picture or a letter
    return f"[{''.join(sign for sign in signs if unicodedata.category(sign) in ('Mn', 'Mc'))}]"


def _by_ids(pairs: PairDataset, value: str, other: PairDataset | None) -> np.ndarray:
    path = user_path(value)
    lines = read_lines(path, "the file of ids ")
    wanted = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not wanted:
        raise InputError(f"the file of ids {path} is empty; write one id on each line")
    have = {name: row for row, name in enumerate(pairs.ids)}
    elsewhere = {} if other is None else {name: row for row, name in enumerate(other.ids)}
    unknown = [name for name in wanted if name not in have and name not in elsewhere]
    if unknown:
        example = f"; ids there look like {pairs.ids[0]!r}" if pairs.ids else ""
        raise InputError(
            f"{len(unknown)} of the {len(wanted)} ids in {path} are not in {pairs.name}: "
            f"{_listed(unknown[:3])}"
            f"{' ...' if len(unknown) > 3 else ''}{example}"
        )
    if other is not None:
        in_both = ((name, have[name], elsewhere[name]) for name in wanted if name in have and name in elsewhere)
        _require_same(pairs, other, in_both, path)
    chosen = set(wanted)
    return np.array([name in chosen for name in pairs.ids], dtype=bool)


def _require_same(pairs: PairDataset, other: PairDataset, rows: Iterable[tuple[str, int, int]], path: Path) -> None:
    """Raise `InputError` if an id names different images. rows: of each id, in `pairs` and in `other`."""
    for name, row, other_row in rows:
        one, another = (part.store.identity(int(part.positions[at])) for part, at in ((pairs, row), (other, other_row)))
        if one != another:
            raise InputError(
                f"the id {name!r} in {path} names an image of {pairs.name} and another one of {other.name}: give each "
                "image an id of its own"
            )
