"""ZeRO-3 for the student and a live teacher: while they are in use, each rank holds its part and the blocks it runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed.process_group import gather_equal
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import evaluating
from cliperase_fast.tensor_files import Pieces
from cliperase_fast.unlearning.checkpoints import OptimizerState
from cliperase_fast.unlearning.engines.base import MOMENTS
from cliperase_fast.unlearning.engines.deepspeed import ZeroEngine, initialize, ready_to_start, wrapped
from cliperase_fast.unlearning.engines.deepspeed_config import IN_BLOCKS
from cliperase_fast.unlearning.runtime import Runtime

_ROUTED = ("encode_image", "encode_text", "logit_scale")


class Zero3Engine(ZeroEngine):
    """Shards the student itself, whose own parameters are empty from the first `train_mode` to `close`.

    Meanwhile the student's adapter encodes with the sharded weights, and all ranks must call it together, equally often
    (`ClipAdapter.in_step`).
    """

    def __init__(
        self,
        student: ClipAdapter,
        parameters: list[tuple[str, nn.Parameter]],
        config: UnlearnConfig,
        runtime: Runtime,
        zero: dict[str, Any],
    ) -> None:
        super().__init__(student, parameters, config, runtime, zero)
        self.forms = {name: (tensor.shape, tensor.dtype) for name, tensor in self.saved.items()}
        self._frozen: dict[str, Tensor] = {}  # this rank's parts in float32

    def weights(self) -> Pieces | dict[str, Tensor]:
        return self.saved if self._engine is None else Pieces(self.forms, self._whole)

    def state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        def whole(moment: str) -> Pieces:
            return Pieces(
                {name: (self.forms[name][0], torch.float32) for name in self.names},
                lambda name: self._shaped(name, safe_get_full_optimizer_state(self.sharded[name], moment)),
            )

        step = next(iter(self._engine.optimizer.optimizer.state.values()))["step"]
        return OptimizerState(int(step), {moment: whole(moment) for moment in MOMENTS})

    def update_student(self) -> None:
        """Do nothing: the student encodes with the trained weights already."""

    def snapshot(self) -> Any:
        """Return this rank's parts of the weights and of the optimizer's state."""
        inner = self._engine.optimizer.optimizer
        return [
            (flat.detach().clone(), {name: value.clone() for name, value in inner.state[flat].items()})
            for flat in self._flat()
        ]

    def restore(self, snapshot: Any) -> None:
        optimizer = self._engine.optimizer
        optimizer.parameter_offload.partition_all_parameters()  # an evaluation leaves some gathered or on their way
        with torch.no_grad():
            for group, (flat, (weights, state)) in enumerate(zip(self._flat(), snapshot, strict=True)):
                flat.copy_(weights)
                for name, value in state.items():
                    optimizer.optimizer.state[flat][name].copy_(value)
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        small: list[Any] = optimizer.persistent_parameters  # each rank keeps them whole
        if small:
            small[0].all_gather(small)
        self._clear_gradients()
        self.train_mode()

    def close(self) -> None:
        """Give the student whole parameters again: those that are frozen, and room for the trained ones."""
        if self._engine is None:
            return
        frozen = self._frozen
        named: dict[str, Any] = dict(self.training.module.named_parameters())
        parts = {name: frozen.get(name, named[name].ds_tensor) for name in named if name not in self.sharded}
        optimizer = self._engine.optimizer
        super().close()
        _release(optimizer)
        for name in (*_ROUTED, "in_step"):
            vars(self.student).pop(name, None)
        self.sharded, self._frozen, self._front = {}, {}, None
        del named, frozen, optimizer
        gc.collect()  # the sharded model and the optimizer's state, before the whole parameters are allocated
        for name, parameter in self.student.module.named_parameters():
            shape, dtype = self._shapes[name]
            device = self.runtime.device
            if name not in parts:
                parameter.data = torch.empty(shape, dtype=dtype, device=device)
                continue
            part: Tensor = parts.pop(name).to(dtype)
            gathered = torch.empty(self.runtime.ranks.size * part.numel(), dtype=dtype, device=device)
            gather_equal(gathered, part.to(device), dist.group.WORLD)
            parameter.data = gathered[: shape.numel()].reshape(shape)
        self.student.loads_back = False

    def _copy_of_student(self) -> ClipAdapter:
        return self.student.share()

    def _clear_gradients(self) -> None:
        self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def _flat(self) -> Iterator[Tensor]:
        yield from self._engine.optimizer.fp32_partitioned_groups_flat

    def _link_states(self) -> None:
        """Do nothing: DeepSpeed finds them."""

    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        ranks = self.runtime.ranks
        value = part_of(whole.to(self.runtime.device, torch.float32), ranks.rank, ranks.size)
        safe_set_local_optimizer_state(parameter, value, moment)

    def _shard(self, encoders: nn.Module) -> None:
        self._shapes = {name: (p.shape, p.dtype) for name, p in self.student.module.named_parameters()}
        whole = dict(self.student.module.named_parameters())
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        ranks = self.runtime.ranks
        names = {id(parameter): name for name, parameter in self.training.module.named_parameters()}

        def sharded(parameter: nn.Parameter) -> None:
            name = names[id(parameter)]
            if dtype != torch.float32 and not parameter.requires_grad:
                self._frozen[name] = part_of(whole[name], ranks.rank, ranks.size)
            whole[name].data = torch.empty(0, dtype=torch.float32, device=self.runtime.device)

        shard(encoders, self.zero, self.runtime.device, dtype, sharded)
        self._route()

    def _route(self) -> None:
        """Let the student's adapter encode with the sharded weights."""
        student, training = self.student, self.training

        def through(encode: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
            before, self._encoders.encode_image = self._encoders.encode_image, encode
            try:
                return self._encode_image(pixels)
            finally:
                self._encoders.encode_image = before

        def encode_image(pixels: Tensor) -> Tensor:
            with evaluating(training.module), torch.autocast(pixels.device.type, enabled=False):
                return through(training.encode_image, pixels)

        def encode_text(tokens: Tensor) -> Tensor:
            with evaluating(training.module), torch.autocast(self.runtime.device.type, enabled=False):
                return self._encode_text(tokens)

        routes = {"encode_image": encode_image, "encode_text": encode_text, "logit_scale": self._logit_scale}
        vars(student).update(routes, in_step=True)

    def _whole(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if name not in self.sharded:  # a buffer
            return self.saved[name]
        return self._shaped(name, safe_get_full_fp32_param(self.sharded[name]))

    def _shaped(self, name: str, whole: Tensor) -> Tensor:
        return whole.detach().reshape(self.forms[name][0]).cpu()


class ShardedTeacher:
    """A frozen model, sharded over all ranks (ZeRO-3, no optimizer), which encodes as its adapter does."""

    def __init__(self, adapter: ClipAdapter, zero: dict[str, Any], device: torch.device) -> None:
        adapter = adapter.share()
        adapter.module.requires_grad_(False)
        self.module = adapter.module
        offload = {key: value for key, value in zero["zero_optimization"].items() if key == "offload_param"}
        config = {
            "zero_optimization": {"stage": 3, **IN_BLOCKS, **offload},
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 2**31,
        }
        encoders = wrapped(adapter, 3)
        shard(encoders, config, device, torch.float32)
        self._engine = initialize(model=encoders, config=config)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._engine(pixels=pixels)[0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._engine(tokens=tokens)[1]


def shard(
    module: nn.Module,
    zero: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    after: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> None:
    """Divide the parameters of `module` over the ranks, one after another.

    Each is copied first: DeepSpeed writes the first rank's values into its memory, which another module may share.
    after: called once this rank has its part of a parameter.
    """
    import deepspeed

    first: Any = None
    for parameter in module.parameters():
        of = dtype if parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(device, of, copy=True)
        if first is None:
            first = parameter
            with ready_to_start():
                deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
                deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=zero)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
        after(parameter)


def _release(optimizer: Any) -> None:
    """Free the memory of DeepSpeed's optimizer, which hooks of the backward pass keep alive."""
    held = [optimizer.grad_partitions_flat_buffer, *optimizer.fp32_partitioned_groups_flat]
    held += [flat for flat in optimizer.fp16_partitioned_groups_flat if flat is not None]
    for state in optimizer.optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, Tensor)]
    for tensor in held:
        tensor.untyped_storage().resize_(0)


def part_of(whole: Tensor, rank: int, size: int) -> Tensor:
    """Return the part of `whole` that DeepSpeed gives to a rank, padded with zeros to the size of the other parts."""
    flat = whole.detach().reshape(-1)
    count = -(-flat.numel() // size)
    part = flat[count * rank : count * (rank + 1)]
    return nn.functional.pad(part, (0, count - part.numel()))
