"""Measure the time to the first training step, and the memory of it, against the number of pairs in a table.

    python -m benchmarks.preparation --rows 1000,10000       a minute
    python -m benchmarks.preparation                         10,000, 100,000 and 1,000,000 rows: some minutes
    python -m benchmarks.preparation --query                 only the query over cached features

A table has a row for each pair, ten for each image file. Files are 32 x 32 pixels, so that decoding them costs little
beside what this library does with a row. Each size runs in a process of its own, which calls `unlearn()` on a CLIP of
two small transformers with the default settings but for the number of steps and the learning rate, which would be found
by trying. Seconds count from the call to the end of the first step; memory is the peak resident size
until then, less the resident size after the imports. The load is that of the machine when the process began.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .machine import RESULTS, describe, own_folder, resident, run_module
from .records import provenance, record_text, table

ROWS = (10_000, 100_000, 1_000_000)
PER_IMAGE = 10  # captions, each of them a row
QUERY_ROWS, QUERY_WIDTH = 1_000_000, 512
WORDS = ("house", "boat", "river", "mountain", "street", "garden", "bridge", "market", "harbour", "field")


def write_table(folder: Path, rows: int) -> Path:
    """Write the image files and the table; one image in a hundred has captions with a zebra."""
    from PIL import Image

    generator = np.random.default_rng(0)
    table = folder / "pairs.csv"
    with table.open("w", encoding="utf-8") as file:
        file.write("filepath\ttitle\n")
        for image in range(rows // PER_IMAGE):
            name = f"{image // 1000:04d}/{image:07d}.png"
            if image % 1000 == 0:
                (folder / name).parent.mkdir()
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(folder / name, compress_level=1)
            animal = "zebra" if image % 100 == 0 else "horse"
            for caption in range(PER_IMAGE):
                word = WORDS[(image + caption) % len(WORDS)]
                file.write(f"{name}\ta {animal} near the {word}, picture {image} in words {caption}\n")
    return table


def small_clip() -> Any:
    import open_clip
    import torch

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return open_clip.model.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)


class _Reached(Exception):
    """The first training step is done."""


def measure_run(table: Path) -> dict[str, Any]:
    """Call `unlearn()` up to its first training step. Runs in a process of its own."""
    import open_clip
    import torch

    import cliperase_fast as cf
    from cliperase_fast.unlearning.trainer import Trainer

    model, transform = small_clip(), open_clip.image_transform(32, is_train=False)
    phases: list[tuple[str, float]] = []
    step = Trainer.step

    def first_step(self: Trainer, *arguments: Any) -> Any:
        step(self, *arguments)
        raise _Reached

    class Phases(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            phases.append((record.getMessage(), time.perf_counter() - began))

    logger = logging.getLogger("cliperase_fast")
    logger.addHandler(Phases())
    logger.setLevel(logging.INFO)
    Trainer.step = first_step  # type: ignore[method-assign, assignment]
    imported, load = resident("VmRSS"), os.getloadavg()[0]
    began, worked = time.perf_counter(), time.process_time()
    settings: dict[str, Any] = {"steps": 20, "learning_rate": 1e-5, "progress": False, "report": False}
    with suppress(_Reached):
        cf.unlearn(model, f"csv:{table}#caption:zebra", "rest", transform=transform, **settings)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {
        "seconds": seconds, "cpu_seconds": cpu, "mib": (resident("VmHWM") - imported) / 2**20, "load": load,
        "threads": torch.get_num_threads(), "phases": [[name, at] for name, at in phases],
    }  # fmt: skip


def measure_query() -> dict[str, Any]:
    """Search features in memory for the 100 nearest to one query. Runs in a process of its own."""
    import torch

    from cliperase_fast.evaluation.ranking import PART, best_rows, cosines, mean_query

    generator = torch.Generator().manual_seed(0)
    features = torch.empty(QUERY_ROWS, QUERY_WIDTH, dtype=torch.float32)
    for part in features.split(1 << 16):
        part.normal_(generator=generator)
    query = torch.nn.functional.normalize(torch.randn(1, QUERY_WIDTH, generator=generator, dtype=torch.float32), dim=1)

    def search(rows: torch.Tensor) -> None:
        best_rows(cosines(rows.split(PART), mean_query(query), len(rows)), k=100)

    search(features[:1000])
    before, load = resident("VmRSS"), os.getloadavg()[0]
    began, worked = time.perf_counter(), time.process_time()
    search(features)
    return {
        "rows": QUERY_ROWS, "width": QUERY_WIDTH, "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
        "mib": (resident("VmHWM") - before) / 2**20, "load": load, "threads": torch.get_num_threads(),
    }  # fmt: skip


def measure(sizes: Sequence[int], folder: Path, record: dict[str, Any], path: Path) -> None:
    """Measure each size and save the record after it."""
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            began = time.perf_counter()
            table = write_table(Path(made), rows)
            print(f"{rows:,} rows written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
            found = json.loads(run_module("preparation", "--run", str(table)).splitlines()[-1])
        record["runs"] = [row for row in record["runs"] if row["rows"] != rows]
        record["runs"].append({"rows": rows, "images": rows // PER_IMAGE, **found})
        record["runs"].sort(key=lambda row: row["rows"])
        path.write_text(record_text(record) + "\n", encoding="utf-8")
        print(f"{rows:,} rows: {found['seconds']:.1f} s, {found['mib']:.0f} MiB", file=sys.stderr)


def preparation_table(record: dict[str, Any]) -> str:
    """Return the table of the docs."""
    head = ["rows", "image files", "to the first step", "of it on the CPU", "memory", "load"]
    rows = [
        [f"{run['rows']:,}", f"{run['images']:,}", f"{run['seconds']:.0f} s", f"{run['cpu_seconds']:.0f} s",
         f"{run['mib']:,.0f} MiB", f"{run['load']:.1f}"]
        for run in record["runs"]
    ]  # fmt: skip
    return table(head, rows)


def docs() -> str:
    """Return the committed figures for docs/data.md."""
    record = json.loads((RESULTS / "preparation.json").read_text(encoding="utf-8"))
    picture = "![time and memory to the first training step against rows](plots/preparation.png)"
    return f"{preparation_table(record)}\n\n{picture}\n\n{query_sentence(record)}\n\n{provenance(record)}\n"


def query_sentence(record: dict[str, Any]) -> str:
    query = record["query"]
    return (
        f"A query over {query['rows']:,} features of width {query['width']} took {query['seconds']:.2f} s, "
        f"{query['cpu_seconds']:.2f} s of it on the CPU, and {query['mib']:.0f} MiB beyond them, with a load of "
        f"{query['load']:.1f}."
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw time and memory against the number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [run["rows"] for run in record["runs"]]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(panels, ("seconds", "mib"), ("seconds to the first step", "MiB"), strict=True):
        axes.plot(rows, [run[key] for run in record["runs"]], marker="o")
        axes.set(xscale="log", xlabel="rows", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="sizes of the tables, multiples of 10")
    parser.add_argument("--query", action="store_true", help="measure only the query")
    parser.add_argument("--folder", type=Path, help="where tables and images are written (a temporary folder)")
    parser.add_argument("--output", type=Path, default=own_folder() / "preparation.json", help="the record")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run-query", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.run or arguments.run_query:
        print(json.dumps(measure_run(arguments.run) if arguments.run else measure_query()))
        return 0
    given = sys.argv[1:] if words is None else words
    command = " ".join(["python -m benchmarks.preparation", *given])
    record: dict[str, Any] = {"command": command, **describe(), "runs": []}
    path = arguments.output
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        record["runs"] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    record["query"] = json.loads(run_module("preparation", "--run-query").splitlines()[-1])
    path.write_text(record_text(record) + "\n", encoding="utf-8")
    if not arguments.query:
        folder = arguments.folder or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        try:
            measure([int(rows) for rows in arguments.rows.split(",")], folder, record, path)
        finally:
            if arguments.folder is None:
                shutil.rmtree(folder)
        print(preparation_table(record))
    print(query_sentence(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
