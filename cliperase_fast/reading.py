"""Read files from others safely: regular files only, up to a size, as UTF-8. Also handles names that are not UTF-8."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from cliperase_fast.errors import InputError

MAX_LINE = 1 << 20  # characters in a line of a table
_MAX_MAPPING = 1 << 20  # bytes of a YAML or JSON file
_JOINER = "\u200d"  # draws two emoji as one
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")  # YAML's octal and base 60
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. Raises `OSError` unless it is a regular file: others may block or never end."""
    try:
        _require_regular(os.stat(path).st_mode)  # before opening, because opening a device can have side effects
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(
            errno.EINVAL, "the path contains a NUL or a character that is not allowed in file names"
        ) from error
    try:
        _require_regular(os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "a special file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")


def read_bytes(path: str | os.PathLike[str], limit: int, what: str = "") -> bytes:
    """Read a regular file of at most `limit` bytes. An `InputError` starts with "cannot read {what}{path}"."""
    subject = f"cannot read {what}{path}"
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{subject}: {error.strerror or error}") from error
    if len(data) > limit:
        raise InputError(f"{subject}: it is larger than {in_bytes(limit)}; is it the right file?")
    return data


def read_text(path: str | os.PathLike[str], limit: int, what: str = "") -> str:
    """Read a UTF-8 file, with or without a byte order mark; see `read_bytes`."""
    data = read_bytes(path, limit, what)
    try:
        return decode_text(data)
    except ValueError as error:
        raise InputError(f"cannot read {what}{path}: {error}") from error


def decode_text(data: bytes) -> str:
    """Decode UTF-8 bytes, without a byte order mark. Raises `ValueError` that says what they are instead."""
    if data.startswith(_UTF_16):
        raise ValueError("it is UTF-16 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_lines(path: str | os.PathLike[str], what: str = "") -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends (LF, CRLF or CR).

    Raises `InputError` with the number of a line that is not UTF-8, contains a NUL or is too long.
    """
    subject = f"cannot read {what}{path}"
    try:
        with open_regular(path) as file:
            if file.read(2) in _UTF_16:
                raise InputError(f"{subject}: it is UTF-16 text; save it as UTF-8")
            file.seek(0)
            with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
                number = 0
                while line := stream.readline(MAX_LINE + 1):
                    number += 1
                    fault = _line_fault(line)
                    if fault:
                        raise InputError(f"{subject}: {fault} (line {number})")
                    yield line
    except OSError as error:
        raise InputError(f"{subject}: {error.strerror or error}") from error


def _line_fault(line: str) -> str | None:
    if "\0" in line:
        return "it contains NUL characters; if it is UTF-16 text, save it as UTF-8"
    if len(line) > MAX_LINE:
        return f"a line has more than {MAX_LINE} characters; is it the right file?"
    if not line.isascii() and has_surrogates(line):
        return "not UTF-8 text; save it as UTF-8"
    return None


def has_surrogates(text: str) -> bool:
    """Return whether text has lone surrogates: from a name that is not UTF-8, or half a character in a JSON escape."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def printable(text: str) -> str:
    """Return text that can be written anywhere: lone surrogates become backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def visible(text: str) -> str:
    """Return text for a line on a terminal: control characters, such as line breaks and colours, become escapes."""
    return "".join(repr(one)[1:-1] if unicodedata.category(one) == "Cc" else one for one in text)


def display_width(text: str) -> int:
    """Return the columns that text takes on a terminal: two for wide letters, none for marks and for what is joined."""
    width, before = 0, ""
    for letter in text:
        if before != _JOINER and unicodedata.category(letter) not in ("Mn", "Me", "Cf"):
            width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        before = letter
    return width


def printable_data(value: Any) -> Any:
    """Apply `printable` to every text inside mappings and lists."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_data(key): printable_data(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_data(one) for one in value]
    return value


def in_bytes(count: float) -> str:
    """Return a number of bytes with a unit."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"


def user_path(path: str | Path) -> Path:
    """Return a user's path, with "~" expanded."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise InputError(f"{str(path)!r} is not a path: {error}") from error


def read_mapping(path: str | Path, what: str, *, as_text: bool = False) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file.

    what: names the file in errors, "the config file". as_text: values in YAML are texts, as they stand in the file,
        and not numbers, dates or true and false.
    """
    import yaml

    path = user_path(path)
    text = read_text(path, _MAX_MAPPING, f"{what} ")
    try:
        if path.suffix == ".json":
            found = json.loads(text, object_pairs_hook=_once_each)
        else:
            found = yaml.load(text, _yaml_loader(as_text))
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


def _once_each(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise InputError(f"sets {key!r} twice: keep one")
        mapping[key] = value
    return mapping


@cache
def _yaml_loader(as_text: bool) -> Any:
    """Return yaml's safe loader, or that of texts, without duplicate keys, aliases, and numbers to base 8 and 60.

    A duplicate key would silently win, a few lines of aliases can expand to gigabytes, and 010 would be read as 8.
    """
    import yaml

    class Loader(yaml.BaseLoader if as_text else yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise InputError("holds an alias (*name): write the value out")
            return super().compose_node(parent, index)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                value = super().construct_object(node, deep)
                if isinstance(value, (int, float)) and _OTHER_BASE.fullmatch(node.value):
                    raise InputError(f"holds {node.value}, which YAML reads as {value}: write the number that you mean")
                return value
            except (AttributeError, LookupError) as error:  # a value that its own tag does not fit, "!!int x"
                raise InputError(f"calls {node.value!r} {node.tag.rpartition(':')[2]}, which it is not") from error

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _once_each((key, None) for key in keys)
            return dict(super().construct_mapping(node, deep))

    return Loader
