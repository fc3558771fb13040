"""Name concepts in other words: templates and synonyms, given by the caller or from small built-in lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cliperase_fast.data import PairDataset
from cliperase_fast.data.classes import folded, readable
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter

TEMPLATES = (
    "{}",
    "an image of a {}",
    "a picture of the {}",
    "a drawing of a {}",
    "there is a {} in this picture",
)
_DIGITS = {
    name: (str(number), plural, f"digit {number}")
    for number, (name, plural) in enumerate(
        {
            "zero": "zeros",
            "one": "ones",
            "two": "twos",
            "three": "threes",
            "four": "fours",
            "five": "fives",
            "six": "sixes",
            "seven": "sevens",
            "eight": "eights",
            "nine": "nines",
        }.items()
    )
}
_CIFAR10 = {
    "airplane": ("aircraft", "plane", "jet", "airplanes", "flying vehicle"),
    "automobile": ("car", "motorcar", "sedan", "automobiles", "road vehicle"),
    "bird": ("songbird", "fowl", "birds", "feathered animal"),
    "cat": ("kitten", "feline", "cats", "house pet"),
    "deer": ("stag", "doe", "antlered animal"),
    "dog": ("puppy", "hound", "dogs", "canine"),
    "frog": ("toad", "frogs", "amphibian"),
    "horse": ("pony", "stallion", "horses", "hoofed animal"),
    "ship": ("boat", "vessel", "ships", "watercraft"),
    "truck": ("lorry", "pickup", "trucks", "heavy vehicle"),
}
_COLOURS = {
    "red": "crimson",
    "orange": "tangerine",
    "yellow": "golden",
    "green": "emerald",
    "cyan": "turquoise",
    "blue": "navy",
    "purple": "violet",
    "pink": "rose",
    "white": "ivory",
    "black": "ebony",
}
_SHAPES = {
    "circle": "disc",
    "square": "box",
    "triangle": "three-sided shape",
    "star": "pentagram",
    "cross": "plus sign",
    "ring": "hoop",
    "heart": "love symbol",
    "diamond": "rhombus",
    "crescent": "moon",
    "arrow": "pointer",
}


@dataclass(frozen=True)
class Wording:
    """Hold the captions of a variant: of concept number `concept`, or of each class in turn if it is None."""

    name: str
    concept: int | None
    captions: tuple[tuple[str, ...], ...]  # [K] or [1], each the captions that are averaged


def known_synonyms(name: str) -> tuple[str, ...]:
    """Return synonyms, plurals and hypernyms of a class of the digits, the shapes or CIFAR-10; none for other names."""
    plain = folded(readable(name))
    if plain in _DIGITS or plain in _CIFAR10:
        return (_DIGITS | _CIFAR10)[plain]
    colour, _, shape = plain.partition(" ")
    if colour in _COLOURS and shape in _SHAPES:
        return (f"{_COLOURS[colour]} {shape}", f"{colour} {_SHAPES[shape]}", f"{plain}s", f"{colour} shape")
    return ()


def check_synonyms(synonyms: Mapping[str, Sequence[str]] | None, pairs: PairDataset) -> dict[int, tuple[str, ...]]:
    """Return other names by the number of the class. Raises `InputError` for names that are not classes of `pairs`."""
    if synonyms is None:
        return {number: known_synonyms(name) for number, name in enumerate(pairs.classes or ())}
    if pairs.classes is None:
        raise InputError(f"{pairs.name} has no classes for the synonyms to rename: leave synonyms out")
    numbers = {folded(readable(name)): number for number, name in enumerate(pairs.classes)}
    found: dict[int, tuple[str, ...]] = {}
    for name, others in synonyms.items():
        if not isinstance(name, str) or folded(readable(name)) not in numbers:
            raise InputError(
                f"synonyms name {name!r}, which is not a class: use one of {', '.join(pairs.classes[:20])}"
            )
        listed = isinstance(others, Iterable) and not isinstance(others, (str, Mapping))
        if not listed or not all(isinstance(one, str) and one.strip() for one in others):
            raise InputError(f"synonyms[{name!r}] is {others!r}; give a list of texts, such as ['plane', 'aircraft']")
        found[numbers[folded(readable(name))]] = tuple(others)
    return found


def wordings(
    pairs: PairDataset,
    forget_concepts: np.ndarray,
    synonyms: Mapping[int, Sequence[str]],
    templates: Sequence[str],
) -> Iterator[Wording]:
    """Yield the variants of the forget classes' captions.

    Each template renames all classes; data with `ClassSpace.paraphrases` has these in place of the built-in templates.
    Each synonym stands in the place of the class's name in the captions that the class has; where none of them holds
    the name, in `TEMPLATES`.
    """
    if pairs.classes is None or pairs.prompts is None:
        return
    if pairs.space is not None and pairs.space.paraphrases is not None and tuple(templates) == TEMPLATES:
        for number, captions in enumerate(zip(*pairs.space.paraphrases, strict=True), 1):
            yield Wording(f"paraphrase {number}", None, tuple((caption,) for caption in captions))
        templates = ()
    for template in templates:
        yield Wording(template, None, tuple((template.replace("{}", name),) for name in pairs.classes))
    for concept in map(int, forget_concepts):
        name = pairs.classes[concept]
        own = [_template(prompt, name) for prompt in pairs.prompts[concept] if name in prompt]
        for synonym in synonyms.get(concept, ()):
            captions = tuple(template.replace("{}", synonym) for template in own or TEMPLATES)
            yield Wording(f"{name} = {synonym}", concept, (captions,))


def _template(prompt: str, name: str) -> str:
    """Put "{}" in the place of a name: of a word of its own where there is one, "ring" in "a rendering of a ring"."""
    found = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "{}", prompt, count=1)
    return prompt.replace(name, "{}", 1) if found == prompt else found


def fitting(asked: Iterable[Wording], adapter: ClipAdapter) -> tuple[list[Wording], list[Wording]]:
    """Return the wordings whose captions fit the model's context, and those with one that does not."""
    kept: list[Wording] = []
    too_long: list[Wording] = []
    for wording in asked:
        captions = [caption for group in wording.captions for caption in group]
        assert adapter.tokenizer is not None  # the classes have captions of text
        overlong = adapter.tokenizer.overlong(captions, adapter.tokenizer(captions))
        (too_long if overlong else kept).append(wording)
    return kept, too_long
