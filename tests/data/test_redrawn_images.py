"""Datasets that draw their images or captions anew each time they are read."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from cliperase_fast.data import as_pairs, concat
from cliperase_fast.data.drawing import seeded
from cliperase_fast.errors import InputError

CAPTIONS = [f"a thing {number % 4}" for number in range(12)]


class Items:
    """change: what is done to an image's values [4, 4, 3] when it is read; caption: what to its caption."""

    def __init__(self, change=lambda values: values, caption=lambda text: text, as_tensor=False):
        self.change, self.caption, self.as_tensor = change, caption, as_tensor

    def __len__(self):
        return len(CAPTIONS)

    def __getitem__(self, index):
        values = self.change(np.full((4, 4, 3), 10.0 * index))
        image = torch.tensor(values) if self.as_tensor else Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return image.permute(2, 0, 1) if self.as_tensor else image, self.caption(CAPTIONS[index])


def own_generator():
    generator = np.random.default_rng(0)
    return lambda values: values + generator.integers(0, 100)


def counter():
    reads = []
    return lambda values: values + (reads.append(1) or len(reads))


DRAWN = {
    "torch": lambda values: values + float(torch.randint(100, ())),
    "random": lambda values: values + random.randrange(100),
    "numpy": lambda values: values + np.random.randint(100),
    "rarely": lambda values: values + 50 * (random.random() < 0.2),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["PIL", "tensor"])
@pytest.mark.parametrize("change", DRAWN.values(), ids=DRAWN.keys())
def test_a_dataset_that_augments_is_found_out_and_its_fixed_images_stay(change, as_tensor):
    pairs = as_pairs(Items(change, as_tensor=as_tensor), "data")
    assert pairs.store.redrawn()
    assert concat([as_pairs(Items(), "plain"), pairs]).store.redrawn()
    fixed = [np.asarray(pairs.image(index)) for index in (3, 3)]
    assert (fixed[0] == fixed[1]).all()
    free = []
    for seed in (*range(20), 0):
        with seeded(seed):
            free.append(np.asarray(pairs.image(3, fixed=False)))
    assert any((image != free[0]).any() for image in free)
    assert (free[-1] == free[0]).all()


@pytest.mark.parametrize(
    "items", [Items(), [(Image.new("RGB", (4, 4)), text) for text in CAPTIONS]], ids=["map", "list"]
)
def test_a_dataset_that_gives_the_same_each_time_is_not(items):
    assert not as_pairs(items, "data").store.redrawn()


def test_a_dataset_that_seeds_every_item_itself_is_the_same_each_time():
    def change(values):
        random.seed(int(values[0, 0, 0]))
        return values + random.randrange(100)

    assert not as_pairs(Items(change), "data").store.redrawn()


@pytest.mark.parametrize("make", [own_generator, counter])
def test_images_that_do_not_follow_the_global_seeds_are_refused_with_the_remedy(make):
    with pytest.raises(
        InputError, match=r"image of item 0 of data differs each time .* pass the augmentation as transform="
    ):
        as_pairs(Items(make()), "data")


def test_a_caption_drawn_at_random_is_refused_with_the_item_and_the_remedy():
    items = Items(caption=lambda text: random.choice([text, "something else", "a third"]))
    with pytest.raises(
        InputError, match=r"caption of item \d+ of data differs each time .* give all captions .* as a list"
    ):
        as_pairs(items, "data")
    tokens = Items(caption=lambda _: torch.randint(9, (5,)))
    with pytest.raises(InputError, match=r"caption of item 0 of data differs each time"):
        as_pairs(tokens, "data")


def test_reading_a_dataset_leaves_the_callers_generators_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    pairs = as_pairs(Items(lambda values: DRAWN["torch"](DRAWN["random"](DRAWN["numpy"](values)))), "data")
    pairs.image(0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
