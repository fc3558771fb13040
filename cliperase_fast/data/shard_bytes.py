"""Read the bytes of a tar shard from front to back: of a local file, a command or a URL, by webdataset's openers.

For a URL webdataset starts a program, such as `curl`. The status of a program is checked at the end of its output, and
a program that is silent for too long is stopped, so a server that stalls ends in an error. Shards compressed by gzip,
bzip2 or xz are decompressed.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import selectors
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import TimeoutExpired
from typing import Any, BinaryIO, Protocol, cast

from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra

TIMEOUT = 300  # seconds without a byte after which a program is stopped
_CHUNK = 1 << 16  # bytes that tarfile asks for, the capacity of a pipe
_EXPANDERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
_ZSTD = b"\x28\xb5\x2f\xfd"
_CURL = {
    6: "the name of the server is unknown",
    7: "the server cannot be reached",
    18: "the server ended the transfer early",
    22: "the server answered with an error, such as 404 for a file that it does not have",
    28: "the server was too slow",
    52: "the server sent nothing",
    56: "the connection was lost",
    60: "the certificate of the server is not trusted",
}


class _Bytes(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class ShardBytes:
    """The bytes of a shard, decompressed; remembers the last of them, and whether any came."""

    def __init__(self, raw: _Bytes) -> None:
        source = _Peeked(raw)
        self.started = bool(source.start)
        self.end = b""
        if source.start.startswith(_ZSTD):
            raise tarfile.ReadError("it is compressed by zstd: decompress it, as in 'pipe:zstd -dc FILE'")
        opener: Any = next((opener for magic, opener in _EXPANDERS if source.start.startswith(magic)), None)
        self._source: _Bytes = source if opener is None else opener(source, "rb")

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self.end = (self.end + data[-512:])[-512:]
        return data

    def tar(self) -> tarfile.TarFile:
        return tarfile.open(fileobj=cast(BinaryIO, self), mode="r|", bufsize=_CHUNK)

    def require_end(self, tar: tarfile.TarFile) -> None:
        """Raise `tarfile.ReadError` for an unreadable header or a missing end, which tarfile takes for the end."""
        assert tar.fileobj is not None
        while data := tar.fileobj.read(1 << 20):
            if data.strip(b"\0"):
                raise tarfile.ReadError("unreadable header")
        if self.end.strip(b"\0"):
            raise tarfile.ReadError("the end of the archive is missing")


class _Peeked:
    """A stream whose first bytes are known."""

    def __init__(self, raw: _Bytes) -> None:
        self.start = b""
        while len(self.start) < 6 and (data := raw.read(6 - len(self.start))):
            self.start += data
        self._raw, self._ahead = raw, self.start

    def read(self, size: int = -1, /) -> bytes:
        if self._ahead and size != 0:
            data, self._ahead = self._ahead, b""
            if 0 < size < len(data):
                data, self._ahead = data[:size], data[size:]
            return data
        return self._raw.read(size)


class _Program:
    """The output of a program that webdataset started."""

    def __init__(self, pipe: Any, timeout: float) -> None:
        self._pipe, self._timeout = pipe, timeout
        self._handle = pipe.stream.fileno()
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._handle, selectors.EVENT_READ)

    def read(self, size: int = -1, /) -> bytes:
        """Return the bytes that are there, at most `size`; at the end raise `OSError` if the program failed."""
        if not self._waiting.select(self._timeout):
            raise TimeoutError(f"{self._name} sent nothing for {self._timeout:g} s; '?timeout=' allows more")
        data = os.read(self._handle, _CHUNK if size < 0 else size)
        if not data:
            self._require_success()
        return data

    @property
    def _name(self) -> str:
        command = self._pipe.args[0][0]
        return "the command" if isinstance(command, str) else str(command[0])

    def _require_success(self) -> None:
        try:
            status = self._pipe.proc.wait(self._timeout)
        except TimeoutExpired as error:
            raise TimeoutError(f"{self._name} did not end within {self._timeout:g} s of its output") from error
        if status not in self._pipe.ignore_status:
            meaning = f": {_CURL[status]}" if self._name == "curl" and status in _CURL else ""
            raise OSError(f"{self._name} ended with status {status}{meaning}")

    def stop(self) -> None:
        self._waiting.close()
        self._pipe.proc.kill()
        self._pipe.ignore_errors = True
        with suppress(OSError):
            self._pipe.close()


@contextmanager
def open_shard(shard: str, timeout: float = TIMEOUT) -> Iterator[_Bytes]:
    """Open a shard for reading. timeout: seconds without a byte after which a program is stopped.

    Raises `OSError` or `ValueError` if it cannot be opened.
    """
    gopen = import_extra("webdataset", "'stream:'", "webdataset.gopen")
    if shard == "-":
        raise InputError(
            "a stream is read more than once, which the standard input '-' cannot be: give files or commands"
        )
    scheme = re.match(r"(?!file:)(\w+):", gopen.rewrite_url(shard))
    if scheme and scheme[1].lower() not in gopen.gopen_schemes:
        raise InputError(
            f"webdataset does not open {scheme[0]!r} URLs such as {shard[:200]!r}: use 'pipe:COMMAND', such as "
            "'pipe:aws s3 cp s3://BUCKET/{000..999}.tar -'"
        )
    try:
        stream = gopen.gopen(shard)
    except FileNotFoundError as error:
        if scheme is None:
            raise
        raise OSError(f"the program {error.filename!r}, which reads it, is not installed") from error
    if not isinstance(stream, gopen.Pipe):
        with stream:
            yield stream
        return
    program = _Program(stream, timeout)
    try:
        yield program
    finally:
        program.stop()
