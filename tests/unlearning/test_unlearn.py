"""`unlearn()` as a user calls it, on a tiny random CLIP and noisy flat colours."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import QUICK, TwoTowers, make_pairs, make_tiny_clip, split_pairs, tokenize

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearningError
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.unlearning.engines.local import LocalEngine

TOKEN_ROWS = ("token_embedding.rows", "token_embedding.used")  # all that is trained of the table, and which rows


def run(model=None, pairs=None, colour="red", **changes):
    forget, retain = split_pairs(make_pairs() if pairs is None else pairs, colour)
    return cf.unlearn(make_tiny_clip() if model is None else model, forget, retain, **{**QUICK, **changes})


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_callers_model_and_random_state_are_unchanged():
    model = make_tiny_clip().train()
    model.logit_scale.requires_grad_(False)
    before, torch_state = state(model), torch.get_rng_state()
    result = run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.logit_scale.requires_grad
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("settings", [QUICK, {**QUICK, "trainable": "lora"}, {"method": "ssd", "progress": False}])
def test_the_result_is_in_the_modes_of_the_given_model(settings):
    model = make_tiny_clip().train()
    model.visual.eval()
    result = cf.unlearn(model, *split_pairs(make_pairs(), "red"), **settings)
    modes, expected = ({name: part.training for name, part in m.named_modules()} for m in (result.model, model))
    assert modes == expected


def test_the_run_directory_holds_what_the_result_says(tmp_path):
    output = tmp_path / "run"
    result = run(output_dir=output, report=True)
    record = json.loads((output / "result.json").read_text())
    assert record["before"] == result.before
    assert record["after"] == result.after
    for part in ("forget", "retain"):
        for name in ("zero_shot_top1", "image_to_text_r@1", "text_to_image_r@10"):
            assert 0 <= record["after"][part][name] <= 1
    assert {"seconds", "pairs_per_second", "versions", "seed", "per_class", "selection", "data"} <= record.keys()
    assert json.loads((output / "config.json").read_text()) == result.config.to_dict()
    steps = [line for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "total" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    for line in steps:
        assert line["total"] == pytest.approx(line["retain"] + 3 * line["forget"] + 3 * line["consistency"], rel=1e-5)
    assert "<html" in (output / "report.html").read_text().lower()
    assert sorted(path.name for path in (output / "plots").iterdir()) == [
        "embeddings.png", "losses.png", "per_class.png", "similarities.png",
    ]  # fmt: skip
    assert not (output / "cache").exists()


def test_the_saved_model_loads_in_open_clip_with_the_same_features(tmp_path):
    result = run(output_dir=tmp_path / "run")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'model'}")
    pixels = torch.randn(3, 3, 8, 8)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'run' / 'model'}")(["a red square"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_image(pixels), result.model.eval().encode_image(pixels))
        torch.testing.assert_close(model.encode_text(tokens), result.model.encode_text(tokens))


def test_a_result_in_memory_can_be_saved_later(tmp_path):
    result = run()
    result.save(tmp_path / "later")
    assert repr(result) == f"<UnlearnResult of CLIP: {result.verdict.text}>"
    assert json.loads((tmp_path / "later" / "result.json").read_text())["after"] == result.after
    assert (tmp_path / "later" / "metrics.jsonl").read_text().count("\n") == len(result.history)
    (tmp_path / "other" / "config.json").mkdir(parents=True)
    with pytest.raises(cf.UnlearningError, match=r"cannot write .*other: Is a directory"):
        result.save(tmp_path / "other")


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not():
    first, again, other = run(), run(), run(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(state(first.model).values(), state(again.model).values(), strict=True))
    differs = zip(state(first.model).values(), state(other.model).values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in differs)


@pytest.mark.parametrize("cache", ["memory", "disk", "off"])
def test_the_teacher_cache_changes_nothing(tmp_path, cache):
    changes = {"false_negatives": "none", "epochs": 1}
    live = run(teacher_cache="off", **changes)
    cached = run(teacher_cache=cache, output_dir=tmp_path / "run", **changes)
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # weights whose gradient is only rounding differ; what the model computes does not
        torch.testing.assert_close(
            live.model.encode_image(pixels), cached.model.encode_image(pixels), rtol=1e-3, atol=1e-4
        )
    for a, b in zip(live.history, cached.history, strict=True):
        if "total" in a:
            assert a["consistency"] == pytest.approx(b["consistency"], rel=1e-4, abs=1e-6)


def test_a_model_string_and_an_instance_give_the_same_result(tmp_path, monkeypatch):
    load_model(make_tiny_clip()).save(tmp_path / "model")
    copies, clone = [], ClipAdapter.clone
    monkeypatch.setattr(ClipAdapter, "clone", lambda adapter: copies.append(adapter) or clone(adapter))
    for cache, most in (("auto", 0), ("off", 1)):  # a teacher that encodes every batch needs weights of its own
        named = run(f"local-dir:{tmp_path / 'model'}", teacher_cache=cache)
        assert len(copies) == most
        given = run(teacher_cache=cache)
        copies.clear()
        assert named.before == given.before
        for name, tensor in state(given.model).items():
            assert torch.equal(state(named.model)[name], tensor), name


def test_the_result_has_the_modules_of_the_given_model():
    model = make_tiny_clip()
    result = run(model)
    assert [type(part) for part in result.model.modules()] == [type(part) for part in model.modules()]
    assert result.model.state_dict().keys() == model.state_dict().keys()
    used = open_clip.SimpleTokenizer(context_length=8)(["a red square", "a green square", "a blue square"]).unique()
    before, after = model.token_embedding.weight, result.model.token_embedding.weight
    changed = (before != after).any(1).nonzero().flatten()
    assert set(changed.tolist()) == set(used.tolist()) - {0}  # the padding is not read
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_weight_decay_reaches_unused_tokens():
    model = make_tiny_clip()
    result = run(model, optimizer="adamw", weight_decay=0.5)
    ratio = result.model.token_embedding.weight[9] / model.token_embedding.weight[9]
    assert (ratio < 1).all()


def test_a_cached_image_is_transformed_once():
    rows = [(Image.new("RGB", (8, 8), (40 * (i % 6), i, 0)), f"a {c} square") for i in range(12)
            for c in ("red", "blue")]  # fmt: skip
    forget, retain = split_pairs(rows, "red")
    calls = {}

    def transform(image):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        calls[image.tobytes()] = calls.get(image.tobytes(), 0) + 1
        return pixels

    results, most = [], []
    for budget in (64, 0):
        calls.clear()
        results.append(cf.unlearn(make_tiny_clip(), forget, retain, transform=transform, image_cache_mib=budget,
                                  **{**QUICK, "epochs": 4}))  # fmt: skip
        most.append(sorted(calls.values())[-2])  # the last one was tried several times before
    assert most[0] == 2 < most[1]  # each image stands in a red and in a blue pair
    assert all(torch.equal(a, b) for a, b in zip(*(state(result.model).values() for result in results), strict=True))


def test_student_and_teacher_see_the_same_random_views():
    rows = [(Image.fromarray(np.full((8, 8, 3), 40 * i % 255, np.uint8)), f"a {c} square") for i in range(6)
            for c in ("red", "blue")]  # fmt: skip
    forget, retain = split_pairs(rows, "red")

    def jitter(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 + 0.5 * torch.randn(3, 1, 1)

    result = cf.unlearn(make_tiny_clip(), forget, retain, transform=jitter, **QUICK)
    first = next(line for line in result.history if "total" in line)
    assert first["consistency"] == pytest.approx(0, abs=1e-6)  # before any step the student is the teacher
    with pytest.raises(InputError, match="deterministic transform"):
        cf.unlearn(make_tiny_clip(), forget, retain, transform=jitter, teacher_cache="memory", **QUICK)


def test_a_teacher_may_have_another_width():
    teacher = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    result = run(teacher=teacher)
    assert next(line for line in result.history if "total" in line)["consistency"] > 1e-6


@pytest.mark.parametrize(
    ("trainable", "moves", "stays"),
    [
        ("image", "visual.proj", "text_projection"),
        ("text", "text_projection", "visual.proj"),
        ("all", "visual.proj", None),
    ],
)
def test_only_the_chosen_tower_is_trained(trainable, moves, stays):
    model = make_tiny_clip()
    result = run(model, trainable=trainable)
    before, after = state(model), state(result.model)
    assert not torch.equal(before[moves], after[moves])
    assert stays is None or torch.equal(before[stays], after[stays])


def test_lora_is_merged_into_ordinary_weights(tmp_path):
    result = run(trainable="lora", lora_rank=2, output_dir=tmp_path / "run")
    assert result.model.state_dict().keys() == make_tiny_clip().state_dict().keys()
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'model'}")


@pytest.mark.parametrize(
    "options",
    [
        {"forget_loss": "hinge", "margin": 0.1},
        {"forget_loss": "contrastive"},
        {"consistency": "features"},
        {"consistency": "intra"},
        {"lambda_consistency": 0},
        {"precision": "bf16"},
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "grad_clip": 1.0},
        {"accumulate": 2},
        {"epoch_over": "retain", "forget_fraction": 0.25},
        {"num_workers": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_option_trains_to_finite_weights(options):
    result = run(**options)
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    assert result.config.to_dict().items() >= options.items()


def test_tensors_and_token_ids_are_not_transformed():
    tokenize = open_clip.SimpleTokenizer(context_length=8)
    rows = [(image, tokenize([caption])[0]) for image, caption in make_pairs()]
    as_text = run(teacher_cache="memory")
    as_tokens = cf.unlearn(make_tiny_clip(), rows[:12], rows[12:], **QUICK)
    assert as_tokens.after["retain"]["association"] == pytest.approx(as_text.after["retain"]["association"], abs=1e-5)


def test_a_test_set_may_be_given_in_two_parts_or_as_one():
    forget, retain = split_pairs(make_pairs(seed=5), "red")
    parts = run(test=(forget, retain))
    whole = run(test=make_pairs(seed=5))
    assert parts.before["forget"]["pairs"] == whole.before["forget"]["pairs"] == 12
    assert parts.before == whole.before


def test_early_stop_ends_training_without_improvement():
    result = run(epochs=50, learning_rate=1e-9, early_stop=3)
    assert result.selection["stopped_early"]
    assert len([line for line in result.history if "validation" in line]) < 10


def test_cosine_alone_lowers_the_similarity_of_forget_pairs():
    result = run(lambda_retain=0, lambda_consistency=0, epochs=10, retain_floor=1.0)
    assert result.after["forget"]["association"] < result.before["forget"]["association"] - 0.1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(UnlearningError, match=r"not finite at step \d+ .*step-\d+.*learning_rate"):
        run(output_dir=output, learning_rate=1e30, epochs=10, checkpoint_every=1)
    from cliperase_fast.unlearning.checkpoints import load_newest

    assert load_newest(output / "checkpoints") is not None
    assert not (output / "result.json").exists()


def memory_runs_out(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 TiB.")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [({}, r"batch_size \(now 6\), or a grad_cache_chunk"), ({"grad_cache_chunk": 3}, r"grad_cache_chunk \(now 3\)")],
)
def test_a_step_out_of_memory_is_an_error_with_the_remedy(monkeypatch, changes, remedy):
    monkeypatch.setattr(LocalEngine, "_scaled", lambda _, loss: memory_runs_out(loss))
    with pytest.raises(UnlearningError, match=f"out of memory while training step 1: give a smaller .*{remedy}"):
        run(**changes)


def test_a_teacher_out_of_memory_is_not_reported_as_a_shape_error():
    teacher = make_tiny_clip()
    teacher.visual.forward = memory_runs_out
    with pytest.raises(UnlearningError, match=r"out of memory while encoding: .*eval_batch_size"):
        run(teacher=teacher)


class Broken(torch.nn.Module):
    def encode_image(self, pixels):
        return pixels


def nan_model():
    model = make_tiny_clip()
    with torch.no_grad():
        model.visual.proj.fill_(float("nan"))
    return model


GOOD = make_pairs()
RED, REST = split_pairs(GOOD, "red")
BAD_INPUT = {
    "empty forget": ({"forget": []}, "forget set is empty"),
    "empty retain": ({"retain": []}, "retain set is empty"),
    "overlap": ({"retain": REST + RED[:3]}, "3 of the 27 retain pairs.*overlap='drop'"),
    "model without a text tower": ({"model": Broken()}, "encode_text"),
    "weights with NaN": ({"model": nan_model()}, "not finite"),
    "unknown model name": ({"model": "ViT-B-99:openai"}, "ViT-B-"),
    "no such weights": ({"model": "ViT-B-32:/absent/weights.pt"}, "/absent/weights.pt"),
    "image with NaN": ({"forget": [(torch.full((3, 8, 8), float("nan")), "a red square"), *RED]}, "finite"),
    "images of two sizes": ({"retain": [*REST, (torch.zeros(3, 4, 4), "a blue square")]}, r"3, 4, 4|3x4x4"),
    "image without channels": ({"forget": [(torch.zeros(8, 8), "a red square"), *RED]}, "3, H, W"),
    "caption beyond the context": ({"forget": [(RED[0][0], "red " * 30), *RED]}, "long_captions=.truncate"),
    "fp16 on the CPU": ({"precision": "fp16", "device": "cpu"}, "needs a GPU"),
    "absent GPU": ({"device": "cuda:7"}, "cuda:7"),
    "unknown backend": ({"backend": "fastest"}, "fastest"),
    "unknown setting": ({"learning_rat": 1.0}, "learning_rate"),
    "unknown source": ({"forget": "nowhere:/x#class:a", "retain": "rest"}, "nowhere"),
    "source without selector": ({"forget": "demo", "retain": "rest"}, "has no selector: add what to forget"),
    "unknown class": ({"forget": "demo#class:sevn", "retain": "rest"}, "seven"),
    "rest of a dataset": ({"retain": "rest"}, "retain='rest' needs"),
    "test set of one kind": ({"test": REST}, r"test=\(forget_test, retain_test\)"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_wrong_input_is_an_error_before_anything_is_written(tmp_path, changes, says):
    arguments = {"model": make_tiny_clip(), "forget": RED, "retain": REST, **QUICK, **changes}
    model, forget, retain = (arguments.pop(name) for name in ("model", "forget", "retain"))
    with pytest.raises(InputError, match=says):
        cf.unlearn(model, forget, retain, output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_class_is_an_error_before_the_model_is_loaded():
    with pytest.raises(InputError, match="seven"):
        cf.unlearn("ViT-B-32:/absent/weights.pt", "demo#class:sevn", "rest")


def test_overlap_is_dropped_on_request():
    result = cf.unlearn(make_tiny_clip(), RED, REST + RED[:3], overlap="drop", **QUICK)
    plain = cf.unlearn(make_tiny_clip(), RED, REST, **QUICK)
    assert result.record["data"]["retain_pairs"] == plain.record["data"]["retain_pairs"]


def test_long_captions_are_truncated_on_request():
    cf.unlearn(make_tiny_clip(), [(RED[0][0], "red " * 30), *RED], REST, long_captions="truncate", **QUICK)


def test_a_used_folder_is_refused_and_unchanged(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already used"):
        run(output_dir=tmp_path)
    with pytest.raises(InputError, match="nothing to resume"):
        run(output_dir=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unreadable_images_are_named_or_skipped_and_counted(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), colour).save(tmp_path / colour / f"{i}.png")
    (tmp_path / "blue" / "bad.png").write_bytes(b"not an image")
    arguments = (make_tiny_clip(), f"folder:{tmp_path}#class:red", "rest")
    with pytest.raises(InputError, match=r"bad\.png"):
        cf.unlearn(*arguments, **QUICK)
    result = cf.unlearn(*arguments, on_error="skip", **QUICK)
    ((reason, row),) = result.record["data"]["skipped"].items()
    assert reason == "image cannot be decoded" and row["count"] == 1 and "bad.png" in row["example"]
    assert "1 x image cannot be decoded" in result.summary() and "bad.png" in result.summary()


def test_a_generic_two_tower_module_is_unlearned_too():
    model = TwoTowers()
    result = cf.unlearn(copy.deepcopy(model), RED, REST, tokenizer=tokenize, **QUICK)
    assert isinstance(result.model, TwoTowers)
    assert not torch.equal(result.model.visual.weight, model.visual.weight)


def test_a_transformers_model_is_unlearned_and_loads_again(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
            projection_dim=16,
        )
    )

    def tokenize(captions):
        return torch.tensor([[1 + ord(letter) % 60 for letter in caption[2:8]] + [63] for caption in captions])

    result = cf.unlearn(model, RED, REST, tokenizer=tokenize, output_dir=tmp_path / "run", **QUICK)
    again = CLIPModel.from_pretrained(tmp_path / "run" / "model")
    assert again.state_dict().keys() == result.model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(state(again).values(), state(result.model).values(), strict=True))


def test_consistency_of_features_needs_a_teacher_of_the_same_width(tmp_path):
    teacher = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    with pytest.raises(InputError, match="24 wide and the model's 16"):
        run(teacher=teacher, consistency="features", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_for_other_images_is_refused_before_anything_is_written(tmp_path):
    teacher = make_tiny_clip(image_size=16)
    with pytest.raises(InputError, match="same image size"):
        run(teacher=teacher, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_norms_keep_the_originals_statistics():
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    ).eval()
    pairs = [(torch.randn(3, 32, 32), caption) for _, caption in make_pairs()]
    result = run(model, pairs)
    before, after = state(model), state(result.model)
    assert all(torch.equal(before[name], after[name]) for name in before if "running_" in name)


def test_the_result_has_the_weights_of_the_chosen_checkpoint_not_of_the_last(tmp_path):
    # At this rate the scores get no better while the weights run on, so an early look stays the choice.
    result = run(output_dir=tmp_path / "run", epochs=8, learning_rate=3e-2)
    chosen = result.selection["step"]
    assert chosen < max(line["step"] for line in result.history)
    weights = load_file(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert weights.keys() - dict(result.model.named_parameters()) <= {"attn_mask", *TOKEN_ROWS}
    for name, parameter in result.model.named_parameters():
        assert name == "token_embedding.weight" or torch.equal(parameter, weights[name])
    assert torch.equal(result.model.token_embedding.weight[weights[TOKEN_ROWS[1]]], weights[TOKEN_ROWS[0]])
