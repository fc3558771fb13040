"""Fifty steps of each trainer with its own loss and with the fused one, and the memory of both losses.

Lightning has no such loss of its own: there the formula with its N x N matrices (the backend "eager") is the other one.

python -m benchmarks.trainers           writes benchmarks/results/trainers.json; then python -m benchmarks.write_docs
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .machine import RESULTS, describe, resident, run_module

STEPS = 50
PAIRS, WIDTH = 8192, 64  # of the memory measurement
LIGHTNING = "Lightning, CLIPErase"
OPEN_CLIP = ("ClipLoss", "DistillClipLoss", "SigLipLoss")
TRANSFORMERS = ("CLIPModel", "SiglipModel")


def open_clip_loss(name: str, fused: bool) -> nn.Module:
    import open_clip.loss

    import cliperase_fast as cf

    return getattr(cf if fused else open_clip.loss, name)()


def extra_arguments(name: str, teacher: tuple[Tensor, Tensor], bias: Tensor) -> dict[str, Any]:
    if name == "DistillClipLoss":
        return {
            "dist_image_features": teacher[0], "dist_text_features": teacher[1], "dist_logit_scale": torch.tensor(20.0),
        }  # fmt: skip
    return {"logit_bias": bias} if name == "SigLipLoss" else {}


def open_clip_curve(name: str, fused: bool) -> list[float]:
    """The losses of two linear towers on random pairs that share a part, in float32."""
    torch.manual_seed(0)
    image_tower, text_tower = nn.Linear(48, 32), nn.Linear(48, 32)
    scale, bias = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.tensor(-5.0))
    optimizer = torch.optim.Adam([*image_tower.parameters(), *text_tower.parameters(), scale, bias], lr=3e-3)
    loss = open_clip_loss(name, fused)
    shared, noise = torch.randn(2048, 48), torch.randn(2, 2048, 48)
    curve = []
    for step in range(STEPS):
        rows = torch.arange(512) + 512 * (step % 4)  # enough pairs that the streamed backend is chosen
        pictures, words = shared[rows] + noise[0, rows], shared[rows] + noise[1, rows]
        teacher = F.normalize(shared[rows] + pictures, dim=1), F.normalize(shared[rows] + words, dim=1)
        losses = loss(
            F.normalize(image_tower(pictures), dim=1), F.normalize(text_tower(words), dim=1), scale.exp(),
            **extra_arguments(name, teacher, bias), output_dict=True,
        )  # fmt: skip
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        curve.append(total.item())
    return curve


def tiny_transformer(name: str) -> Any:
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 32, "max_position_embeddings": 6, "eos_token_id": 31, "bos_token_id": 30, "pad_token_id": 0}
    config = getattr(transformers, name.replace("Model", "Config"))(
        text_config={**tower, **words}, vision_config={**tower, "image_size": 16, "patch_size": 8}
    )
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


def transformers_curve(name: str, fused: bool) -> list[float]:
    """The losses that a transformers Trainer logs, of a tiny model, in float32."""
    import transformers

    from cliperase_fast.integrations.transformers import FusedLossMixin

    model = tiny_transformer(name)
    tokens = torch.randint(1, 30, (64, 6))
    tokens[:, -1] = 31
    data = [{"pixel_values": torch.randn(3, 16, 16) + i % 5, "input_ids": row} for i, row in enumerate(tokens)]
    kind = type("FusedTrainer", (FusedLossMixin, transformers.Trainer), {}) if fused else transformers.Trainer

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, per_device_train_batch_size=16, max_steps=STEPS, learning_rate=1e-3, logging_steps=1, report_to=[],
            save_strategy="no", seed=0, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = kind(model, options, train_dataset=data, data_collator=collate)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Towers(nn.Module):
    """Of `UnlearningModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(48, 32), nn.Linear(48, 32)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images)

    def encode_text(self, texts: Tensor) -> Tensor:
        return self.text(texts)


def lightning_curve(name: str, fused: bool) -> list[float]:
    """The totals of CLIPErase's loss in a Lightning Trainer, 512 pairs to keep and 64 to forget a step, in float32."""
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    import cliperase_fast as cf
    from cliperase_fast.integrations.lightning import UnlearningModule

    torch.manual_seed(0)
    model, shared = Towers(), torch.randn(2304, 48)
    pairs = TensorDataset(shared + torch.randn(2304, 48), shared + torch.randn(2304, 48))
    forget, retain = (torch.utils.data.Subset(pairs, rows) for rows in (range(256), range(256, 2304)))
    curve: list[float] = []

    class Watched(UnlearningModule):
        def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
            total = super().training_step(batch, batch_index)
            curve.append(total.item())
            return total

    loss = cf.CLIPEraseLoss(backend="auto" if fused else "eager")
    module = Watched(model, loss=loss, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, {"forget": DataLoader(forget, 64), "retain": DataLoader(retain, 512)})
    return curve


def compare(name: str, curve: Any) -> dict[str, Any]:
    stock, fused = curve(name, False), curve(name, True)
    assert len(stock) == len(fused) == STEPS
    return {
        "name": name,
        "first": stock[0],
        "last": stock[-1],
        "largest_difference": max(abs(one - other) for one, other in zip(stock, fused, strict=True)),
    }


def loss_step(name: str, fused: bool) -> Callable[[int], None]:
    """One forward and backward of a loss for so many pairs."""
    import cliperase_fast as cf

    def made(n: int) -> list[Tensor]:
        image, text, *teacher = (F.normalize(torch.randn(n, WIDTH), dim=1) for _ in range(4))
        return [image.requires_grad_(), text.requires_grad_(), *teacher]

    if name == LIGHTNING:
        erase = cf.CLIPEraseLoss(backend="auto" if fused else "eager")

        def erase_step(n: int) -> None:
            image, text, *teacher = made(n)
            erase(image[:64], text[:64], image, text, *teacher, 20.0, 20.0).total.backward()

        return erase_step
    loss = open_clip_loss(name, fused)

    def step(n: int) -> None:
        image, text, *teacher = made(n)
        extra = extra_arguments(name, (teacher[0], teacher[1]), torch.tensor(-5.0))
        sum(loss(image, text, torch.tensor(20.0), **extra, output_dict=True).values()).backward()

    return step


def model_step(name: str, fused: bool) -> Callable[[int], None]:
    """One forward and backward of a tiny model of transformers with its loss."""
    from cliperase_fast.integrations.transformers import fuse_loss

    model = tiny_transformer(name)
    if fused:
        fuse_loss(model)

    def step(n: int) -> None:
        tokens = torch.full((n, 6), 31)
        tokens[:, :-1] = torch.randint(1, 30, (n, 5))
        model(input_ids=tokens, pixel_values=torch.randn(n, 3, 16, 16), return_loss=True).loss.backward()

    return step


def print_memory(name: str, fused: bool) -> None:
    """Print the bytes that one forward and backward adds at its peak; in a process of its own."""
    torch.set_num_threads(1)
    step = (model_step if name in TRANSFORMERS else loss_step)(name, fused)
    step(300)  # loads what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    step(PAIRS)
    print(resident("VmHWM") - before)


def memory(name: str, fused: bool) -> int:
    return int(run_module("trainers", "--memory", name, *(["--fused"] if fused else [])).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=(*OPEN_CLIP, *TRANSFORMERS, LIGHTNING), help=argparse.SUPPRESS)
    parser.add_argument("--fused", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory, arguments.fused)
        return
    torch.set_num_threads(1)
    curves = [compare(name, open_clip_curve) for name in OPEN_CLIP]
    curves += [compare(name, transformers_curve) for name in TRANSFORMERS]
    curves.append(compare(LIGHTNING, lightning_curve))
    for run in curves:
        run["memory"] = {"stock": memory(run["name"], False), "fused": memory(run["name"], True)}
    record = {"command": "python -m benchmarks.trainers", **describe(), "steps": STEPS, "pairs": PAIRS, "runs": curves}
    (RESULTS / "trainers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
