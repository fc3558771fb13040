"""The settings of `unlearn()`: one dataclass, which also defines the flags and the config file's keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliperase_fast.coercion import AUTO, Auto, coerce, is_auto
from cliperase_fast.errors import InputError
from cliperase_fast.reading import read_mapping
from cliperase_fast.terms import CONSISTENCY_MODES, FORGET_LOSSES, TERMS, described, nearest_name

PROBE_STEPS = 30  # optimizer steps by which learning rates are compared
RECIPES = Path(__file__).parent / "recipes"  # NAME.yaml: settings that a search on validation data found for a method
LOGGERS = ("none", "tensorboard", "wandb")  # beside metrics.jsonl; see unlearning/loggers.py


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None, group: str = "training") -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


@dataclass(frozen=True)
class UnlearnConfig:
    """Settings of `unlearn()`. Defaults follow CLIPErase (arXiv 2410.23330) where the paper states them.

    Build one with keywords, `UnlearnConfig.paper(name)`, `recipe(method)`, `from_file(path)` or `from_dict(mapping)`;
    all of them raise `InputError` for a wrong name or value. Frozen: derive a variant with `dataclasses.replace`.
    """

    method: str = _option("calibrated", "unlearning method, see `cliperase-fast methods`", group="method")
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
        f"what stays close to the teacher ({described(CONSISTENCY_MODES.values())})",
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
    epochs: int | Auto = _option(  # noqa: RUF009
        AUTO,
        "number of epochs; auto: until the target is reached and the divergence from the original stops improving, "
        "also at 0.3 and 0.1 of the learning rate",
    )
    steps: int = _option(0, "number of optimizer steps, in place of epochs; 0 for none")
    epoch_over: str = _option("forget", "an epoch is one pass over this set; the other is cycled", ("forget", "retain"))
    batch_size: int | Auto = _option(  # noqa: RUF009
        AUTO,
        "pairs in a batch, of both kinds; auto: 16 if learning_rate and epochs or steps are given, else 128",
    )
    forget_fraction: float | Auto = _option(  # noqa: RUF009
        AUTO,
        "share of forget pairs in a batch (0.5: one to one); auto: 0.5 where batch_size=auto stands for 16, else 0.25",
    )
    learning_rate: float | Auto = _option(  # noqa: RUF009
        AUTO, f"peak learning rate; auto: the best of a few rates, each tried for {PROBE_STEPS} steps"
    )
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
    precision: str = _option(
        "fp32",
        "arithmetic of the encoders; fp16 needs a GPU; auto: bf16 where the device is fast at it and the model's "
        "features and scores stay nearly the same, else fp32",
        ("fp32", "bf16", "fp16", AUTO),
    )
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
    worst_class_floor: float = _option(
        0.3,
        "select=divergence: largest divergence from the original, in nats, that a retained class may show in a chosen "
        "checkpoint",
        group="selection",
    )
    select: str = _option(
        AUTO,
        "which checkpoint is kept: the one that forgets most within retain_floor, the one at the target that diverges "
        "least from the original, or the last; auto: floor where batch_size=auto stands for 16, else divergence",
        (AUTO, "floor", "divergence", "last"),
        group="selection",
    )
    forget_level: str = _option(
        "auto",
        "how similar forget pairs are to stay, where the run has a target (the recipe, select=divergence, "
        "method=calibrated): unrelated, as pairs that have nothing to do with each other; related, classes that share "
        "words with retained ones near the level of those; similar, also other classes near the level of the retained "
        "class that the model finds most similar; auto: similar if the text tower knows words from elsewhere, else "
        "related, and unrelated with lambda_hidden",
        ("auto", "similar", "related", "unrelated"),
        group="selection",
    )
    evaluate_every: int = _option(
        1, "epochs between two evaluations on the validation split (every 10 steps if epochs=auto)", group="selection"
    )
    early_stop: int = _option(
        0,
        "stop after this many evaluations without a better checkpoint; 0 for never, or for a number of the recipe's "
        "own if epochs=auto",
        group="selection",
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
    max_retain_pairs: int = _option(
        50_000,
        "retain pairs to use at most, a seeded sample of more; held-out pairs are taken from them; 0 for all",
        group="data",
    )
    max_test_pairs: int = _option(
        10_000,
        "pairs of a test or validation split to score at most, a seeded sample of more; 0 for all",
        group="data",
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
            value = coerce(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            choices = spec.metadata["choices"]
            if choices and value not in choices:
                raise InputError(
                    f"{spec.name}={value!r} is not one of {', '.join(choices)}{nearest_name(value, choices)}"
                )
        for name in ("epochs", "batch_size", "accumulate", "eval_batch_size", "evaluate_every", "lora_rank",
                     "checkpoint_every", "keep_checkpoints"):  # fmt: skip
            self._require(is_auto(getattr(self, name)) or getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("lambda_retain", "lambda_forget", "lambda_consistency", "weight_decay", "grad_clip",
                     "grad_cache_chunk", "steps", "warmup_steps", "num_workers", "early_stop", "retain_floor",
                     "worst_class_floor", "seed", "image_cache_mib", "max_retain_pairs", "max_test_pairs"):  # fmt: skip
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("val_fraction", "test_fraction", "forget_fraction"):
            value = getattr(self, name)
            self._require(is_auto(value) or 0 < value < 1, name, "must lie between 0 and 1, both excluded")
        self._require(
            isinstance(self.learning_rate, str) or self.learning_rate > 0,
            "learning_rate",
            "must be positive, or 'auto'",
        )
        self._require(self.rank_timeout > 0, "rank_timeout", "must be positive")
        self._require(-1 <= self.margin <= 1, "margin", "is a cosine: it must lie between -1 and 1")
        self._require(
            self.lambda_retain + self.lambda_forget + self.lambda_consistency > 0,
            "lambda_retain, lambda_forget, lambda_consistency",
            "are all 0, so nothing would be trained",
        )
        self._require(self.pairs_per_batch >= 2, "batch_size", "must be at least 2: one forget and one retain pair")
        self._require(
            self.grad_cache_chunk <= self.pairs_per_batch,
            "grad_cache_chunk",
            f"is more than the {self.pairs_per_batch} pairs of a batch (batch_size), so it has no effect: make it "
            "smaller, or 0 to turn it off",
        )
        self._require(
            self.max_retain_pairs == 0 or self.max_retain_pairs >= self.retain_pairs,
            "max_retain_pairs",
            f"is less than the {self.retain_pairs} retain pairs of a batch: give more, or a smaller batch_size",
        )
        self._require(self.max_test_pairs != 1, "max_test_pairs", "must be at least 2: one forget and one retain pair")
        self._check_auto()
        kind, _, count = self.trainable.partition(":")
        known = self.trainable in ("all", "image", "text", "lora") or (
            kind == "last" and count.isdecimal() and int(count) > 0
        )
        self._require(known, "trainable", f"is {self.trainable!r}: use all, image, text, last:K or lora")

    def _check_auto(self) -> None:
        """Raise InputError for settings that need a number where there is `auto`."""
        self._require(
            self.steps == 0 or self.epochs == AUTO,
            "steps",
            f"and epochs={self.epochs} both say how long to train: give one of them",
        )
        if self.open_ended:
            self._require(self.schedule != "cosine", "schedule", "ends with the last epoch: give a number of epochs")
        if self.epochs == AUTO:
            self._require(
                self.evaluate_every == 1,
                "evaluate_every",
                "counts epochs, and epochs='auto' evaluates every few steps: leave it out, or give a number of epochs",
            )
        if self.learning_rate == AUTO:
            self._require(
                self.warmup_steps < PROBE_STEPS,
                "warmup_steps",
                f"must be less than the {PROBE_STEPS} steps for which learning_rate='auto' tries a rate: make it "
                "smaller, or give a learning_rate",
            )

    def _require(self, holds: bool, name: str, complaint: str) -> None:
        if not holds:
            value = getattr(self, name, None)
            raise InputError(f"{name}={value} {complaint}" if hasattr(self, name) else f"{name} {complaint}")

    @property
    def open_ended(self) -> bool:
        """Whether the run finds its number of steps itself."""
        return self.epochs == AUTO and self.steps == 0

    @property
    def automatic(self) -> bool:
        """Whether the run finds its learning rate or its number of steps itself."""
        return self.learning_rate == AUTO or self.open_ended

    @property
    def drops_out(self) -> bool:
        """Whether dropout is on in training. It is off where the student must stay near the original, which has none:
        its noise would count as a divergence in every step.
        """
        return not (self.automatic or self.method == "calibrated")

    @property
    def pairs_per_batch(self) -> int:
        """Pairs in a batch: `batch_size`, or what `auto` stands for."""
        return (128 if self.automatic else 16) if isinstance(self.batch_size, str) else self.batch_size

    @property
    def forget_pairs(self) -> int:
        """Forget pairs in a batch (M); the rest are retain pairs (N). Both at least 1."""
        fraction = (0.25 if self.automatic else 0.5) if isinstance(self.forget_fraction, str) else self.forget_fraction
        return min(max(round(self.pairs_per_batch * fraction), 1), self.pairs_per_batch - 1)

    @property
    def retain_pairs(self) -> int:
        return self.pairs_per_batch - self.forget_pairs

    def resolved(self, unused: Collection[str] = ()) -> UnlearnConfig:
        """Return the settings with numbers for batch_size and forget_fraction, and with the rule of selection.

        unused: settings that the method does not use, which stay as they are. A method that uses no learning_rate
        selects by the floor.
        """
        values: dict[str, Any] = {}
        if self.batch_size == AUTO:
            values["batch_size"] = self.pairs_per_batch
        if self.forget_fraction == AUTO:
            values["forget_fraction"] = 0.25 if self.automatic else 0.5
        if self.select == AUTO:
            values["select"] = "divergence" if self.automatic and "learning_rate" not in unused else "floor"
        return dataclasses.replace(self, **{name: value for name, value in values.items() if name not in unused})

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
    def recipe(cls, method: str, **overrides: Any) -> UnlearnConfig:
        """Return the settings that a search on validation data found for a method (`python -m benchmarks.search`).

        Raises InputError for a method that has no recipe.
        """
        return cls.from_dict({**recipe_settings(method), **overrides})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> UnlearnConfig:
        """Build from a mapping. Raises InputError for an unknown key, with the nearest known one."""
        if not isinstance(settings, Mapping):
            raise InputError(f"config is a {type(settings).__name__}; pass a mapping, an UnlearnConfig or a file")
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
    "epochs": 20, "steps": 0, "epoch_over": "forget", "batch_size": 16, "forget_fraction": 0.5, "optimizer": "adam",
    "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0, "grad_clip": 0.0, "accumulate": 1,
    "grad_cache_chunk": 0, "precision": "fp32", "trainable": "all", "lora_rank": 8, "lora_alpha": 16.0, "seed": 0,
    "device": "auto", "deepspeed": "", "rank_timeout": 600.0,
    "val_fraction": 0.1, "test_fraction": 0.2, "retain_floor": 0.02, "worst_class_floor": 0.3, "select": "floor",
    "forget_level": "unrelated", "evaluate_every": 1, "early_stop": 0,
    "on_error": "raise", "overlap": "error", "long_captions": "error", "max_retain_pairs": 0, "max_test_pairs": 0,
    "num_workers": 0, "image_cache_mib": 512, "eval_batch_size": 256, "teacher_cache": "auto",
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
        return options(**{name: coerce(specs[name], value) for name, value in given.items()})
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


def recipe_names() -> list[str]:
    """Return the methods that have a recipe."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_settings(method: str) -> dict[str, Any]:
    """Return the settings in a method's recipe, its name among them."""
    known = recipe_names()
    if method not in known:
        hint = nearest_name(method, known) or f"; there are those of {', '.join(known)}"
        raise InputError(f"the method {method!r} has no recipe{hint}")
    return read_settings(RECIPES / f"{method}.yaml")


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file of settings."""
    return read_mapping(path, "the config file")
