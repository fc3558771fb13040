"""Look up the backend that was measured as the fastest on a GPU; "auto" uses it there.

The table, measured.json, is written from the committed results by `python -m benchmarks.fastest`. It is empty until
`make gpu-check` has run on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

# compute capability -> dtype -> width D -> pairs N -> backend
Table = dict[str, dict[str, dict[int, dict[int, str]]]]


def read(path: Path) -> Table:
    written = json.loads(path.read_text(encoding="utf-8"))
    return {
        capability: {
            dtype: {
                int(width): {int(pairs): backend for pairs, backend in backends.items()}
                for width, backends in widths.items()
            }
            for dtype, widths in dtypes.items()
        }
        for capability, dtypes in written.items()
    }


PATH = Path(__file__).with_suffix(".json")
TABLE = read(PATH)


def fastest(device: torch.device, dtype: torch.dtype, pairs: int, width: int) -> str | None:
    """Return the fastest backend at the next larger measured width and number of pairs, else at the largest.

    Returns None if nothing was measured on such a GPU in this dtype.
    """
    if not TABLE:
        return None
    gpu = torch.cuda.get_device_properties(device)
    widths = TABLE.get(f"{gpu.major}.{gpu.minor}", {}).get(str(dtype).removeprefix("torch."))
    if not widths:
        return None
    backends = widths[_next(widths, width)]
    return backends[_next(backends, pairs)]


def _next(measured: Iterable[int], wanted: int) -> int:
    return min((value for value in measured if value >= wanted), default=max(measured))
