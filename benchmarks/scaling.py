"""Measure how time and memory of the loss grow with N, from 2^10 to 2^17 pairs: time as N², memory as N.

    cliperase-fast bench scaling --quick                    up to 2^12, about two minutes on two cores
    cliperase-fast bench scaling                            up to 2^17, about half an hour on two cores
    cliperase-fast bench scaling --widths 256 --cap 900     wider features, which take longer
    cliperase-fast bench scaling --compare before.json after.json

Each provider and size runs in --repeats separate processes. The memory of the first step is measured (see `bench memory
--help`), the second step is a warm-up, and later steps are timed for --seconds. If a step takes ten times as long, the
second step is the only sample. --compare takes the spread of the processes' medians as the noise. Sizes that cannot
fit, or that would take more than --cap seconds per step, are skipped and listed. A point that takes minutes is measured
by one process. "grows as" is fitted over the larger half of the sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import options, points_report
from .memory import measure
from .providers import BASELINES, default_names

_SIZES = [1 << k for k in range(10, 18)]
_WIDTH = {"cpu": 64, "cuda": 768}
_NAMES = ["ours-auto", "ours-native-keep-nothing"]


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    p = options.parser("scaling", __doc__)
    p.add_argument("--seconds", type=float, default=1.0, help="to spend on timing a point (1)")
    p.add_argument("--cap", type=float, default=240.0, help="seconds: a slower step is skipped (240)")
    p.add_argument("--repeats", type=int, help="processes for each point (3; 2 with --quick)")
    arguments = p.parse_args(words)
    if arguments.repeats is not None and arguments.repeats < 1:
        p.error(f"--repeats {arguments.repeats}: must be at least 1")
    names = [*_NAMES, next(name for name in BASELINES if name in default_names("cliperase"))]
    sizes, widths = _SIZES, [_WIDTH[arguments.device]]
    if arguments.quick:
        sizes, widths = _SIZES[:3], [32]
    return options.run(
        arguments,
        options.record_path("scaling", arguments),
        lambda path: measure(
            "scaling", arguments, words, path, min(arguments.seconds, 0.5) if arguments.quick else arguments.seconds,
            arguments.sizes or sizes, arguments.widths or widths, arguments.providers or names,
            arguments.repeats or (2 if arguments.quick else 3),
        ),
        points_report.full_text,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
