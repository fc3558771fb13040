"""A transformers Trainer on ranks, stock and with the fused loss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from processes import launched

STEPS = 6


def curves(folder: Path, model: str, ranks: int = 2, **options: Any) -> dict[str, list[float]]:
    """The losses that the stock trainer and the fused one log on `ranks` ranks; options: of TrainingArguments."""
    return launched(ranks, folder, run_rank, folder, model, options)[0]


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration for the CPU."""
    return {
        "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def run_rank(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    import test_transformers as cases
    import torch
    import transformers

    # both before the arguments, in whose presence ZeRO 3 shards what is made
    models = [cases.model_of(getattr(transformers, name)).train() for _ in range(2)]
    if "deepspeed" in options:
        for parameter in (parameter for model in models for parameter in model.parameters()):
            if parameter.ndim == 0:  # DeepSpeed's broadcast wants at least one dimension, with any trainer
                parameter.data = parameter.data.reshape(1)
    found = {}
    for trainer_kind, model in zip((transformers.Trainer, cases.FusedTrainer), models, strict=True):
        arguments = transformers.TrainingArguments(
            str(folder / trainer_kind.__name__), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=1e-3,
            logging_steps=1, report_to=[], save_strategy="no", seed=3, use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = trainer_kind(model, arguments, train_dataset=cases.pairs(), data_collator=cases.collate)
        trainer.train()
        assert arguments.world_size == int(os.environ["WORLD_SIZE"])
        wrapped = type(trainer.model_wrapped).__name__
        found[trainer_kind.__name__] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[f"wrapped {trainer_kind.__name__}"] = wrapped
    torch.distributed.destroy_process_group()
    return found
