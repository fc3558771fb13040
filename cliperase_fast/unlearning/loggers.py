"""Where a run's metrics go: always to metrics.jsonl, and to TensorBoard or Weights & Biases on request.

To add a logger: a class with `log` and `close`, a line in `LOGGERS`, its name in `config.LOGGERS`, and its extra in
`extras.EXTRAS` and pyproject.toml.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.storage import write_all, write_text_atomically
from cliperase_fast.unlearning.checkpoints import metric_lines


class Logger(Protocol):
    """What receives the lines of metrics.jsonl, one for each optimizer step and each evaluation."""

    def log(self, line: dict[str, Any], step: int) -> None: ...

    def close(self, failed: bool = False) -> None:
        """Write everything out. failed: whether training ended in an error."""


def run_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the run itself, without those of learning rates that were tried."""
    return [line for line in lines if "probe" not in line]


class JsonlLogger:
    """Writes metrics.jsonl: first the lines of the steps done, then each new line at once."""

    def __init__(self, path: Path, done: list[dict[str, Any]]) -> None:
        write_text_atomically(path, "".join(metric_lines(done)))
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)

    def log(self, line: dict[str, Any], step: int) -> None:
        for text in metric_lines([line]):
            write_all(self._handle, text.encode("utf-8"))

    def close(self, failed: bool = False) -> None:
        os.close(self._handle)


class TensorBoardLogger:
    """Writes event files to DIR/tensorboard.

    A resumed run adds a file that purges the steps after its checkpoint, so TensorBoard shows each step once.
    """

    folder = "tensorboard"

    def __init__(self, directory: Path, settings: dict[str, Any], done: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        old = directory.exists()
        last = max((line["step"] for line in run_lines(done)), default=0)
        self._writer = SummaryWriter(str(directory), purge_step=last + 1 if old else None)
        if not old:
            self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in settings.items()))
            for line in run_lines(done):  # of a run that had no such logger until now
                self.log(line, line["step"])

    def log(self, line: dict[str, Any], step: int) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # what is in metrics.jsonl is here too, also after a kill

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WandbLogger:
    """Logs to a Weights & Biases run whose files are in DIR/wandb; WANDB_* variables apply (WANDB_MODE=offline).

    A resumed run has the same id. The server drops steps that it has already, which are those since the checkpoint;
    offline, each start makes a folder of its own, and `wandb sync` joins them by the id.
    """

    folder = "wandb"

    def __init__(self, directory: Path, settings: dict[str, Any], done: list[dict[str, Any]]) -> None:
        import wandb

        note = directory / "run-id.txt"
        old = note.exists()
        if not old:
            directory.mkdir(parents=True, exist_ok=True)
            write_text_atomically(note, secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cliperase_fast"),
            dir=str(directory.parent),
            id=note.read_text(encoding="utf-8").strip(),
            config=settings,
            resume="allow",
            reinit="create_new",  # a run of the caller's own is not touched
            settings=wandb.Settings(console="off"),  # standard output stays the caller's
        )
        for line in () if old else run_lines(done):  # of a run that had no such logger until now
            self.log(line, line["step"])

    def log(self, line: dict[str, Any], step: int) -> None:
        self._run.log(scalars(line), step=step)

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


# The values of `UnlearnConfig.logger` beside "none". Each has an extra of the same name.
LOGGERS: dict[str, Any] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def require_logger(name: str, output_dir: Path | None) -> None:
    """Raise InputError unless that logger's package can be imported and it has a folder to write to."""
    if name == "none":
        return
    import_extra(name, f"logger={name!r}")
    if output_dir is None:
        raise InputError(f"logger={name!r} writes to the run directory: give output_dir")


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: train/total, train/grad_norm, validation/forget and so on."""
    groups = {key: value for key, value in line.items() if isinstance(value, dict)} or {"train": line}
    found: dict[str, float] = {}
    for group, values in groups.items():
        for key, value in values.items():
            numbers = {f"{key}/{index}": item for index, item in enumerate(value)} if isinstance(value, list) else {
                key: value
            }  # fmt: skip
            found.update({f"{group}/{key}": float(number) for key, number in numbers.items() if key != "step"})
    return found


class MetricsLog:
    """The loggers of one run; only the first rank has one. A context manager.

    metrics.jsonl is part of the run, so a failure to write it is raised. The logger that `name` adds is not: its first
    failure is a warning, and the run goes on without it.

    directory: the run directory. settings: the run's. done: the lines of the steps before this start.
    """

    def __init__(self, directory: Path, name: str, settings: dict[str, Any], done: list[dict[str, Any]]) -> None:
        self._jsonl = JsonlLogger(directory / "metrics.jsonl", done)
        self._name = name
        self._extra: Logger | None = None
        if name != "none":
            try:
                self._extra = LOGGERS[name](directory / LOGGERS[name].folder, settings, done)
            except Exception as error:
                self._give_up(error)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._jsonl.close(kind is not None)
        if self._extra is not None:
            try:
                self._extra.close(kind is not None)
            except Exception as error:
                self._give_up(error)

    def append(self, line: dict[str, Any]) -> None:
        self._jsonl.log(line, line["step"])
        if self._extra is not None and "probe" not in line:  # its steps come once, from the chosen probe
            try:
                self._extra.log(line, line["step"])
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._extra = None
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"logger={self._name!r} failed ({said}) and is off for the rest of this run; metrics.jsonl has every line",
            stacklevel=3,
        )
