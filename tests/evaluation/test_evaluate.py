from __future__ import annotations

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from lookup_model import LookupModel, as_pixels, directions
from PIL import Image

from cliperase_fast.data import as_pairs, open_source
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import evaluate

NAMES = ("red", "green", "blue")
ROWS = directions(4)
CAPTIONS = {f"a {name}": row for name, row in zip(NAMES, ROWS[:3], strict=True)} | {"the longest": ROWS[3]}


@pytest.fixture
def model():
    return LookupModel(CAPTIONS)


def coloured(per_class=4, blue_is_lost=True):
    """Images at their caption; those of "a blue" lie at "a red" when they are to be lost."""
    rows = {"red": ROWS[0], "green": ROWS[1], "blue": ROWS[0] if blue_is_lost else ROWS[2]}
    return [(as_pixels(rows[name]), f"a {name}") for name in NAMES for _ in range(per_class)]


def test_forget_and_retain_are_scored_separately(model):
    scores = evaluate(model, coloured(), forget="class:blue", tokenizer=model.tokenizer)
    assert scores["forget"]["pairs"] == 4
    assert scores["forget"]["zero_shot_top1"] == 0
    assert scores["forget"]["image_to_text_r@1"] == 0
    assert scores["retain"]["pairs"] == 8
    assert scores["retain"]["zero_shot_top1"] == 1
    assert scores["retain"]["image_to_text_r@1"] == 1
    assert scores["per_class"]["blue"] == {"set": "forget", "pairs": 4, "accuracy": 0.0}
    assert scores["per_class"]["red"] == {"set": "retain", "pairs": 4, "accuracy": 1.0}
    json.dumps(scores, allow_nan=False)


def test_a_selector_a_mask_and_a_dataset_name_the_same_forget_pairs(model):
    data = coloured()
    mask = np.array(["blue" in caption for _, caption in data])
    blue = [pair for pair in data if "blue" in pair[1]]
    expected = evaluate(model, data, forget="caption:blue", tokenizer=model.tokenizer)
    for forget in (mask, torch.tensor(mask), mask.tolist(), blue):
        assert evaluate(model, data, forget=forget, tokenizer=model.tokenizer) == expected
    rest = [pair for pair in data if "blue" not in pair[1]]
    assert evaluate(model, rest, forget=blue, tokenizer=model.tokenizer) == expected


def test_without_forget_there_is_one_set(model):
    scores = evaluate(model, coloured(blue_is_lost=False), tokenizer=model.tokenizer)
    assert set(scores) == {"all", "per_class"}
    assert scores["all"]["zero_shot_top1"] == 1
    assert scores["all"]["association"] == pytest.approx(1)


def test_templates_replace_the_class_captions(model):
    # Every class gets another's caption, so nothing is right any more.
    swapped = LookupModel({"a red": ROWS[0], "a green": ROWS[1], "a blue": ROWS[2]}
                          | {"no red": ROWS[1], "no green": ROWS[2], "no blue": ROWS[0]})  # fmt: skip
    data = coloured(blue_is_lost=False)
    assert evaluate(swapped, data, tokenizer=swapped.tokenizer, templates=["no {}"])["all"]["zero_shot_top1"] == 0
    assert evaluate(swapped, data, tokenizer=swapped.tokenizer)["all"]["zero_shot_top1"] == 1


def test_the_model_is_unchanged(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, coloured(), tokenizer=model.tokenizer)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def digits_model():
    torch.manual_seed(0)
    return open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    ).eval()


def test_an_open_clip_model_is_scored_on_a_named_source(digits_model):
    scores = evaluate(digits_model, "demo", forget="class:seven", batch_size=64)
    test = open_source("demo").test
    sevens = int((test.labels == 7).sum())
    assert scores["forget"]["pairs"] == sevens
    assert scores["retain"]["pairs"] == len(test) - sevens
    assert scores["forget"]["gallery_captions"] == 40
    assert list(scores["per_class"]) == list(test.classes)
    assert all(0 <= scores[name]["zero_shot_top1"] <= 1 for name in ("forget", "retain"))
    # An adapter that is told its pairs gives the same.
    assert evaluate(digits_model, test, forget="class:seven", batch_size=np.int64(100))["forget"] == pytest.approx(
        scores["forget"]
    )


