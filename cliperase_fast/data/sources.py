"""Open data by name: `demo`, `shapes`, `cifar100:DIR`, `csv:FILE` and so on.

To add a source: a file with a `SourceType` and a line in `SOURCES`. `python -m benchmarks.write_docs` then adds it to
the README.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

from cliperase_fast.data import (
    cifar,
    coco,
    digits,
    flickr,
    folders,
    hugging_face,
    personas,
    shapes,
    shards,
    streams,
    tables,
)
from cliperase_fast.data.classes import check_templates
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.selectors import parse_reference
from cliperase_fast.data.source_types import Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable

SOURCES: tuple[SourceType, ...] = (
    digits.SOURCE,
    shapes.SOURCE,
    personas.SOURCE,
    cifar.CIFAR10,
    cifar.CIFAR100,
    folders.SOURCE,
    tables.SOURCE,
    flickr.SOURCE,
    coco.SOURCE,
    hugging_face.HUGGING_FACE,
    hugging_face.PARQUET,
    shards.SOURCE,
    streams.SOURCE,
)


def sources_text(indent: str = "") -> str:
    """Return the table as aligned lines, for help texts."""
    width = max(len(source.usage) for source in SOURCES) + 2
    lines = []
    for source in SOURCES:
        lines.append(f"{source.usage:{width}}{source.help}")
        lines += [f"{'':{width}}?{option.name}= {option.help}" for option in source.options]
    return "\n".join(indent + line for line in lines)


def sources_markdown() -> str:
    """Return the table in Markdown, for the docs."""
    rows = ["| source | pairs | options |", "| --- | --- | --- |"]
    for source in SOURCES:
        options = "; ".join(f"`?{option.name}=` {option.help}" for option in source.options)
        rows.append(f"| `{source.usage}` | {source.help} | {options} |")
    return "\n".join(rows)


def open_source(
    spec: str, *, templates: Sequence[str] | str | None = None, seed: int = 0, on_error: str = "raise"
) -> Source:
    """Open a source by name.

    templates: caption templates with "{}" for the class name. If the data has classes but no captions, they make the
        captions; otherwise they only make the prompts of zero-shot classification.
    seed: for sources that draw their images.
    on_error: "raise" refuses the first item that cannot be used; "skip" leaves such items out and counts them in the
        `intake` of the pairs.

    Raises `InputError` that says what is missing or malformed, and where. docs/data.md shows the layouts. Join several
    options with "&"; write "&" in a value as %26. The sources:

    """
    if "\0" in spec:
        raise InputError(f"the source {spec!r} contains a NUL character; remove it")
    match = re.fullmatch(r"([^:?]*)(:?)(.*)", spec, flags=re.DOTALL)
    assert match is not None
    kind, colon, rest = match.groups()
    known = {source.kind: source for source in SOURCES}
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {known[near[0]].usage!r}? " if near else _path_hint(spec)
        raise InputError(f"unknown source {spec!r}; {hint}Use one of {', '.join(source.usage for source in SOURCES)}")
    found = known[kind]
    path, options = _options(rest, found, spec) if found.options else (rest, {})
    if found.needs_path != bool(path) or found.needs_path != bool(colon):
        raise InputError(f"{spec!r} is not a source; write {found.usage}")
    request = Request(spec, path, options, check_templates(templates), seed, Intake(on_error))
    try:
        return found.open(request)
    except MemoryError as error:
        raise InputError(
            f"{request.name[:200]!r} does not fit into memory: give fewer pairs, or smaller images"
        ) from error
    except OSError as error:  # a folder without permission, a name that is too long, a disk that fails
        where = "" if error.filename is None else f": {printable(os.fsdecode(error.filename))[:200]}"
        raise InputError(f"cannot open {request.name[:200]!r}: {error.strerror or error}{where}") from error


if open_source.__doc__:  # python -OO has none
    open_source.__doc__ += sources_text("    ") + "\n"


def with_option(spec: str, name: str, value: str | None) -> str:
    """Return the name of a source, or "SOURCE#SELECTOR", with one more option; unchanged if the value is None.

    Raises `InputError` if the source does not have the option.
    """
    if value is None:
        return spec
    spec, selector = parse_reference(spec)
    kind = re.split("[:?]", spec, maxsplit=1)[0]
    source = next((source for source in SOURCES if source.kind == kind), None)
    chosen = "" if selector is None else f"#{selector}"
    if source is None:
        return spec + chosen  # refused when it is opened
    if name not in [option.name for option in source.options]:
        able = ", ".join(one.usage for one in SOURCES if name in [option.name for option in one.options])
        raise InputError(f"the source {spec!r} has no option {name!r}; {able} have it")
    _, options = _options(spec, source, spec)
    if name in options:
        raise InputError(f"{spec!r} already has {name}={options[name]!r}; give it once")
    return f"{spec}{'&' if options else '?'}{name}={quote(value, safe='/ ')}{chosen}"


def require_indexed(spec: str) -> None:
    """Raise InputError for the name of a source whose pairs cannot be chosen one by one."""
    if spec.startswith("stream:"):  # before its head is read
        raise InputError(f"{spec!r} is read one pair after another, so it can be used only as retain, and whole")


def _path_hint(spec: str) -> str:
    """Return a hint for a path without a kind before it."""
    file = spec.partition("?")[0].lower()
    if file.endswith(".tar"):
        kind = "wds"
    elif file.endswith(".parquet"):
        kind = "parquet"
    elif file.endswith((".csv", ".tsv", ".txt")):
        kind = "csv"
    else:
        kind = "folder" if os.path.isdir(os.path.expanduser(spec)) else ""
    return f"did you mean '{kind}:{printable(spec)}'? " if kind else ""


def _options(rest: str, source: SourceType, spec: str) -> tuple[str, dict[str, str]]:
    """Split "path?key=value&key=value"; any other '?' belongs to the path, as do the parameters of a URL."""
    names = [option.name for option in source.options]
    is_url = re.match(r"\w+://|pipe:", rest) is not None
    match = re.search(rf"\?((?:\w+=[^&{'?' if is_url else ''}]*)(?:&\w+=[^&]*)*)$", rest)
    if match is None or (is_url and not difflib.get_close_matches(match.group(1).partition("=")[0], names)):
        return rest, {}
    options = {}
    for item in match.group(1).split("&"):
        key, _, value = item.partition("=")
        if key not in names:
            raise InputError(f"unknown option {key!r} in {spec!r}; use one of {', '.join(names)}")
        options[key] = unquote(value)
    return rest[: match.start()], options
