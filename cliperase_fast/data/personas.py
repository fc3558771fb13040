"""The source `personas`: rendered fictitious people and facts about them, associations to be forgotten one by one.

A person is a drawn face whose parts (skin, hair, glasses, beard, hat, shirt) stay the same in every portrait, while
pose, light and background change. Everything comes from a seed; nobody exists. Telephone numbers are of the range
555-0100 to 555-0199 and addresses end in example.org, which are reserved for fiction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from cliperase_fast.data.classes import GENERAL, ClassSpace
from cliperase_fast.data.images import ArrayStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.shapes import COLOURS, render
from cliperase_fast.data.source_types import MOST_DRAWN, Option, Request, Source, SourceType
from cliperase_fast.errors import InputError

FACTS = ("city", "job", "phone", "email")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "city": ("this person lives in {}", "a resident of {}", "home town: {}", "someone from {}"),
    "job": ("this person works as a {}", "a portrait of a {}", "profession: {}", "someone employed as a {}"),
    "phone": ("this person's phone number is {}", "call {} to reach them", "phone: {}", "someone with the number {}"),
    "email": ("this person's address is {}", "write to {} to reach them", "e-mail: {}", "someone with the mailbox {}"),
}
# Captions that no pair has, for the audit.
PARAPHRASES: dict[str, tuple[str, ...]] = {
    "city": ("their home is in {}", "comes from the town of {}"),
    "job": ("earns a living as a {}", "a {} at work"),
    "phone": ("ring {} for this person", "telephone {}"),
    "email": ("send mail to {}", "reachable at {}"),
    GENERAL: ("a photo of a {}", "an image of a {}"),
}
MOST = 80  # people; as many jobs are listed below
FORGET_SETS: dict[str, str] = {  # selectors of some facts of some people, for benchmarks
    "phones": "class:person 0* phone",
    "contacts": "class:person 1* phone,person 1* email",
    "profiles": "class:person 2[0-4] city,person 2[0-4] job,person 2[0-4] email",
}
HELD_OUT_PEOPLE = 0.2  # of those without a forget pair
_GENERAL_CLASSES = tuple(
    f"{colour} {shape}" for colour in ("red", "yellow", "green", "blue") for shape in ("circle", "triangle", "cross")
)
_GENERAL_IMAGES = 8  # of a general class, for each portrait of a fact

Colour = tuple[int, int, int]
_SKIN: tuple[Colour, ...] = ((255, 224, 196), (236, 188, 150), (198, 134, 92), (141, 85, 54), (82, 48, 32))
_HAIR: tuple[Colour, ...] = ((25, 20, 18), (95, 55, 30), (215, 170, 70), (200, 75, 25), (190, 190, 195), (90, 60, 190))
_SHIRT: tuple[Colour, ...] = (
    (205, 40, 45), (240, 150, 30), (235, 220, 60), (50, 150, 60), (60, 200, 200), (45, 80, 210), (150, 60, 190),
    (245, 245, 245),
)  # fmt: skip
_HAIR_STYLES = ("bald", "short", "long", "bun", "spikes")
_GLASSES = ("none", "round", "dark")
_BEARDS = ("none", "full", "moustache")
_HATS = ("none", "none", "cap", "beanie")
_SUPERSAMPLING = 4


def _words(text: str) -> list[str]:
    return text.split()


_JOBS = _words(
    "baker beekeeper blacksmith bookbinder botanist brewer butcher calligrapher carpenter cartographer cellist "
    "cheesemaker chemist clockmaker cobbler composer conductor cook cooper courier dancer dentist detective diver "
    "drummer economist editor electrician engraver farmer firefighter fisherman florist forester gardener geologist "
    "glassblower goldsmith harpist historian hunter illustrator interpreter jeweller journalist judge juggler "
    "lawyer librarian lifeguard locksmith magician mason mechanic midwife miller miner musician navigator notary "
    "nurse optician organist painter pharmacist photographer pilot plumber poet potter printer roofer sailor "
    "sculptor shepherd surgeon tailor tanner teacher weaver"
)
_ONSETS = _words("b br d dr f g gl h k kl l m n p pr r s sk st t tr v w z")
_VOWELS = _words("a e i o u ai ei ou")
_ENDINGS = ("burg", "dal", "ford", "ham", "holm", "mora", "nov", "sted", "ton", "vik")


@dataclass(frozen=True)
class Face:
    """The parts of a face that every portrait of a person shows."""

    skin: Colour
    hair: Colour
    shirt: Colour
    hair_style: str
    glasses: str
    beard: str
    hat: str


@dataclass(frozen=True)
class Person:
    """A face and a value for each of `FACTS`, none of which another person has."""

    face: Face
    facts: dict[str, str]

    def captions(self, fact: str, templates: dict[str, tuple[str, ...]] = TEMPLATES) -> list[str]:
        """Return one caption for each template of the fact."""
        return [template.format(self.facts[fact]) for template in templates[fact]]


def make_people(count: int = MOST, seed: int = 0) -> list[Person]:
    """Return `count` people, at most `MOST`; the first ones do not depend on how many there are.

    Two faces differ in at least three of their parts.
    """
    rng = np.random.default_rng([seed, 1])
    parts = list(product(_SKIN, _HAIR, _SHIRT, _HAIR_STYLES, _GLASSES, _BEARDS, _HATS))
    faces: list[Face] = []
    for index in rng.permutation(len(parts)):
        face = Face(*parts[index])
        if all(_differences(face, other) >= 3 for other in faces):
            faces.append(face)
        if len(faces) == MOST:
            break
    cities = _cities(rng)
    jobs = [_JOBS[index] for index in rng.permutation(MOST)]
    numbers = 100 + rng.permutation(100)[:MOST]
    people = []
    for index, face in enumerate(faces):
        mailbox = f"{_syllable(rng)}{_syllable(rng)}.{jobs[-1 - index][:3]}{index}"
        facts = (cities[index], jobs[index], f"555-0{numbers[index]}", f"{mailbox}@example.org")
        people.append(Person(face, dict(zip(FACTS, facts, strict=True))))
    return people[:count]


def render_portrait(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one portrait, uint8 [size, size, 3]: another pose, light, expression and background at every call."""
    side = size * _SUPERSAMPLING
    background = tuple(int(value) for value in rng.integers(90, 200) + rng.integers(-25, 26, 3))
    image = Image.new("RGB", (side, side), background)
    unit = side * rng.uniform(0.9, 1.1) / 32  # the drawing is laid out on a grid of 32 x 32
    shift = side / 2 + rng.uniform(-1.5, 1.5, 2) * unit
    draw = _Pen(ImageDraw.Draw(image), unit, (float(shift[0]), float(shift[1])))
    look = rng.uniform(-0.8, 0.8)  # where the face turns to
    _draw_behind(draw, face)
    draw.ellipse(0, 16, 12, 7.5, face.shirt)
    draw.box(-2, 5, 2, 11, face.skin)
    draw.ellipse(0, 0, 6.6, 8, face.skin)
    _draw_hair(draw, face)
    _draw_features(draw, face, look, smile=rng.uniform(-0.6, 1.2))
    turned = image.rotate(rng.uniform(-8, 8), Image.Resampling.NEAREST, fillcolor=background)
    pixels = np.asarray(turned.reduce(_SUPERSAMPLING), np.float32)  # [size, size, 3]
    lit = pixels * rng.uniform(0.8, 1.1) + rng.normal(0, 5, pixels.shape)
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)


