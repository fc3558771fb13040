"""Background levels of classes that are related to retained classes.

A model that never saw a red circle still knows red things and circles, so it finds such an image and its caption more
similar than an unrelated pair. How similar, the original tells by the classes that share the most words with this one,
or, where none does and the level is "similar", by the one whose captions it finds most similar to these images:

    t̄_c = t̄ + f (mean over the related classes r of t̄_r - t̄),    ī_c likewise
    f   = min(SHARE, MOST (own - level) / (related - level))

t̄ and ī are the mean features of the captions and images of all retain pairs, t̄_r and ī_r those of a class. own is the
mean cosine of the pairs to forget of the class, level and related are their background levels by t̄ and ī, and by the
related classes alone. A class therefore ends below its relatives, whose captions are then nearer to its images than
its own. Measured from the level of unrelated pairs, its association falls to at most `MOST` of its former value.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.coercion import AUTO
from cliperase_fast.evaluation import Background, EncodedPairs
from cliperase_fast.evaluation.background import PART, ConceptLevels
from cliperase_fast.unlearning.splits import Split

UNRELATED, RELATED, SIMILAR = "unrelated", "related", "similar"  # values of forget_level
SHARE = 0.8  # of the related classes' level
MOST = 0.5  # of the association that is there
# Words that say nothing about an image, of the languages in which many class names have them.
_EMPTY_WORDS = frozenset([
    "a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with",
    "au", "aux", "de", "des", "du", "en", "et", "la", "le", "les", "un", "une",  # French
    "das", "dem", "den", "der", "die", "ein", "eine", "im", "mit", "und", "vom", "von",  # German
    "com", "con", "da", "del", "della", "di", "do", "dos", "el", "il", "las", "lo", "los", "una",  # others
])  # fmt: skip
_APOSTROPHES, _HYPHENS = "'\u2019\u02bc", "-\u2010\u2011"


def related_classes(names: Sequence[str], label: int, others: Collection[int]) -> list[int]:
    """Return the classes among `others` that share the most words with class `label`, at least one; often none.

    A word of all others does not count, as all of them have the level of unrelated pairs.
    """
    words = {other: _words(names[other]) for other in others}
    own = _words(names[label]) - frozenset.intersection(*words.values()) if words else frozenset()
    shared = {other: len(own & of) for other, of in words.items()}
    most = max(shared.values(), default=0)
    return sorted(other for other, count in shared.items() if count == most > 0)


@cache
def _words(name: str) -> frozenset[str]:
    """Return the words of a name, however it is encoded, spelt large or small, and divided.

    A single letter is a word where it stands alone, as in "red A", not at an apostrophe. A compound with one, such as
    "t-shirt", is one word.
    """
    kept = []
    for character in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()):
        kind = unicodedata.category(character)
        if kind[0] in "LNM" or character in _APOSTROPHES + _HYPHENS:  # letters, digits and the marks on them
            kept.append("'" if character in _APOSTROPHES else "-" if character in _HYPHENS else character)
        elif kind != "Cf":  # those stand inside of words
            kept.append(" ")
    found: set[str] = set()
    for word in "".join(kept).split():
        parts = [part for part in word.split("'") if len(part) > 1] if "'" in word else [word]
        for part in parts:
            pieces = [piece for piece in part.split("-") if piece]
            compound = len(pieces) > 1 and any(len(piece) == 1 and piece.isalpha() for piece in pieces)
            found.update(["-".join(pieces)] if compound else pieces)
    return frozenset(found - _EMPTY_WORDS)


def relatives_of(train: Split, alone: bool = False) -> dict[int, list[int]]:
    """Return the classes that share words with each class whose pairs are all to be forgotten, if there are any.

    alone: also classes that share none, with an empty list (`with_most_similar`).
    """
    pairs = train.pairs
    if pairs.labels is None or pairs.entities is not None or pairs.classes is None:
        return {}
    forget, retain = (set(map(int, part)) for part in np.split(pairs.labels, [train.n_forget]))
    found = {label: related_classes(pairs.classes, label, retain) for label in sorted(forget - retain)}
    return {label: relatives for label, relatives in found.items() if relatives or alone}


def level_of(setting: str, train: Split, knows_words: Callable[[], bool]) -> str:
    """Return which background levels a run has, for "auto" the one that fits the model.

    That is `SIMILAR` where a class to forget shares no word with a retained one, if the text tower knows words from
    elsewhere: then a model that never saw the class still knows its name. Else it is `RELATED`.
    """
    if setting != AUTO:
        return setting
    alone = not all(relatives_of(train, alone=True).values())
    return SIMILAR if alone and knows_words() else RELATED


def related_pairs(
    train: Split, relatives: Mapping[int, Sequence[int]], most: int | None, seed: int
) -> dict[int, np.ndarray]:
    """Return the pairs that give the levels of each class of `relatives_of` and of its related classes, ascending.

    most: about how many pairs to draw, None for all. Of each class at least 8 are drawn, if it has them.
    """
    labels = train.pairs.labels
    if not relatives:
        return {}
    assert labels is not None
    used = sorted({*relatives, *(other for found in relatives.values() for other in found)})
    each = None if most is None else max(8, most // len(used))
    found = {}
    for label in used:
        pairs = np.flatnonzero(labels == label)
        if each is not None:
            pairs = np.sort(np.random.default_rng([seed, label]).permutation(pairs)[:each])
        found[label] = pairs
    return found


@dataclass(frozen=True)
class PairFeatures:
    """The features of training pairs by the model that gives the levels.

    images: returns those of some pairs. captions: [U, D]. caption_index: returns for each of some pairs the rows of its
    captions.
    """

    images: Callable[[np.ndarray], Tensor]
    captions: Tensor
    caption_index: Callable[[np.ndarray], Sequence[np.ndarray]]

    def means(self, of: np.ndarray) -> Background:
        parts = (self.images(of[start : start + PART]) for start in range(0, len(of), PART))
        return Background.of_rows(parts, self.captions, self.caption_index(of))

    def association(self, of: np.ndarray) -> float:
        """Return the mean cosine of pairs."""
        index = self.caption_index(of)
        rows = torch.stack([self.captions[torch.from_numpy(rows)].double().mean(0) for rows in index])
        return float((self.images(of).double() * rows).sum(1).mean())

    def caption_means(self, of: np.ndarray, classes: np.ndarray, count: int) -> Tensor:
        """Return the mean caption features [count, D] of the pairs of each class. classes: int64 [n], below `count`."""
        index = self.caption_index(of)
        captions = np.array([len(rows) for rows in index], dtype=np.int64)
        weights = np.repeat(1 / (captions * np.bincount(classes, minlength=count)[classes]), captions)
        rows, places = np.concatenate(index), np.repeat(classes, captions)
        sums = torch.zeros(count, self.captions.shape[1], dtype=torch.float64, device="cpu")
        for start in range(0, len(rows), PART):
            part = slice(start, start + PART)
            weighted = self.captions[rows[part]].double().cpu() * torch.from_numpy(weights[part, None])
            sums.index_add_(0, torch.from_numpy(places[part]), weighted)
        return sums


def with_most_similar(
    relatives: Mapping[int, Sequence[int]],
    train: Split,
    retained: np.ndarray,
    pairs: Mapping[int, np.ndarray],
    features: PairFeatures,
) -> tuple[dict[int, list[int]], dict[int, np.ndarray]]:
    """Give each class without relatives the retained class whose captions are most similar to its images.

    retained: pairs to look in. pairs: those of `related_pairs`, which are returned with those of the classes found.
    """
    found, of_class = {label: list(others) for label, others in relatives.items()}, dict(pairs)
    alone = [label for label, others in found.items() if not others and of_class[label].size]
    labels = train.pairs.labels
    if not alone or not retained.size or labels is None:
        return found, of_class
    classes, places = np.unique(labels[retained], return_inverse=True)
    means = features.caption_means(retained, places, len(classes))
    for label in alone:
        images = features.images(of_class[label]).double().cpu()
        nearest = int((means @ images.mean(0)).argmax())
        found[label] = [int(classes[nearest])]
        of_class.setdefault(int(classes[nearest]), retained[places == nearest])
    return found, of_class


def with_related_levels(
    background: Background,
    relatives: Mapping[int, Sequence[int]],
    pairs: Mapping[int, np.ndarray],
    features: PairFeatures,
    most: float | None = MOST,
) -> Background:
    """Return the background with levels of their own for the classes that have relatives.

    relatives: of `relatives_of`. pairs: those of `related_pairs`. most: None for no bound by the association that is
    there.
    """
    of_class = {label: features.means(of) for label, of in pairs.items() if of.size}
    found: dict[int, Background] = {}
    relatives = {label: [other for other in of if other in of_class] for label, of in relatives.items()}
    for label, others in relatives.items():
        if label not in of_class or not others:
            continue
        related = _mean([of_class[other] for other in others])
        level, above = (_level(of_class[label], by) for by in (background, related))
        if above > level:
            share = SHARE
            if most is not None:
                share = min(share, most * max(features.association(pairs[label]) - level, 0.0) / (above - level))
            found[label] = _between(background, related, share)
    return replace(background, own=_own_levels(found, of_class, relatives)) if found else background


def _own_levels(
    found: Mapping[int, Background], of_class: Mapping[int, Background], relatives: Mapping[int, Sequence[int]]
) -> ConceptLevels:
    related = sorted({other for label in found for other in relatives[label]})
    column = {other: place for place, other in enumerate(related)}
    weights = torch.zeros(len(found), len(related), dtype=torch.float64, device="cpu")
    for row, label in enumerate(found):
        weights[row, [column[other] for other in relatives[label]]] = 1 / len(relatives[label])
    return ConceptLevels(
        torch.tensor(list(found), dtype=torch.int64, device="cpu"),
        torch.stack([of.image_mean for of in found.values()]),
        torch.stack([of.text_mean for of in found.values()]),
        torch.tensor(related, dtype=torch.int64, device="cpu"),
        torch.stack([of_class[other].image_mean for other in related]),
        weights,
    )


def concepts_of(part: Split, train: Split) -> np.ndarray | None:
    """Return the classes of a split's pairs as labels of the training split, -1 for others; None without classes."""
    labels, names, own = part.pairs.labels, part.pairs.classes, train.pairs.classes
    if labels is None or names is None or own is None:
        return None
    places = {name: label for label, name in enumerate(own)}
    return np.array([places.get(name, -1) for name in names], dtype=np.int64)[labels]


