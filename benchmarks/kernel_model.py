"""Predict the times of the Triton kernels on an H200 from their machine code.

    python -m benchmarks.kernel_report --model

Each configuration is compiled for sm_90, for RM + CM in bfloat16 with N = 32,768 and D = 768, and its instructions are
counted: those of a step of the loop over features, and those of a tile outside it. From the counts follow the clocks
that a tile keeps each unit of a multiprocessor busy: tensor cores, shared memory, the way to the L2 cache, schedulers,
special functions. Loads and products overlap with each other, but with the rest of the tile only where several blocks
of threads fit a multiprocessor. It is a model, not a measurement, and meant to rank designs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from cliperase_fast.ops.triton.configs import SHARED, TABLE, Config

from .kernel_report import Case, compiled_case, dump, resources
from .machine import RESULTS, describe
from .tournament import BACKWARD, FORWARD, unique

PATH = RESULTS / "kernel_model.json"
N, D = 32_768, 768
# One H200, by its data sheet, except for the L2 cache, of which the measured figures of others differ by a third.
MULTIPROCESSORS, CLOCK = 132, 1.83e9
REGISTERS, SHARED_BYTES = 65_536, 227 << 10
_L2_BYTES = 7.5e12 / MULTIPROCESSORS / CLOCK  # a clock, for each multiprocessor on average
_PORT_BYTES = 64  # a clock, for one multiprocessor
_SHARED_BYTES_A_CLOCK = 128
_PRODUCTS_A_CLOCK = 2048  # multiply-adds of bfloat16
_SCHEDULERS, _SPECIAL_CLOCKS, _SHUFFLE_CLOCKS = 4, 2, 1  # clocks of an instruction of a warp, for the multiprocessor
_LATENCY = 800  # clocks until the first loads of a loop over features have come
_BYTES = 2  # of a feature

_CLASSES = {
    "tensor core": r"HGMMA", "exponential": r"MUFU", "shuffle": r"SHFL", "shared memory": r"LDS|STS|LDSM|STSM",
    "copy": r"LDGSTS|UTMALDG", "load": r"LDG", "store": r"STG", "spill": r"LDL|STL", "barrier": r"BAR|SYNCS|WARPGROUP",
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Instructions of a warp. step: of all loops over features, one turn of each; tile: of a tile outside them."""

    step: Counter[str]
    tile: Counter[str]
    columns: int  # N of the tensor cores' instruction
    loops: int  # over features


def count(sass: str) -> Counts:
    """Count the instructions of a kernel with one loop over tiles, or none, around loops over features."""
    instructions, labels = parse(sass)
    loops = [
        (labels[target], place)
        for place, text in enumerate(instructions)
        if (target := _branch(text)) is not None and labels.get(target, place + 1) <= place
    ]
    products = {
        loop: sum(_opcode(text).startswith("HGMMA") for text in instructions[loop[0] : loop[1] + 1]) for loop in loops
    }
    innermost = [loop for loop in loops if products[loop] and not any(_inside(one, loop) for one in loops)]
    most = max((products[loop] for loop in innermost), default=0)
    inner = [loop for loop in innermost if 2 * products[loop] > most]
    # Smaller ones form tiles again that are out of reach of one exponential; they are rare.
    rare = [loop for loop in loops if any(_inside(one, loop) for one in innermost if one not in inner)]
    around = [loop for loop in loops if any(_inside(one, loop) for one in inner)]
    first, last = min(around) if around else (0, len(instructions) - 1)
    step, tile = Counter[str](), Counter[str]()
    for place in range(first, last + 1):
        if any(begin <= place <= end for begin, end in rare if (begin, end) not in around):
            continue
        within = any(begin <= place <= end for begin, end in inner)
        (step if within else tile)[_class(_opcode(instructions[place]))] += 1
    shapes = [int(found[1]) for text in instructions if (found := re.search(r"HGMMA\.\d+x(\d+)x", text))]
    return Counts(step, tile, max(shapes, default=0), len(inner))


