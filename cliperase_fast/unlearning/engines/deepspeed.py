"""DeepSpeed ZeRO, stages 1 and 2: gradients and the optimizer sharded over the ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.adapters.base import Tower
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront
from cliperase_fast.unlearning.checkpoints import OptimizerState
from cliperase_fast.unlearning.engines.base import MOMENTS, Engine, train_mode
from cliperase_fast.unlearning.runtime import Runtime


@contextmanager
def restore_torch_linear() -> Iterator[None]:
    """Restore torch's linear function on exit, which ZeRO-3 replaces for the whole process."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def initialize(**arguments: Any) -> Any:
    import deepspeed

    with ready_to_start():
        return deepspeed.initialize(**arguments, dist_init_required=False)[0]


@contextmanager
def ready_to_start() -> Iterator[None]:
    """Let DeepSpeed start in any process group, and keep it from compiling an all-reduce on the CPU.

    That takes a minute, only its inference calls it, and it does without if the extension is marked as incompatible.
    """
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # DeepSpeed needs it, whoever made the process group
    known = deepspeed.ops.__compatible_ops__
    name = "deepspeed_shm_comm"
    said = known.get(name, False)
    known[name] = False
    try:
        yield
    finally:
        known[name] = said


class _Encoders(nn.Module):
    """Runs the encoders in a forward pass, as ZeRO-3 gathers parameters there."""

    def __init__(self, adapter: ClipAdapter) -> None:
        super().__init__()
        self.module, self.adapter = adapter.module, adapter
        self.encode_image: Callable[[Tensor], Tensor] = adapter.encode_image  # or a part of it

    def forward(
        self, pixels: Tensor | None = None, tokens: Tensor | None = None, scale: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            None if pixels is None else self.encode_image(pixels),
            None if tokens is None else self.adapter.encode_text(tokens),
            self.adapter.logit_scale() if scale else None,
        )


def wrapped(adapter: ClipAdapter, stage: int, owners: Iterable[nn.Module] = ()) -> _Encoders:
    """Wrap the encoders for DeepSpeed. owners: modules whose own forward passes will not run, see `FrozenFront`."""
    import deepspeed

    encoders = _Encoders(adapter)
    for parameter in adapter.module.parameters():
        if parameter.ndim == 0:  # DeepSpeed's broadcast and partitions want at least one dimension
            parameter.data = parameter.data.reshape(1)
    if stage == 3:
        for owner in (adapter.module, *owners):  # whose parameters are used outside their own forward passes
            for parameter in owner.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(encoders, parameter)
    return encoders


