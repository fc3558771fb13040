"""One rank of a transformers Trainer, stock and with the fused loss; started by torchrun.

python -m torch.distributed.run --nproc_per_node 2 trainer_ranks.py FOLDER MODEL [TrainingArguments as JSON]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 6


def curves(folder: Path, model: str, ranks: int = 2, **options: Any) -> dict[str, list[float]]:
    """The losses that the stock trainer and the fused one log on `ranks` ranks; options: of TrainingArguments."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", __file__, str(folder), model, json.dumps(options),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "curves.json").read_text())


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration for the CPU."""
    return {
        "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def run_rank(folder: Path, name: str, options: dict[str, Any]) -> None:
    import test_transformers as cases
    import torch
    import transformers

    torch.set_num_threads(1)
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
    if os.environ["RANK"] == "0":
        (folder / "curves.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
