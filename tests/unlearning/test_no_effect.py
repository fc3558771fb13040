"""Runs that cannot forget anything, or did not: refused with the remedy, or said in plain words."""

import pytest
import torch
from tiny import COLOURS, QUICK, TwoTowers, make_pairs, make_tiny_clip, split_pairs, tokenize
from torch import nn

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearningError
from cliperase_fast.config import UnlearnConfig

RED, REST = split_pairs(make_pairs(), "red")


def run(model=None, **changes):
    return cf.unlearn(model or TwoTowers(), RED, REST, **{**QUICK, "tokenizer": tokenize, **changes})


def zero(features):
    return features * 0


def detached(features):
    return features.detach()


def constant(features):
    return features * 0 + torch.arange(8.0)


def own_normalisation(features):
    return zero(features) / zero(features).norm(dim=-1, keepdim=True)


def broken(name, value):
    model = TwoTowers()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    return model


class NoParameters(nn.Module):
    logit_scale = torch.tensor(2.0)

    def encode_image(self, pixels):
        return pixels.flatten(1)

    def encode_text(self, tokens):
        return tokens.float()


class NoText(nn.Module):
    """Its texts have features that nothing trains."""

    def __init__(self):
        super().__init__()
        self.visual, self.logit_scale = nn.Linear(3 * 8 * 8, 16), nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        return self.visual(pixels.flatten(1))

    def encode_text(self, tokens):
        return tokens.float()


