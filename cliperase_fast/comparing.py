"""`compare()`: several methods on the same model and pairs, one after another, with their audits side by side."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast.auditing import Audit
from cliperase_fast.auditing.features import keep_features
from cliperase_fast.auditing.loading import load_models
from cliperase_fast.auditing.sets import open_sets
from cliperase_fast.coercion import shortly
from cliperase_fast.config import UnlearnConfig, recipe_names, recipe_settings
from cliperase_fast.distributed import SINGLE_PROCESS
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.models.runtime import device_of_rank
from cliperase_fast.progress import say
from cliperase_fast.reading import printable_data, read_text
from cliperase_fast.report import comparison_page, comparison_table
from cliperase_fast.storage import Locked, check_writable, lock, output_folder, write_text_atomically, writing
from cliperase_fast.terms import nearest_name
from cliperase_fast.unlearning import unlearn
from cliperase_fast.unlearning.advice import Advice, advising
from cliperase_fast.unlearning.methods import make_method, methods
from cliperase_fast.unlearning.run_directory import holds_run

FORMAT = 1
FILE, PAGE = "compare.json", "compare.html"
ALL = "all"
_LARGEST = 1 << 26  # bytes of a file that is read
_DEPTHS: Mapping[bool | str, bool | str] = {False: True, True: "depth", "full": "full"}  # depth= -> unlearn(audit=...)
_SCORES = {
    "forgetting": ("zero_shot_top1", "association", "mrr"),
    "collateral": ("retain_top1", "retain_association", "worst_class_drop", "image_side", "text_side"),
    "depth": ("relearn_area",),
}  # fmt: skip


class Comparison(NamedTuple):
    """What `compare()` returns. content: that of compare.json, see there. folder: where the runs are."""

    content: dict[str, Any]
    folder: Path

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The entry of each method: its scores, or "error"."""
        return self.content["methods"]

    @property
    def failed(self) -> dict[str, str]:
        """Why the methods without a result have none."""
        return {name: entry["error"] for name, entry in self.methods.items() if "error" in entry}

    def summary(self) -> str:
        """Return a table of the methods in plain text, and why others have no result."""
        failed = [f"{name} has no result: {why}" for name, why in self.failed.items()]
        return "\n\n".join([comparison_table(self.content), *failed, *self.content["notes"]])


