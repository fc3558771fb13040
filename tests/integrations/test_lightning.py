"""UnlearningModule in a Lightning Trainer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch.utils.data import DataLoader

import cliperase_fast as cf
from cliperase_fast.integrations.lightning import UnlearningModule


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(8, 6), torch.nn.Embedding(10, 6)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode_image(self, images):
        return self.image(images)

    def encode_text(self, texts):
        return self.text(texts)


def pairs(ids):
    return [(F.one_hot(torch.tensor(i % 8), 8).float(), torch.tensor(i)) for i in ids]


def fit(module, folder, max_steps=40, **options):
    torch.manual_seed(0)
    loaders = {"forget": DataLoader(pairs([7] * 4), 4), "retain": DataLoader(pairs(range(7)), 7)}
    trainer = Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, loaders)
    return trainer


def test_it_forgets_and_keeps_and_the_teacher_stays_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = Towers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = UnlearningModule(model, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-2))
    with torch.no_grad():
        forget, retain = (module._features(model, tensors(ids)) for ids in ([7], range(7)))
        start = module.loss(*forget, *retain, *retain, 7.4, 7.4)
    trainer = fit(module, tmp_path)
    end = {name.removeprefix("train/"): value.item() for name, value in trainer.callback_metrics.items()}
    assert end["forget"] < start.forget.item() - 0.3
    assert end["total"] < start.total.item()
    teacher = module._teacher[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(name.startswith("_teacher") or "teacher" in name for name in module.state_dict())


def tensors(ids):
    found = pairs(ids)
    return torch.stack([image for image, _ in found]), torch.stack([text for _, text in found])


def test_a_model_without_two_towers_is_refused_by_the_missing_name():
    with pytest.raises(cf.InputError, match="Linear has no encode_image"):
        UnlearningModule(torch.nn.Linear(2, 2))


class BufferedTowers(Towers):
    """With a buffer, which follows too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.full((8,), 0.25))

    def encode_image(self, images):
        return self.image(images + self.shift)


def losses(module, folder, precision):
    """(total at the first step, total at the last) in a Trainer of this precision."""
    seen = []
    step = module.training_step
    module.training_step = lambda *batch: seen.append(step(*batch)) or seen[-1]
    fit(module, folder, max_steps=8, precision=precision)
    return seen[0].item(), seen[-1].item()


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("32-true", torch.float32, 0),
        ("64-true", torch.float64, 1e-5),
        ("bf16-true", torch.bfloat16, 5e-2),
        ("16-true", torch.float16, 1e-2),
        ("bf16-mixed", torch.float32, 5e-2),
    ],
)
def test_every_precision_of_lightning_trains_with_a_teacher_of_the_modules_dtype(precision, dtype, tolerance, tmp_path):
    def module():
        torch.manual_seed(0)
        return UnlearningModule(BufferedTowers(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=5e-2))

    exact = losses(module(), tmp_path, "32-true")
    ours = module()
    found = losses(ours, tmp_path, precision)
    assert found == pytest.approx(exact, rel=tolerance, abs=tolerance)
    assert {tensor.dtype for tensor in ours._teacher[0].state_dict().values()} == {dtype}
    assert found[1] < found[0] - 0.3


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.float64), lambda m: m.model.double()])
def test_the_teacher_follows_a_module_or_model_that_is_converted_by_hand(move):
    module = UnlearningModule(BufferedTowers())
    module.log_dict = lambda *values, **options: None
    move(module)
    forget, retain = ((images.double(), texts) for images, texts in (tensors([7]), tensors(range(7))))
    total = module.training_step({"forget": forget, "retain": retain}, 0)
    assert total.dtype == torch.float64
    assert {tensor.dtype for tensor in module._teacher[0].state_dict().values()} == {torch.float64}


def test_a_copy_of_the_module_has_a_teacher_of_its_own():
    module = UnlearningModule(Towers())
    twin = copy.deepcopy(module)
    twin._teacher[0].image.weight.data.zero_()
    assert module._teacher[0].image.weight.any()
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again._teacher[0].image.weight, module._teacher[0].image.weight)


def test_a_checkpoint_holds_no_teacher_and_goes_on_with_the_original_one_alone(tmp_path):
    torch.manual_seed(0)
    original = Towers()
    first = UnlearningModule(copy.deepcopy(original), optimizer=sgd)
    trainer = fit(first, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == first.state_dict().keys()
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"model"}
    again = UnlearningModule.load_from_checkpoint(tmp_path / "last.ckpt", model=copy.deepcopy(original), optimizer=sgd)
    assert torch.equal(again.model.image.weight, first.model.image.weight)
    assert torch.equal(again._teacher[0].image.weight, original.image.weight)
    with pytest.raises(cf.InputError, match="not the one that this checkpoint was trained with"):
        UnlearningModule.load_from_checkpoint(tmp_path / "last.ckpt", model=first.model, optimizer=sgd)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=5e-2)


def test_a_teacher_that_shares_weights_with_the_model_is_refused():
    model = Towers()
    with pytest.raises(cf.InputError, match="shares weights with model"):
        UnlearningModule(model, teacher=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_default_optimizer_stays_finite_in_half_precision_and_says_what_it_loses(precision, tmp_path):
    module = UnlearningModule(Towers())
    with pytest.warns(UserWarning, match="mostly lost to rounding; .* precision='bf16-mixed'"):
        found = losses(module, tmp_path, precision)
    assert found == pytest.approx([found[0]] * 2, rel=5e-2)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_an_eps_that_is_zero_in_half_precision_is_warned_of(tmp_path):
    module = UnlearningModule(Towers(), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    module.half()
    with pytest.warns(UserWarning, match=r"Adam's eps=1e-08 is 0 in float16.*pass eps=1e-4"):
        module.configure_optimizers()


def test_models_without_a_part_or_with_another_loss_are_refused():
    class Siglip(Towers):
        logit_bias = torch.tensor(-10.0)

    with pytest.raises(cf.InputError, match="Linear has no encode_image"):
        UnlearningModule(Towers(), teacher=torch.nn.Linear(2, 2))
    for given in ({"model": Siglip()}, {"model": Towers(), "teacher": Siglip()}):
        with pytest.raises(cf.InputError, match="Siglip has a logit_bias"):
            UnlearningModule(**given)
