"""Compute the cost of a step: arithmetic, memory traffic, communication and memory. Nothing is measured.

`sweep_cost` counts the work of the sharded sweep; tests compare it with real ranks. `step_cost` adds the encoders, the
optimizer and the rates of a machine. The rates are assumptions: a GPU's data sheet times an efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cliperase_fast.distributed.process_group import GATHER_MODES
from cliperase_fast.errors import InputError
from cliperase_fast.ops.blocks import block_shape

FLOAT32 = 4  # bytes of statistics and of gradients that are added up
_ID = 8  # bytes of a group id
_STATE = 9  # numbers of a column's saved statistics, see `ops.spec.SavedStats`
_AGREEMENT = 24  # bytes with which ranks compare their options and sizes
_TOTALS = 2 * FLOAT32  # retention and consistency


@dataclass(frozen=True)
class Sweep:
    """Describe a batch of pairs in equal shares on ranks, and the options of its loss.

    width, teacher_width: D and D°; the teacher's counts with consistency only. feature_bytes: bytes of a feature's
    number. block_rows, block_columns: of dS formed at a time; 0 columns: all that a rank has at a time. fused: whether
    one kernel forms and uses the similarities (the GPU backends); otherwise each block of them is written in float32
    (the "torch" backend).
    """

    pairs: int
    ranks: int
    width: int
    teacher_width: int
    feature_bytes: int = 2
    retention: bool = True
    consistency: bool = True
    groups: bool = False
    gather: str = "all"
    block_rows: int = 128
    block_columns: int = 0
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("pairs", "ranks", "width", "teacher_width", "feature_bytes", "block_rows"):
            _whole(name, getattr(self, name))
        if self.pairs % self.ranks:
            below = self.pairs // self.ranks * self.ranks
            near = f"{below} or {below + self.ranks}" if below else f"{self.ranks} or more"
            raise InputError(f"{self.pairs} pairs do not divide among {self.ranks} ranks; use {near} pairs")
        if not (self.retention or self.consistency):
            raise InputError("retention and consistency are both off, so there is no sweep; turn one of them on")
        if self.gather not in GATHER_MODES:
            raise InputError(f"gather={self.gather!r} must be one of {', '.join(GATHER_MODES)}")

    @property
    def own(self) -> int:
        return self.pairs // self.ranks

    @property
    def teacher(self) -> int:
        """D°; 0 without a teacher."""
        return self.teacher_width if self.consistency else 0

    @property
    def ids(self) -> bool:
        return self.groups and self.retention

    @property
    def num_stats(self) -> int:
        """Numbers that the forward pass keeps for a row or column, as `ops.spec.SimilarityInputs.num_stats`."""
        return 2 * ((self.consistency or not self.ids) + self.ids) + 3 * self.consistency


class SweepCost(NamedTuple):
    """The cost for one rank of one step, forward and backward."""

    operations: int  # floating-point operations of matrix products
    moved: int  # bytes of device memory that these products and the blocks of dS between them read and write
    received: int  # bytes from other ranks
    memory: int  # bytes beyond the rank's own features and the blocks


def sweep_cost(sweep: Sweep) -> SweepCost:
    """Compute what `sharded_sweep` costs one rank when nothing is kept between the passes (keep="nothing")."""
    return SweepCost(_operations(sweep), _moved(sweep), _received(sweep), _memory(sweep))


def _operations(sweep: Sweep) -> int:
    formed = 2 * (sweep.width + sweep.teacher)  # S and S°, in each pass
    gradients = 2 * sweep.width  # dI and dT
    return 2 * sweep.own * sweep.pairs * (formed + gradients)


def _moved(sweep: Sweep) -> int:
    """Each block of a product reads its operands and adds to its result once; caches are ignored."""
    at_once = sweep.own if sweep.gather == "ring" else sweep.pairs  # columns
    times = sweep.pairs // at_once
    across = -(-at_once // min(sweep.block_columns or at_once, at_once))  # blocks beside each other
    down = -(-sweep.own // min(sweep.block_rows, sweep.own))
    entries = sweep.own * sweep.pairs
    bytes_ = sweep.feature_bytes
    rows, columns = times * across * sweep.own, times * down * at_once  # that all blocks together have
    similarities = 1 + sweep.consistency

    operands = bytes_ * (sweep.width + sweep.teacher) * (rows + columns)
    results = times * (2 * across - 1) * sweep.own  # rows of dI that are written, and read to be added to
    image = bytes_ * sweep.width * columns + FLOAT32 * sweep.width * results
    text = bytes_ * sweep.width * rows + 2 * FLOAT32 * sweep.width * columns  # accumulated
    entry = bytes_ if sweep.fused else FLOAT32
    read = 2 * entry * entries  # for dI and for dT
    written = bytes_ * entries if sweep.fused else 2 * FLOAT32 * similarities * entries
    return 2 * operands + image + text + read + written


def _received(sweep: Sweep) -> int:
    others, own = sweep.ranks - 1, sweep.own
    texts = others * own * (sweep.feature_bytes * (sweep.width + sweep.teacher) + _ID * sweep.ids)
    numbers = others * (own * FLOAT32 * (sweep.num_stats + 1 + _STATE) + _TOTALS + _AGREEMENT)
    gradient = own * FLOAT32 * sweep.width
    if sweep.gather == "all":
        return texts + numbers + others * gradient
    return 2 * texts + numbers + (sweep.ranks * gradient if others else 0)  # the gradient takes one more hop, home


def _memory(sweep: Sweep) -> int:
    """Count the peak of the backward pass: other ranks' texts, dT and what is received of it, dI, the statistics."""
    text = sweep.feature_bytes * (sweep.width + sweep.teacher) + _ID * sweep.ids
    gradient = FLOAT32 * sweep.width
    # saved, concatenated for the backward pass, and the anchors and factors computed from them
    states = FLOAT32 * (14 * sweep.pairs + 15 * sweep.own)
    if sweep.gather == "all":
        return sweep.pairs * (text + gradient) + sweep.own * gradient + states
    blocks = min(2, sweep.ranks - 1)  # one in use, one in transit; the rank's own exists anyway
    gradients = 3 + 3 * (sweep.ranks > 1) + (sweep.ranks > 2)  # dI and its summands; dT in use and in transit
    return sweep.own * (blocks * text + gradients * gradient) + states


