import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cliperase_fast.data import as_pairs, concat
from cliperase_fast.data.loading import PixelCache, load_batches


def rows(count, offset=0):
    return as_pairs(
        [(Image.new("RGB", (2, 2), (offset + i, 0, 0)), f"image {offset + i}") for i in range(count)], f"rows {offset}"
    )


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_an_image_is_transformed_once_for_all_subsets():
    pairs, transform, cache = concat([rows(3), rows(3, 100)]), Counting(), PixelCache(2**20)
    first = [cache.pixels(pairs, index, transform) for index in range(6)]
    again = [cache.pixels(pairs.subset([4, 1]), index, transform) for index in range(2)]
    assert transform.calls == 6
    assert torch.equal(again[0], first[4])
    assert torch.equal(again[1], first[1])
    assert [int(pixels[0, 0, 0]) for pixels in first] == [0, 1, 2, 100, 101, 102]


def test_no_more_is_kept_than_the_budget_holds():
    pairs, transform = rows(4), Counting()
    cache = PixelCache(3 * 4 * 4 * 2)  # two images [3, 2, 2] of float32
    for _ in range(2):
        for index in range(4):
            assert int(cache.pixels(pairs, index, transform)[0, 0, 0]) == index
    assert transform.calls == 4 + 2


def test_images_make_room_only_for_others_that_would_not_fit():
    wanted, unwanted, transform = rows(2), rows(2, 100), Counting()
    for images in (3, 4):
        cache = PixelCache(3 * 4 * 4 * images)
        for pairs, index in ((unwanted, 0), (unwanted, 1), (wanted, 0)):
            cache.pixels(pairs, index, transform)
        cache.make_room(wanted, unwanted)
        transform.calls = 0
        for index in range(2):
            cache.pixels(wanted, index, transform)
            cache.pixels(unwanted, index, transform)
        assert transform.calls == (3 if images == 3 else 1)


def test_tensors_pass_as_they_are():
    pixels = torch.randn(3, 2, 2)
    pairs = as_pairs([(pixels, "one")], "tensors")
    assert PixelCache(2**20).pixels(pairs, 0, Counting()) is pixels


class InterruptedStart(DataLoader):
    """Gets a SIGINT while its processes start."""

    started = False

    def __iter__(self):
        os.kill(os.getpid(), signal.SIGINT)
        self.started = True
        return iter([])


class Interruptible:
    """Says whether a loader process takes an interruption as usual."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def interruptible():
    """Take interruptions as a command in the foreground does; those in the background of a shell ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_waits_until_the_loader_processes_have_started(interruptible):
    loader = InterruptedStart(rows(1), num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        list(load_batches(loader))
    assert loader.started and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(load_batches(DataLoader(Interruptible(), batch_size=None, num_workers=1))) == [True]