class ZeroEngine(Engine):
    """Trains a sharded copy of `student`, whose own weights are updated on request.

    parameters: the trained ones of `student`, by name. zero: the configuration from `read_deepspeed`.
    """

    def __init__(
        self,
        student: ClipAdapter,
        parameters: list[tuple[str, nn.Parameter]],
        config: UnlearnConfig,
        runtime: Runtime,
        zero: dict[str, Any],
    ) -> None:
        super().__init__(student, parameters, config, runtime)
        self.zero, self.stage = zero, zero["zero_optimization"]["stage"]
        self._dims = {name: parameter.ndim for name, parameter in parameters}
        self._loaded: OptimizerState | None = None
        self._engine: Any = None
        self._encoders: Any = None
        self._probe: Tensor | None = None  # pixels to find the frozen front with
        self._front: FrozenFront | None = None
        self._from_front = False

    def train_mode(self) -> None:
        self._start()
        super().train_mode()

    def find_front(self, pixels: Tensor) -> bool:
        self._probe = pixels.to(self.runtime.device)
        self.train_mode()
        return self._front is not None

    def front_of(self, pixels: Tensor) -> Tensor:
        assert self._front is not None
        before, self._encoders.encode_image = self._encoders.encode_image, self._front.first
        try:
            with torch.no_grad():
                return self._encode_image(pixels)
        finally:
            self._encoders.encode_image = before

    def train_from_front(self) -> None:
        assert self._front is not None
        self._encoders.encode_image, self._from_front = self._front.rest, True

    def step(self, rate: float) -> tuple[Tensor, bool]:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self._clear_gradients()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.runtime.device)
        return norm, bool(torch.isfinite(norm))

    def _clear_gradients(self) -> None:
        """Set the gradients to zero after a step.

        DeepSpeed 0.19 replaces the gradient in a step's first backward pass and adds in later ones, so a parameter
        without a gradient in the first one (as with cached gradients) would keep that of the last step.
        """
        for gradient in getattr(self._engine.optimizer, "accumulated_grads_in_cpu", {}).values():  # offloaded
            gradient.zero_()

    def stepped(self) -> list[tuple[Tensor, Tensor | None]]:
        inner = self._engine.optimizer.optimizer
        return [(flat, inner.state[flat][MOMENTS[0]]) for flat in self._flat()]

    def weights(self) -> Mapping[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self._engine is None:
            return self.saved
        found = {}
        for name, tensor in self.saved.items():
            if name in self.sharded:
                whole = safe_get_full_fp32_param(self.sharded[name])
                found[name] = whole.detach().reshape(tensor.shape).cpu()
            else:
                found[name] = tensor
        return found

    def update_student(self) -> None:
        if self._engine is not None:
            super().load_weights(self.weights().items())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert self._engine is None, "weights are loaded before the sharded copy is made of them, or after `close`"
        super().load_weights(weights)

    def state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        assert self._engine is not None
        moments = {
            moment: {
                name: safe_get_full_optimizer_state(parameter, moment).reshape(self.saved[name].shape).cpu()
                for name, parameter in self.sharded.items()
            }
            for moment in MOMENTS
        }
        step = next(iter(self._engine.optimizer.optimizer.state.values()))["step"]
        return OptimizerState(int(step), moments)

    def load_state(self, state: OptimizerState) -> None:
        self._loaded = state

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = self._encoders = None
            self.training = self.student

    def _copy_of_student(self) -> ClipAdapter:
        return self.student.clone()

    def _shard(self, encoders: nn.Module) -> None:
        """Divide the parameters of the copy over the ranks, if the stage does."""

    def _start(self) -> None:
        if self._engine is not None:
            return
        self.training = self._copy_of_student()
        module = self.training.module
        if self._probe is not None:
            train_mode(module, self.config.drops_out)
            with torch.no_grad():
                self._front = FrozenFront.of(self.training, self._probe)
        encoders = wrapped(self.training, self.stage, self._front.owners if self._front else ())
        self._encoders = encoders
        if self._from_front:
            self.train_from_front()
        self._shard(encoders)
        named = dict(module.named_parameters())
        self.sharded = {name: named[name] for name in self.names}
        optimizer = self.make_optimizer(((self.sharded[name], self._dims[name]) for name in self.names), fused=False)
        self._engine = initialize(model=encoders, optimizer=optimizer, config=copy.deepcopy(self.zero))
        inner = self._engine.optimizer.optimizer
        loaded = self._loaded
        # Created before the first step would: DeepSpeed 0.19 links what `safe_get_full_optimizer_state` reads after the
        # first group's step, when the states of the other groups would not exist yet.
        for flat in self._flat():
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            inner.state[flat] = {
                "step": torch.tensor(float(loaded.step if loaded else 0), dtype=torch.float32, device="cpu"),
                **zeros,
            }
        self._link_states()
        if loaded:
            for moment in MOMENTS:
                for name, parameter in self.sharded.items():
                    if name in loaded.moments.get(moment, {}):
                        self._set_moment(parameter, moment, loaded.moments[moment][name])
        self._loaded = None

    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, whole.to(self.runtime.device, torch.float32).reshape(-1), moment)

    def _link_states(self) -> None:
        """Let DeepSpeed find the optimizer's states by parameter."""
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> Iterator[Tensor]:
        """Yield the flat parts of the master weights that this rank's optimizer steps."""
        yield from self._engine.optimizer.single_partition_of_fp32_groups

    def _encode_image(self, pixels: Tensor) -> Tensor:
        return self._run(pixels=self._pixels(pixels))[0]

    def _encode_text(self, tokens: Tensor) -> Tensor:
        return self._run(tokens=tokens.to(self.runtime.device, non_blocking=True))[1]

    def _encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._run(self._pixels(pixels), tokens.to(self.runtime.device, non_blocking=True), True)

    def _logit_scale(self) -> Tensor:
        return self._run(scale=True)[2]

    def _run(self, *inputs: Any, **named: Any) -> Any:
        return self._engine(*inputs, **named)

    def _pixels(self, pixels: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.config.precision == "bf16" else pixels.dtype
        return pixels.to(self.runtime.device, dtype, non_blocking=True)

    def _before_last_pass(self, tower: Tower | None = None) -> None:
        """Do nothing: DeepSpeed exchanges gradients in every pass."""

    def _backpropagate(self, scalar: Tensor) -> None:
        self._engine.backward(scalar, scale_wrt_gas=False)

    def _chunks(self, *rows: int) -> list[int]:
        """Return the maximum over the ranks, as each chunk gathers parameters or reduces gradients on all of them."""
        return self.runtime.ranks.all_reduce_max(*super()._chunks(*rows))
