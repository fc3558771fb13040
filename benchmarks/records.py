"""What the benchmarks of unlearned models share: data given by path, spreads, and records as JSON and text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .machine import abilities_text

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head and rows

# How version 0.1's demo unlearned: photographs and digits, and data with few pairs of each class.
DEMO = {"epochs": 10, "batch_size": 64, "learning_rate": 1e-4}
DEMO_FEW_PAIRS = {
    "epochs": 100, "batch_size": 128, "forget_fraction": 0.25, "learning_rate": 3e-4, "evaluate_every": 10,
}  # fmt: skip


def demo_settings(source: str) -> dict[str, Any]:
    """The settings of version 0.1's demo for a source."""
    kind = source.partition(":")[0].partition("?")[0]
    return {"method": "cliperase", **(DEMO_FEW_PAIRS if kind in ("shapes", "personas") else DEMO)}


def classes(*names: str) -> dict[str, str]:
    """The selector of each class."""
    return {name: f"class:{name}" for name in names}


def add_shards(parser: argparse.ArgumentParser, *data: str) -> None:
    """Add the options that name shards. data: what needs them."""
    for option, what in (("--shards", "train"), ("--test-shards", "measure")):
        parser.add_argument(option, help=f"{', '.join(data)}: webdataset shards to {what} on")


def shards_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[str, str]:
    """The shards that were named; exits with an error if one of the options is missing."""
    if not (arguments.shards and arguments.test_shards):
        parser.error(f"{arguments.name} needs --shards and --test-shards")
    return arguments.shards, arguments.test_shards


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "low": min(values),
        "high": max(values),
        "count": len(values),
    }


def record_text(value: Any, depth: int = 0) -> str:
    """JSON with one line for each dict or list that holds no other dict, its floats of six digits."""
    nested = isinstance(value, dict) and any(isinstance(of, dict) for of in value.values())
    nested = nested or (isinstance(value, list) and any(isinstance(of, dict) for of in value))
    if not nested:
        return json.dumps(_rounded(value))
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{pad}{json.dumps(key)}: {record_text(of, depth + 1)}" for key, of in value.items()]
        opening, closing = "{}"
    else:
        parts = [f"{pad}{record_text(of, depth + 1)}" for of in value]
        opening, closing = "[]"
    return f"{opening}\n" + ",\n".join(parts) + f"\n{' ' * depth}{closing}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(of) for key, of in value.items()}
    return [_rounded(of) for of in value] if isinstance(value, list) else value


def provenance(record: Mapping[str, Any]) -> str:
    """Say how, when, where and with what a record was measured."""
    machine, versions = record["machine"], record["versions"]
    where = f"{machine['processor']} ({abilities_text(machine)}), {machine['cores']} cores"
    where += f", {machine['gpu']}" if machine["gpu"] else ""
    budget = f", keep budget {record['keep_mib']:,} MiB" if "keep_mib" in record else ""
    return (
        f"`{record['command']}` on {record['date']}, {where}{budget}, Python {versions['python']}, "
        f"torch {versions['torch']}, commit {record['commit']}."
    )


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