def _inside(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and other[0] <= loop[0] and loop[1] <= other[1]


def parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions, and the place of each address."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", line):
            labels[found[1].lstrip("0") or "0"] = len(instructions)
            instructions.append(found[2])
    return instructions, labels


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _branch(text: str) -> str | None:
    found = re.match(r"(?:@!?U?P\w+\s+)?BRA(?:\.\w+)*\s.*?0x([0-9a-f]+)$", text)
    return None if found is None else found[1].lstrip("0") or "0"


def _class(opcode: str) -> str:
    return next((name for name, pattern in _CLASSES.items() if re.match(pattern, opcode)), "other")


def clocks(counts: Counts, config: Config, blocks: int) -> dict[str, float]:
    """Return the clocks of each unit for a tile, and `tile`, those that a tile takes with so many blocks at a time."""
    m, n, warps = config.block_m, config.block_n, config.warps
    features = 2 * D  # student and teacher
    bytes_in = (m + n) * features * _BYTES
    # Each instruction of 64 rows and 16 features reads both operands from shared memory.
    instructions = m * n / (64 * counts.columns) * features / 16
    read = instructions * 16 * _BYTES * (64 + counts.columns)
    steps = features / config.block_k / counts.loops
    issued = steps * counts.step.total() * warps / _SCHEDULERS
    found = {
        "tensor cores": m * n * features / _PRODUCTS_A_CLOCK,
        "shared memory": (read + bytes_in) / _SHARED_BYTES_A_CLOCK,
        "L2": bytes_in / _L2_BYTES,
        "port": bytes_in / _PORT_BYTES,
        "issue, products": issued,
        "issue, rest": counts.tile.total() * warps / _SCHEDULERS,
        "special, rest": counts.tile["exponential"] * warps * _SPECIAL_CLOCKS,
        "shuffles, rest": (counts.tile["shuffle"] + counts.tile["shared memory"]) * warps * _SHUFFLE_CLOCKS,
    }
    products = max(found[unit] for unit in ("tensor cores", "shared memory", "port", "issue, products"))
    rest = max(found["issue, rest"], found["special, rest"], found["shuffles, rest"])
    alone = products + rest + counts.loops * _LATENCY
    # While some multiprocessors do the rest of a tile, the others have their share of the L2 cache.
    found["tile"] = max(alone / blocks, products, rest, found["L2"])
    return found


def prediction(case: Case) -> dict[str, Any]:
    """Return the counts of a case, the clocks of a tile and the milliseconds of all tiles."""
    compiled = compiled_case(case)
    found, config = resources(compiled, case.target), case.config
    counts = count(dump(compiled.asm["cubin"], "-sass"))
    blocks = max(1, min(REGISTERS // (found.registers * 32 * config.warps), SHARED_BYTES // max(1, found.shared_bytes)))
    of_tile = clocks(counts, config, blocks)
    tiles = N // config.block_m * (N // config.block_n) / MULTIPROCESSORS
    return {
        "kernel": case.kernel, "form": case.form, "config": asdict(config), **asdict(found), "blocks": blocks,
        "columns": counts.columns, "step": dict(counts.step), "rest": dict(counts.tile),
        "clocks": {unit: round(value) for unit, value in of_tile.items()},
        "ms": round(tiles * of_tile["tile"] / CLOCK * 1e3, 2),
    }  # fmt: skip


def wanted() -> list[Case]:
    shipped, shared = TABLE[9][True, False], SHARED[9]
    found = [
        Case(kernel, "consistency, or both", "bf16", False, 90, config)
        for kernel, configs in (
            ("forward", unique(shipped.forward, shared.forward, *FORWARD)),
            ("backward", unique(shipped.backward, shared.backward, *BACKWARD)),
        )
        for config in configs
    ]
    for kernel, config in (("calibrated forward", shipped.forward), ("calibrated backward", shipped.backward)):
        found.append(Case(kernel, "calibrated, edited", "bf16", False, 90, config))
    return found


def predict() -> int:
    runs = []
    for case in wanted():
        runs.append(prediction(case))
        print(json.dumps({key: runs[-1][key] for key in ("kernel", "config", "ms", "clocks")}), flush=True)
    record = {
        "command": "python -m benchmarks.kernel_report --model", **describe(), "n": N, "width": D, "runs": runs
    }  # fmt: skip
    PATH.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0
