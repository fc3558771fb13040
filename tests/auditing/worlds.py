"""Random features and the definitions once more, one image at a time, that the tests here share."""

import numpy as np
import torch
import torch.nn.functional as F

from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.scores import Features, View


def unit(rows):
    return F.normalize(torch.as_tensor(np.asarray(rows), dtype=torch.float32), dim=-1)


def class_world(classes=6, per_class=(5, 12), forget=(1, 4), dim=8, noise=0.7, seed=0):
    """Noisy images around class captions; classes of different sizes. Returns (layout, features)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(*per_class, size=classes)
    labels = rng.permutation(np.repeat(np.arange(classes), sizes))
    concepts = rng.normal(size=(classes, dim))
    images = concepts[labels] + noise * rng.normal(size=(len(labels), dim)) * np.sqrt(dim) / 2
    rows = np.arange(len(labels))
    names = tuple(f"class {number}" for number in range(classes))
    layout = Layout(np.isin(labels, forget), names, rows, labels, rows, labels, labels)
    return layout, Features(unit(images), unit(concepts), unit(concepts))


def caption_world(images=20, captions=30, dim=8, seed=0):
    """Images with one to three captions, none shared; the first five are forget pairs."""
    rng = np.random.default_rng(seed)
    caption_image_of = np.sort(np.concatenate([np.arange(images), rng.integers(0, images, captions - images)]))
    caption_of = np.arange(captions)
    text = rng.normal(size=(captions, dim))
    image = text[[np.flatnonzero(caption_image_of == number)[0] for number in range(images)]]
    forget = np.arange(images) < 5
    layout = Layout(forget, tuple(caption_of), caption_image_of, caption_of, caption_image_of, caption_of, None)
    return layout, Features(unit(image + rng.normal(size=image.shape)), unit(text), unit(text))


def view_of(world, **more):
    layout, features = world
    return View(layout, features, more.pop("before", features), **more)
