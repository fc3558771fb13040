"""Make the pages of the API from the docstrings, and that of the commands from the command line's help."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import html
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

# Page: title, what it is about, and its names. A name without a module is one of `cliperase_fast`.
PAGES = {
    "unlearning": (
        "Unlearning",
        "Make a model forget, with one method or with several side by side.",
        ["unlearn", "UnlearnResult", "UnlearnConfig", "methods", "register_method", "compare", "Comparison"],
    ),
    "evaluation": (
        "Evaluation and audit",
        "Measure what a model answers, and what unlearning left behind or damaged.",
        [
            *("evaluate", "audit", "Audit"),
            *(f"cliperase_fast.evaluation.generation:{name}" for name in ("compare_generation", "Judge", "Generation")),
            "cliperase_fast.report.generation:save_generation_page",
        ],
    ),
    "ledger": (
        "Ledger",
        "Requests over time: [the guide](../ledger.md).",
        ["Ledger", "cliperase_fast.ledger:Entry", "cliperase_fast.ledger:apply_patch"],
    ),
    "functional": (
        "Losses as functions",
        "",
        [
            *(f"cliperase_fast.functional:{name}" for name in ("cliperase_loss", "calibrated_loss", "clip_loss")),
            *(f"cliperase_fast.functional:{name}" for name in ("similarity_kl", "LossTerms", "CalibratedTerms")),
            *(f"cliperase_fast.contrastive:{name}" for name in ("distill_clip_loss", "local_clip_loss")),
            *(f"cliperase_fast.contrastive:{name}" for name in ("sigmoid_loss", "sigmoid_cliperase_loss")),
            "backends",
        ],
    ),
    "losses": (
        "Losses as modules",
        "The losses for training loops, and those that replace open_clip's.",
        ["CLIPEraseLoss", "CalibratedLoss", "ClipLoss", "DistillClipLoss", "SigLipLoss"],
    ),
    "data": (
        "Data",
        "Open pairs by name, choose among them and look at them: [the sources](../data.md).",
        [
            "inspect_data",
            "select_by_query",
            *(f"cliperase_fast.data:{name}" for name in ("open_source", "Source", "PairDataset", "as_pairs")),
            *(f"cliperase_fast.data:{name}" for name in ("select", "parse_reference", "split", "concat")),
            "cliperase_fast.data:ClassSpace",
        ],
    ),
    "models": (
        "Models",
        "Load a model by name, and convert it for another library: [the families](../models.md).",
        [
            *(f"cliperase_fast.models:{name}" for name in ("load_model", "ClipAdapter", "set_trainable", "merge_lora")),
            *(f"cliperase_fast.export:to_{name}" for name in ("transformers", "open_clip", "diffusers_text_encoder")),
        ],
    ),
    "trainers": (
        "In other trainers",
        "Put the losses into open_clip's, transformers' and Lightning's trainers: [the guide](../trainers.md).",
        [
            *("patch_open_clip", "unpatch_open_clip", "patch_transformers_clip", "unpatch_transformers_clip"),
            "cliperase_fast.integrations.transformers:FusedLossMixin",
            "cliperase_fast.integrations.lightning:UnlearningModule",
            "cliperase_fast.integrations.open_clip_unlearning:unlearning",
        ],
    ),
    "errors": (
        "Errors",
        "What the package raises. Both have a message of one line that names the thing and the remedy.",
        ["InputError", "UnlearningError"],
    ),
}
WIDTH = 88  # of a signature in one line
FULL = 95  # a docstring's line of more characters was broken where it was full
NAMES = re.compile(r"([a-z_*][\w.*]*(?:, [a-z_*][\w.*]*)*(?: \([^)]*\))?): (.*)", re.DOTALL)
PAGE_OF = re.compile(r"docs/([\w-]+\.md)")


def api_pages() -> dict[str, str]:
    """Return {file of the site: Markdown} of the reference."""
    return {f"api/{page}.md": _page(*content) for page, content in PAGES.items()}


def commands() -> str:
    """Return the help of every command."""
    from cliperase_fast.cli.parser import make_parser

    about = "What `cliperase-fast COMMAND --help` prints. [The command line](command-line.md) has the ideas behind it."
    parts = ["# All commands", about]
    with _environment(COLUMNS="100", NO_COLOR="1"):
        for name, parser in _subparsers(make_parser()):
            parts += [f"## {name}", f"```text\n{parser.format_help().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def prose(doc: str) -> str:
    """Return a docstring as Markdown: paragraphs, lists of arguments, and indented text as it is."""
    return "\n\n".join(_block(lines) for lines in _blocks(doc))


def _page(title: str, about: str, names: list[str]) -> str:
    parts = [f"# {title}"]
    modules = {name.partition(":")[0] for name in names if ":" in name}
    if about:
        parts.append(about)
    elif "cliperase_fast.functional" in modules:
        parts.append(prose(inspect.getdoc(importlib.import_module("cliperase_fast.functional")) or ""))
    for name in names:
        parts += _entry(name)
    return "\n\n".join(parts) + "\n"


def _entry(name: str) -> Iterator[str]:
    """Yield the parts of one name: heading, signature, text, members."""
    module, _, attribute = name.rpartition(":")
    module = module or "cliperase_fast"
    thing = getattr(importlib.import_module(module), attribute)
    yield f"## `{module}.{attribute}` {{#{attribute} data-toc-label={attribute}}}"
    yield _signature(attribute, thing)
    yield prose(inspect.getdoc(thing) or "")
    if thing.__name__ == "UnlearnConfig":
        yield from _settings(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            yield from _member(attribute, member, value)


def _member(owner: str, name: str, value: Any) -> Iterator[str]:
    inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    inner = inner.fget if isinstance(inner, property) else inner
    if name.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
        return
    yield f"### `{name}` {{#{owner}.{name}}}"
    if isinstance(value, property):
        returned = inner.__annotations__.get("return")
        yield f"```python\n{name}: {returned}\n```"
    else:
        yield _signature(name, inner, bound=not isinstance(value, staticmethod))
    yield prose(inspect.getdoc(inner) or "")


def _signature(name: str, thing: Any, bound: bool = False) -> str:
    try:
        signature = inspect.signature(thing)
    except ValueError:  # exceptions of the standard library's kind have none
        return f"```python\nclass {name}\n```"
    if thing.__name__ == "UnlearnConfig":
        return f"```python\n{name}(**settings)\n```"
    parts, star = [], False
    for parameter in list(signature.parameters.values())[int(bound) :]:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(_parameter(parameter))
    end = "" if signature.return_annotation in (signature.empty, "None") or inspect.isclass(thing) else (
        f" -> {_annotation(signature.return_annotation)}"
    )  # fmt: skip
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"
    return f"```python\n{line}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = star + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        shown = re.sub(r"<(?:function|class) ([\w.]+).*?>", r"\1", repr(parameter.default))
        text += f" = {shown}" if ": " in text else f"={shown}"
    return text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _settings(config: Any) -> Iterator[str]:
    """Yield a table for each group of settings."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
        meaning = _escaped(field.metadata["help"])
        if field.metadata["choices"]:
            meaning += ": " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
        row = f"| `{field.name}` | `{default!r}` | {meaning} |".replace("`''`", "none")
        groups.setdefault(field.metadata["group"], []).append(row)
    for group, rows in groups.items():
        yield f"### Settings: {group}"
        yield "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows])


