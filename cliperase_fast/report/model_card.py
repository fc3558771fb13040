"""README.md of an unlearned model: a model card as Hugging Face has them, from the content of result.json."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliperase_fast.coercion import AUTO
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data.selectors import parse_reference
from cliperase_fast.plurals import counted
from cliperase_fast.reading import printable_data
from cliperase_fast.report.rendering import TEMPLATES
from cliperase_fast.report.wording import cell, count, number, shown_metrics, value, verdict

if TYPE_CHECKING:
    from jinja2 import Environment

_LIBRARIES = ("open_clip", "transformers")  # that load a saved model
_ALWAYS = ("epochs", "batch_size", "learning_rate", "optimizer", "trainable", "seed")  # shown at their defaults too
_HIDDEN = ("method", "audit", "report", "logger", "device", "deepspeed", "rank_timeout", "num_workers",
           "image_cache_mib", "checkpoint_every", "keep_checkpoints")  # fmt: skip  # shown elsewhere, or without effect
_SPECIAL = re.compile(r"([\\`*_\[\]|~$]|^[-+=#])")
_NAMED = 5  # classes in the title
_HUB = "hf-hub:"


def model_card(result: Mapping[str, Any], model_dir: str | Path, output_dir: str | Path | None = None) -> str:
    """Return the card.

    result: the content of result.json. model_dir: the folder of the model. output_dir: where the advice on an audit
    puts its files. Every text that comes from the run is escaped.
    """
    result = printable_data(result)
    data, config = result["data"], result["config"]
    sets = [(name, result["before"][name], result["after"][name]) for name in ("forget", "retain")]
    metrics = shown_metrics(*(scores for _, *both in sets for scores in both))
    advice = audit_advice(result, model_dir, output_dir)
    return _environment().get_template("model_card.md").render(
        front_matter=_front_matter(result),
        title=_title(result),
        forget=data["forget"],
        retain=data["retain"],
        test=data["test"],
        forget_pairs=count(data["forget_pairs"]),
        retain_pairs=count(data["retain_pairs"]),
        base=result["model"],
        version=result["versions"]["cliperase_fast"],
        verdict=verdict(result),
        library=result["library"],
        method=result["method"],
        settings=_settings(config, result["recipe"]),
        notes=[f"{note}." for note in result["notes"]],
        sets=[{"name": name, "pairs": count(before.get("pairs"))} for name, before, _ in sets],
        rows=[
            (metric.label, [cell(metric, value(metric, scores)) for _, *both in sets for scores in both])
            for metric in metrics
        ],
        audit=None if result["audit"] is None else {"verdicts": list(result["audit"]["verdicts"].values())},
        advice=advice,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", advice)), default=0)),
        grain=_grain(number(result["before"]["forget"].get("pairs"))),
    )  # fmt: skip


def audit_advice(result: Mapping[str, Any], model_dir: str | Path, output_dir: str | Path | None = None) -> str:
    """Return the command that audits the saved model, or the Python call where the run was given objects.

    result: the content of result.json. model_dir: the folder of the model. output_dir: where the audit's files go.
    """
    inputs, config = result["inputs"], result["config"]
    after = f"local-dir:{model_dir}" if result["library"] == "open_clip" else str(model_dir)
    words = _audit_words(result, after)
    if words is not None:
        words += ["--seed", str(config["seed"])] if config["seed"] else []
        if config["test_fraction"] != UnlearnConfig.test_fraction:
            words += ["--test-fraction", str(config["test_fraction"])]
        words += ["--on-error", "skip"] if config["on_error"] == "skip" else []
        words += ["--long-captions", "truncate"] if config["long_captions"] == "truncate" else []
        words += [] if output_dir is None else ["--output", str(output_dir)]
        return shlex.join(["cliperase-fast", "audit", *words])
    names = {"before": inputs["model"], "after": after if result["library"] in _LIBRARIES else None}
    names |= {name: inputs[name] for name in ("forget", "retain")}
    more = ["test=test"] if inputs["own_test"] else []
    for name in ("seed", "test_fraction"):
        more += [] if config[name] == getattr(UnlearnConfig, name) else [f"{name}={config[name]!r}"]
    more += [] if output_dir is None else [f"output_dir={str(output_dir)!r}"]
    shown = [name if given is None else repr(given) for name, given in names.items()]
    return f"cliperase_fast.audit({', '.join([*shown, *more])})"


def _audit_words(result: Mapping[str, Any], after: str) -> list[str] | None:
    """Return arguments of `cliperase-fast audit` for the run's models and data; None where flags cannot name them."""
    inputs = result["inputs"]
    texts = [inputs[name] for name in ("model", "forget", "retain", *(["test"] if inputs["own_test"] else []))]
    if result["library"] not in _LIBRARIES or not all(texts):
        return None
    spec, selector = parse_reference(inputs["forget"])
    words = ["--before", inputs["model"], "--after", after, "--data", spec, "--forget", str(selector)]
    if inputs["retain"] != "rest":
        retain_spec, retain_selector = parse_reference(inputs["retain"])
        if retain_spec != spec or retain_selector is None:
            return None
        words += ["--retain", retain_selector]
    words += ["--test-data", inputs["test"]] if inputs["test"] else []
    return words + [word for template in inputs["templates"] for word in ("--template", template)]


def _front_matter(result: Mapping[str, Any]) -> str:
    import yaml

    content: dict[str, Any] = {
        "tags": ["clip", "machine-unlearning", "cliperase"],
        "pipeline_tag": "zero-shot-image-classification",
    }
    if result["library"] in _LIBRARIES:
        content["library_name"] = result["library"]
    base = result["inputs"]["model"] or ""
    if base.startswith(_HUB):
        content["base_model"] = _one_line(base.removeprefix(_HUB))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 20).strip()


def _title(result: Mapping[str, Any]) -> str:
    """Return the names of the forget classes, else the forget set."""
    names = [name for name, row in result["per_class"].items() if row["set"] == "forget"]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more or result["data"]["forget"]


def _settings(config: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Return what the method's outcome depends on: some settings always, the others where they are not the default.

    recipe: what the run found for settings that are "auto", None where all were given.
    """
    found = {} if recipe is None else {"learning_rate": recipe["learning_rate"], "epochs": f"{recipe['steps']} steps"}
    shown: list[tuple[str, Any]] = []
    for spec in dataclasses.fields(UnlearnConfig):
        given_steps = spec.name == "epochs" and bool(config.get("steps"))  # shown themselves
        if spec.name in _HIDDEN or spec.name not in config or given_steps:
            continue
        chosen = config[spec.name]
        if spec.name == "method_options":
            shown += [(f"method_options: {name}", option) for name, option in chosen.items()]
        elif spec.name in _ALWAYS or chosen != spec.default:
            shown.append((spec.name, f"auto: {found[spec.name]}" if chosen == AUTO and spec.name in found else chosen))
    return shown


def _grain(pairs: float | None) -> str:
    return f"With {counted(int(pairs), 'forget pair', ',')}, one image is {100 / pairs:.1f} points." if pairs else ""


def _one_line(text: Any) -> str:
    """Return a text without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _escape(text: Any) -> str:
    """Return a text as Markdown shows it, in one line: no HTML, no markup, no end of a table cell."""
    plain = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", plain)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["md"] = _escape
    return found
