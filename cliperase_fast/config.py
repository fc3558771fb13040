"""The settings of `unlearn()`: one dataclass, which also defines the flags and the config file's keys."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cliperase_fast.errors import InputError
from cliperase_fast.reading import read_text
from cliperase_fast.terms import CONSISTENCY_MODES, FORGET_LOSSES, TERMS, described, nearest_name

AUDIT_DEPTHS = ("depth", "full")  # beside False and True
LOGGERS = ("none", "tensorboard", "wandb")  # beside metrics.jsonl; see unlearning/loggers.py


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None, group: str = "training") -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


@dataclass(frozen=True)
class UnlearnConfig:
    """Settings of `unlearn()`. Defaults follow CLIPErase (arXiv 2410.23330) where the paper states them.

    Build one with keywords, `UnlearnConfig.paper(name)`, `from_file(path)` or `from_dict(mapping)`; all of them raise
    `InputError` for a wrong name or value. Frozen: derive a variant with `dataclasses.replace`.
    """

    method: str = _option("cliperase", "unlearning method, see `cliperase-fast methods`", group="method")
    method_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of that method, as KEY=VALUE or a JSON object", "choices": None, "group": "method"},
    )

    # the losses
    lambda_retain: float = _option(1.0, TERMS["retain"].help, group="loss")
    lambda_forget: float = _option(3.0, TERMS["forget"].help, group="loss")
    lambda_consistency: float = _option(3.0, TERMS["consistency"].help, group="loss")
    forget_loss: str = _option(
        "cosine",
        f"what pushes forget pairs apart ({described(FORGET_LOSSES.values())})",
        tuple(FORGET_LOSSES),
        group="loss",
    )
    margin: float = _option(0.0, "hinge only: stop pushing a pair once its cosine is below this", group="loss")
    consistency: str = _option(
        "logits",
        f"what is kept like the teacher's ({described(CONSISTENCY_MODES.values())})",
        tuple(CONSISTENCY_MODES),
        group="loss",
    )
    false_negatives: str = _option(
        "auto",
        "pairs that are not negatives of each other: auto, those of the same entity if the data names entities, else "
        "of the same class (caption if there are no classes); caption, those of the same caption; none",
        ("auto", "caption", "none"),
        group="loss",
    )
    backend: str = _option("auto", "loss backend, see `cliperase-fast backends`", group="loss")

    # the optimisation
    epochs: int = _option(20, "number of epochs")
    epoch_over: str = _option("forget", "an epoch is one pass over this set; the other is cycled", ("forget", "retain"))
    batch_size: int = _option(16, "pairs in a batch, forget and retain together")
    forget_fraction: float = _option(0.5, "share of forget pairs in a batch (0.5: one to one)")
    learning_rate: float = _option(1e-6, "peak learning rate")
    optimizer: str = _option("adam", "optimizer", ("adam", "adamw"))
    weight_decay: float = _option(0.0, "weight decay (matrices only)")
    schedule: str = _option("constant", "learning rate after the warm-up", ("constant", "cosine"))
    warmup_steps: int = _option(0, "linear warm-up, in optimizer steps")
    grad_clip: float = _option(0.0, "clip the gradient norm to this; 0 for none")
    accumulate: int = _option(1, "batches per optimizer step")
    grad_cache_chunk: int = _option(
        0,
        "encode a batch this many pairs at a time and each twice (gradient caching): the same gradients, with the "
        "activations of one chunk in memory; 0 for the whole batch at once",
    )
    precision: str = _option("fp32", "arithmetic of the encoders; fp16 needs a GPU", ("fp32", "bf16", "fp16"))
    trainable: str = _option("all", "what is trained: all, image, text, last:K (the last K blocks of each tower), lora")
    lora_rank: int = _option(8, "rank of the LoRA update (trainable=lora)")
    lora_alpha: float = _option(16.0, "scale of the LoRA update (trainable=lora)")
    seed: int = _option(0, "seed of everything random")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1 ...")

    # many devices
    deepspeed: Any = _option(  # noqa: RUF009
        "",
        "shard the student with DeepSpeed: zero1, zero2, zero3, or a DeepSpeed configuration (a JSON file; in a config "
        "file and from Python a mapping too); empty for none",
        group="devices",
    )
    rank_timeout: float = _option(600.0, "seconds after which a silent rank counts as lost", group="devices")

    # choosing the result
    val_fraction: float = _option(0.1, "share of the training pairs held out to choose a checkpoint", group="selection")
    test_fraction: float = _option(0.2, "share held out as test split where the data has none", group="selection")
    retain_floor: float = _option(
        0.02, "largest drop of the retain score a chosen checkpoint may show (0.02: two points)", group="selection"
    )
    select: str = _option(
        "floor",
        "which checkpoint is kept: the one that forgets most within retain_floor, or the last",
        ("floor", "last"),
        group="selection",
    )
    evaluate_every: int = _option(1, "epochs between two evaluations on the validation split", group="selection")
    early_stop: int = _option(
        0, "stop after this many evaluations without a better checkpoint; 0 for never", group="selection"
    )

    # the data
    on_error: str = _option(
        "raise",
        "pairs that cannot be used, such as unreadable images: raise, or skip and count",
        ("raise", "skip"),
        group="data",
    )
    overlap: str = _option(
        "error", "pairs in both sets: an error, or dropped from retain", ("error", "drop"), group="data"
    )
    long_captions: str = _option(
        "error", "captions longer than the model's context: an error, or cut", ("error", "truncate"), group="data"
    )
    num_workers: int = _option(0, "processes that load images", group="data")
    image_cache_mib: int = _option(
        512,
        "memory for transformed images, in MiB, so that each is read and transformed once (deterministic transforms, "
        "num_workers=0), or for the activations of layers that are not trained; 0 for none",
        group="data",
    )
    eval_batch_size: int = _option(256, "images per batch without gradient, as in evaluation", group="data")
    teacher_cache: str = _option(
        "auto",
        "frozen teacher's features: kept in memory or a file when the transform is deterministic (auto), "
        "forced to memory or disk, or computed in every step (off)",
        ("auto", "memory", "disk", "off"),
        group="data",
    )

    # the run directory
    checkpoint_every: int = _option(
        100, "optimizer steps between two checkpoints; one also ends each epoch", group="run"
    )
    keep_checkpoints: int = _option(2, "checkpoints kept", group="run")
    report: bool = _option(True, "write plots and report.html", group="run")
    audit: bool | str = _option(
        False,
        "audit the result on the run's own test split; depth: with attacks on copies of the models, full: with more",
        group="run",
    )
    logger: str = _option(
        "none",
        "where metrics go besides metrics.jsonl: tensorboard, wandb (Weights & Biases) or none",
        LOGGERS,
        group="run",
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            choices = spec.metadata["choices"]
            if choices and value not in choices:
                raise InputError(
                    f"{spec.name}={value!r} is not one of {', '.join(choices)}{nearest_name(value, choices)}"
                )
        for name in ("epochs", "batch_size", "accumulate", "eval_batch_size", "evaluate_every", "lora_rank",
                     "checkpoint_every", "keep_checkpoints"):  # fmt: skip
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("lambda_retain", "lambda_forget", "lambda_consistency", "weight_decay", "grad_clip",
                     "grad_cache_chunk", "warmup_steps", "num_workers", "early_stop", "retain_floor",
                     "seed", "image_cache_mib"):  # fmt: skip
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("val_fraction", "test_fraction", "forget_fraction"):
            self._require(0 < getattr(self, name) < 1, name, "must lie between 0 and 1, both excluded")
        self._require(self.learning_rate > 0, "learning_rate", "must be positive")
        self._require(self.rank_timeout > 0, "rank_timeout", "must be positive")
        self._require(-1 <= self.margin <= 1, "margin", "is a cosine: it must lie between -1 and 1")
        self._require(
            self.lambda_retain + self.lambda_forget + self.lambda_consistency > 0,
            "lambda_retain, lambda_forget, lambda_consistency",
            "are all 0, so nothing would be trained",
        )
        self._require(self.batch_size >= 2, "batch_size", "must be at least 2: one forget and one retain pair")
        self._require(
            self.grad_cache_chunk <= self.batch_size,
            "grad_cache_chunk",
            f"is more than batch_size={self.batch_size}, so it has no effect: make it smaller, or 0 to turn it off",
        )
        kind, _, count = self.trainable.partition(":")
        known = self.trainable in ("all", "image", "text", "lora") or (
            kind == "last" and count.isdigit() and int(count) > 0
        )
        self._require(known, "trainable", f"is {self.trainable!r}: use all, image, text, last:K or lora")

    def _require(self, holds: bool, name: str, complaint: str) -> None:
        if not holds:
            value = getattr(self, name, None)
            raise InputError(f"{name}={value} {complaint}" if hasattr(self, name) else f"{name} {complaint}")

    @property
    def forget_pairs(self) -> int:
        """Forget pairs in a batch (M); the rest of `batch_size` are retain pairs (N). Both at least 1."""
        return min(max(round(self.batch_size * self.forget_fraction), 1), self.batch_size - 1)

    @property
    def retain_pairs(self) -> int:
        return self.batch_size - self.forget_pairs

    @classmethod
    def paper(cls, dataset: str, **overrides: Any) -> UnlearnConfig:
        """Return the settings of CLIPErase, section 4 (arXiv 2410.23330): lambda 1, 3, 3; Adam; batch 16; 20 epochs.

        Every field is pinned, so that a later change of a default does not change the preset.

        dataset: "cifar100" or "cc12m" (learning rate 1e-6), "flickr30k" (1e-8). The paper masks no false negatives.
        """
        rates = {"cifar100": 1e-6, "cc12m": 1e-6, "flickr30k": 1e-8}
        if dataset not in rates:
            raise InputError(f"no paper preset {dataset!r}; there are {', '.join(rates)}")
        return cls.from_dict({**_PAPER, "learning_rate": rates[dataset], **overrides})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> UnlearnConfig:
        """Build from a mapping. Raises InputError for an unknown key, with the nearest known one."""
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                hint = nearest_name(name, known) or f"; known are {', '.join(known)}"
                raise InputError(f"unknown setting {name!r}{hint}")
        return cls(**settings)

    @classmethod
    def from_file(cls, path: str | Path) -> UnlearnConfig:
        """Read a YAML or JSON file whose keys are the field names."""
        return cls.from_dict(read_settings(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# What the paper states, and for the rest what this package does where the paper says nothing.
_PAPER: dict[str, Any] = {
    "method": "cliperase", "method_options": {},
    "lambda_retain": 1.0, "lambda_forget": 3.0, "lambda_consistency": 3.0, "forget_loss": "cosine", "margin": 0.0,
    "consistency": "logits", "false_negatives": "none", "backend": "auto",
    "epochs": 20, "epoch_over": "forget", "batch_size": 16, "forget_fraction": 0.5, "optimizer": "adam",
    "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0, "grad_clip": 0.0, "accumulate": 1,
    "grad_cache_chunk": 0, "precision": "fp32", "trainable": "all", "lora_rank": 8, "lora_alpha": 16.0, "seed": 0,
    "device": "auto", "deepspeed": "", "rank_timeout": 600.0,
    "val_fraction": 0.1, "test_fraction": 0.2, "retain_floor": 0.02, "select": "floor", "evaluate_every": 1,
    "early_stop": 0,
    "on_error": "raise", "overlap": "error", "long_captions": "error", "num_workers": 0, "image_cache_mib": 512,
    "eval_batch_size": 256, "teacher_cache": "auto",
    "checkpoint_every": 100, "keep_checkpoints": 2, "report": True, "audit": False, "logger": "none",
}  # fmt: skip


def read_options(options: type, given: Mapping[str, Any], what: str) -> Any:
    """Build a dataclass of options from a mapping.

    what: whose options they are, for errors. Raises InputError for an unknown option, which offers the nearest known
    one, and for a value that is not of the option's type.
    """
    specs = {spec.name: spec for spec in dataclasses.fields(options)}
    for name in given:
        if name not in specs:
            known = f"; known are {', '.join(specs)}" if specs else "; it has no options"
            raise InputError(f"{what} has no option {name!r}{nearest_name(name, specs) or known}")
    try:
        return options(**{name: _coerce(specs[name], value) for name, value in given.items()})
    except TypeError as error:
        raise InputError(f"the options of {what}: {error}") from error


def parse_options(words: Iterable[str]) -> dict[str, Any]:
    """Return the mapping that words of a command line name: each KEY=VALUE or a JSON object.

    Values are read as JSON where they can be (numbers, true, lists), otherwise as strings.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            value = json.loads(word if word.lstrip().startswith("{") else text)
        except (ValueError, RecursionError):
            value = text
        if word.lstrip().startswith("{") and isinstance(value, dict):
            found.update(value)
        elif equals and name.isidentifier():
            found[name] = value
        else:
            raise InputError(f"method_options={word!r} is neither KEY=VALUE nor a JSON object")
    return found


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file of settings."""
    return read_mapping(path, "the config file")


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file. what: names the file in errors, "the config file"."""
    import yaml

    path = Path(path)
    text = read_text(path, _MAX_CONFIG, f"{what} ")
    try:
        if path.suffix == ".json":
            found = json.loads(text, object_pairs_hook=_once_each)
        else:
            found = yaml.load(text, _yaml_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{what} {path} {error}") from error
        said = " ".join(str(error).split())
        raise InputError(f"{what} {path} is neither valid YAML nor JSON: {said}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{what} {path} must hold `name: value` lines, not a {type(found).__name__}")
    return found


_MAX_CONFIG = 1 << 20


def _once_each(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise InputError(f"sets {key!r} twice: keep one")
        mapping[key] = value
    return mapping


@cache
def _yaml_loader() -> Any:
    """Return yaml's safe loader without duplicate keys and aliases.

    A duplicate key would silently win, and a few lines of aliases can expand to gigabytes.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise InputError("holds an alias (*name): write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _once_each((key, None) for key in keys)
            return dict(super().construct_mapping(node, deep))

    return Loader


def _coerce(spec: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as the field's type, so that `1e-6` from YAML (a string there) and `1` for 1.0 both work.

    A field of another type than bool, int, float or str takes any value.
    """
    wanted = getattr(spec.type, "__name__", spec.type)
    if spec.name == "method_options":
        if isinstance(value, Mapping):
            return dict(value)
        raise InputError(f"{spec.name}={_shortly(value)} must be a mapping")
    if spec.name == "audit":
        if isinstance(value, bool) or (isinstance(value, str) and value in AUDIT_DEPTHS):
            return value
        raise InputError(f"audit={_shortly(value)} must be true, false, {' or '.join(AUDIT_DEPTHS)}")
    if spec.name == "deepspeed":
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, (str, Path)):
            return str(value)
        raise InputError(f"{spec.name}={_shortly(value)} must be a string or a mapping")
    if wanted == "bool":
        if isinstance(value, bool):
            return value
        raise InputError(f"{spec.name}={_shortly(value)} must be true or false")
    if wanted == "str":
        if isinstance(value, str):
            return value
        if value is False and "off" in (spec.metadata.get("choices") or ()):  # YAML reads a bare `off` as false
            return "off"
        raise InputError(f"{spec.name}={_shortly(value)} must be a string")
    if wanted not in ("int", "float"):
        return value
    number: type = int if wanted == "int" else float
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError(f"{spec.name}={_shortly(value)} must be a number")
    try:
        converted = number(value)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{spec.name}={_shortly(value)} must be {'a whole number' if number is int else 'a number'}"
        ) from error
    if not math.isfinite(converted):
        raise InputError(f"{spec.name}={value!r} must be finite")
    if number is int and isinstance(value, float) and value != converted:
        raise InputError(f"{spec.name}={value!r} must be a whole number")
    return converted


def _shortly(value: Any) -> str:
    """Return a short repr of a few levels, as lists can contain each other or be deeply nested."""
    brief = reprlib.Repr()
    brief.maxlevel = 3
    brief.maxstring = brief.maxother = brief.maxlong = 100
    try:
        return brief.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"
