"""CLIPModel and SiglipModel with the fused loss, patched and in a Trainer, against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
import trainer_ranks
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, Trainer, TrainingArguments

import cliperase_fast as cf
from cliperase_fast.integrations.transformers import FusedLossMixin, fuse_loss, unfuse_loss

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 32, "max_position_embeddings": 6, "eos_token_id": 31, "bos_token_id": 30, "pad_token_id": 0}


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    config = {"text_config": {**SHAPE, **TEXT}, "vision_config": {**SHAPE, "image_size": 16, "patch_size": 8}}
    if kind is CLIPModel:
        return CLIPModel(CLIPConfig(**config, projection_dim=12))
    model = SiglipModel(SiglipConfig(**config))
    with torch.no_grad():
        model.logit_scale.fill_(2.0), model.logit_bias.fill_(-3.0)
    return model


def pairs(count=48):
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 30, (count, 6), generator=g)
    tokens[:, -1] = 31
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=g) + index % 5, "input_ids": row}
        for index, row in enumerate(tokens)
    ]


def batch(count=9):
    found = pairs(count)
    return {key: torch.stack([pair[key] for pair in found]) for key in found[0]}


def gradients(model, **options):
    model.zero_grad()
    output = model(**batch(), return_loss=True, **options)
    output.loss.backward()
    return output, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
def test_return_loss_gives_the_same_loss_and_gradients_and_no_logits(kind):
    model = model_of(kind)
    stock, stock_gradients = gradients(model)
    with cf.patch_transformers_clip():
        fused, fused_gradients = gradients(model)
        asked, _ = gradients(model, return_logits=True)
        plain = model(**batch())
        as_tuple = model(**batch(), return_loss=True, return_dict=False)
    torch.testing.assert_close(fused.loss, stock.loss)
    torch.testing.assert_close(fused_gradients, stock_gradients, rtol=1e-4, atol=1e-5)
    assert fused.logits_per_image is None and fused.logits_per_text is None
    torch.testing.assert_close(fused.text_embeds, stock.text_embeds)
    torch.testing.assert_close(asked.logits_per_image, stock.logits_per_image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.logits_per_text, stock.logits_per_text)
    assert plain.loss is None
    assert as_tuple[0].item() == fused.loss.item()


def test_the_patch_is_undone_idempotent_and_leaves_other_forwards_alone(monkeypatch):
    stock = CLIPModel.forward

    class Mine(CLIPModel):
        def forward(self, *args, **kwargs):
            return "mine"

    with cf.patch_transformers_clip() as patch:
        assert patch.replaced == ["CLIPModel.forward", "SiglipModel.forward"]
        assert cf.patch_transformers_clip().replaced == []
        assert Mine(model_of(CLIPModel).config)() == "mine"
    assert CLIPModel.forward is stock
    cf.unpatch_transformers_clip()
    assert CLIPModel.forward is stock

    def theirs(self):
        return None

    monkeypatch.setattr(CLIPModel, "forward", theirs)
    with cf.patch_transformers_clip() as patch:
        assert CLIPModel.forward is theirs
        assert patch.replaced == ["SiglipModel.forward"]
    with pytest.raises(cf.InputError, match="forward of its own"):
        fuse_loss(model_of(CLIPModel))


def test_a_single_model_can_be_fused_and_copied_and_given_back():
    model = fuse_loss(fuse_loss(model_of(CLIPModel)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.logit_scale.zero_()
    assert twin(**batch(), return_loss=True).loss.item() != model(**batch(), return_loss=True).loss.item()
    assert model(**batch(), return_loss=True).logits_per_image is None
    assert unfuse_loss(model)(**batch(), return_loss=True).logits_per_image is not None
    with pytest.raises(cf.InputError, match="Linear holds 0"):
        fuse_loss(torch.nn.Linear(2, 2))


def test_an_unsupported_version_is_refused_by_the_range(monkeypatch):
    from cliperase_fast.integrations import versions

    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: "4.40.1")
    with pytest.raises(cf.InputError, match=r"transformers 4\.40\.1 .* transformers >=5\.0,<6\.0"):
        cf.patch_transformers_clip()


class FusedTrainer(FusedLossMixin, Trainer):
    pass


def collate(found):
    return {key: torch.stack([pair[key] for pair in found]) for key in found[0]} | {"return_loss": True}


@pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
def test_fifty_steps_of_a_trainer_follow_the_stock_curve(kind, tmp_path):
    curves = {}
    for trainer_kind in (Trainer, FusedTrainer):
        options = TrainingArguments(
            str(tmp_path / trainer_kind.__name__), per_device_train_batch_size=12, max_steps=50, learning_rate=1e-3,
            logging_steps=1, report_to=[], save_strategy="no", seed=3, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = trainer_kind(
            model_of(kind), options, train_dataset=pairs(), eval_dataset=pairs(12), data_collator=collate
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        curves[trainer_kind] = [*losses, trainer.evaluate()["eval_loss"]]
    assert len(curves[Trainer]) == 51
    assert curves[FusedTrainer] == pytest.approx(curves[Trainer], rel=1e-4, abs=1e-4)
    assert curves[FusedTrainer][49] < curves[FusedTrainer][0]


def test_a_compiled_and_checkpointed_model_has_the_same_loss():
    model = fuse_loss(model_of(CLIPModel).train())
    plain, plain_gradients = gradients(model)
    model.gradient_checkpointing_enable()
    checkpointed, checkpointed_gradients = gradients(model)
    torch.testing.assert_close(checkpointed.loss, plain.loss)
    torch.testing.assert_close(checkpointed_gradients, plain_gradients)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch(), return_loss=True).loss, plain.loss)


def test_two_ranks_of_a_trainer_follow_the_stock_curve(tmp_path):
    """DDP as Trainer sets it up; ZeRO, gradient checkpointing and compiled models are in `long_trainers.py`."""
    assert_same_curves(trainer_ranks.curves(tmp_path, "CLIPModel", ddp_backend="gloo"), "DistributedDataParallel")


def assert_same_curves(found, wrapped):
    assert found["wrapped Trainer"] == found["wrapped FusedTrainer"] == wrapped
    assert len(found["Trainer"]) == trainer_ranks.STEPS
    assert found["FusedTrainer"] == pytest.approx(found["Trainer"], rel=1e-4, abs=1e-4)
    assert len(set(found["FusedTrainer"])) == trainer_ranks.STEPS  # it trains
