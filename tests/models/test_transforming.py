"""Transforms as users have them: processors, other floating-point dtypes, and invalid ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import picture, tiny_clip, tiny_open_clip, word_tokenizer
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPProcessor

import cliperase_fast as cf
from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model

FORGET, RETAIN = (
    [(picture(seed), caption) for seed in seeds] for caption, seeds in (("a dog", (0, 1)), ("red", (2, 3)))
)
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "progress": False, "report": False}


def own_processor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def as_tensor(image: Any) -> Tensor:
    return load_model(tiny_open_clip()).transform(image)  # type: ignore[misc]


@pytest.mark.parametrize("whole", [True, False])
def test_a_processor_is_a_transform_wherever_one_is_taken(whole: bool) -> None:
    processor = CLIPProcessor(own_processor(), word_tokenizer()) if whole else own_processor()
    plain = cf.unlearn(tiny_clip(), FORGET, RETAIN, tokenizer=word_tokenizer(), **QUICK)
    given = cf.unlearn(tiny_clip(), FORGET, RETAIN, tokenizer=word_tokenizer(), transform=processor, **QUICK)
    assert given.after == plain.after
    assert isinstance(load_model(tiny_open_clip(), transform=processor).transform(picture()), Tensor)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_another_floating_type_are_encoded(dtype: torch.dtype) -> None:
    def transform(image: Any) -> Tensor:
        return as_tensor(image).to(dtype)

    result = cf.unlearn(tiny_open_clip(), FORGET, RETAIN, transform=transform, **QUICK)
    assert result.after["forget"]["association"] != result.before["forget"]["association"]


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (lambda image: None, "returned a NoneType"),
        (lambda image: as_tensor(image).numpy(), "returned a ndarray"),
        (lambda image: as_tensor(image)[None], r"returned a float32 tensor \[1, 3, 16, 16\]"),
        (lambda image: as_tensor(image).byte(), r"returned a uint8 tensor"),
        (lambda image: image.no_such_method(), r"fails for an image \(AttributeError"),
    ],
)
def test_an_invalid_transform_is_refused_before_any_work(transform: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"{says}.*must turn a PIL image into a float tensor"):
        cf.unlearn(tiny_open_clip(), FORGET, RETAIN, transform=transform, **QUICK)
    with pytest.raises(InputError, match=says):
        cf.evaluate(tiny_open_clip(), FORGET, transform=transform, progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_without_gradients_around_it_trains_and_is_not_saved_over_a_file(mode: Any, tmp_path: Any) -> None:
    plain = cf.unlearn(tiny_open_clip(), FORGET, RETAIN, **QUICK)
    with mode():
        result = cf.unlearn(tiny_open_clip(), FORGET, RETAIN, **QUICK)
    assert result.after == plain.after
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot be saved to \S+taken \(File exists\)"):
        result.save(tmp_path / "taken")
