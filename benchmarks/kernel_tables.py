"""Tables of the Triton kernels' records, for the docs: what they take, and their predicted times."""

from __future__ import annotations

from typing import Any

from .records import Table


def tile(config: dict[str, Any]) -> str:
    shape = " x ".join(str(config[side]) for side in ("block_m", "block_n", "block_k"))
    return f"{shape}, {config['warps']} warps, {config['stages']} stages" + ", shared" * config["shared"]


def kernels(record: dict[str, Any]) -> Table:
    """A row for each configuration: the loss that takes the most registers in it."""
    worst: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in record["runs"]:
        key = (run["target"], run["dtype"], run["narrow"], run["kernel"], tile(run["config"]))
        if key not in worst or run["registers"] > worst[key]["registers"]:
            worst[key] = run
    rows = []
    for (target, dtype, narrow, kernel, shape), run in worst.items():
        width = "up to 64" if narrow else "any"
        counts = str(run["registers"]), str(run["spilled_bytes"]), f"{run['shared_bytes'] / 1024:.0f} KiB"
        rows.append((f"sm_{target}", dtype, width, kernel, shape, run["form"], *counts))
    head = (
        "target", "features", "width", "kernel", "tile", "largest form", "registers", "spilled bytes", "shared memory",
    )  # fmt: skip
    return head, rows


_UNITS = ("tensor cores", "shared memory", "L2", "issue, rest", "shuffles, rest", "tile")


def model(record: dict[str, Any]) -> Table:
    """A row for each configuration: clocks of a multiprocessor for 128 x 128 entries, and milliseconds."""
    rows = []
    for run in record["runs"]:
        config = run["config"]
        share = 128 * 128 / (config["block_m"] * config["block_n"])
        units = (f"{run['clocks'][unit] * share:,.0f}" for unit in _UNITS)
        rows.append(
            (run["kernel"], tile(config), str(run["registers"]), str(run["blocks"]), *units, f"{run['ms']:.1f}")
        )
    head = (
        "kernel", "tile", "registers", "blocks", "tensor cores", "shared memory", "L2", "rest: instructions",
        "rest: shuffles", "clocks", "ms",
    )  # fmt: skip
    return head, rows
