"""How time and memory of the loss grow with N, from 2^10 to 2^17 pairs: time as N², memory as N.

    cliperase-fast bench scaling --quick                    up to 2^13
    cliperase-fast bench scaling                            up to 2^17, about ten minutes on two cores
    cliperase-fast bench scaling --widths 256 --cap 900     a wider one, in longer
    cliperase-fast bench scaling --compare before.json after.json

Each provider and size runs in a process of its own: its first step is weighed (see `bench memory --help`), more of them
are timed, for --seconds; where that one took twenty times as long, it is the sample. What cannot fit, and what would
take more than --cap seconds a step, is skipped and named. "grows as" is fitted over the larger half of the sizes.
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
    arguments = p.parse_args(words)
    names = [*_NAMES, next(name for name in BASELINES if name in default_names("cliperase"))]
    sizes, widths = _SIZES, [_WIDTH[arguments.device]]
    if arguments.quick:
        sizes, widths = _SIZES[1:4], [32]
    return options.run(
        arguments,
        options.record_path("scaling", arguments),
        lambda path: measure(
            "scaling", arguments, words, path, min(arguments.seconds, 0.5) if arguments.quick else arguments.seconds,
            arguments.sizes or sizes, arguments.widths or widths, arguments.providers or names,
        ),
        points_report.full_text,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
