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


KINDS = pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])


def fields(output):
    """(name, value) of an output and of those inside it, in their order."""
    for name, value in output.items():
        yield from (
            ((f"{name}.{inner}", part) for inner, part in value.items()) if hasattr(value, "items") else [(name, value)]
        )


def assert_same_outputs(ours, stock):
    ours, stock = list(fields(ours)), list(fields(stock))
    assert [name for name, _ in ours] == [name for name, _ in stock]
    for (name, value), (_, right) in zip(ours, stock, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@KINDS
def test_return_loss_gives_the_same_loss_gradients_and_outputs(kind):
    model = model_of(kind)
    stock, stock_gradients = gradients(model)
    with cf.patch_transformers_clip():
        fused, fused_gradients = gradients(model)
        asked, _ = gradients(model, return_logits=True)
        plain = model(**batch())
    torch.testing.assert_close(fused.loss, stock.loss)
    torch.testing.assert_close(fused_gradients, stock_gradients, rtol=1e-4, atol=1e-5)
    assert_same_outputs(asked, stock)
    torch.testing.assert_close(plain.logits_per_text, stock.logits_per_text)
    assert plain.loss is None


WAYS_TO_READ = {
    "attribute": lambda output: (output.logits_per_image, output.logits_per_text),
    "name": lambda output: (output["logits_per_image"], output["logits_per_text"]),
    "get": lambda output: (output.get("logits_per_image"), output.get("logits_per_text")),
    "position": lambda output: (output[1], output[2]),
    "slice": lambda output: output[1:3],
    "tuple": lambda output: output.to_tuple()[1:3],
    "copy": lambda output: copy.copy(output)[1:3],
    "getattr": lambda output: [getattr(output, name) for name in ("logits_per_image", "logits_per_text")],
}


@KINDS
@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_logits_are_formed_when_they_are_read_and_not_before(way, kind):
    model = model_of(kind)
    stock = model(**batch(), return_loss=True)
    fused = fuse_loss(model)(**batch(), return_loss=True)
    assert fused[0] is fused.loss is fused["loss"]
    assert not {"logits_per_image", "logits_per_text"} & {*fused.keys(), *vars(fused)}
    torch.testing.assert_close(tuple(WAYS_TO_READ[way](fused)), tuple(WAYS_TO_READ[way](stock)), rtol=1e-5, atol=1e-6)
    assert_same_outputs(fused, stock)


def test_logits_that_are_read_have_gradients_and_the_scale_of_the_forward_pass():
    model = model_of(CLIPModel)
    found = []
    for output in (model(**batch(), return_loss=True), fuse_loss(model)(**batch(), return_loss=True)):
        (gradient,) = torch.autograd.grad(output.logits_per_text.sum(), [model.logit_scale], retain_graph=True)
        found.append((output.logits_per_text.detach(), gradient))
    torch.testing.assert_close(found[1], found[0])
    output = model(**batch(), return_loss=True)
    with torch.no_grad():
        model.logit_scale.zero_()  # an optimizer's step before the reading
    torch.testing.assert_close(output.logits_per_text, found[0][0], check_stride=False)


@KINDS
def test_a_tuple_has_transformers_order(kind):
    model = model_of(kind)
    stock = model(**batch(), return_loss=True, return_dict=False)
    fused = fuse_loss(model)(**batch(), return_loss=True, return_dict=False)
    assert len(fused) == len(stock) == 7
    torch.testing.assert_close(fused[:5], stock[:5], rtol=1e-5, atol=1e-6)


def test_under_autocast_logits_that_are_read_after_it_are_those_of_transformers():
    model = model_of(CLIPModel)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        stock, fused = model(**batch(), return_loss=True), fuse_loss(model)(**batch(), return_loss=True)
    assert fused.logits_per_image.dtype == stock.logits_per_image.dtype
    torch.testing.assert_close(fused.logits_per_image, stock.logits_per_image)


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
    with pytest.raises(cf.InputError, match="has its own forward"):
        fuse_loss(model_of(CLIPModel))


def test_a_single_model_can_be_fused_and_copied_and_given_back():
    model = fuse_loss(fuse_loss(model_of(CLIPModel)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.logit_scale.zero_()
    assert twin(**batch(), return_loss=True).loss.item() != model(**batch(), return_loss=True).loss.item()
    assert "logits_per_image" not in model(**batch(), return_loss=True)
    assert "logits_per_image" in unfuse_loss(model)(**batch(), return_loss=True)
    with pytest.raises(cf.InputError, match="Linear holds 0"):
        fuse_loss(torch.nn.Linear(2, 2))


def test_an_unsupported_version_is_refused_by_the_range(monkeypatch):
    from cliperase_fast import extras

    monkeypatch.setattr(extras.importlib.metadata, "version", lambda package: "4.40.1")
    with pytest.raises(cf.InputError, match=r"transformers 4\.40\.1 is not supported: .*transformers>=5\.0,<6\.0"):
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
    """DDP as Trainer sets it up."""
    assert_same_curves(trainer_ranks.curves(tmp_path, "CLIPModel", ddp_backend="gloo"), "DistributedDataParallel")


def assert_same_curves(found, wrapped):
    assert found["wrapped Trainer"] == found["wrapped FusedTrainer"] == wrapped
    assert len(found["Trainer"]) == trainer_ranks.STEPS
    assert found["FusedTrainer"] == pytest.approx(found["Trainer"], rel=1e-4, abs=1e-4)
    assert len(set(found["FusedTrainer"])) == trainer_ranks.STEPS  # it trains


WRAPPINGS = {
    "gradient checkpointing": ({"ddp_backend": "gloo", "gradient_checkpointing": True}, "DistributedDataParallel"),
    "accumulation": ({"ddp_backend": "gloo", "gradient_accumulation_steps": 2}, "DistributedDataParallel"),
    "compiled": (
        # traced and run as it is, without a C++ compiler in each process
        {"ddp_backend": "gloo", "torch_compile": True, "torch_compile_backend": "aot_eager"},
        "OptimizedModule",
    ),
    "ZeRO 2, accumulation": (
        {"deepspeed": trainer_ranks.zero(2), "gradient_accumulation_steps": 2},
        "DeepSpeedEngine",
    ),
    **{f"ZeRO {stage}": ({"deepspeed": trainer_ranks.zero(stage)}, "DeepSpeedEngine") for stage in (1, 2, 3)},
}


@pytest.mark.long
@pytest.mark.parametrize("model", ["CLIPModel", "SiglipModel"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_two_ranks_follow_the_stock_curve_however_the_trainer_wraps_the_model(wrapping, model, tmp_path):
    options, wrapped = WRAPPINGS[wrapping]
    assert_same_curves(trainer_ranks.curves(tmp_path, model, **options), wrapped)


def trainer_of(trainer_kind, kind, folder, with_loss=True, compute_metrics=None, **options):
    """On 21 pairs in batches of 8: the last one is short."""
    found = {"per_device_eval_batch_size": 8, **options}
    arguments = TrainingArguments(
        str(folder), report_to=[], save_strategy="no", seed=3, use_cpu=True, disable_tqdm=True, **found
    )
    return trainer_kind(
        model_of(kind), arguments, eval_dataset=pairs(21), compute_metrics=compute_metrics,
        data_collator=collate if with_loss else lambda rows: {**collate(rows), "return_loss": None},
    )  # fmt: skip


def assert_same_predictions(ours, stock):
    assert len(ours) == len(stock) == 6
    for mine, theirs in zip(ours, stock, strict=True):
        if hasattr(theirs, "shape"):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        else:
            assert mine.keys() == theirs.keys()
            assert all(mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5) for name in theirs)


@KINDS
@pytest.mark.parametrize("options", [{}, {"bf16_full_eval": True, "eval_accumulation_steps": 1}])
@pytest.mark.parametrize("with_loss", [True, False])
def test_predictions_and_what_metrics_see_are_those_of_the_stock_trainer(with_loss, options, kind, tmp_path):
    seen = {}

    def metrics_of(name):
        def metrics(found):
            seen[name] = found.predictions
            return {"first": float(found.predictions[0].sum())}

        return metrics

    evaluated, predicted = {}, {}
    for trainer_kind in (Trainer, FusedTrainer):
        metrics = metrics_of(trainer_kind)
        evaluated[trainer_kind] = trainer_of(
            trainer_kind, kind, tmp_path, with_loss, compute_metrics=metrics, **options
        ).evaluate()
        predicted[trainer_kind] = trainer_of(trainer_kind, kind, tmp_path, with_loss, **options).predict(pairs(21))
    assert_same_predictions(predicted[FusedTrainer].predictions, predicted[Trainer].predictions)
    if not with_loss:  # of which the stock trainer makes neither a loss nor metrics
        assert_same_predictions(seen[FusedTrainer], predicted[Trainer].predictions)
        return
    assert_same_predictions(seen[FusedTrainer], seen[Trainer])
    assert predicted[FusedTrainer].label_ids == predicted[Trainer].label_ids
    assert evaluated[FusedTrainer]["eval_first"] == pytest.approx(evaluated[Trainer]["eval_first"], rel=1e-4)
    tolerance = 2e-2 if "bf16_full_eval" in options else 1e-5  # transformers rounds its logits to bfloat16
    assert evaluated[FusedTrainer]["eval_loss"] == pytest.approx(evaluated[Trainer]["eval_loss"], rel=tolerance)


@KINDS
def test_no_logits_are_formed_where_no_predictions_are_wanted(kind, tmp_path, monkeypatch):
    from cliperase_fast.integrations import transformers_output

    formed = []
    form = transformers_output._Fused.form_logits
    monkeypatch.setattr(
        transformers_output._Fused, "form_logits", lambda self: formed.append("_pending" in vars(self)) or form(self)
    )
    trainer = trainer_of(FusedTrainer, kind, tmp_path, per_device_train_batch_size=8, max_steps=2)
    trainer.train_dataset = pairs(21)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer_of(FusedTrainer, kind, tmp_path, compute_metrics=lambda found: {}, prediction_loss_only=True).evaluate()
    assert not any(formed)
    trainer.predict(pairs(21))
    assert sum(formed) == 3
