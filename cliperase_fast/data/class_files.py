"""Files that name classes: lines "KEY NAME", lines of names in order, or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable, read_text, user_path

WORDNET = re.compile(r"n\d{8}")
_LARGEST = 16 << 20  # bytes


def read_names(file: str, root: Path) -> dict[str, str]:
    """Read the name of each key, such as a folder: lines "KEY NAME", or JSON {key: name}.

    The key ends at a space, tab or comma. JSON of the form of ImageNet's class index, {"0": [key, name]}, is read too.
    root: where a relative path is looked for if it is not in the working directory.
    """
    path, text = _read(file, root)
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
            pairs = [(key, one) if isinstance(one, str) else tuple(one) for key, one in content.items()]
            if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
                raise ValueError("a value is neither a name nor [folder, name]")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"the file of class names {path} is not JSON {{folder: name}}: {error}") from error
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [tuple(_split(line)) for line in lines]
        bad = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
        if bad is not None:
            raise InputError(f"the file of class names {path} has the line {bad!r}; write 'FOLDER NAME'")
    known: dict[str, str] = {}
    for key, name in pairs:
        if known.setdefault(key, name.strip()) != name.strip():
            raise InputError(f"the file of class names {path} names the folder {key!r} twice; keep one")
    return known


def name_keys(keys: Sequence[str], file: str, root: Path, where: str) -> list[str]:
    """Return the names of labels that the data itself names, such as WordNet ids, from a file (see `read_names`).

    where: the column of labels, for errors.
    """
    known = read_names(file, root)
    missing = next((key for key in keys if key not in known), None)
    if missing is not None:
        raise InputError(f"the file of class names {file} has no line for {printable(missing)!r} in {where}")
    return [known[key] for key in keys]


def name_numbers(count: int, file: str, root: Path, where: str) -> list[str]:
    """Return the names of the labels 0 to count - 1 from a file.

    The file has a name on each line, in order; lines that all begin with their number or with a WordNet id; or JSON: a
    list, or {"0": name} or {"0": [id, name]}. It may name further classes. where: the column of labels, for errors.
    """
    path, text = _read(file, root)
    if path.suffix.lower() == ".json":
        names = _json_names(text, path)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        split = [_split(line) for line in lines]
        keys = [parts[0] for parts in split if len(parts) == 2]
        if len(keys) == len(lines) and sorted(keys) == sorted(map(str, range(len(lines)))):
            names = [name for _, name in sorted((int(key), name) for key, name in split)]
        elif len(keys) == len(lines) and all(WORDNET.fullmatch(key) for key in keys):
            names = [name for _, name in split]
        elif keys and len(keys) == len(lines) and all(re.fullmatch(r"\d+\W?", key) for key in keys):
            raise InputError(
                f"the lines of the file of class names {path} begin with numbers other than 0 to {len(lines) - 1} (the "
                f"first is {lines[0]!r}), which would be parts of the names: number them from 0, or remove the numbers"
            )
        else:
            names = lines
    if len(names) < count:
        raise InputError(f"the file of class names {path} names {len(names)} classes and {where} has {count}")
    return names[:count]


def _json_names(text: str, path: Path) -> list[str]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(number)] for number in range(len(content))]
        names = [one if isinstance(one, str) else one[1] for one in content]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a name is not text")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(
            f'the file of class names {path} is neither a JSON list of names nor {{"0": name}}: {said}'
        ) from error
    return names


def _read(file: str, root: Path) -> tuple[Path, str]:
    path = user_path(file)
    if not path.exists() and (root / path).exists():
        path = root / path
    return path, read_text(path, _LARGEST, "the file of class names ")


def _split(line: str) -> list[str]:
    return re.split(r"\t|,|\s", line, maxsplit=1)
