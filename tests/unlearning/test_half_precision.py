"""Models whose weights are not float32: trained in float32, given back in their own types where these can hold it."""

import json

import open_clip
import pytest
import torch
from open_clip.model import convert_weights_to_lp
from tiny import QUICK, interrupted_after, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast.models import load_model

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
RED, REST = split_pairs(make_pairs(), "red")


def run(model, **changes):
    return cf.unlearn(model, RED, REST, **{**QUICK, "select": "last", **changes})


def forget_change(result):
    return result.after["forget"]["association"] - result.before["forget"]["association"]


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_half_precision_weights_train_like_float32_ones(dtype):
    model = make_tiny_clip().to(dtype)
    same = make_tiny_clip().to(dtype).float()
    here, there = run(model, learning_rate=1e-5), run(same, learning_rate=1e-5)
    assert here.before == there.before
    assert forget_change(here) == pytest.approx(forget_change(there), rel=0.1)
    assert forget_change(there) < -1e-4
    assert next(model.parameters()).dtype == dtype, "the caller's model stays as it was"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_returned_in_the_given_dtype_with_their_own_scores(dtype, tmp_path):
    model = make_tiny_clip().to(dtype)
    test = split_pairs(make_pairs(seed=5), "red")
    result = run(model, learning_rate=3e-3, output_dir=tmp_path / "run", test=test)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert result.record["weights"] == {"given": name, "trained": "float32", "returned": name}
    assert result.record["notes"] == []
    again = cf.evaluate(result.model, test[0] + test[1], forget=[True] * 12 + [False] * 24, progress=False)
    assert again["forget"] == result.after["forget"]
    saved, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'model'}")
    for parameter, mine in zip(saved.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(parameter, mine.float())


def test_untrained_float64_weights_keep_their_bits():
    model = make_tiny_clip().double()
    with torch.no_grad():
        model.visual.proj.add_(1e-12)
    result = run(model, trainable="text")
    assert torch.equal(result.model.visual.proj, model.visual.proj)
    assert not torch.equal(result.model.text_projection, model.text_projection)


def test_rounding_that_would_undo_the_change_is_skipped_with_a_note():
    result = run(make_tiny_clip().bfloat16(), learning_rate=1e-6, epochs=1)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert result.record["weights"]["returned"] == "float32"
    assert "returned in float32: rounded to bfloat16" in result.record["notes"][0]
    assert "returned in float32" in result.summary()
    assert forget_change(result) < 0


def test_weights_of_mixed_dtypes_are_returned_and_saved_in_their_own(tmp_path):
    model = make_tiny_clip()
    convert_weights_to_lp(model, torch.float16)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(before.values()) == {torch.float16, torch.float32}
    result = run(model, learning_rate=3e-3)
    assert {name: parameter.dtype for name, parameter in result.model.named_parameters()} == before
    result.save(tmp_path / "run")
    load_model(result.model).save(tmp_path / "model")  # whose configuration is to be found first
    for folder in (tmp_path / "run" / "model", tmp_path / "model"):
        saved, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        for parameter, mine in zip(saved.parameters(), result.model.parameters(), strict=True):
            assert torch.equal(parameter, mine.float())
    converted = cf.export.to_transformers(result.model)
    assert torch.equal(converted.visual_projection.weight, result.model.visual.proj.T.float())


def test_lora_and_a_half_precision_teacher_train_in_float32_too():
    result = run(make_tiny_clip().bfloat16(), teacher=make_tiny_clip(1).half(), trainable="lora", learning_rate=3e-2)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.model.state_dict().keys() == make_tiny_clip().state_dict().keys()


def test_an_interrupted_half_precision_run_resumes_to_the_same_bits(tmp_path):
    model = make_tiny_clip().bfloat16()
    whole = run(model, learning_rate=3e-3)
    settings = {"learning_rate": 3e-3, "output_dir": tmp_path / "run"}
    with interrupted_after(2):
        run(model, **settings)
    again = run(model, **settings, resume=True)
    for mine, theirs in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_transformers_model_and_its_folder_give_the_same_result(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    ).bfloat16()  # fmt: skip
    model.save_pretrained(tmp_path / "hf")

    def tokenize(captions):
        return torch.tensor([[1 + ord(letter) % 60 for letter in caption[2:8]] + [63] for caption in captions])

    instance = CLIPModel.from_pretrained(tmp_path / "hf", dtype="auto")
    assert instance.dtype == torch.bfloat16
    here = run(instance, tokenizer=tokenize, learning_rate=1e-5)
    there = run(str(tmp_path / "hf"), tokenizer=tokenize, learning_rate=1e-5)
    assert here.before == there.before
    assert forget_change(here) == pytest.approx(forget_change(there), rel=0.1)
    out = run(instance, tokenizer=tokenize, learning_rate=1e-2, output_dir=tmp_path / "run")
    assert CLIPModel.from_pretrained(tmp_path / "run" / "model").dtype == out.model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "run" / "result.json").read_text())["weights"]["returned"] == "bfloat16"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluate_scores_weights_of_any_dtype_in_float32(dtype):
    model = make_tiny_clip().to(dtype)
    options = {"forget": [True] * 12 + [False] * 24, "progress": False}
    assert cf.evaluate(model, RED + REST, **options) == cf.evaluate(
        make_tiny_clip().to(dtype).float(), RED + REST, **options
    )
    assert next(model.parameters()).dtype == dtype


def test_the_adapter_of_float32_weights_is_not_copied():
    from cliperase_fast.models.runtime import in_float32

    adapter = load_model(make_tiny_clip())
    assert in_float32(adapter) is adapter
