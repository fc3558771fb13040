"""Kinds of pairs: forget and retain pairs must be of one, and the model must be able to read them."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import MODELS


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


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_images_of_another_size_than_the_models_are_refused_with_both_sizes(kind):
    model = MODELS[kind]()
    pairs = [(torch.rand(3, 40, 24), torch.tensor([8, 2 + number % 3, 9])) for number in range(9)]
    with pytest.raises(
        InputError, match=r"cannot encode images of shape \(3, 40, 24\) \(Input .*: give tensors of the"
    ):
        cf.unlearn(model, pairs[::3], [*pairs[1::3], *pairs[2::3]], **QUICK)


def test_images_made_in_inference_mode_are_those_made_outside():
    pairs = make_pairs()
    expected = cf.unlearn(make_tiny_clip(), *split_pairs(pairs, "red"), **QUICK)
    with torch.inference_mode():
        pairs = [(image.clone(), caption) for image, caption in pairs]
    found = cf.unlearn(make_tiny_clip(), *split_pairs(pairs, "red"), **QUICK)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
