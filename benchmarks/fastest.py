"""Write the fastest backend of the committed GPU results to cliperase_fast/ops/measured.json, which "auto" reads.

    python -m benchmarks.fastest            write it, and show it
    python -m benchmarks.fastest --check    change nothing; exit 1 when benchmarks/results/ say otherwise

The table is by compute capability, dtype, width and number of pairs, for forward and backward of RM + FM + CM on data
like a trained model's. A backend is ranked by what it does with `keep="auto"`, the default, and only if its loss and
gradients agree with float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from cliperase_fast.ops import measured

from .loss_report import text
from .machine import IN_CHECKOUT, RESULTS

_OURS = "ours-"


def table_of(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """As it is written: capability -> dtype -> width -> pairs -> backend. records: of `bench loss`."""
    seconds: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for record in records:
        capability = record["machine"].get("capability")
        for run in record["runs"] if capability else []:
            provider = run["provider"]
            wanted = (run["loss"], run["data"], run["status"]) == ("cliperase", "peaked", "ok")
            if not wanted or not provider.startswith(_OURS) or not run.get("auto", True):
                continue
            backend = provider.removeprefix(_OURS).partition("-")[0]
            if backend != "auto":
                of = seconds.setdefault((capability, run["dtype"], run["width"], run["n"]), {})
                of[backend] = min(run["both_ms"]["median"], of.get(backend, float("inf")))
    table: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for (capability, dtype, width, pairs), of in sorted(seconds.items()):
        widths = table.setdefault(capability, {}).setdefault(dtype, {})
        widths.setdefault(str(width), {})[str(pairs)] = min(of, key=lambda backend: of[backend])
    return table


def committed() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("loss-*.json"))]


def main(words: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.fastest", description=__doc__, formatter_class=formatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args(words)
    if not IN_CHECKOUT:
        raise SystemExit("the results are not installed: run this in a checkout, or choose with CLIPERASE_BACKEND")
    table = table_of(committed())
    written = json.dumps(table, indent=1) + "\n"
    if arguments.check:
        same = measured.PATH.read_text(encoding="utf-8") == written
        print(f"{measured.PATH.name} {'follows' if same else 'does not follow'} from the committed results")
        return 0 if same else 1
    measured.PATH.write_text(written, encoding="utf-8")
    lines = [
        (capability, dtype, width, pairs, backend)
        for capability, dtypes in table.items()
        for dtype, widths in dtypes.items()
        for width, backends in widths.items()
        for pairs, backend in backends.items()
    ]
    print(text((("compute capability", "dtype", "D", "N", "auto"), lines)) if lines else "no GPU has been measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