def with_levels_of_relatives(
    background: Background, part: Split, encoded: EncodedPairs, level: str, most: float | None = None
) -> Background:
    """Return the background with the levels at which a model is that never saw the classes to forget of a split.

    encoded: of the split's pairs, by the model that is asked. level: as `Run.forget_level`. most: as in
    `with_related_levels`.
    """
    features = PairFeatures(
        lambda rows: encoded.image_features[torch.from_numpy(rows)],
        encoded.caption_features,
        lambda rows: [encoded.caption_index[row] for row in map(int, rows)],
    )
    relatives = relatives_of(part, level == SIMILAR)
    pairs = related_pairs(part, relatives, None, 0)
    if level == SIMILAR:
        retained = np.arange(part.n_forget, len(part.pairs))
        relatives, pairs = with_most_similar(relatives, part, retained, pairs, features)
    return with_related_levels(background, relatives, pairs, features, most)


def related_note(train: Split, background: Background, level: str, masked: bool) -> str | None:
    """Say which classes have levels of their own, and why; None if none has.

    level: the setting forget_level; unless it is "auto", say why it makes no difference. masked: whether the pairs of a
    batch are told apart by their classes.
    """
    names, own = train.pairs.classes, background.own
    if own is None or names is None:
        if level not in (RELATED, SIMILAR):
            return None
        return f"forget_level={level!r} makes no difference: {_why_unrelated(train, level, masked)}"
    by_words, labels = relatives_of(train), own.concepts.tolist()
    others = {
        label: [names[other] for other in own.related[weights > 0].tolist()]
        for label, weights in zip(labels, own.related_weights, strict=True)
    }
    told = []
    for similar in (False, True):
        of = [label for label in labels if (label not in by_words) == similar]
        if not of:
            continue
        related = list(dict.fromkeys(name for label in (of if similar else of[:1]) for name in others[label]))
        shown = ", ".join(repr(name) for name in related[:3]) + (", ..." if len(related) > 3 else "")
        classes = f"the retained class {shown}" if len(related) == 1 else f"retained classes ({shown})"
        who = repr(names[of[0]]) if len(of) == 1 else f"{len(of)} classes to forget, {names[of[0]]!r} among them,"
        s = "s" if len(of) == 1 else ""
        told.append(f"{who} look{s} most like {classes}" if similar else f"{who} share{s} words with {classes}")
    return (
        f"{'; '.join(told)}. A model that never saw the pairs to forget would know what they have in common, so the "
        "target is near the level of those classes instead of that of unrelated pairs (forget_level='unrelated')"
    )


