"""What touches parameters, gradients and the optimizer; the trainer's loop sees features, terms and numbers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.functional import LossTerms
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.checkpoints import OptimizerState
from cliperase_fast.unlearning.engines.grad_cache import ChunkedFeatures
from cliperase_fast.unlearning.runtime import Runtime

# The losses of image features [M + N, D] and of text features [U, D] of the batch's different captions, at this scale.
Terms = Callable[[Batch, Tensor, Tensor, Tensor], LossTerms]

MOMENTS = ("exp_avg", "exp_avg_sq")  # of each parameter in Adam


class Engine(ABC):
    """Trains `student`. parameters: the trained ones by name.

    On several ranks each has its share of every batch, and the losses' gradients are such that their mean over the
    ranks is the gradient of the whole batch. What an engine saves is whole, by name and the same for every engine and
    number of ranks; all ranks call every method together.
    """

    def __init__(
        self, student: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], config: UnlearnConfig, runtime: Runtime
    ) -> None:
        self.student, self.config, self.runtime = student, config, runtime
        self.training = student  # the model that runs in a step; another one where an engine needs a copy
        self.names = [name for name, _ in parameters]
        self.saved: dict[str, Tensor] = {**dict(parameters), **dict(student.module.named_buffers())}

    def train_mode(self) -> None:
        train_mode(self.training.module)

    def backward(self, batch: Batch, share: float, terms_of: Terms) -> LossTerms:
        """Add `share` of the batch's gradient to the parameters'; the terms are the whole batch's."""
        if self.config.grad_cache_chunk == 0:
            terms = terms_of(batch, *self._encode(batch.pixels, batch.tokens))
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
        terms = terms_of(
            batch, image.features[: len(batch.pixels)], text.features[: len(batch.tokens)], self._logit_scale()
        )
        self._backpropagate(self._scaled(terms.total * share))
        image.backward()
        text.backward()
        return terms

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put saved weights into the student."""
        with torch.no_grad():
            for name, tensor in self.saved.items():
                tensor.copy_(weights[name])

    @abstractmethod
    def step(self, rate: float) -> tuple[Tensor, bool]:
        """(norm of the gathered gradient before clipping, whether it is fit for going on); the gradient is used up."""

    @abstractmethod
    def stepped(self) -> list[tuple[Tensor, Tensor | None]]:
        """What this rank's optimizer steps: float32 weights and, after a step, Adam's first moment of each."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and all buffers, whole."""

    @abstractmethod
    def state(self) -> OptimizerState:
        """Return the state of the optimizer and of the gradient scaler."""

    @abstractmethod
    def load_state(self, state: OptimizerState) -> None: ...

    @abstractmethod
    def update_student(self) -> None:
        """Bring the student's own weights up to date, for whoever looks at them."""

    @abstractmethod
    def close(self) -> None:
        """Training is over: give up all but the student."""

    def make_optimizer(
        self, parameters: Iterable[tuple[nn.Parameter, int]], *, fused: bool = True
    ) -> torch.optim.Optimizer:
        """Adam over (parameter, its dimensions); only matrices decay."""
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.config.optimizer]
        parameters = list(parameters)
        groups = [
            {"params": [p for p, ndim in parameters if ndim >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p, ndim in parameters if ndim < 2], "weight_decay": 0.0},
        ]
        return kind([group for group in groups if group["params"]], lr=self.config.learning_rate, fused=fused)

    @abstractmethod
    def _encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image features, text features and scale."""

    @abstractmethod
    def _encode_image(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _encode_text(self, tokens: Tensor) -> Tensor: ...

    @abstractmethod
    def _logit_scale(self) -> Tensor: ...

    @abstractmethod
    def _backpropagate(self, scalar: Tensor) -> None:
        """Add its gradient to the parameters'."""

    def _scaled(self, loss: Tensor) -> Tensor:
        """Times what keeps gradients of half precision from vanishing; gradients of features then have it too."""
        return loss

    def _chunks(self, *rows: int) -> list[int]:
        """In how many chunks so many rows are encoded."""
        return [-(-count // self.config.grad_cache_chunk) for count in rows]


def train_mode(module: nn.Module) -> None:
    """Dropout on; batch norms keep the original's statistics, which batches rich in forget pairs would shift."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """`rows` [n, ...], the first repeated until there are `count`, so that they can be cut into as many parts."""
    if len(rows) >= count:
        return rows
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])
