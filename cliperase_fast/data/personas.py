"""Render fictitious people and write facts about them: associations that can be forgotten one by one.

A person is a drawn face whose parts (skin, hair, glasses, beard, hat, shirt) stay the same in every portrait, while
pose, light and background change. Everything comes from a seed; nobody exists. Telephone numbers are of the range
555-0100 to 555-0199 and addresses end in example.org, which are reserved for fiction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

FACTS = ("city", "job", "phone", "email")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "city": ("this person lives in {}", "a resident of {}", "home town: {}", "someone from {}"),
    "job": ("this person works as a {}", "a portrait of a {}", "profession: {}", "someone employed as a {}"),
    "phone": ("this person's phone number is {}", "call {} to reach them", "phone: {}", "someone with the number {}"),
    "email": ("this person's address is {}", "write to {} to reach them", "e-mail: {}", "someone with the mailbox {}"),
}
MOST = 80  # people; as many jobs are listed below

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

    def captions(self, fact: str) -> list[str]:
        """Return one caption for each template of the fact."""
        return [template.format(self.facts[fact]) for template in TEMPLATES[fact]]


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
    pixels = np.asarray(image.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, fillcolor=background), np.float32)
    pixels = pixels.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING, 3).mean((1, 3))  # [size, size, 3]
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