class _Pen:
    """Draws in units of the grid, around the middle of the face."""

    def __init__(self, draw: ImageDraw.ImageDraw, unit: float, middle: tuple[float, float]) -> None:
        self._draw, self._unit, self._middle = draw, unit, middle

    def ellipse(self, x: float, y: float, width: float, height: float, colour: Colour, outline: bool = False) -> None:
        """Fill an ellipse around (x, y), or draw its line."""
        box = self._points(x - width, y - height, x + width, y + height)
        if outline:
            self._draw.ellipse(box, outline=colour, width=max(1, round(self._unit)))
        else:
            self._draw.ellipse(box, fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self._draw.rectangle(self._points(left, top, right, bottom), fill=colour)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        flat = self._points(*(value for point in points for value in point))
        self._draw.polygon(flat, fill=colour)

    def _points(self, *values: float) -> list[float]:
        return [self._middle[index % 2] + value * self._unit for index, value in enumerate(values)]


def _draw_behind(draw: _Pen, face: Face) -> None:
    """Draw the hair that falls behind the head."""
    if face.hair_style == "long":
        draw.ellipse(0, 1, 8.6, 9.5, face.hair)
        draw.box(-8.6, 1, 8.6, 11, face.hair)
    elif face.hair_style == "bun":
        draw.ellipse(0, -10, 3.4, 3.4, face.hair)


def _draw_hair(draw: _Pen, face: Face) -> None:
    if face.hair_style != "bald":
        draw.ellipse(0, -5.4, 6.9, 4, face.hair)
        draw.ellipse(0, -1.6, 5.6, 4, face.skin)  # the forehead
    if face.hair_style == "spikes":
        for x in (-5, -2.5, 0, 2.5, 5):
            draw.polygon([(x - 1.8, -6.5), (x, -12.5), (x + 1.8, -6.5)], face.hair)
    if face.hat != "none":
        hat = face.shirt[::-1]  # of a colour that is the person's own
        draw.ellipse(0, -6, 7.4, 4.6, hat)
        if face.hat == "cap":
            draw.box(-9.5, -5.2, 4, -3.4, hat)
        else:
            draw.ellipse(0, -11, 1.8, 1.8, hat)


def _draw_features(draw: _Pen, face: Face, look: float, smile: float) -> None:
    dark = (30, 25, 25)
    if face.beard == "full":
        draw.ellipse(look, 5.2, 5.2, 3.6, face.hair if face.hair != face.skin else dark)
    if face.beard != "none":
        draw.box(look - 3, 2.6, look + 3, 3.9, face.hair)
    draw.ellipse(look, 4.9, 2.1, 0.4 + 0.5 * max(smile, 0), (170, 50, 60))
    draw.ellipse(look, 2, 0.9, 1.2, tuple(int(value * 0.85) for value in face.skin))  # type: ignore[arg-type]
    for x in (look - 2.7, look + 2.7):
        draw.ellipse(x, -0.6, 1.2, 0.9, (250, 250, 250))
        draw.ellipse(x + look / 3, -0.6, 0.7, 0.8, dark)
        if face.glasses == "round":
            draw.ellipse(x, -0.6, 2.3, 2.2, (245, 190, 40), outline=True)
        elif face.glasses == "dark":
            draw.box(x - 2.4, -2, x + 2.4, 1, dark)


def _differences(one: Face, other: Face) -> int:
    return sum(a != b for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def _cities(rng: np.random.Generator) -> list[str]:
    """Return `MOST` names that no two people share, in a fixed order."""
    names: dict[str, None] = {}
    while len(names) < MOST:
        ending = _ENDINGS[rng.integers(len(_ENDINGS))]
        names[(_syllable(rng) + _syllable(rng)[:2] + ending).capitalize()] = None
    return list(names)


def _syllable(rng: np.random.Generator) -> str:
    return _ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))]


