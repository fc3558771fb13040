"""The engine: parameters, gradients and the optimizer. The training loop sees only features, terms and numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.functional import LossTerms
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.adapters.base import Tower
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.checkpoints import OptimizerState
from cliperase_fast.unlearning.engines.grad_cache import ChunkedFeatures
from cliperase_fast.unlearning.runtime import Runtime

# Computes the terms from image features [M + N, D], text features [U, D] of the distinct captions, and the scale.
Terms = Callable[[Batch, Tensor, Tensor, Tensor], LossTerms]

# What modules of torch, transformers, timm and open_clip call their rate of dropout.
_RATES = ("p", "dropout", "attention_dropout", "drop_prob", "drop_rate", "prob")

MOMENTS = ("exp_avg", "exp_avg_sq")  # of each parameter in Adam


class Engine(ABC):
    """Trains `student`. parameters: the trained ones by name.

    On several ranks each has its share of every batch, and the mean of the losses' gradients over the ranks is the
    gradient of the whole batch. Saved states are whole and by name, the same for every engine and number of ranks. All
    ranks call every method together.
    """

    def __init__(
        self, student: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], config: UnlearnConfig, runtime: Runtime
    ) -> None:
        self.student, self.config, self.runtime = student, config, runtime
        self.training = student  # the model that runs in a step; some engines need a copy
        self.names = [name for name, _ in parameters]
        self.saved: dict[str, Tensor] = {**dict(parameters), **dict(student.module.named_buffers())}

    def train_mode(self) -> None:
        train_mode(self.training.module, self.config.drops_out)

    def backward(self, batch: Batch, share: float, terms_of: Terms, last: bool = False) -> LossTerms:
        """Add `share` times the gradient of the batch to the parameters'. Returns the terms of the whole batch.

        last: whether it is the last batch before `step`.
        """
        if self.config.grad_cache_chunk == 0:
            terms = terms_of(batch, *self._encode(batch.pixels, batch.tokens))
            if last:
                self._before_last_pass()
            self._backpropagate(self._scaled(terms.total * share))
            return terms
        image, text = (
            ChunkedFeatures(encode, pad_rows(rows, count), count, self.runtime.device, self._backpropagate)
            for encode, rows, count in zip(
                (self._encode_image, self._encode_text),
                (batch.pixels, batch.tokens),
                self._chunks(len(batch.pixels), len(batch.tokens)),
                strict=True,
            )
        )
        scale = self._logit_scale()
        terms = terms_of(batch, image.features[: len(batch.pixels)], text.features[: len(batch.tokens)], scale)
        loss = self._scaled(terms.total * share)
        if scale.requires_grad:
            self._backpropagate(loss)
        else:  # the gradient is only the features', and DeepSpeed refuses a backward pass without parameters
            loss.backward()
        image.backward(lambda: self._before_last_pass("image") if last else None)
        text.backward(lambda: self._before_last_pass("text") if last else None)
        return terms

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy saved weights into the student. Raises KeyError for a name that is missing."""
        missing = set(self.saved)
        with torch.no_grad():
            for name, tensor in weights:
                if name in missing:
                    self.saved[name].copy_(tensor)
                    missing.remove(name)
        if missing:
            raise KeyError(min(missing))

    def snapshot(self) -> Any:
        """Return copies of the trained weights and of the optimizer's state on the CPU, for `restore`."""
        state = self.state()
        moments = {
            moment: {name: _copied(tensor) for name, tensor in tensors.items()}
            for moment, tensors in state.moments.items()
        }
        weights = {name: _copied(tensor) for name, tensor in self.weights().items()}
        return weights, replace(state, moments=moments)

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot, ready to train."""
        self.reset(*snapshot)

    def reset(self, weights: Mapping[str, Tensor], state: OptimizerState) -> None:
        """Go back to these weights and this state of the optimizer, ready to train."""
        self.close()
        self.load_weights(weights.items())
        self.load_state(state)
        self.train_mode()

    @abstractmethod
    def find_front(self, pixels: Tensor) -> bool:
        """Look for frozen first layers of the image tower, in the mode of the steps; return whether there are any.

        pixels: [1, 3, H, W], to try them with; the same on every rank.
        """

    @abstractmethod
    def front_of(self, pixels: Tensor) -> Tensor:
        """Return the output of the frozen layers that were found, [B, ...], for pixels [B, 3, H, W] on the device."""

    @abstractmethod
    def train_from_front(self) -> None:
        """From now on take that output in place of pixels in every step."""

    @abstractmethod
    def step(self, rate: float) -> tuple[Tensor, bool]:
        """Step and clear the gradient. Returns its norm before clipping, and whether training can continue."""

    @abstractmethod
    def stepped(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return what this rank's optimizer steps: float32 weights and, after a step, Adam's first moment of each."""

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Return the trained parameters and all buffers, whole."""

    @abstractmethod
    def state(self) -> OptimizerState:
        """Return the state of the optimizer and of the gradient scaler."""

    @abstractmethod
    def load_state(self, state: OptimizerState) -> None: ...

    @abstractmethod
    def update_student(self) -> None:
        """Copy the trained weights into the student, so that it can be evaluated."""

    @abstractmethod
    def close(self) -> None:
        """End training: release all but the student."""

    def make_optimizer(
        self, parameters: Iterable[tuple[nn.Parameter, int]], *, fused: bool = True
    ) -> torch.optim.Optimizer:
        """Return Adam over (parameter, its number of dimensions); only matrices decay."""
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.config.optimizer]
        parameters = list(parameters)
        groups = [
            {"params": [p for p, ndim in parameters if ndim >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p, ndim in parameters if ndim < 2], "weight_decay": 0.0},
        ]
        # `step` sets the rate before each step.
        return kind([group for group in groups if group["params"]], lr=0.0, fused=fused)

    @abstractmethod
    def _encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features, text features and the scale."""

    @abstractmethod
    def _encode_image(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _encode_text(self, tokens: Tensor) -> Tensor: ...

    @abstractmethod
    def _logit_scale(self) -> Tensor: ...

    @abstractmethod
    def _backpropagate(self, scalar: Tensor) -> None:
        """Add the gradient of `scalar` to the parameters'."""

    @abstractmethod
    def _before_last_pass(self, tower: Tower | None = None) -> None:
        """Prepare for the last backward pass of a step. tower: of this tower's parameters only; None: of all."""

    def _scaled(self, loss: Tensor) -> Tensor:
        """Multiply by the gradient scaler's factor, which gradients of features then have too."""
        return loss

    def _chunks(self, *rows: int) -> list[int]:
        """Return in how many chunks so many rows are encoded."""
        return [-(-count // self.config.grad_cache_chunk) for count in rows]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def train_mode(module: nn.Module, drops_out: bool = True) -> None:
    """Set training mode. Norms keep the original's statistics, which batches rich in forget pairs would shift.

    drops_out: whether modules that drop values at random do so.
    """
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) or not (drops_out or _is_steady(part)):
            part.training = False


def _is_steady(part: nn.Module) -> bool:
    """Return whether a module has no rate of dropout above zero, neither its own nor that of a dropout inside it."""
    modules = (part, *(child for child in part.children() if isinstance(child, nn.modules.dropout._DropoutNd)))
    rates = (getattr(module, name, 0.0) for module in modules for name in _RATES)
    return not any(isinstance(rate, float) and rate > 0 for rate in rates)


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat the first of `rows` [n, ...] until there are `count`, so that they can be split into as many parts."""
    if len(rows) >= count:
        return rows
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])
