"""Runs of `open_clip_train.main` on a tiny model and tiny data, in this process or on two ranks."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from processes import free_ports, launched

COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "head_width": 12},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
}


def samples(count: int) -> Iterator[tuple[str, bytes, str]]:
    """(key, png, caption): noise around a colour, and its name with a number."""
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        pixels = (index % 8) * 30 + torch.randint(0, 40, (16, 16, 3), generator=generator)
        png = io.BytesIO()
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(png, "PNG")
        yield f"{index:05d}", png.getvalue(), f"{colour} number {index}"


def write_data(folder: Path, count: int = 96, shards: int = 2) -> None:
    """Shards, a CSV of the same pictures, and the tiny architecture with a checkpoint for a teacher."""
    found = list(samples(count))
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for key, png, caption in found[shard::shards]:
                for name, data in ((f"{key}.png", png), (f"{key}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    lines = ["filepath\ttitle"]
    for key, png, caption in found:
        (folder / f"{key}.png").write_bytes(png)
        lines.append(f"{folder / key}.png\t{caption}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    (folder / "tiny-clip.json").write_text(json.dumps(ARCHITECTURE))
    add_architecture(folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "teacher.pt")


def add_architecture(folder: Path) -> None:
    open_clip.add_model_config(folder / "tiny-clip.json")


def arguments(folder: Path, kind: str, *extra: Any) -> list[str]:
    data = {
        "webdataset": [str(folder / "train-{0..1}.tar"), "--train-num-samples", "96"],
        "csv": [str(folder / "train.csv")],
    }[kind]
    given = [
        "--train-data", *data, "--dataset-type", kind, "--model", "tiny-clip", "--batch-size", "16", "--epochs", "2",
        "--lr", "1e-3", "--warmup", "2", "--workers", "0", "--device", "cpu", "--logs", str(folder / "logs"),
        "--seed", "1", "--precision", "fp32", "--save-frequency", "0", *extra,
    ]  # fmt: skip
    return [str(word) for word in given]


@contextmanager
def recording() -> Iterator[list[dict[str, float]]]:
    """The losses of every call, of whatever loss open_clip_train creates; its shards unshuffled, to repeat a run."""
    import open_clip_train.data as data
    import open_clip_train.main as trainer

    losses: list[dict[str, float]] = []
    making = "create_task" if hasattr(trainer, "create_task") else "create_loss"  # of open_clip 4 and 3
    create = getattr(trainer, making)

    def create_and_watch(*args: Any, **options: Any) -> torch.nn.Module:
        made = create(*args, **options)
        loss = made.loss if making == "create_task" else made
        loss.register_forward_hook(
            lambda module, inputs, output: losses.append({key: value.item() for key, value in output.items()})
        )
        loss.register_forward_hook(lambda module, inputs, output: kinds.add(type(module).__module__.split(".")[0]))
        return made

    kinds: set[str] = set()
    expand = data.tar_file_expander
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])  # the trainer sets its own, on captured streams
        patch.setattr(trainer, making, create_and_watch)
        patch.setattr(data, "_SAMPLE_SHUFFLE_SIZE", 1)
        patch.setattr(data, "_SAMPLE_SHUFFLE_INITIAL", 1)
        if "eof_value" in inspect.signature(expand).parameters:  # newer than open_clip's shard reader takes
            patch.setattr(data, "tar_file_expander", partial(expand, eof_value=None))
        yield losses
    losses.append({"package": "".join(sorted(kinds))})  # type: ignore[dict-item]


def run(folder: Path, name: str, patched: bool, words: list[str]) -> list[dict[str, Any]]:
    """The losses of each step, and last which package computed them."""
    import open_clip_train.main as trainer

    import cliperase_fast as cf

    with cf.patch_open_clip() if patched else nullcontext(), recording() as losses:
        assert trainer.main([*words, "--name", name]) is None
    return losses


def run_ranks(folder: Path, cases: dict[str, list[str]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Each case without and with the patch on two gloo ranks: {case: [stock rank 0, fused 0, stock 1, fused 1]}.

    All in one pair of processes, as importing takes longer than training.
    """
    ports = free_ports(2 * len(cases))
    found = launched(2, folder, run_rank, folder, cases, ports)
    return {name: [*found[0][name], *found[1][name]] for name in cases}


def run_rank(folder: Path, cases: dict[str, list[str]], ports: list[int]) -> dict[str, list[Any]]:
    import open_clip_train.main as trainer

    add_architecture(folder)
    parallel = torch.nn.parallel.DistributedDataParallel

    def on_the_cpu(model: torch.nn.Module, device_ids: Any = None, **options: Any) -> torch.nn.Module:
        """open_clip names a device, which DDP takes on GPUs only; and it wraps the teacher, which has no gradients."""
        wanted = any(parameter.requires_grad for parameter in model.parameters())
        return parallel(model, **options) if wanted else model

    trainer.torch.nn.parallel.DistributedDataParallel = on_the_cpu  # type: ignore[misc, assignment]
    results: dict[str, list[Any]] = {}
    for name, words in cases.items():
        for patched in (False, True):
            os.environ["MASTER_PORT"] = str(ports.pop())
            results.setdefault(name, []).append(run(folder, f"{name}-{patched}", patched, words))
            torch.distributed.destroy_process_group()
    return results
