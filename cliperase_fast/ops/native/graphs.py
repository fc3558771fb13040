"""Run the sweep of the backend "native" on a GPU from CUDA graphs, in blocks that fit the L2 cache.

A block of S, S° and dS is written and soon read again. In the L2 cache this causes no traffic with the GPU's memory,
but the blocks are then so many that Python takes longer to launch their kernels than the GPU to run them. So each pass
is captured into a graph on its first call, and replayed from then on: the inputs are copied into tensors of the graph,
and the results out of them. CLIPERASE_CUDA_GRAPHS=1 selects this.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.matmul import float32_precision
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.spec import Need, SavedStats, SimilarityInputs, Stats, Weights

_L2_SHARE = 0.5  # of the L2 cache, for a block; features and gradients pass through it too
_MOST_GRAPHS = 8  # of a device, those used last: the two passes of four kinds of batches

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]


class Captured(Protocol):
    """What `torch.cuda.CUDAGraph` has."""

    def replay(self) -> None: ...
    def pool(self) -> Any: ...  # the memory of the graph


class GpuCapture:
    """Captures passes on one device. Calls wait for the device."""

    def __init__(self, device: torch.device) -> None:
        # Not one stream for both: cuBLAS's workspace of the stream that is captured then lies in the graphs' memory.
        self._warm, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def __call__(self, run: Run, pool: Any) -> tuple[Captured, Tensors]:
        """Return a graph of `run`, in the memory `pool` or in its own, and the tensors that hold the results."""
        current = torch.cuda.current_stream(self._warm.device)
        self._warm.wait_stream(current)
        with torch.cuda.stream(self._warm):
            run()  # libraries initialise themselves on their first call, which cannot be captured
        current.wait_stream(self._warm)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
            results = run()
        return graph, results


Capture = Callable[[torch.device], Callable[[Run, Any], tuple[Captured, Tensors]]]


def capturing(device: torch.device) -> bool:
    """Return whether the current stream is captured already, so that no other capture may begin."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GraphedKernels:
    """Implement `ops.spec.SweepKernels` with replayed graphs of `CudaKernels`.

    A graph serves one combination of shapes, dtypes, device and options. Calls of all streams and threads take turns.
    Similarities that are kept would be copied into a graph and out of it: keep="auto" keeps nothing here, and other
    values of `keep` are computed as without graphs. So are shards of a batch.
    """

    def __init__(
        self,
        kernels: Any = None,
        name: str = "native_cuda_graphs",
        block_columns: int = 0,
        block_bytes: int = 0,
        capture: Capture = GpuCapture,
    ) -> None:
        """Take the arguments of `CudaKernels`; block_bytes 0: a share of the L2 cache."""
        self.name = name
        self._plain = CudaKernels(kernels, name, block_columns)
        self._kernels, self._block_columns, self._block_bytes = kernels, block_columns, block_bytes
        self._capture = capture
        self._devices: dict[torch.device, _Device] = {}

    def cache_size(self, inputs: SimilarityInputs) -> int:
        return 0 if inputs.keep == "auto" else self._plain.cache_size(inputs)

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        return self._plain.forward(inputs, cache_size)

    def losses(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if cache_size:
            return self._plain.losses(inputs, cache_size)
        names, tensors, options = _parts(inputs)

        def run(small: CudaKernels, *given: Tensor) -> Tensors:
            return small.losses(_with(inputs, names, given), 0)

        retention, consistency, saved, cache = self._run(("forward", names, options), run, tensors)
        return retention, consistency, saved, cache

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        if partial or len(saved.cache) > 0:
            return self._plain.backward(inputs, saved, weights, need, partial)
        names, tensors, options = _parts(inputs)

        def run(small: CudaKernels, *given: Tensor) -> Tensors:
            *features, both, retention, consistency, cache = given
            saved_stats, weights = SavedStats(both, inputs.n, cache), Weights(retention, consistency)
            return small.backward(_with(inputs, names, features), saved_stats, weights, need)

        tensors = [*tensors, saved.both, *weights, saved.cache]
        image, text, scale = self._run(("backward", names, options, need), run, tensors)
        return image, text, scale

    def clear(self) -> None:
        """Release all graphs and their memory."""
        for device in list(self._devices.values()):
            device.clear()

    def _run(self, key: tuple[Any, ...], run: Callable[..., Tensors], tensors: Sequence[Tensor]) -> Tensors:
        """Return the results of `run(kernels, *tensors)`, from the graph for `key` and their shapes and dtypes."""
        device = tensors[0].device
        small = CudaKernels(
            self._kernels, self.name, self._block_columns, batched=True,
            block_bytes=self._block_bytes or l2_share(device),
        )  # fmt: skip
        with torch.cuda.device_of(tensors[0]):
            if torch.compiler.is_compiling() or capturing(device):
                return run(small, *tensors)  # the graph that is being made replays these launches
            key = (*key, _settings(), *((tensor.shape, tensor.dtype) for tensor in tensors))
            if device not in self._devices:
                self._devices.setdefault(device, _Device(device, self._capture))
            return self._devices[device](key, lambda *given: run(small, *given), tensors)


class _Device:
    """The graphs of one device. They share their memory, because all calls take turns."""

    def __init__(self, device: torch.device, capture: Capture) -> None:
        self._device, self._new_capture = device, capture
        self._capture = capture(device)
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._done = torch.cuda.Event() if device.type == "cuda" else None  # recorded after the last call
        self._lock = threading.Lock()  # autograd calls the backward pass in a thread of its own

    def __call__(self, key: Any, run: Callable[..., Tensors], tensors: Sequence[Tensor]) -> Tensors:
        with self._lock, torch.no_grad():
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
            if key not in self._graphs:
                while len(self._graphs) >= _MOST_GRAPHS:
                    self._finish()
                    self._graphs.popitem(last=False)
                pool = next((graph.pool() for graph in self._graphs.values()), None)  # of a graph that lives
                self._graphs[key] = _Graph(self._capture, run, tensors, pool)
            self._graphs.move_to_end(key)
            results = self._graphs[key](tensors)
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self._device))
            return results

    def clear(self) -> None:
        with self._lock:
            self._finish()
            self._graphs.clear()
            self._capture = self._new_capture(self._device)  # the old workspace lies in the memory that is released

    def _finish(self) -> None:
        """Wait for the last call: a graph that runs must not lose its memory."""
        if self._done is not None:
            self._done.synchronize()


