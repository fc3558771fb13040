"""A transformers Trainer with the fused loss on two ranks, however it wraps the model; part of `make long-check`."""

from __future__ import annotations

import pytest
import trainer_ranks
from test_transformers import assert_same_curves

WAYS = {
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


@pytest.mark.parametrize("model", ["CLIPModel", "SiglipModel"])
@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_the_stock_trainers(way, model, tmp_path):
    options, wrapped = WAYS[way]
    assert_same_curves(trainer_ranks.curves(tmp_path, model, **options), wrapped)
