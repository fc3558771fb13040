"""`inspect_data()`: what a data set and a forget set hold, before anything is trained."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.coercion import whole
from cliperase_fast.data import PairDataset, make_reference
from cliperase_fast.data.images import pixel_bytes
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.pair_sets import Opener, open_pair_sets
from cliperase_fast.data.selectors import require_whole
from cliperase_fast.errors import InputError
from cliperase_fast.plurals import counted, more_classes
from cliperase_fast.progress import Steps
from cliperase_fast.reading import display_width, visible
from cliperase_fast.report.contact_sheet import Group, contact_sheet, thumbnails
from cliperase_fast.report.rendering import Row, Table, write_page
from cliperase_fast.report.wording import left_out_lines
from cliperase_fast.storage import writing

IMAGES = 10_000  # read of each set at most
_LONGEST, _EXAMPLES, _PICTURES, _EQUAL = 5, 20, 24, 6
_PART = 256  # images read at a time, so that an interrupt need not wait for all of them
_OVERLAP = "retain pair that is also a forget pair"


@dataclass(frozen=True)
class Inspection:
    """What was found.

    sets: the pairs by name, "train" and "test", or "forget", "retain", "forget test" and "retain test". content: the
    figures, ready for JSON.
    """

    name: str
    sets: dict[str, PairDataset]
    content: dict[str, Any]

    def text(self) -> str:
        """Return the findings for a terminal."""
        found = self.content
        lines = [self.name, ""]
        lines += [
            f"{name:<14}{counted(row['pairs'], 'pair', '>9,')}, {counted(row['captions'], 'different caption', ',')}"
            + (f", {row['classes']} class{'es' * (row['classes'] != 1)}" if row["classes"] else "")
            for name, row in found["sets"].items()
        ]
        lines += ["", *_class_lines(found["classes"])]
        lines += ["", "longest captions"]
        lines += [f"  {row['characters']:>6} characters  {row['id']}: {row['caption']}" for row in found["longest"]]
        lines += ["", f"read {found['read']:,} of {found['images']:,} images"]
        lines += [f"  unreadable  {line}" for line in found["unreadable"]["examples"]]
        lines += _more(found["unreadable"])
        lines += [f"  the same    {_equal(group)}" for group in found["duplicates"]["examples"]]
        lines += _more(found["duplicates"])
        lines += [f"  {line}" for line in found["notes"]]
        return "\n".join(map(visible, lines))

    def save_sheet(self, path: str | Path) -> Path:
        """Write the findings and some pictures of each set as a page."""
        with writing(path):
            return write_page(self.sheet(), path)

    def sheet(self) -> str:
        """Return that page."""
        found = self.content
        facts = [(name, counted(row["pairs"], "pair", ",")) for name, row in found["sets"].items()]
        facts += [("read", f"{found['read']:,} of {found['images']:,} images"),
                  ("unreadable", str(found["unreadable"]["count"])),
                  ("duplicates", str(found["duplicates"]["count"]))]  # fmt: skip
        groups = []
        for name, pairs in self.sets.items():
            rows = np.unique(np.linspace(0, len(pairs) - 1, min(_PICTURES, len(pairs))).astype(int)).tolist()
            shown = f"{len(rows)} of {counted(len(pairs), 'pair', ',')}, spread evenly."
            groups.append(Group(name, shown, thumbnails(pairs, rows)))
        warnings = [*found["unreadable"]["examples"], *map(_equal, found["duplicates"]["examples"])]
        longest = [Row([row["id"], row["caption"], str(row["characters"])]) for row in found["longest"]]
        tables = [("Longest captions", Table(["image", "caption", "characters"], longest, text_columns=2))]
        if found["classes"]:
            columns = ["class", *self.sets]
            rows_of_classes = [
                Row([name, *(f"{counts[of]:,}" for of in self.sets)]) for name, counts in found["classes"].items()
            ]
            tables.insert(0, ("Classes", Table(columns, rows_of_classes)))
        return contact_sheet(self.name, "Data inspected", facts, groups, [*warnings, *found["notes"]], tables)


def inspect_data(
    data: str,
    forget: str | None = None,
    *,
    retain: str = "rest",
    test: str | None = None,
    templates: Sequence[str] | None = None,
    images: int = IMAGES,
    seed: int = 0,
    progress: bool = False,
) -> Inspection:
    """Look at data as `unlearn()` would use it: counts, classes, captions, and images that are unreadable or equal.

    data: a source. forget, retain: as in the command `unlearn`; without `forget` the splits are looked at.
    test: another source to measure on. images: how many of each set are read at most, a seeded sample of more.

    Items that cannot be used are counted instead of raising an error. Raises `InputError` if the source or a selector
    is wrong.
    """
    if not isinstance(data, str):
        raise InputError(f"data is a {type(data).__name__}; name a source by a string such as 'folder:DIR'")
    for name, value in (("forget", forget or ""), ("retain", retain)):
        if not isinstance(value, str):
            raise InputError(f"{name} is a {type(value).__name__}; give a string such as 'class:apple'")
    require_whole(data)
    images, seed = whole("images", images, 0), whole("seed", seed, 0)
    opener = Opener(templates, seed, "skip")
    notes: list[str] = []
    if forget is None:
        source = opener(data)
        sets = {"train": source.train}
        tested = source.test if test is None else opener.test_pairs(test, "test")
        if tested is not None:
            sets["test"] = tested
    else:
        kept = retain if retain == "rest" or retain.startswith("stream:") else make_reference(data, retain)
        chosen = make_reference(data, forget)
        opened = open_pair_sets(chosen, kept, test, opener, overlap_policy="drop", test_fraction=0.2)
        sets = {"forget": opened.forget, "retain": opened.retain}
        if opened.test is not None:
            sets.update({"forget test": opened.test[0], "retain test": opened.test[1]})
        sets.update({f"held out: {name}": pairs for name, pairs in opened.holdouts.items()})
    sets = {name: pairs for name, pairs in sets.items() if len(pairs)}
    for name, source in opener.opened.items():
        if source.stream is not None:
            head = counted(len(source.train), "pair")
            notes.append(f"only the head of {name} was looked at: {head}, which training leaves out")
    intake = Intake.merged(pairs.intake for pairs in sets.values())
    notes += [*left_out_lines(intake.skipped.to_dict()), *left_out_lines(intake.ignored.to_dict())]
    bad, equal, read = _read_images(sets, images, seed, progress)
    same = [[f"{name} ({of})" for name, of in group] for group in equal]
    in_several = Counter(tuple(dict.fromkeys(of for _, of in group)) for group in equal)
    notes += [
        f"{counted(count, 'image')} {'is' if count == 1 else 'are'} in {' and in '.join(of)}"
        for of, count in in_several.items()
        if len(of) > 1
    ]
    content = {
        "sets": {name: _counts(pairs) for name, pairs in sets.items()},
        "classes": _classes(sets),
        "longest": _longest(sets),
        "images": sum(map(len, sets.values())),
        "read": read,
        "unreadable": {"count": len(bad), "examples": bad[:_EXAMPLES]},
        "duplicates": {"count": len(same), "examples": same[:_EXAMPLES]},
        "overlap": intake.skipped.counts.get(_OVERLAP, 0),
        "notes": notes,
    }
    return Inspection(data if forget is None else f"{data}#{forget}", sets, content)


def _counts(pairs: PairDataset) -> dict[str, int]:
    labels = pairs.labels
    return {
        "pairs": len(pairs),
        "captions": len(pairs.different_captions()[0]),
        "classes": 0 if labels is None else len(np.unique(labels)),
    }


def _classes(sets: dict[str, PairDataset]) -> dict[str, dict[str, int]]:
    """Return the number of pairs of each class in each set."""
    counts = {
        name: Counter(pairs.classes[label] for label in pairs.labels)
        for name, pairs in sets.items()
        if pairs.classes is not None and pairs.labels is not None
    }
    names = dict.fromkeys(name for pairs in sets.values() for name in pairs.classes or ())
    rows = {name: {of: counts[of][name] if of in counts else 0 for of in sets} for name in names}
    return {name: row for name, row in rows.items() if any(row.values())}


def _class_lines(classes: dict[str, dict[str, int]]) -> list[str]:
    if not classes:
        return ["no classes: captions are too many, or not repeated"]
    sets = list(next(iter(classes.values())))
    shown = list(classes.items())[: 2 * _EXAMPLES]
    width = max(display_width(name) for name, _ in shown) + 2
    head = f"{'class':<{width}}" + "".join(f"{name:>{len(name) + 4}}" for name in sets)
    rows = [
        name + " " * (width - display_width(name)) + "".join(f"{row[of]:>{len(of) + 4},}" for of in sets)
        for name, row in shown
    ]
    rest = [f"... and {more_classes(len(classes) - len(shown))}"] if len(classes) > len(shown) else []
    return [head, *rows, *rest]


def _longest(sets: dict[str, PairDataset]) -> list[dict[str, Any]]:
    """Return the longest captions that are texts."""
    texts = {
        caption: pairs.ids[row]
        for pairs in sets.values()
        for row, captions in enumerate(pairs.captions)
        for caption in captions
        if isinstance(caption, str)
    }
    longest = sorted(texts, key=lambda text: (-len(text), text))[:_LONGEST]
    return [
        {"id": texts[text], "characters": len(text), "caption": text if len(text) <= 200 else text[:199] + "…"}
        for text in longest
    ]


def _read_images(
    sets: dict[str, PairDataset], most: int, seed: int, progress: bool
) -> tuple[list[str], list[list[tuple[str, str]]], int]:
    """Read at most so many images of each set. Returns messages about unreadable ones, groups of (id, set) with the
    same pixels, and how many were read."""
    chosen = {
        name: np.sort(np.random.default_rng([seed, number]).permutation(len(pairs))[:most])
        for number, (name, pairs) in enumerate(sets.items())
    }
    count = sum(map(len, chosen.values()))
    messages: list[str] = []
    by_digest: dict[bytes, list[tuple[str, str]]] = {}
    with Steps(count, "reading", "image", bar=progress) as steps:
        for name, pairs in sets.items():
            for row, (digest, fault) in zip(chosen[name], _digests(pairs, chosen[name]), strict=True):
                if fault is not None:
                    messages.append(fault)
                else:
                    by_digest.setdefault(digest, []).append((pairs.ids[row], name))
                steps.update()
    return messages, [names for names in by_digest.values() if len(names) > 1], count


def _digests(pairs: PairDataset, rows: np.ndarray) -> Iterator[tuple[bytes, str | None]]:
    """Yield a digest of the pixels of each image, or why it cannot be read."""

    def look(row: int) -> tuple[bytes, str | None]:
        try:
            return hashlib.blake2b(pixel_bytes(pairs.image(row)), digest_size=16).digest(), None
        except InputError as error:
            return b"", str(error)

    numbers = [int(row) for row in rows]
    if not pairs.store.thread_safe():
        yield from map(look, numbers)
        return
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(numbers), _PART):
            yield from pool.map(look, numbers[start : start + _PART])


def _equal(group: Sequence[str]) -> str:
    """Name images that are the same, the first of many."""
    left = len(group) - _EQUAL
    return " = ".join(group[:_EQUAL]) + (f" = {left:,} more" if left > 0 else "")


def _more(found: dict[str, Any]) -> list[str]:
    left = found["count"] - len(found["examples"])
    return [f"  ... and {left} more"] if left else []
