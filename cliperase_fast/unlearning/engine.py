"""What touches parameters, gradients and the optimizer; the trainer's loop sees features, terms and numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.functional import LossTerms
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.chunks import ChunkedFeatures
from cliperase_fast.unlearning.runtime import Runtime

# The losses of image features [M + N, D] and of text features [U, D] of the batch's different captions, at this scale.
Terms = Callable[[Batch, Tensor, Tensor, Tensor], LossTerms]


class LocalEngine:
    """Trains `student` in place, in this process. parameters: the trained ones by name."""

    def __init__(
        self, student: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], config: UnlearnConfig, runtime: Runtime
    ) -> None:
        self.student, self.config, self.runtime = student, config, runtime
        self.parameters = [parameter for _, parameter in parameters]
        self.saved: dict[str, Tensor] = {**dict(parameters), **dict(student.module.named_buffers())}
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    def train_mode(self) -> None:
        """Dropout on; batch norms keep the original's statistics, which batches rich in forget pairs would shift."""
        self.student.module.train()
        for module in self.student.module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def backward(self, batch: Batch, share: float, terms_of: Terms) -> LossTerms:
        """Add `share` of the batch's gradient to the parameters'; the terms are the whole batch's."""
        size = self.config.grad_cache_chunk
        if size == 0:
            image, text = self._encode_image(batch.pixels), self._encode_text(batch.tokens)
            terms = terms_of(batch, image, text, self.student.logit_scale())
            self.scaler.scale(terms.total * share).backward()
            return terms
        chunked_image = ChunkedFeatures(self._encode_image, batch.pixels, size, self.runtime.device)
        chunked_text = ChunkedFeatures(self._encode_text, batch.tokens, size, self.runtime.device)
        terms = terms_of(batch, chunked_image.features, chunked_text.features, self.student.logit_scale())
        self.scaler.scale(terms.total * share).backward()
        chunked_image.backward()
        chunked_text.backward()
        return terms

    def step(self, rate: float) -> tuple[Tensor, bool]:
        """(norm of the gathered gradient before clipping, whether training can go on); the gradient is used up.

        A gradient that is not finite changes no weights. In fp16 it happens now and then: the step is left out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            return norm, False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, True

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and all buffers, whole."""
        return self.saved

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.saved.items():
                tensor.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """What the optimizer and the scaler remember."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    # An autocast of their own for each call: it would otherwise hand the weights it cast without a graph to the
    # encoding that needs one.
    def _encode_image(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D]
        with self.runtime.autocast():
            return self.student.encode_image(pixels.to(self.runtime.device, non_blocking=True))

    def _encode_text(self, tokens: Tensor) -> Tensor:  # [U, L] -> [U, D]
        with self.runtime.autocast():
            return self.student.encode_text(tokens.to(self.runtime.device, non_blocking=True))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.config.optimizer]
        matrices = [parameter for parameter in self.parameters if parameter.ndim >= 2]
        others = [parameter for parameter in self.parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return kind(groups, lr=self.config.learning_rate, fused=True)
