"""The source `shapes`: rendered shapes, with classes that share a colour or a shape."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from cliperase_fast.data.classes import ClassSpace
from cliperase_fast.data.images import ArrayStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import MOST_DRAWN, Option, Request, Source, SourceType

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 230, 30),
    "green": (25, 150, 45),
    "cyan": (40, 215, 220),
    "blue": (35, 60, 225),
    "purple": (125, 35, 190),
    "pink": (255, 140, 200),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "crescent", "arrow")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

_SUPERSAMPLING = 4


def render_split(per_class: int, size: int, seed: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [100 * per_class, size, size, 3] and labels int64, class by class.

    part: number of the split; splits and seeds draw independently. The first images of a class do not depend on how
    many there are.
    """
    pixels = np.empty((len(CLASSES) * per_class, size, size, 3), dtype=np.uint8)
    for label, name in enumerate(CLASSES):
        colour, shape = name.split(" ")
        rng = np.random.default_rng([seed, part, label])
        for index in range(per_class):
            pixels[label * per_class + index] = render(shape, COLOURS[colour], size, rng)
    return pixels, np.repeat(np.arange(len(CLASSES)), per_class)


def render(shape: str, colour: tuple[int, int, int], size: int, rng: np.random.Generator) -> np.ndarray:
    """Render one image uint8 [size, size, 3]: random position, size, tilt and brightness, noisy grey background."""
    radius = rng.uniform(0.27, 0.4) * size
    centre = rng.uniform(radius, size - radius, 2)
    tilt = np.deg2rad(rng.uniform(-20, 20))
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    mask = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for outline, fill in _OUTLINES[shape]:
        points = (outline @ turn.T * radius + centre) * _SUPERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    cover = np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32)[:, :, None] / 255  # [size, size, 1]
    background = rng.uniform(90, 150) + rng.uniform(-12, 12, 3)  # [3]
    ink = np.array(colour) * rng.uniform(0.85, 1.0)  # [3]
    image = cover * ink + (1 - cover) * background + rng.normal(0, 6, (size, size, 3))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _ellipse(radius: float, x: float = 0.0, y: float = 0.0, points: int = 64) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)  # [points, 2]


def _star(points: int, inner: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False) - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart(points: int = 64) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y + 2.5], axis=1) / 16


# Outlines [points, 2] inside the unit circle, y downwards, each filled (255) or cut out of the one before
# (0).
_OUTLINES: dict[str, list[tuple[np.ndarray, int]]] = {
    "circle": [(_ellipse(0.95), 255)],
    "square": [(np.array([[-0.78, -0.78], [0.78, -0.78], [0.78, 0.78], [-0.78, 0.78]]), 255)],
    "triangle": [(np.array([[0, -1], [0.92, 0.7], [-0.92, 0.7]]), 255)],
    "star": [(_star(5, 0.4), 255)],
    "cross": [
        (np.array([[-0.28, -0.95], [0.28, -0.95], [0.28, 0.95], [-0.28, 0.95]]), 255),
        (np.array([[-0.95, -0.28], [0.95, -0.28], [0.95, 0.28], [-0.95, 0.28]]), 255),
    ],
    "ring": [(_ellipse(0.98), 255), (_ellipse(0.58), 0)],
    "heart": [(_heart(), 255)],
    "diamond": [(np.array([[0, -1], [0.58, 0], [0, 1], [-0.58, 0]]), 255)],
    "crescent": [(_ellipse(0.98), 255), (_ellipse(0.8, 0.5), 0)],
    "arrow": [
        (np.array([[1, 0], [0.1, -0.8], [0.1, -0.3], [-1, -0.3], [-1, 0.3], [0.1, 0.3], [0.1, 0.8]]), 255),
    ],
}


def _open(request: Request) -> Source:
    """Render the train and test splits."""
    number = request.numbers(
        {"train": 100, "test": 20, "size": 32, "seed": request.seed}, {"seed": 0, "size": 16}, MOST_DRAWN
    )
    space = ClassSpace.from_templates(CLASSES, request.templates or ("a {}",))
    parts = []
    for part, split_name in enumerate(("train", "test")):
        count = number[split_name]
        pixels, labels = render_split(count, number["size"], number["seed"], part)
        origin = f"shapes/{number['size']}px-seed{number['seed']}/{split_name}"
        parts.append(
            PairDataset(
                f"{request.spec} {split_name}",
                ArrayStore(pixels, origin),
                [space.prompts[label] for label in labels],
                [f"{origin}/{space.names[label]}/{index % count}" for index, label in enumerate(labels)],
                labels=labels,
                space=space,
            )
        )
    return Source(request.spec, *parts)


SOURCE = SourceType(
    "shapes",
    'rendered coloured shapes, classes "red circle" and so on',
    _open,
    (
        Option("train", "images per class for training (100)"),
        Option("test", "images per class for the test (20)"),
        Option("size", "width and height in pixels (32)"),
        Option("seed", "seed of the drawing (the run's)"),
    ),
)
