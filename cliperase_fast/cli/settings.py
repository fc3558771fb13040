"""The command line's flags for the settings of `UnlearnConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Container
from typing import Any

from cliperase_fast.coercion import AUDIT_DEPTHS
from cliperase_fast.config import UnlearnConfig, parse_options, read_settings, recipe_settings


def add_settings(parser: argparse.ArgumentParser, without: Container[str] = ()) -> None:
    """Add a flag for every field of UnlearnConfig. A flag that is not given leaves the config file's value.

    without: the fields that get none.
    """
    groups: dict[str, Any] = {}
    for spec in dataclasses.fields(UnlearnConfig):
        if spec.name in without:
            continue
        name = spec.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(f"settings: {name}")
        flag = "--" + spec.name.replace("_", "-")
        if spec.name == "method_options":
            groups[name].add_argument(
                flag,
                nargs="+",
                action="extend",
                default=argparse.SUPPRESS,
                metavar="KEY=VALUE",
                help=f"{spec.metadata['help']} (default: the method's own)",
            )
            continue
        if spec.name == "audit":
            _add_audit(groups[name], spec.metadata["help"])
            continue
        default = spec.default
        if spec.type == "bool":
            default = "yes" if default else "no"
        text = f"{spec.metadata['help']} (default: {default if default != '' else 'none'})".replace("%", "%%")
        if spec.type == "bool":
            groups[name].add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            groups[name].add_argument(
                flag,
                default=argparse.SUPPRESS,
                choices=spec.metadata["choices"],
                metavar=None if spec.metadata["choices"] else _placeholder(str(spec.type)),
                help=text,
            )


def _add_audit(group: Any, text: str) -> None:
    group.add_argument(
        "--audit", nargs="?", const=True, default=argparse.SUPPRESS, choices=AUDIT_DEPTHS, help=f"{text} (default: no)"
    )
    group.add_argument("--no-audit", dest="audit", action="store_false", default=argparse.SUPPRESS)


def _placeholder(kind: str) -> str:
    """Return what stands for a value of this type in the help."""
    number, automatic, _ = kind.partition(" | Auto")
    if number not in ("int", "float"):
        return "TEXT"
    return number.upper() + ("|auto" if automatic else "")


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the user gave: preset and recipe, over them the config file, over it flags."""
    settings: dict[str, Any] = {}
    if getattr(arguments, "paper", None):
        settings.update(UnlearnConfig.paper(arguments.paper).to_dict())
    if getattr(arguments, "recipe", None):
        settings.update(recipe_settings(arguments.recipe))
    if getattr(arguments, "config", None):
        found = read_settings(arguments.config)
        _replace_method(settings, found.get("method"))
        settings.update(found)
    _replace_method(settings, getattr(arguments, "method", None))
    for spec in dataclasses.fields(UnlearnConfig):
        if hasattr(arguments, spec.name):
            value = getattr(arguments, spec.name)
            settings[spec.name] = parse_options(value) if spec.name == "method_options" else value
    return settings


def settings_text(config: UnlearnConfig) -> str:
    """Return all settings as YAML that `--config` reads, in the groups of the help."""
    import yaml

    groups: dict[str, dict[str, Any]] = {}
    for spec in dataclasses.fields(config):
        groups.setdefault(spec.metadata["group"], {})[spec.name] = getattr(config, spec.name)
    parts = [f"# {name}\n{yaml.safe_dump(values, sort_keys=False)}" for name, values in groups.items()]
    return "\n".join(parts)


def _replace_method(settings: dict[str, Any], method: Any) -> None:
    """Drop the options of the method that `method` is about to replace."""
    if method is not None and method != settings.get("method"):
        settings.pop("method_options", None)


def demo_forget() -> str:
    """Return what the demo forgets unless told, as text."""
    from cliperase_fast.demo_models import DEMO_MODELS

    first, *others = [(kind, recipe.forget) for kind, recipe in DEMO_MODELS.items() if recipe.forget is not None]
    return "; ".join([str(first[1]), *(f"for {kind} {selector!r}" for kind, selector in others)])