def compare(
    model: Any,
    forget: Any,
    retain: Any = "rest",
    *,
    output_dir: str | Path,
    methods: Sequence[str] | str = ALL,
    oracle: Any = None,
    oracle_seconds: float | None = None,
    test: Any = None,
    depth: bool | str = False,
    recipes: bool = True,
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> Comparison:
    """Unlearn the same pairs by several methods and audit each result.

    Every method gets the same original, pairs, splits, evaluation and audit, each in a run directory of its own,
    `output_dir/NAME`. A method that fails, or that refuses the model, has an entry with the reason, and the others go
    on. compare.json and compare.html are written after each method. The same call again continues where an earlier one
    ended, and repeats what failed. It is refused if the weights of a model or the names or captions of pairs changed.

    model, forget, retain, test, tokenizer, transform: as in `unlearn()`.
    methods: "all" for every name of `cliperase_fast.methods()`, or names.
    oracle: a model, or a list of models, trained like the original without the forget pairs: the target.
    oracle_seconds: how long it took to train one of them, to be shown beside the seconds of the methods.
    depth: also attack copies of the models, for the relearning area, as in `audit()`.
    recipes: whether each method starts from its recipe (`UnlearnConfig.recipe`), else from its defaults.
    config, overrides: settings for all methods, over recipes. A setting that a method does not use is left out for it.

    Returns a `Comparison`. Raises `InputError` before any work for unknown methods, wrong settings, models and data
    that cannot be read, and a folder that holds something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process: start it without torchrun, or call unlearn() for each method")
    names = _names(methods)
    settings = _settings(config, overrides, depth, names)
    if oracle_seconds is not None:
        known = isinstance(oracle_seconds, (int, float, np.integer, np.floating))
        if not known or not 0 < oracle_seconds < math.inf:
            raise InputError(f"oracle_seconds={oracle_seconds} must be positive; leave it out if it is not known")
        oracle_seconds = float(oracle_seconds)
    given = {"forget": forget, "retain": retain, "test": test, "oracle": oracle}
    shared = {**given, "tokenizer": tokenizer, "transform": transform, "progress": progress}
    for name in names:
        make_method(UnlearnConfig.from_dict(_settings_of(name, settings, recipes)))
    folder = output_folder(output_dir, "output_dir=")
    check_writable(folder, "output_dir=")
    originals, digests = _check(model, given, settings, tokenizer, transform)
    inputs = {**_named(model, given), "depth": depth, "recipes": recipes, "settings": settings}
    record = _Record(folder, inputs, digests, oracle_seconds)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), keep_features():
        if not (folder / FILE).exists():
            record.write()  # the same call then knows the folder if this one is killed in its first method
        for number, name in enumerate(names, 1):
            if record.is_done(name):
                say("%s is done already", name)
                continue
            say("method %d of %d: %s", number, len(names), name)
            used = _settings_of(name, settings, recipes)
            entry = _attempt(name, model, shared, used, folder / name, originals, record)
            record.add(name, {**entry, "left_out": sorted(settings.keys() - used.keys())})
        record.write_page()
    return Comparison(record.content, folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / ".lock"))
        except Locked as holder:
            raise InputError(
                f"output_dir={str(folder)!r} is in use by {holder}: wait for it, or give another"
            ) from holder
        yield


def _names(given: Sequence[str] | str) -> list[str]:
    """Return the names of methods. Raises `InputError` for a name that is unknown."""
    if not isinstance(given, Iterable):
        raise InputError(f"methods is a {type(given).__name__}; give a list of names, or 'all'")
    known = methods()
    names = list(known) if given == ALL else [given] if isinstance(given, str) else list(given)
    if not names:
        raise InputError("methods is empty: name at least one, or pass 'all'")
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"methods holds {shortly(name)}: give names, such as {next(iter(known))!r}")
        if name not in known:
            raise InputError(f"methods={name!r} is not one of {', '.join(known)}{nearest_name(name, known)}")
    return list(dict.fromkeys(names))


def _settings(
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None,
    overrides: Mapping[str, Any],
    depth: bool | str,
    names: Sequence[str],
) -> dict[str, Any]:
    """Return the settings that differ from their defaults. names: the methods, which config must not contradict."""
    for name in ("method", "method_options", "audit"):
        if name in overrides:
            raise InputError(f"{name}= is not for compare(), which tries several methods and audits each")
    if depth not in _DEPTHS:
        raise InputError(f"depth={depth!r} must be False, True or 'full'")
    if isinstance(config, (str, Path)):
        base = UnlearnConfig.from_file(config)
    else:
        base = (
            config if isinstance(config, UnlearnConfig) else UnlearnConfig.from_dict({} if config is None else config)
        )
    _check_method(base, names)
    found = UnlearnConfig.from_dict({**base.to_dict(), **overrides, "audit": _DEPTHS[depth]})
    return {
        spec.name: value
        for spec in fields(UnlearnConfig)
        if (value := getattr(found, spec.name)) != spec.default and spec.name not in ("method", "method_options")
    }


def _check_method(config: UnlearnConfig, names: Sequence[str]) -> None:
    """Raise `InputError` for a method or options in the config that the comparison would not use."""
    _, usual = make_method(UnlearnConfig(method=config.method))
    _, given = make_method(UnlearnConfig(method=config.method, method_options=config.method_options))
    if given.method_options != usual.method_options:
        raise InputError(
            f"config sets options of the method {config.method!r}, which compare() does not pass on: leave "
            "method_options out"
        )
    if config.method not in (UnlearnConfig.method, *names):
        raise InputError(f"config is for the method {config.method!r}, which is not compared: add it to methods=")


def _settings_of(name: str, settings: Mapping[str, Any], recipes: bool) -> dict[str, Any]:
    """Return the settings over the method's recipe, without those that the method does not use."""
    method, _ = make_method(UnlearnConfig(method=name))
    base = recipe_settings(name) if recipes and name in recipe_names() else {"method": name}
    return {**base, **{key: value for key, value in settings.items() if key not in method.unused_settings}}


def _check(
    model: Any, given: Mapping[str, Any], settings: Mapping[str, Any], tokenizer: Any, transform: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Open everything once, so that wrong input is an error before work starts.

    Returns the original's weights, and digests by which a later call knows that models and pairs are the same.
    """
    config = UnlearnConfig.from_dict(dict(settings))
    opened = open_sets(given["forget"], given["retain"], given["test"], on_error=config.on_error, seed=config.seed)
    device = device_of_rank(config.device, SINGLE_PROCESS)
    loaded = load_models(
        model, model, given["oracle"], tokenizer=tokenizer, transform=transform, device=device, truncate=True
    )
    models = {"model" if name == "before" else name: one for name, one in loaded.items() if name != "after"}
    digests = {"pairs": opened.pairs.fingerprint(), **{name: one.identity() for name, one in models.items()}}
    return weights_of(loaded["before"].module), digests


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().float().cpu().clone() for name, weight in module.named_parameters()}


def _named(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return texts for what was given, by which a later call is known as the same."""

    def text(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and all(isinstance(one, (str, Path, nn.Module)) for one in value):
            return [text(one) for one in value]
        if value is None:
            return None
        return str(value) if isinstance(value, (str, Path)) else f"<{type(value).__name__}>"

    return {"model": text(model), **{name: text(value) for name, value in given.items()}}


class _Record:
    """compare.json. inputs: what was given; methods: {name: entry}; models: the scores of the original and the oracles.

    digests: of the weights of each model and of the pairs' names and captions, none in files of earlier versions.
    An entry has "scores", as in audit.json but without groups, "gap" and "floor", "over_forgotten", "verdict",
    "seconds", "peak_mib" (memory beyond that before the run; None where the system does not tell) and "changed_mib"
    (the size of the weights that differ from the original's); or "error".
    """

    def __init__(
        self, folder: Path, inputs: Mapping[str, Any], digests: Mapping[str, str], oracle_seconds: float | None
    ) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {
            "format": FORMAT, "inputs": printable_data(dict(inputs)), "digests": dict(digests),
            "oracle_seconds": oracle_seconds, "models": {}, "data": {}, "methods": {}, "notes": [],
        }  # fmt: skip
        if (folder / FILE).exists():
            self._read()
        elif folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
            raise InputError(
                f"output_dir={str(folder)!r} holds other files: give a new folder, or that of a comparison"
            )

    def _read(self) -> None:
        file = self.folder / FILE
        try:
            found = json.loads(read_text(file, _LARGEST, "the comparison "))
            same = found["format"] == FORMAT and isinstance(found["methods"], dict)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not a comparison ({error}): give another folder") from error
        if not same:
            raise InputError(f"{file} is of another version of cliperase_fast: give another folder")
        for name, value in self.content["inputs"].items():
            if found["inputs"].get(name) != value:
                raise InputError(
                    f"{file} was made with {name}={found['inputs'].get(name)!r}, not {value!r}: give another folder, "
                    "or the same arguments to continue"
                )
        before, digests = found.get("digests", {}), self.content["digests"]
        changed = [name for name, value in digests.items() if before.get(name, value) != value]
        if changed:
            raise InputError(
                f"{file} was made with other {'pairs' if changed[0] == 'pairs' else f'weights of the {changed[0]}'}, "
                "which have changed since: give another folder, as methods are compared on the same model and pairs"
            )
        oracle_seconds = self.content["oracle_seconds"] or found["oracle_seconds"]
        self.content = {**found, "digests": digests, "oracle_seconds": oracle_seconds}

    def is_done(self, name: str) -> bool:
        return "scores" in self.content["methods"].get(name, {})

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.content["methods"] = {**self.content["methods"], name: printable_data(entry)}
        self.write()
        self.write_page()

    def write(self) -> None:
        """Write compare.json."""
        with writing(self.folder / FILE, "the same call continues"):
            text = json.dumps(self.content, indent=2, allow_nan=False)
            write_text_atomically(self.folder / FILE, text + "\n")

    def write_page(self) -> None:
        """Write compare.html. A call that was interrupted between the two files may have left an older one."""
        with writing(self.folder / PAGE, "the same call continues"):
            write_text_atomically(self.folder / PAGE, comparison_page(self.content))

    def describe(self, audit: Audit) -> None:
        """Take what every audit says alike: the sets, the notes, the scores of the original and the oracles."""
        models = [name for name in audit.scores if name not in ("after",)]
        self.content["models"] = printable_data({name: _scores(audit, name) for name in models})
        self.content["data"] = printable_data(audit.data)
        self.content["notes"] = printable_data(list(audit.notes))


def _attempt(
    name: str,
    model: Any,
    shared: Mapping[str, Any],
    settings: Mapping[str, Any],
    folder: Path,
    original: Mapping[str, Tensor],
    record: _Record,
) -> dict[str, Any]:
    """Unlearn by a method. settings: of this method. Returns its entry."""
    memory = PeakMemory()
    try:
        with advising(Advice(go_on="make the same call again")):
            result = unlearn(
                model, output_dir=folder, resume=folder.is_dir() and holds_run(folder), config=settings, **shared
            )  # fmt: skip
    except Exception as error:  # whatever a method fails with, the others go on
        known = isinstance(error, (InputError, UnlearningError))
        said = str(error) if known else f"{type(error).__name__}: {error}"
        say("%s failed: %s", name, said)
        return {"error": said}
    audit = result.audit
    assert audit is not None
    record.describe(audit)
    seconds = result.record["seconds"]
    gap = audit.gap or {}
    return {
        "scores": _scores(audit, "after"),
        "gap": gap.get("mean"),
        "floor": gap.get("floor"),
        "over_forgotten": audit.over_forgotten,
        "verdict": result.verdict.short,
        "seconds": seconds["total"] - seconds["audit"],
        "peak_mib": memory.mib(),
        "changed_mib": changed_bytes(original, result.model) / 2**20,
    }


def _scores(audit: Audit, model: str) -> dict[str, Any]:
    groups = audit.scores[model]
    return {
        score: groups[group][score]
        for group, names in _SCORES.items()
        for score in names
        if score in groups.get(group, {})
    }


def changed_bytes(original: Mapping[str, Tensor], module: nn.Module) -> int:
    """Return the bytes of the weights that differ from the original's."""
    bytes_ = 0
    for name, weight in module.named_parameters():
        before = original[name]
        changed = int((weight.detach().float().cpu() != before).sum())
        bytes_ += changed * weight.element_size()
    return bytes_


class PeakMemory:
    """The largest memory of the process (on a GPU: of torch there) since it was made, beyond that of this moment."""

    _STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            self._RESET.write_text("5", encoding="ascii")  # the peak becomes what is in use
        except OSError:
            self._start = None
        else:
            self._start = self._peak()

    def mib(self) -> float | None:
        """Return MiB; None where the system does not tell."""
        if self._gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        peak = self._peak()
        return None if peak is None or self._start is None else (peak - self._start) / 2**10

    def _peak(self) -> int | None:
        """Return the peak resident size in KiB."""
        try:
            found = re.search(r"^VmHWM:\s*(\d+) kB", self._STATUS.read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            return None
        return int(found.group(1)) if found else None