def test_a_selector_after_the_source_restricts_it(digits_model):
    scores = evaluate(digits_model, "demo#class:one,two", forget="class:two")
    assert list(scores["per_class"]) == ["one", "two"]


def test_a_file_of_ids_may_hold_those_of_the_training_split(digits_model, tmp_path):
    source = open_source("demo")
    file = tmp_path / "ids.txt"
    file.write_text("".join(f"{name}\n" for name in [*source.train.ids[:3], *source.test.ids[:2]]))
    assert evaluate(digits_model, "demo", forget=f"ids:{file}")["forget"]["pairs"] == 2
    assert evaluate(digits_model, f"demo#ids:{file}")["all"]["pairs"] == 2


def test_long_captions_are_an_error_or_truncated(digits_model):
    data = [(Image.new("RGB", (16, 16), (60 * i, 0, 0)), "red " * 40 if i else "red") for i in range(3)]
    with pytest.raises(InputError, match="context"):
        evaluate(digits_model, data)
    assert evaluate(digits_model, data, long_captions="truncate")["all"]["pairs"] == 3


def broken_image(tmp_path):
    path = tmp_path / "pairs.csv"
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    Image.new("RGB", (4, 4)).save(tmp_path / "fine.png")
    path.write_text(f"filepath\ttitle\n{tmp_path / 'fine.png'}\ta red\n{tmp_path / 'broken.jpg'}\ta green\n")
    return f"csv:{path}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget": "class:purple"}, "purple"),
        ({"forget": "caption:nothing"}, "matches none"),
        ({"forget": np.ones(12, dtype=bool)}, "marks all"),
        ({"forget": np.zeros(12, dtype=bool)}, "marks none"),
        ({"forget": np.ones(5, dtype=bool)}, r"\[12\]"),
        ({"forget": np.ones(12, dtype=int)}, "bool"),
        ({"forget": []}, "empty"),
        ({"forget": coloured()}, "no retain pairs are left"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "64"}, "batch_size='64' must be a whole number"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_workers": None}, "num_workers=None must be a whole number"),
        ({"device": None}, "device='None' is not a valid device"),
        ({"templates": 3}, "templates is a int; give a list"),
        ({"precision": "int3"}, "fp32, bf16, fp16"),
        ({"precision": "fp16", "device": "cpu"}, "GPU"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"long_captions": "ignore"}, "error, truncate"),
        ({"templates": ["a photo"]}, "a photo"),
        ({"templates": []}, "templates is empty"),
        ({"data": []}, "empty"),
        ({"data": "demoo"}, "demo"),
        ({"data": coloured()[:1], "templates": ["a {}"]}, "no classes"),
    ],
)
def test_wrong_arguments_are_named_before_encoding(model, arguments, message):
    arguments = {"data": coloured(), "tokenizer": model.tokenizer, **arguments}
    with pytest.raises(InputError, match=message):
        evaluate(model, **arguments)
    assert model.images_seen == 0
    assert model.captions_seen == []


def test_an_unreadable_image_is_named_before_encoding(model, tmp_path):
    options = {"tokenizer": model.tokenizer, "transform": lambda image: torch.zeros(3, 2, 2)}
    with pytest.raises(InputError, match=r"broken\.jpg"):
        evaluate(model, broken_image(tmp_path), batch_size=1, **options)
    assert model.images_seen == 0
    assert model.captions_seen == []


def test_damaged_weights_are_an_error_not_a_score(model):
    with torch.no_grad():
        model.gain.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"1 of the 144 values of gain.weight"):
        evaluate(model, coloured(), tokenizer=model.tokenizer)


def test_a_pair_dataset_is_accepted(model):
    pairs = as_pairs(coloured(), "data")
    assert evaluate(model, pairs, tokenizer=model.tokenizer) == evaluate(model, coloured(), tokenizer=model.tokenizer)
