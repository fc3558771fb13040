"""The DeepSpeed configuration of a run: a stage, a file or a mapping, checked and completed from the settings."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.reading import read_text

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_OLDEST = "0.19.8"
# ZeRO-3 without DeepSpeed's defaults, which keep up to 10^9 gathered weights, and collect 5 * 10^8 gradients.
IN_BLOCKS = {
    "stage3_max_live_parameters": 5 * 10**7,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 10**7,
    "reduce_bucket_size": 10**7,
}


def read_deepspeed(setting: str | Mapping[str, Any], config: UnlearnConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run, completed from `config`.

    setting: a stage's name, a JSON file or a mapping.

    Raises InputError if DeepSpeed is missing, no launcher has started the ranks, or a key contradicts `config`; the
    message names the key.
    """
    _require_deepspeed()
    if ranks.group is None:
        raise InputError(
            "deepspeed needs a process group, and this process was started alone: start it with "
            "`torchrun --nproc_per_node N` or `deepspeed --num_gpus N` (N=1 for one process), or call "
            "torch.distributed.init_process_group() first"
        )
    given = _given(setting)
    _check(given, config, ranks)
    for key in ("optimizer", "train_batch_size"):
        given.pop(key, None)
    zero = given["zero_optimization"]
    completed = {
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is torch's, which runs on the CPU as well
        "steps_per_print": 2**31,
        **given,
        "zero_optimization": {"overlap_comm": False, **zero} if zero["stage"] < 3 else {**IN_BLOCKS, **zero},
        # A step is any number of backward passes, each with its share of the gradient already.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip,
        "bf16": {**given.get("bf16", {}), "enabled": config.precision == "bf16", "check_grad_overflow": True},
    }
    _try(completed)
    return completed


def _require_deepspeed() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed: Any = import_extra("deepspeed", "deepspeed=")
    from packaging.version import Version  # deepspeed brings it

    if Version(deepspeed.__version__) < Version(_OLDEST):
        raise InputError(
            f"deepspeed {deepspeed.__version__} changes the weights by gradients that are not finite, and {_OLDEST} "
            f'does not: pip install "deepspeed>={_OLDEST}"'
        )
    deepspeed.utils.logger.setLevel(logging.WARNING)


def _try(completed: dict[str, Any]) -> None:
    """Raise now what DeepSpeed would raise once everything is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(completed))
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"deepspeed: DeepSpeed refuses the configuration: {error}") from error


def _given(setting: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(setting, Mapping):
        return copy.deepcopy(dict(setting))
    if setting in _STAGES:
        return {"zero_optimization": {"stage": _STAGES[setting]}}
    try:
        text = read_text(setting, 1 << 20)
    except InputError as error:
        raise InputError(
            f"deepspeed={setting!r} is neither one of {', '.join(_STAGES)} nor a readable file ({error})"
        ) from error
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the DeepSpeed configuration {setting} is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"the DeepSpeed configuration {setting} must be a JSON object, not a {type(given).__name__}")
    return given


def _check(given: dict[str, Any], config: UnlearnConfig, ranks: Ranks) -> None:
    if config.precision == "fp16":
        raise InputError("precision='fp16' is not supported with deepspeed; use 'bf16' or 'fp32'")
    zero = given.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise InputError(f"deepspeed: zero_optimization.stage is {stage!r} and must be 1, 2 or 3")
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.pairs_per_batch * config.accumulate, "batch_size x accumulate"),
        "gradient_accumulation_steps": (config.accumulate, "accumulate"),
        "gradient_clipping": (config.grad_clip, "grad_clip"),
        "managed_gradient_accumulation": (False, "steps of its own"),
        "bf16.enabled": (config.precision == "bf16", f"precision={config.precision!r}"),
        "fp16.enabled": (False, f"precision={config.precision!r}"),
        "torch_autocast.enabled": (False, f"precision={config.precision!r}"),
        "bf16.check_grad_overflow": (True, "leaving out a step whose gradient is not finite"),
        "zero_optimization.compute_grad_norm": (True, "the gradient's norm in metrics.jsonl"),
        "optimizer.type": (config.optimizer, "optimizer"),
        "optimizer.params.lr": (config.learning_rate, "learning_rate"),
        "optimizer.params.weight_decay": (config.weight_decay, "weight_decay"),
    }
    micro = given.get("train_micro_batch_size_per_gpu", "auto")
    if micro != "auto" and micro * ranks.size != config.pairs_per_batch:
        raise InputError(
            f"deepspeed: train_micro_batch_size_per_gpu={micro} on {ranks.size} ranks makes batches of "
            f"{micro * ranks.size} pairs, and batch_size={config.pairs_per_batch}; leave the key out"
        )
    for key, (value, setting) in ours.items():
        found = _lookup(given, key)
        same = str(found).lower() == value if isinstance(value, str) else found == value
        if found not in (None, "auto") and not same:
            raise InputError(
                f"deepspeed: {key}={found!r} contradicts {setting}, which makes it {value!r}; leave the key out"
            )
    known = {"optimizer": {"type", "params"}, "optimizer.params": {"lr", "weight_decay"}}
    for section, keys in known.items():
        for key in (_lookup(given, section) or {}).keys() - keys:
            raise InputError(f"deepspeed: {section}.{key} is not supported; leave the key out")
    for part in ("offload_optimizer", "offload_param"):
        if _lookup(given, f"zero_optimization.{part}.device") == "nvme":
            raise InputError(f"deepspeed: zero_optimization.{part}.device='nvme' is not supported; use 'cpu'")
    if stage == 1 and _lookup(given, "data_types.grad_accum_dtype") not in (None, "auto"):
        raise InputError("deepspeed: data_types.grad_accum_dtype is not supported with stage 1; use stage 2")
    if "scheduler" in given:
        raise InputError("deepspeed: scheduler contradicts the settings schedule and warmup_steps; leave the key out")


def _lookup(given: Mapping[str, Any], key: str) -> Any:
    found: Any = given
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
