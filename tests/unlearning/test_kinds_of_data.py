"""Forget and retain pairs must be of one kind."""

import pytest
import torch
from PIL import Image
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError


def test_forget_and_retain_of_different_kinds_are_refused() -> None:
    forget, retain = split_pairs(make_pairs(), "red")
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match="images of forget are tensors and those of retain are PIL images: give PIL"):
        cf.unlearn(make_tiny_clip(), forget, [(picture, caption) for _, caption in retain], **QUICK)
    tokens = [(image, torch.arange(8)) for image, _ in forget]
    with pytest.raises(InputError, match="captions of forget are 8 token ids and those of retain are texts: give"):
        cf.unlearn(make_tiny_clip(), tokens, retain, **QUICK)
    with pytest.raises(
        InputError, match="captions of forget test are texts and those of retain test are 8 token ids: give"
    ):
        test = (forget, [(image, torch.arange(8)) for image, _ in retain])
        cf.unlearn(make_tiny_clip(), forget, retain, test=test, **QUICK)
