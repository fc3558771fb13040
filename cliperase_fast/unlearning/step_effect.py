"""Check that steps are large enough to change the weights, once, in the first step at the full learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks
from cliperase_fast.errors import UnlearningError
from cliperase_fast.models import ClipAdapter, lora
from cliperase_fast.unlearning.engines.base import Engine

KEY = "weights_changed"  # of a line of metrics.jsonl
FEW = 0.1  # share of changed weights below which there is a warning
_SAMPLE = 1 << 16  # weights sampled of each tensor


class ChangeMeter:
    """Measures which share of the weights with a gradient a step changes.

    It measures the first step at the full learning rate (after the warm-up) with a nonzero gradient. A share of 0 is an
    `UnlearningError`, and so is a gradient that stays zero for an epoch. A small share is a warning.

    trial: the rate is only tried, so steps that are too small are neither an error nor a warning.
    """

    def __init__(
        self, config: UnlearnConfig, steps_per_epoch: int, total_steps: int, ranks: Ranks, *, trial: bool = False
    ) -> None:
        self.config, self.ranks, self.trial = config, ranks, trial
        self.first = min(max(config.warmup_steps - 1, 0), total_steps - 1)
        self.patience = max(self.first, min(steps_per_epoch, total_steps) - 1)
        self.done = False
        self._before: list[Tensor] | None = None

    def before(self, step: int, engine: Engine) -> None:
        """Sample the weights before a step. step: how many are done."""
        self._before = None
        if not self.done and step >= self.first:
            self._before = [_sample(weights) for weights, _ in engine.stepped()]

    def after(self, step: int, engine: Engine, rate: float, norm: Tensor) -> dict[str, float]:
        """Return what to add to the step's line of metrics; empty unless this step is the measured one."""
        if self._before is None or not torch.isfinite(norm):  # fp16 skipped the step
            return {}
        found = _Tally.of(self._before, engine.stepped(), self.ranks)
        self._before = None
        if found.reached == 0:
            if step >= self.patience:
                why = _no_gradient(self.config)
                raise UnlearningError(f"the gradient was zero in each of {step + 1} steps: {why}")
            return {}
        self.done = True
        if found.changed == 0 and not self.trial:
            why = _too_small(rate, found.median, float(norm))
            raise UnlearningError(f"step {step + 1} changed none of the weights: {why}")
        share = found.changed / found.reached
        if share < FEW and self.ranks.first and not self.trial:
            warnings.warn(few_changed(share, rate), stacklevel=2)
        return {KEY: share}

    def resume(self, metrics: list[dict[str, Any]]) -> None:
        self.done = changed_share(metrics) is not None


@dataclass
class _Tally:
    """How many weights have a gradient, how many of them changed, and the change at which half of them would.

    A weight of exactly 0 takes any change, however small, so such weights count only if no others have a gradient (as
    in the first step of LoRA).
    """

    reached: float
    changed: float
    median: float

    @classmethod
    def of(cls, before: list[Tensor], after: list[tuple[Tensor, Tensor | None]], ranks: Ranks) -> _Tally:
        # rows: weights that were 0, and the others; columns: with a gradient, changed
        counts = torch.zeros(2, 2, dtype=torch.float64, device="cpu")
        resolution = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        for old, (weights, moment) in zip(before, after, strict=True):
            if moment is None or not len(old):
                continue
            share = weights.numel() / len(old)  # how many weights each sampled one stands for
            has_gradient, changed = _sample(moment) != 0, _sample(weights) != old
            for row, members in enumerate((old == 0, old != 0)):
                mine = has_gradient & members
                counts[row, 0] += share * int(mine.sum())
                counts[row, 1] += share * int((mine & changed).sum())
            resolution.append(_half_step(old[has_gradient & (old != 0)]).cpu())
        steps = torch.cat(resolution)
        median = max(ranks.all_gather_numbers(float(steps.median()) if len(steps) else 0.0))
        zeros, others = ([sum(ranks.all_gather_numbers(float(value))) for value in row] for row in counts)
        reached, changed_count = others if others[0] else zeros
        return cls(reached, changed_count, median)


def changed_share(metrics: list[dict[str, Any]]) -> float | None:
    """Return the measured share from the lines of metrics.jsonl, None if there is none yet."""
    line = _measured_line(metrics)
    return None if line is None else line[KEY]


def _measured_line(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((line for line in metrics if KEY in line and "probe" not in line), None)


def few_changed(share: float, rate: float) -> str:
    return (
        f"one step changes only {100 * share:.2g}% of the weights that it has a gradient for: learning_rate={rate:g} "
        "is close to the resolution of float32; raise it if too little is forgotten"
    )


def notes(metrics: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """Return what the result should say about its steps."""
    line = _measured_line(metrics)
    found = [] if line is None or line[KEY] >= FEW else [few_changed(line[KEY], line["learning_rate"])]
    if settings["lambda_forget"] == 0:
        found.append("With lambda_forget=0 no loss pushed the forget pairs apart: what they lost is a side effect")
    return found


def merge_lora(student: ClipAdapter, config: UnlearnConfig) -> None:
    """Merge LoRA's updates into the weights. Raises `UnlearningError` if they are too small to change any."""
    layers: list[Any] = [layer for layer in student.module.modules() if hasattr(layer, "lora_A")]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [_sample(weight) for weight in weights]
    lora.merge_lora(student)
    if weights and all(torch.equal(_sample(weight), old) for weight, old in zip(weights, before, strict=True)):
        raise UnlearningError(
            "LoRA's update is below the resolution of the weights, so merging it changes none of them: raise "
            f"learning_rate (now {config.learning_rate:g}), epochs or lora_alpha"
        )


def _sample(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)].clone()


def _half_step(weights: Tensor) -> Tensor:
    """Return half the distance to the next float32, above which an addition changes the weight."""
    size = weights.abs()
    return (torch.nextafter(size, torch.full_like(size, torch.inf)) - size) / 2


def _too_small(rate: float, median: float, norm: float) -> str:
    if rate < median:
        return (
            f"learning_rate={rate:g} is below the resolution of these float32 weights; half of them would change from "
            f"{median:.1g} on, and 1e-8 to 1e-4 are usual: raise learning_rate"
        )
    return (
        f"the gradient's norm is {norm:g}, which Adam treats as zero: raise lambda_forget and the other weights of the "
        "loss, or check that the model's features depend on its weights"
    )


def _no_gradient(config: UnlearnConfig) -> str:
    if config.lambda_forget == 0:
        return "with lambda_forget=0 nothing pushes the forget pairs apart; set it above 0"
    if config.forget_loss == "hinge":
        return (
            f"every forget pair's cosine is below margin={config.margin:g} already, so the hinge loss has nothing to "
            "push; lower margin, or use forget_loss='cosine'"
        )
    return "the losses do not depend on the trained weights; check the model's encoders and trainable"