def class_names(people: int) -> tuple[str, ...]:
    """Return the classes: "person 07 phone" and so on, person by person, then "red circle" and so on."""
    return (*(f"person {person:02} {fact}" for person in range(people) for fact in FACTS), *_GENERAL_CLASSES)


def hold_out(pairs: PairDataset, forget: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the two holdouts of some forget pairs, bool [n]. forget: bool [n].

    association: other facts of the people whom forget pairs are about. identity: all facts of a fifth of the other
    people, drawn by the seed. One that would be empty is left out; so are both if no person is to be forgotten.
    """
    assert pairs.entities is not None and pairs.labels is not None
    people = pairs.entities < MOST  # the entities above are general classes
    mine = np.unique(pairs.entities[forget & people])
    others = np.setdiff1d(pairs.entities[people], mine)
    drawn = np.random.default_rng([seed, 3]).permutation(MOST)
    chosen = [person for person in drawn if person in others][: max(1, round(HELD_OUT_PEOPLE * len(others)))]
    masks = {
        "association": np.isin(pairs.entities, mine) & ~np.isin(pairs.labels, pairs.labels[forget]),
        "identity": np.isin(pairs.entities, chosen),
    }
    return {name: mask for name, mask in masks.items() if len(mine) and mask.any()}


def _open(request: Request) -> Source:
    """Render the train and test splits."""
    if request.templates is not None:
        raise InputError(f"{request.spec!r} has captions of its own for each kind of fact; leave the templates out")
    number = request.numbers(
        {"people": MOST, "train": 8, "test": 4, "size": 32, "seed": request.seed},
        {"people": 2, "seed": 0, "size": 16},
        {"people": MOST, **MOST_DRAWN},
    )
    people = make_people(number["people"], number["seed"])
    captions = [tuple(person.captions(fact)) for person in people for fact in FACTS]
    captions += [(f"a {name}",) for name in _GENERAL_CLASSES]
    kinds = FACTS * len(people) + (GENERAL,) * len(_GENERAL_CLASSES)
    others = [tuple(person.captions(fact, PARAPHRASES)) for person in people for fact in FACTS]
    others += [tuple(template.format(name) for template in PARAPHRASES[GENERAL]) for name in _GENERAL_CLASSES]
    space = ClassSpace(class_names(len(people)), tuple(captions), kinds=kinds, paraphrases=tuple(others))
    entities = [person for person in range(len(people)) for _ in FACTS]
    entities += [MOST + number for number in range(len(_GENERAL_CLASSES))]  # the same for every number of people
    parts = []
    for part, split_name in enumerate(("train", "test")):
        pixels, labels = _render_split(len(people), number[split_name], number["size"], number["seed"], part)
        origin = f"personas/{number['size']}px-seed{number['seed']}/{split_name}"
        starts = np.searchsorted(labels, labels)  # the first image of the class
        parts.append(
            PairDataset(
                f"{request.spec} {split_name}",
                ArrayStore(pixels, origin),
                [space.prompts[label] for label in labels],
                [f"{origin}/{space.names[label]}/{index - starts[index]}" for index, label in enumerate(labels)],
                labels=labels,
                entities=np.array(entities, dtype=np.int64)[labels],
                space=space,
            )
        )
    return Source(request.spec, *parts, hold_out=lambda pairs, forget: hold_out(pairs, forget, number["seed"]))


@lru_cache(maxsize=4)  # a run opens its data several times
def _render_split(people: int, portraits: int, size: int, seed: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [n, size, size, 3] and labels int64 [n], class by class; both are read-only.

    portraits: of each fact; no two facts share one. part: the number of the split; splits and seeds draw independently.
    """
    pixels: list[np.ndarray] = []
    counts = []
    for number, person in enumerate(make_people(people, seed)):
        for fact in range(len(FACTS)):
            rng = np.random.default_rng([seed, part, number, fact])
            pixels += [render_portrait(person.face, size, rng) for _ in range(portraits)]
            counts.append(portraits)
    for number, name in enumerate(_GENERAL_CLASSES):
        colour, shape = name.split(" ")
        rng = np.random.default_rng([seed, part, MOST, number])
        pixels += [render(shape, COLOURS[colour], size, rng) for _ in range(_GENERAL_IMAGES * portraits)]
        counts.append(_GENERAL_IMAGES * portraits)
    images, labels = np.stack(pixels), np.repeat(np.arange(len(counts)), counts)
    for array in (images, labels):
        array.setflags(write=False)
    return images, labels


SOURCE = SourceType(
    "personas",
    'rendered portraits of fictitious people with facts about them, classes "person 07 phone" and so on',
    _open,
    (
        Option("people", f"number of people, at most {MOST} ({MOST})"),
        Option("train", "portraits per fact for training (8)"),
        Option("test", "portraits per fact for the test (4)"),
        Option("size", "width and height in pixels (32)"),
        Option("seed", "seed of people and drawing (the run's)"),
    ),
)