def _blocks(doc: str) -> Iterator[list[str]]:
    """Yield the paragraphs of a docstring, in lines. Neighbouring indented ones are one block."""
    found: list[list[str]] = []
    for text in re.split(r"\n\s*\n", doc.strip()):
        lines = text.splitlines()
        if lines and lines[0].startswith("    ") and found and found[-1][0].startswith("    "):
            found[-1] += ["", *lines]
        elif lines:
            found.append(lines)
    yield from found


def _block(lines: list[str]) -> str:
    if lines[0].startswith("    "):
        return "```text\n" + inspect.cleandoc("\n" + "\n".join(lines)) + "\n```"
    parts: list[str] = []
    entries: list[str] = []
    for item in _items(lines):
        match = NAMES.fullmatch(item)
        if match and not match[1].startswith("http"):
            entries.append(f"<dt>{_names(match[1])}</dt><dd>{_html(match[2])}</dd>")
            continue
        if entries:
            parts.append(f"<dl>{''.join(entries)}</dl>")
            entries = []
        parts.append(_escaped(item))
    if entries:
        parts.append(f"<dl>{''.join(entries)}</dl>")
    return "\n\n".join(parts)


def _items(lines: list[str]) -> Iterator[str]:
    """Yield arguments and runs of prose.

    An argument starts at a line "names: text". It goes on in indented lines, or in any after a full first line.
    """
    current: list[str] = []
    flush = False  # the argument goes on in lines that are not indented
    for line in lines:
        argument = NAMES.fullmatch(line) is not None
        begun = bool(current) and NAMES.fullmatch(current[0]) is not None
        flush = begun and not argument and (flush or (len(current) == 1 and len(current[0]) > FULL))
        follows = line.startswith(" ") or flush or not (argument or begun)
        if current and not follows:
            yield " ".join(current)
            current = []
        current.append(line.strip())
    if current:
        yield " ".join(current)


def _names(text: str) -> str:
    names, _, remark = text.partition(" (")
    codes = ", ".join(f"<code>{html.escape(name)}</code>" for name in names.split(", "))
    return f"{codes} ({html.escape(remark)}" if remark else codes


def _html(text: str) -> str:
    """Return a line of prose as HTML, with code between backticks and links to pages."""
    parts = text.split("`")
    coded = [f"<code>{html.escape(part)}</code>" if i % 2 else html.escape(part) for i, part in enumerate(parts)]
    return PAGE_OF.sub(
        lambda match: f'<a href="../{match[1].replace(".md", ".html")}">{match[1][:-3]}</a>', "".join(coded)
    )


def _escaped(text: str) -> str:
    """Return a line of prose as Markdown, with its special characters escaped outside of backticks."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_\[\]|<>])", r"\\\1", parts[i])
        parts[i] = PAGE_OF.sub(r"[\1](../\1)", parts[i])
    return "`".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