class _Graph:
    """One captured pass, with the tensors that it reads and writes."""

    def __init__(self, capture: Any, run: Callable[..., Tensors], tensors: Sequence[Tensor], pool: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():  # a later call outside the mode must be able to write them
            self._given = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in tensors]
            self._graph, self._results = capture(lambda: run(*self._given), pool)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensors:
        for given, tensor in zip(self._given, tensors, strict=True):
            given.copy_(tensor)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)

    def pool(self) -> Any:
        return self._graph.pool()


def l2_share(device: torch.device) -> int:
    """Return the bytes of a block that stays in the L2 cache; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size * _L2_SHARE)


def _parts(inputs: SimilarityInputs) -> tuple[tuple[str, ...], list[Tensor], tuple[Any, ...]]:
    """Return the names of the tensors in `inputs`, the tensors, and the other options."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs) if field.init}
    del values["keep"]  # nothing is kept
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tuple(tensors), list(tensors.values()), tuple(values[name] for name in values if name not in tensors)


def _with(inputs: SimilarityInputs, names: Sequence[str], tensors: Sequence[Tensor]) -> SimilarityInputs:
    changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return replace(inputs, **changes)


def _settings() -> tuple[Any, ...]:
    """Return the settings of torch that a graph has captured."""
    products = torch.backends.cuda.matmul
    return (
        float32_precision(), products.allow_fp16_reduced_precision_reduction,
        products.allow_bf16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )  # fmt: skip


kernels = GraphedKernels()
sweep = as_sweep(kernels)
clear = kernels.clear
