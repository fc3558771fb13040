"""Measure the peak memory of the losses against N, in a separate process for each provider and size.

    cliperase-fast bench memory --quick
    cliperase-fast bench memory --sizes 1024,4096,16384 --widths 512 --dtypes float32,bfloat16
    cliperase-fast bench memory --loss siglip --providers ours-auto,open_clip
    cliperase-fast bench memory --compare before.json after.json

The figure is the peak of one forward and backward pass beyond what the process held before (inputs, Python, torch),
including gradients. On the CPU it is resident memory as counted by Linux; on a GPU it is what torch allocates. Each
provider's loss and gradients are first compared with float64; a provider that fails this check gets no figure. Sizes
that cannot fit, or whose step would take longer than --cap, are skipped and listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import options, points_report
from .batches import Case
from .points import Points
from .providers import default_names, every_provider

_SIZES = {"cpu": [1024, 2048, 4096, 8192, 16_384], "cuda": [8192, 16_384, 32_768, 65_536, 131_072]}
_WIDTH = {"cpu": 128, "cuda": 768}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_QUICK: tuple[Any, ...] = ([1024, 2048, 4096], [64], ["ours-auto", "ours-native-keep-nothing", "open_clip"])


def measure(
    what: str,
    arguments: argparse.Namespace,
    words: Sequence[str],
    path: Path,
    seconds: float,
    sizes: Sequence[int],
    widths: Sequence[int],
    names: Sequence[str] | None,
    repeats: int = 1,
) -> tuple[options.Record, int]:
    """The record, saved after every size, and the exit status: 1 when one of our own providers failed.

    names: None for all that compute the loss. repeats: processes for each point, where times are measured.
    """
    if arguments.device == "cpu" and sys.platform != "linux":
        raise SystemExit("memory is read from /proc, so on the CPU this needs Linux")
    settings = {
        "device": arguments.device, "threads": arguments.threads, "seconds": seconds, "cap": arguments.cap,
        "repeats": repeats,
    }  # fmt: skip
    record = options.begin(what, arguments, words, settings)
    points = Points(every_provider(), arguments.device, arguments.threads, seconds, arguments.cap, repeats)
    record["runs"] = points.rows
    for loss in arguments.loss:
        for data in arguments.data:
            for dtype in arguments.dtypes or [_DTYPE[arguments.device]]:
                for width in widths:
                    for n in sorted(sizes):
                        points.run(Case(loss, data, dtype, n, width), names or default_names(loss))
                        options.save(record, path)
    return record, int(points.ours_failed)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    p = options.parser("memory", __doc__)
    p.add_argument("--cap", type=float, default=60.0, help="seconds: a slower step is skipped (60)")
    arguments = p.parse_args(words)
    device = arguments.device
    defaults = _QUICK if arguments.quick else (_SIZES[device], [_WIDTH[device]], None)
    sizes, widths, names = (
        given or default
        for given, default in zip((arguments.sizes, arguments.widths, arguments.providers), defaults, strict=True)
    )
    return options.run(
        arguments,
        options.record_path("memory", arguments),
        lambda path: measure("memory", arguments, words, path, 0.0, sizes, widths, names),
        points_report.full_text,
    )


if __name__ == "__main__":
    sys.exit(main())