class WholeNumbers(nn.Module):
    """Its only floating-point parameter is the scale, which changes no ranking."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.arange(128), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        return pixels.flatten(1)[:, :16]

    def encode_text(self, tokens):
        return self.table[tokens].float()


CANNOT_FORGET = {
    "images of zero": ({"model": TwoTowers(image=zero)}, "encode_image gives features of zero for all"),
    "texts of zero": ({"model": TwoTowers(text=zero)}, "encode_text gives features of zero for all"),
    "zeros normalised": ({"model": TwoTowers(image=own_normalisation)}, "not finite.*normalises features that are all"),
    "one image for all": ({"model": TwoTowers(image=constant)}, "encode_image gives all .* the same features"),
    "one text for all": ({"model": TwoTowers(text=constant)}, "encode_text gives all .* the same features"),
    "both detached": ({"model": TwoTowers(detached, detached)}, "no gradient reaches .* detached"),
    "trained tower detached": (
        {"model": TwoTowers(image=detached), "trainable": "image"}, "no gradient reaches .* encode_image",
    ),
    "no text tower": ({"model": NoText(), "trainable": "text"}, "seems to belong to the text tower"),
    "no parameters": ({"model": NoParameters()}, "without parameters"),
    "only the scale": ({"model": WholeNumbers()}, "no gradient reaches"),
    "a weight of NaN": ({"model": broken("visual.weight", torch.nan)}, r"1 of the 1536 values of visual\.weight"),
    "an infinite weight": ({"model": broken("text.weight", torch.inf)}, r"text\.weight are not finite"),
    "scale of NaN": ({"model": TwoTowers(scale=torch.nan)}, "the model's logit_scale is nan"),
    "infinite scale": ({"model": TwoTowers(scale=torch.inf)}, "the model's logit_scale is inf"),
    "scale that is not a logarithm": ({"model": TwoTowers(scale=100.0)}, r"is 100.*exp\(logit_scale\), is inf"),
    "teacher's scale": ({"teacher": TwoTowers(scale=100.0)}, "the teacher's logit_scale is 100"),
    "teacher's weights": ({"teacher": broken("visual.bias", torch.nan)}, r"the teacher's .* visual\.bias"),
    "images in a type of its own": (
        {"model": TwoTowers(image=lambda features: features.half() @ torch.eye(8))}, "encoders must follow the dtype",
    ),
    "texts in a type of its own": (
        {"model": TwoTowers(text=lambda features: features.half() @ torch.eye(8))}, "encode a caption.*must follow",
    ),
    "rate of zero": ({"learning_rate": 0}, "learning_rate=0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), CANNOT_FORGET.values(), ids=CANNOT_FORGET.keys())
def test_models_that_cannot_forget_are_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        run(output_dir=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 100.0], ids=str)
def test_an_unusable_scale_is_an_error_for_every_kind_of_model(scale):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 128, "max_position_embeddings": 16, "eos_token_id": 32}
    config = CLIPConfig(text_config={**tower, **words}, vision_config={**tower, "image_size": 8, "patch_size": 4})
    for model, options in ((make_tiny_clip(), {"tokenizer": None}), (CLIPModel(config), {})):
        with torch.no_grad():
            model.logit_scale.fill_(scale)
        with pytest.raises(InputError, match="logit_scale is"):
            run(model, **options)
        with pytest.raises(InputError, match="logit_scale is"):
            cf.evaluate(model, RED, progress=False)


def test_a_tower_without_gradient_is_a_warning_and_the_other_is_trained():
    model = TwoTowers(image=detached)
    with pytest.warns(UserWarning, match="no gradient goes through encode_image, so only the text tower"):
        result = run(model)
    assert torch.equal(result.model.visual.weight, model.visual.weight)
    assert not torch.equal(result.model.text.weight, model.text.weight)


def test_parameters_frozen_by_the_caller_are_trained_on_request():
    model = TwoTowers().requires_grad_(False)
    result = run(model)
    assert not torch.equal(result.model.visual.weight, model.visual.weight)


def test_a_rate_below_the_resolution_of_the_weights_is_an_error(tmp_path):
    with pytest.raises(UnlearningError, match=r"step 1 changed none .* learning_rate=1e-20 .* raise learning_rate"):
        run(make_tiny_clip(), tokenizer=None, learning_rate=1e-20, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_rate_close_to_the_resolution_is_a_warning_and_a_note():
    with pytest.warns(UserWarning, match=r"only .*% of the weights .* learning_rate=1e-11"):
        result = run(make_tiny_clip(), tokenizer=None, learning_rate=1e-11)
    (share,) = [line["weights_changed"] for line in result.history if "weights_changed" in line]
    assert 0 < share < 0.1
    assert "changes only" in result.summary()
    assert "changes only" in result.record["notes"][0]


def test_the_papers_smallest_rate_changes_most_weights(recwarn):
    preset = UnlearnConfig.paper("flickr30k")
    assert preset.learning_rate == 1e-8
    result = run(make_tiny_clip(), tokenizer=None, config=preset, epochs=1, learning_rate=1e-8, batch_size=6)
    (share,) = [line["weights_changed"] for line in result.history if "weights_changed" in line]
    assert share > 0.5
    assert not [warning for warning in recwarn if "of the weights" in str(warning.message)]
    assert result.record["notes"] == []


def test_a_lora_update_lost_in_merging_is_an_error(tmp_path):
    with pytest.raises(UnlearningError, match=r"merging it changes none .* learning_rate \(now 1e-20\)"):
        run(make_tiny_clip(), tokenizer=None, trainable="lora", learning_rate=1e-20, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_the_changed_share_is_measured_after_the_warm_up():
    changes = {"learning_rate": 1e-7, "warmup_steps": 3, "epochs": 4}
    result = run(make_tiny_clip(), tokenizer=None, **changes)
    steps = [line["step"] for line in result.history if "weights_changed" in line]
    assert steps == [3]


def test_weights_without_a_gradient_do_not_count_as_unchanged():
    # With weight decay the whole token table is trained, of which the captions use a few rows.
    result = run(make_tiny_clip(), tokenizer=None, optimizer="adamw", weight_decay=1e-12)
    (share,) = [line["weights_changed"] for line in result.history if "weights_changed" in line]
    assert share > 0.9


def test_a_gradient_that_stays_zero_is_an_error_with_the_cause():
    settings = {"lambda_retain": 0, "lambda_consistency": 0, "forget_loss": "hinge", "margin": 1.0}
    with pytest.raises(UnlearningError, match=r"gradient was zero in each of \d+ steps: .*margin=1"):
        run(**settings)


def knowing():
    """A model that recognises every colour: its images have the features of their captions, less what these share."""
    model = TwoTowers()
    with torch.no_grad():
        texts = model.encode_text(tokenize([f"a {colour} square" for colour in COLOURS]))  # [3, 8]
        wanted = (texts - texts.mean(0)).T @ torch.linalg.inv(torch.tensor(list(COLOURS.values())).T)  # [8, 3]
        model.visual.weight.copy_(wanted.repeat_interleave(64, dim=1) / 64)
        model.visual.bias.zero_()
    return model


def test_a_run_that_forgets_nothing_says_what_to_change():
    result = run(knowing(), learning_rate=1e-7)
    assert result.before["forget"]["zero_shot_top1"] == result.after["forget"]["zero_shot_top1"] == 1.0
    assert result.summary().startswith("Not forgotten: ")
    assert "learning_rate (now 1e-07)" in result.summary()
    assert result.record["verdict"]["level"] == "bad"
    result = run(knowing(), lambda_forget=0, learning_rate=1e-7)
    assert "lambda_forget=0 nothing pushes the forget pairs apart" in result.summary()
    assert "what they lost is a side effect" in result.record["notes"][0]


def test_a_run_that_forgets_says_so():
    result = run(knowing(), epochs=10, learning_rate=3e-3, retain_floor=1.0)
    assert result.summary().startswith("Forgotten")
