"""Peak memory of each rank of `unlearn()` under ZeRO-3 against the number of ranks, on a model of 208 M weights.

python -m benchmarks.zero_memory                      writes benchmarks/results/zero-memory.json; CPU, up to an hour
python -m benchmarks.zero_memory --one OUTPUT FOLDER  a rank, under torchrun; writes OUTPUT/RANK.json

The model is a CLIP with two transformers of width 768 and random weights, of which the last six blocks of each are
trained. It is loaded from a file, evaluated, trained for two steps with a checkpoint, evaluated again and saved. The
figure of a rank is the most anonymous memory (RssAnon of Linux, sampled every few milliseconds) beyond what it had
after the imports. Pages of mapped files, which the ranks of a machine share and Linux can drop, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .machine import RESULTS, ROOT, describe, resident

RANKS = (1, 2, 4)
_STEPS = 2
_SAMPLE = 0.003  # seconds between two looks at the memory
_CONFIG: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}


def write_model(folder: Path) -> int:
    """Write a model with random weights to a folder; return how many it has."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = open_clip.CLIP(**_CONFIG)
    save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    saved = {"model_cfg": _CONFIG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(saved), encoding="utf-8")
    return sum(parameter.numel() for parameter in module.parameters())


class AnonymousMemory(threading.Thread):
    """Samples this process's anonymous memory, and keeps the most in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = resident("RssAnon")

    def run(self) -> None:
        while True:
            self.most = max(self.most, resident("RssAnon"))
            time.sleep(_SAMPLE)


def run_rank(output: Path, folder: Path) -> None:
    """Train as one rank of torchrun, and write the most memory it held."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - its memory is not the run's
    import open_clip  # noqa: F401
    import torch

    from cliperase_fast import unlearn

    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(0)

    def pairs(kind: str, count: int) -> list[tuple[Any, str]]:
        images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float32, device="cpu")
        return [(image, f"{kind} {index}") for index, image in enumerate(images)]

    memory = AnonymousMemory()
    memory.start()
    result = unlearn(
        f"local-dir:{folder}",
        pairs("a red square", 12),
        pairs("a blue circle", 12),
        test=(pairs("one red square", 4), pairs("one blue circle", 4)),
        validation=(pairs("some red square", 4), pairs("some blue circle", 4)),
        method="cliperase",
        batch_size=8,
        steps=_STEPS,
        learning_rate=1e-6,
        trainable="last:6",
        deepspeed="zero3",
        select="last",
        output_dir=output / "run",
        report=False,
        progress=False,
    )
    found = {
        "most_bytes": memory.most - memory.before,
        "imports_bytes": memory.before,
        "losses": [line["total"] for line in result.history if "total" in line],
    }
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


def measure(ranks: int, folder: Path) -> dict[str, Any]:
    """Return the memory of each of so many ranks."""
    output = Path(tempfile.mkdtemp(prefix="zero-memory."))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    module = ["-m", f"{__package__}.zero_memory", "--one", str(output), str(folder)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # Linux then gets back what is freed
    try:
        subprocess.run([sys.executable, *launcher, *module], cwd=ROOT, check=True, env=environment)
        found = [json.loads((output / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    finally:
        shutil.rmtree(output)
    return {"ranks": ranks, "bytes": [one["most_bytes"] for one in found], "losses": found[0]["losses"]}


def parts(record: dict[str, Any]) -> list[Any]:
    """The table of a record: the most memory of a rank beside its goal, a share of one rank's and 15 %."""
    alone = max(next(run for run in record["runs"] if run["ranks"] == 1)["bytes"])
    rows = [
        (
            str(run["ranks"]),
            f"{max(run['bytes']) / 2**30:.2f} GiB",
            f"{max(run['bytes']) / alone:.0%}",
            f"{min(1.0, 1 / run['ranks'] + 0.15):.0%}",
            f"{run['losses'][-1]:.6f}",
        )
        for run in record["runs"]
    ]
    head = ("ranks", "most memory of a rank", "of one rank's", "goal: at most", f"loss of step {_STEPS}")
    return [(head, rows), f"The model has {record['weights']:,} weights."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=Path, metavar=("OUTPUT", "FOLDER"))
    parser.add_argument("--ranks", type=int, nargs="*", help="measure only these, keep the other runs of the record")
    arguments = parser.parse_args()
    if arguments.one:
        run_rank(*arguments.one)
        return 0
    path = RESULTS / "zero-memory.json"
    record: dict[str, Any] = {"command": "python -m benchmarks.zero_memory", **describe(), "runs": []}
    if arguments.ranks and path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))["runs"]
        record["runs"] = [run for run in known if run["ranks"] not in arguments.ranks]
    with tempfile.TemporaryDirectory(prefix="zero-memory.") as folder:
        record["weights"] = write_model(Path(folder))
        for ranks in arguments.ranks or RANKS:
            record["runs"].append(measure(ranks, Path(folder)))
            print(record["runs"][-1], flush=True)
            record["runs"].sort(key=lambda run: run["ranks"])
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
