"""The engine with the whole student on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import GradientExchange
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.adapters.base import Tower
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront
from cliperase_fast.unlearning.checkpoints import OptimizerState
from cliperase_fast.unlearning.engines.base import MOMENTS, Engine
from cliperase_fast.unlearning.runtime import Runtime


class LocalEngine(Engine):
    """Trains the whole student on every rank.

    The ranks' gradients are averaged once per step, after accumulation, while the last backward pass runs (of each
    tower, with cached gradients). DistributedDataParallel does not wrap the methods by which encoders are called.
    """

    def __init__(
        self, student: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], config: UnlearnConfig, runtime: Runtime
    ) -> None:
        super().__init__(student, parameters, config, runtime)
        self.encode_image: Callable[[Tensor], Tensor] = student.encode_image  # or of the activations of a frozen front
        self.front: FrozenFront | None = None
        self.parameters = [parameter for _, parameter in parameters]
        self.towers: list[Tower | None] = ["text"] * len(parameters)  # whose last backward pass is the parameter's last
        if config.grad_cache_chunk:
            self.towers = ["image" if student.tower(name) == "image" else "text" for name in self.names]
        self.exchange = GradientExchange(runtime.ranks, [self._of_tower("image"), self._of_tower("text")])
        self.optimizer = self.make_optimizer((parameter, parameter.ndim) for parameter in self.parameters)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    def find_front(self, pixels: Tensor) -> bool:
        self.train_mode()  # in which the front must not be random
        with torch.no_grad(), self.runtime.autocast():
            self.front = FrozenFront.of(self.student, pixels.to(self.runtime.device))
        return self.front is not None

    def front_of(self, pixels: Tensor) -> Tensor:
        assert self.front is not None
        with torch.no_grad(), self.runtime.autocast():
            return self.front.first(pixels)

    def train_from_front(self) -> None:
        assert self.front is not None
        self.encode_image = self.front.rest

    def step(self, rate: float) -> tuple[Tensor, bool]:
        """Step and clear the gradient. A gradient that is not finite changes no weights; fp16 skips such a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.reduce_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            return norm, False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, True

    def reduce_gradients(self) -> None:
        """Average the gradients over the ranks."""
        if self.runtime.ranks.size > 1:
            self.exchange.finish()

    def stepped(self) -> list[tuple[Tensor, Tensor | None]]:
        state = self.optimizer.state
        return [(p, state[p][MOMENTS[0]] if p in state else None) for p in self.parameters]

    def weights(self) -> Mapping[str, Tensor]:
        return self.saved

    def update_student(self) -> None:
        """Do nothing: the student itself is trained."""

    def close(self) -> None:
        if self.exchange.started:  # by a step that ended before its gradients were needed, on all ranks
            self.exchange.finish()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> OptimizerState:
        known = {
            name: self.optimizer.state[parameter]
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if parameter in self.optimizer.state
        }
        steps = [int(of_parameter["step"]) for of_parameter in known.values()]
        moments = {moment: {name: known[name][moment] for name in known} for moment in MOMENTS}
        return OptimizerState(max(steps, default=0), moments, self.scaler.state_dict())

    def load_state(self, state: OptimizerState) -> None:
        self.optimizer.state.clear()
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in state.moments.get(MOMENTS[0], {}):
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step), dtype=torch.float32, device=parameter.device),
                    **{moment: state.moments[moment][name].to(parameter, copy=True) for moment in MOMENTS},
                }
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)

    # Each call has its own autocast, whose cache would otherwise pass weights that were cast without a graph to a call
    # that needs one.
    def _encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._encode_image(pixels), self._encode_text(tokens), self._logit_scale()

    def _encode_image(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D]
        with self.runtime.autocast():
            return self.encode_image(pixels.to(self.runtime.device, non_blocking=True))

    def _encode_text(self, tokens: Tensor) -> Tensor:  # [U, L] -> [U, D]
        with self.runtime.autocast():
            return self.student.encode_text(tokens)

    def _logit_scale(self) -> Tensor:
        return self.student.logit_scale()

    def _before_last_pass(self, tower: Tower | None = None) -> None:
        if self.runtime.ranks.size > 1:
            self.exchange.start(self._of_tower(tower))

    def _of_tower(self, tower: Tower | None) -> list[nn.Parameter]:
        return [p for p, of in zip(self.parameters, self.towers, strict=True) if tower in (None, of)]

    def _backpropagate(self, scalar: Tensor) -> None:
        scalar.backward()

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)