class Model(NamedTuple):
    """The size of an architecture, from `planning.plan.count_model`."""

    name: str
    width: int  # of the features
    parameters: int
    operations: int  # floating-point operations of encoding a pair, forward
    activations: int  # bytes that encoding a pair leaves for the backward pass


class Device(NamedTuple):
    """A GPU and its links. Rates are from data sheets, per second and in one direction."""

    name: str
    bf16: float  # floating-point operations, dense
    fp32: float
    memory: float  # bytes
    bandwidth: float  # bytes, of its memory
    link: float  # bytes, to the GPUs of its node
    network: float  # bytes, its share of the node's network
    source: str
    node: int = 8  # GPUs


DEVICES = {
    device.name: device
    for device in (
        Device(
            "a100", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9,
            "NVIDIA A100 80 GB SXM data sheet; DGX A100 data sheet: eight 200 Gb/s adapters",
        ),
        Device(
            "h100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9,
            "NVIDIA H100 SXM data sheet; DGX H100 data sheet: eight 400 Gb/s adapters",
        ),
        Device(
            "h200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9,
            "NVIDIA H200 SXM data sheet; DGX H200 data sheet: eight 400 Gb/s adapters",
        ),
    )
}  # fmt: skip
PRECISIONS = {"bf16": 2, "fp32": 4}
_STATES = {"bf16": 12, "fp32": 8}  # bytes per parameter: Adam's two moments, and a float32 copy of bf16 weights


