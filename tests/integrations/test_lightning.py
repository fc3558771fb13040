"""UnlearningModule in a Lightning Trainer."""

from __future__ import annotations

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


def fit(module, folder, **options):
    torch.manual_seed(0)
    loaders = {"forget": DataLoader(pairs([7] * 4), 4), "retain": DataLoader(pairs(range(7)), 7)}
    trainer = Trainer(
        max_steps=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
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
