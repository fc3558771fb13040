"""What an item of a dataset may be, and the fix if it is something else."""

import numpy as np
import pytest
import torch
from PIL import Image

from cliperase_fast.data import as_pairs, check_images
from cliperase_fast.errors import InputError

PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ((PICTURE, float("nan")), r"caption of item 1 of data is NaN.*dropna"),
        ((PICTURE, None), r"caption of item 1 of data is a NoneType.*give a str"),
        ((PICTURE, 3), r"caption of item 1 of data is the number 3, a class label"),
        ((PICTURE, "a dog", 3), r"item 1 of data is a tuple of 3; each item must be \(image, caption\)"),
        ({"image": PICTURE, "text": "a dog"}, r"\[\(row\['image'\], row\['text'\]\) for row in dataset\]"),
        ({"img": PICTURE, "label": 3}, r"item 1 of data is a dict with the keys 'img', 'label'.*row\['img'\]"),
    ],
    ids=["nan", "none", "label", "three parts", "dict", "dict of image and label"],
)
def test_a_pair_that_is_something_else_is_named_with_the_remedy(item, says):
    with pytest.raises(InputError, match=says):
        as_pairs([(PICTURE, "a cat"), item], "data")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(1, 4, 4), r"'1' of data is a tensor \[1, 4, 4\].*expand\(3, -1, -1\)"),
        (torch.zeros(4, 4), r"'1' of data is a tensor \[4, 4\].*expand\(3, -1, -1\)"),
        (torch.zeros(4, 5, 3), r"'1' of data is a tensor \[4, 5, 3\].*permute\(2, 0, 1\)"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), r"is a uint8 tensor; .*; pass image\.permute\(1, 2, 0\)\.numpy\(\)"),
        (torch.zeros(2, 3, 4, 4), r"'1' of data is a tensor \[2, 3, 4, 4\]; tensor images must be \[3, H, W\]"),
    ],
)
def test_a_tensor_of_another_form_is_named_with_the_remedy(image, says):
    with pytest.raises(InputError, match=says):
        check_images(as_pairs([(torch.zeros(3, 4, 4), "a cat"), (image, "a dog")], "data"))


def test_an_array_of_pixels_is_an_image():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (np.asarray(as_pairs([(pixels, "a cat")], "data").image(0)) == pixels).all()


class Frame:
    """What pandas' tables and this library look at of each other."""

    columns = ("img", "caption")

    def __init__(self, *columns):
        self.data = dict(zip(self.columns, columns, strict=True))

    def __len__(self):
        return 2

    def __getitem__(self, name):
        return self.data[name]

    def itertuples(self):
        return zip(*self.data.values(), strict=True)


def test_a_table_in_memory_is_refused_with_advice_that_works():
    frame = Frame([PICTURE, PICTURE], ["a dog", "a cat"])
    with pytest.raises(
        InputError, match=r"data is a table \(Frame\) with the columns 'img', 'caption'; .*list"
    ) as caught:
        as_pairs(frame, "data")
    pairs = as_pairs(eval(str(caught.value).rpartition("for example ")[2], {"data": frame}), "data")
    assert pairs.captions == [("a dog",), ("a cat",)]


def test_advice_for_a_tensor_of_pixels_works():
    image = torch.arange(60, dtype=torch.uint8).reshape(3, 4, 5)
    decoded = as_pairs([(image.permute(1, 2, 0).numpy(), "a dog")], "data").image(0)
    assert (torch.from_numpy(np.asarray(decoded).copy()).permute(2, 0, 1) == image).all()