@dataclass(frozen=True)
class Step:
    """A training step: student and frozen teacher of one architecture, and the loss with retention and consistency.

    chunk: pairs encoded at a time; when fewer than a GPU's share, the gradients of features are cached. zero: the ZeRO
    stage (arXiv 1910.02054). efficiency: the fraction of the GPU's peak rates that is reached. strip_bytes: memory for
    a block of dS.
    """

    batch: int
    gpus: int
    model: Model
    device: Device
    precision: str = "bf16"
    gather: str = "all"
    chunk: int | None = None
    zero: int = 0
    cached_teacher: bool = False
    groups: bool = False
    efficiency: float = 0.5
    strip_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        for name in ("batch", "gpus", "strip_bytes"):
            _whole(name, getattr(self, name))
        if self.precision not in PRECISIONS:
            raise InputError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.zero not in range(4):
            raise InputError(f"zero={self.zero} must be 0 (no ZeRO), 1, 2 or 3")
        if not 0 < self.efficiency <= 1:
            raise InputError(
                f"efficiency={self.efficiency:g} must be above 0 and at most 1: a fraction of the peak rates"
            )
        share = self.sweep.own
        if self.chunk is not None:
            _whole("chunk", self.chunk)
            if self.chunk > share:
                raise InputError(f"chunk={self.chunk} is more than a GPU's share of {share} pairs; leave it out")

    @property
    def _columns(self) -> int:
        """Columns that a GPU compares its rows with at a time."""
        return max(1, self.batch // self.gpus) if self.gather == "ring" else self.batch

    @property
    def block(self) -> tuple[int, int]:
        """The rows and columns of a block of dS, as the Triton backend cuts them."""
        own = max(1, self.batch // self.gpus)
        return block_shape(own, self._columns, PRECISIONS[self.precision], self.strip_bytes)

    @property
    def sweep(self) -> Sweep:
        width, (rows, columns) = self.model.width, self.block
        return Sweep(
            self.batch, self.gpus, width, width, PRECISIONS[self.precision], groups=self.groups, gather=self.gather,
            block_rows=rows, block_columns=columns,
        )  # fmt: skip


class StepCost(NamedTuple):
    """The cost for one GPU."""

    sweep: SweepCost
    memory: dict[str, float]  # bytes
    seconds: dict[str, float]  # nothing overlaps except a ring's communication with its arithmetic


def step_cost(step: Step) -> StepCost:
    """Compute the memory of a GPU and the time of a step, in parts.

    The forget term is left out, because its cost is linear in its pairs.
    """
    cost = sweep_cost(step.sweep)
    model, device, own = step.model, step.device, step.sweep.own
    weight = PRECISIONS[step.precision]
    chunk = step.chunk or own

    shards = [step.gpus if step.zero >= stage else 1 for stage in (1, 2, 3)]  # of states, gradients, weights
    rows, columns = step.block
    memory = {
        "student": model.parameters * (_STATES[step.precision] / shards[0] + weight / shards[1] + weight / shards[2]),
        "teacher": 0 if step.cached_teacher else model.parameters * weight / shards[2],
        "activations": chunk * model.activations,
        "features": own * model.width * (4 * weight + 2 * weight),  # of both towers and models; gradients
        "loss": cost.memory + rows * columns * weight,
    }

    rate = step.efficiency * getattr(device, step.precision)
    passes = 4 if chunk < own else 3  # one forward, two backward; with chunks one more forward without a graph
    arithmetic = max(cost.operations / rate, cost.moved / (step.efficiency * device.bandwidth))
    exchange = cost.received / (step.efficiency * _exchange_rate(step))
    seconds = {
        "student": passes * own * model.operations / rate,
        "teacher": 0 if step.cached_teacher else own * model.operations / rate,
        "loss": arithmetic,
        "loss exchange": max(0.0, exchange - arithmetic) if step.gather == "ring" else exchange,
        "weights and gradients": _weights_received(step, chunk) / (step.efficiency * _collective_rate(step)),
    }
    return StepCost(cost, memory, seconds)


def _weights_received(step: Step, chunk: int) -> float:
    """Count bytes of the gradients' reduce-scatter and the weights' all-gather (DDP's all-reduce); more for ZeRO-3."""
    whole = step.model.parameters * PRECISIONS[step.precision] * (step.gpus - 1) / step.gpus
    if step.zero < 3:
        return 2 * whole
    chunks = -(-step.sweep.own // chunk)
    gathers = chunks * (2 if chunks == 1 else 3) + chunks * (not step.cached_teacher)
    return (gathers + chunks) * whole  # gradients are reduced after each chunk


def _collective_rate(step: Step) -> float:
    """Return the rate of a collective. Between nodes each byte enters a node once, over all its ports."""
    device = step.device
    return device.link if step.gpus <= device.node else min(device.link, device.node * device.network)


def _exchange_rate(step: Step) -> float:
    """Return the rate of the loss exchange. A ring is as fast as its slowest link, one port between two nodes."""
    if step.gather == "all" or step.gpus <= step.device.node:
        return _collective_rate(step)
    return min(step.device.link, step.device.network)


def _whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} must be a whole number, at least 1")