def _why_unrelated(train: Split, level: str, masked: bool) -> str:
    pairs = train.pairs
    if pairs.entities is not None:
        return "the pairs name entities, and what is known of one says nothing about another"
    if pairs.labels is None or pairs.classes is None:
        return "the pairs have no classes"
    if not masked:
        return "classes are left out of account, leave false_negatives at 'auto'"
    if not set(map(int, pairs.labels[: train.n_forget])) - set(map(int, pairs.labels[train.n_forget :])):
        return "no class is to be forgotten as a whole"
    if level == SIMILAR:
        return "no class to forget is more similar to a retained one than to unrelated pairs"
    return "no class to forget shares words with retained ones that are more similar to it than unrelated pairs"


def _level(of: Background, by: Background) -> float:
    """Return the background level of the pairs with the means `of`, by the means of others."""
    return float(of.image_mean @ by.text_mean + by.image_mean @ of.text_mean) / 2


def _mean(backgrounds: Sequence[Background]) -> Background:
    return Background(
        torch.stack([of.image_mean for of in backgrounds]).mean(0),
        torch.stack([of.text_mean for of in backgrounds]).mean(0),
    )


def _between(one: Background, other: Background, share: float) -> Background:
    return Background(
        one.image_mean + share * (other.image_mean - one.image_mean),
        one.text_mean + share * (other.text_mean - one.text_mean),
    )
