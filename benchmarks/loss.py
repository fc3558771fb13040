"""Compare the speed and memory of the losses with those of other libraries.

    cliperase-fast bench loss --quick                       under a minute on two cores
    cliperase-fast bench loss                               a few sizes on this device
    cliperase-fast bench loss --sizes 256,4096 --widths 64,512 --dtypes float32 --memory --json mine.json
    cliperase-fast bench loss --providers ours-auto,open_clip-compiled --loss clip --data random
    cliperase-fast bench loss --compare before.json after.json
    cliperase-fast bench loss --gpu-check                   the set of sizes for one GPU, in under five minutes

Timed are one call of the loss ("forward") and torch.autograd.grad of it ("backward"). All providers get the same inputs
and take turns in rounds. Losses: cliperase is RM + 3 FM + 3 CM (retention, forgetting, consistency), clip is RM, siglip
is the sigmoid loss, and calibrated is calibrated forgetting. Beside the last, ours-cliperase measures cliperase_loss on
as many rows, and the table says how their times compare.

Before the timing, each provider's loss and gradients are compared with float64 on 512 pairs of the same kind of data; a
provider that fails this check is not timed. "floor" is 6 products (clip: 4, siglip: 3) of 2 N² D FLOP, measured in the
same rounds: every method that stores no N x N matrix needs them. TFLOP/s counts these products for all providers.
"against compiled" is the speedup over torch.compile of open_clip's losses. Extra memory is the measured peak beyond the
inputs, including gradients; on the CPU it needs --memory and is measured in a process for each provider. In a checkout
without an installation, use python -m benchmarks.loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import loss_report, options
from .batches import Case
from .providers import default_names, every_provider
from .runner import DeviceLost, Runner, Settings

_REHEARSAL = 256  # --gpu-check on the CPU: sizes divided by this
_QUICK: dict[str, Any] = {"sizes": [1024], "widths": [128], "seconds": 1.0}


def gpu_plan(device: str, names: Sequence[str] | None = None) -> list[tuple[Case, Sequence[str]]]:
    """What `--gpu-check` measures, the most wanted first; on the CPU a rehearsal with small sizes."""
    clip, calibrated = names or default_names("clip"), names or default_names("calibrated")
    names = names or default_names("cliperase")
    own = [name for name in names if name.startswith("ours-") and name != "ours-eager"]
    others = [name for name in names if name not in own]
    calibrated = [name for name in calibrated if name != "ours-eager"]
    target = Case("cliperase", "peaked", "bfloat16", 32_768, 768)
    plan = [
        (target, own),  # by themselves, so that they are written before the others compile
        *([(target, others)] if others else []),
        (replace(target, n=65_536), names),
        (replace(target, loss="calibrated"), calibrated),
        (replace(target, n=262_144), own),
        (replace(target, loss="clip"), clip),
        (replace(target, loss="clip", n=65_536), clip),
        (replace(target, n=8_192), names),
        (replace(target, n=2_048), names),
        (replace(target, data="random"), own),
        (replace(target, width=512), own),
        (replace(target, width=1_024), own),
        (replace(target, dtype="float16"), own),
        (replace(target, dtype="float32", n=8_192, width=512), names),
        (replace(target, width=256), own),
        (replace(target, width=770), own),  # rows that are not a multiple of 16 bytes are copied
        (replace(target, loss="clip", n=262_144), own),
        (replace(target, loss="siglip"), names if names is clip else default_names("siglip")),
    ]  # fmt: skip
    if device == "cpu":
        plan = [(replace(case, n=max(8, case.n // _REHEARSAL)), who) for case, who in plan]
    return plan


def parser() -> argparse.ArgumentParser:
    p = options.parser("loss", __doc__)
    p.add_argument("--seconds", type=float, default=2.0, help="to spend on each provider of a case (2)")
    p.add_argument("--rounds", type=int, help="at most so many rounds")
    p.add_argument("--cap", type=float, default=60.0, help="seconds: slower steps are measured once, or not (60)")
    p.add_argument("--limit", type=float, help="seconds after which no case is begun (--gpu-check: 240, --quick: 30)")
    p.add_argument("--memory", action="store_true", help="on the CPU, measure peak memory too")
    p.add_argument("--gpu-check", action="store_true", help="the set for one GPU; on the CPU a rehearsal of it")
    return p


def plan_of(arguments: argparse.Namespace) -> list[tuple[Case, Sequence[str]]]:
    if arguments.gpu_check:
        return gpu_plan(arguments.device, arguments.providers)
    cpu = arguments.device == "cpu"
    quick = _QUICK if arguments.quick else {}
    sizes = arguments.sizes or quick.get("sizes") or ([1024, 4096] if cpu else [8192, 32768])
    widths = arguments.widths or quick.get("widths") or ([128, 512] if cpu else [768])
    dtypes = arguments.dtypes or (["float32", "bfloat16"] if cpu else ["bfloat16"])
    return [
        (Case(loss, data, dtype, n, width), arguments.providers or default_names(loss))
        for loss in arguments.loss
        for data in arguments.data
        for dtype in dtypes
        for width in widths
        for n in sorted(sizes)
    ]


def measure(arguments: argparse.Namespace, words: Sequence[str], path: Path) -> tuple[options.Record, int]:
    """The record, and the exit status: 1 when one of our own providers failed or the device was lost."""
    if arguments.memory and arguments.device == "cpu" and sys.platform != "linux":
        raise SystemExit("--memory reads /proc, so on the CPU it needs Linux")
    quick = arguments.quick or arguments.gpu_check
    settings = Settings(
        device=arguments.device,
        seconds=min(arguments.seconds, 1.0) if quick else arguments.seconds,
        rounds=arguments.rounds,
        cap=min(arguments.cap, 6.0) if arguments.gpu_check else arguments.cap,
        limit=arguments.limit or (240.0 if arguments.gpu_check else 30.0 if arguments.quick else None),
        memory=arguments.memory,
        threads=arguments.threads,
    )
    record = options.begin("loss", arguments, words, asdict(settings))
    runner = Runner(settings, every_provider())
    record["runs"] = runner.rows
    status = 0
    for case, names in plan_of(arguments):
        try:
            runner.run(case, names)
        except DeviceLost as error:
            print(f"{error}; run again with --providers and without it", file=sys.stderr)
            status = 1
            break
        finally:
            options.save(record, path)
    if any(row["status"] == "failed" and row["provider"].startswith("ours-") for row in runner.rows):
        status = 1
    return record, status


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    arguments = parser().parse_args(words)
    path = options.record_path("loss", arguments, committed=arguments.gpu_check and arguments.device == "cuda")

    def shown(record: options.Record) -> str:
        text = loss_report.full_text(record)
        if arguments.gpu_check or (arguments.source is not None and record["device"] != "cpu"):
            text += "\n\nTargets for one H200, bfloat16, D = 768, cliperase\n"
            text += loss_report.text(loss_report.targets_table(record))
        return text

    return options.run(arguments, path, lambda path: measure(arguments, words, path), shown)


if __name__ == "__main__":
    sys.exit(main())
