"""Write files atomically, lock between processes, and explain errors of the file system."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.reading import in_bytes, user_path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_REMEDIES = {
    errno.ENOSPC: "free some space, or use a folder on another disk",
    errno.EDQUOT: "free some of your quota, or use a folder on another disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or use another file system",
    errno.EACCES: "use a folder that you may write to",
    errno.EPERM: "use a folder that you may write to",
    errno.EROFS: "use a folder on a file system that can be written",
    errno.ENOTDIR: "a part of the path is a file; use another folder",
    errno.EEXIST: "a part of the path is a file; use another folder",
    errno.ENOENT: "a part of the path is missing; was the folder removed?",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ELOOP: "a symbolic link in the path points to itself; use another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use fewer num_workers",
    errno.ENFILE: "raise the limit on open files (ulimit -n), or use fewer num_workers",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the connection to the file server",
}


def explain(error: BaseException, path: str | Path) -> str:
    """Return one line for a system error: the message, `path` and the fix."""
    number = _number(error)
    if number is None:
        said = str(error).partition("\n")[0]
    else:
        said = os.strerror(number)
        if number == errno.ENOSPC and isinstance(path, Path):
            said += _free_in_words(path)
    remedy = _REMEDIES.get(number) if number is not None else None
    return f"{path}: {said}" + (f"; {remedy}" if remedy else "")


@contextmanager
def writing(path: str | Path, then: str = "") -> Iterator[None]:
    """Turn a failure to write `path` inside the block into an `UnlearningError`. then: how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UnlearningError(f"cannot write {explain(error, path)}" + (f"; {then}" if then else "")) from error


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Write chunks (bytes or buffers), flush them to disk and return their SHA-256. Removes the file on failure."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            for chunk in chunks:
                digest.update(chunk)
                write_all(handle, chunk)
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def write_all(handle: int, chunk: Any) -> None:
    """Write all of a buffer; one system call may write less."""
    rest = memoryview(chunk).cast("B")
    while len(rest):
        rest = rest[os.write(handle, rest) :]


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file's text atomically: a crash leaves the old or the new text. Of a link the target is replaced."""
    path = Path(os.path.realpath(path))
    draft = draft_of(path)
    write_file(draft, [text.encode("utf-8")])
    try:
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reserve(handle: int, size: int) -> None:
    """Reserve `size` bytes for a file, so that a full disk is an error now and not while it is written."""
    fallocate = getattr(os, "posix_fallocate", None)
    if size == 0:
        return
    if fallocate is not None:
        try:
            fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
    block = bytes(min(size, 1 << 20))  # no such call here; zeros reserve the space too
    os.lseek(handle, 0, os.SEEK_SET)
    for start in range(0, size, len(block)):
        write_all(handle, block[: size - start])


def free_space(folder: Path) -> int:
    return shutil.disk_usage(existing_part(folder)).free


def existing_part(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def cache_root() -> Path:
    """Return the folder of caches: $CLIPERASE_CACHE, else ~/.cache/cliperase_fast.

    Raises `InputError` for a user without a home directory, as in some containers.
    """
    given = os.environ.get("CLIPERASE_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "cliperase_fast"
    except RuntimeError as error:
        raise InputError("this user has no home directory for caches: name a folder with CLIPERASE_CACHE") from error


def check_writable(folder: Path, name: str) -> None:
    """Raise `InputError` unless files can be created in `folder` or, if it is missing, in its nearest parent.

    name: what comes before the path in the message, such as "output_dir=". Leaves nothing behind.
    """
    try:
        within = existing_part(folder)
        with tempfile.NamedTemporaryFile(prefix=".probe-", suffix=".tmp", dir=within) as probe:
            write_all(probe.fileno(), b"a line that must reach the disk\n" * 32)
            os.fsync(probe.fileno())
        os.stat(folder) if folder.exists() else _check_names(folder, within)
    except OSError as error:
        raise InputError(f"{name}{explain(error, folder)}") from error


def check_output_file(path: str | Path, name: str) -> None:
    """Raise `InputError` unless `path` can be written as a file. name: as in `check_writable`."""
    if Path(path).is_dir():
        raise InputError(f"{name}{path} is a folder; give a file")
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{name}{path} is a device or a pipe, which would be replaced; give a file")
    check_writable(Path(path).parent, name)


def output_folder(path: str | Path, name: str = "folder=") -> Path:
    """Return the path, with "~" expanded. Raises `InputError` for an empty text, which would be the working directory.

    name: as in `check_writable`.
    """
    if path == "":
        raise InputError(f"{name}'' names no folder; give one, or '.' for the working directory")
    return user_path(path)


def make_folder(path: str | Path, what: str) -> Path:
    """Create a folder and its parents, and return it; raises `InputError` if that fails. what: is saved there."""
    folder = output_folder(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{what} cannot be saved to {folder} ({error.strerror}): give a folder that can be written to"
        ) from error
    return folder


def check_room(folder: Path, size: int, largest: int, remedy: str) -> None:
    """Raise `InputError` unless the disk has `size` free bytes and a file may have `largest`."""
    free = free_space(folder)
    if free < size:
        raise InputError(f"{folder} needs {in_bytes(size)} and the disk has {in_bytes(free)} left; {remedy}")
    limit = _limit_of_a_file()
    if limit is not None and limit < largest:
        raise InputError(
            f"{folder} needs files of {in_bytes(largest)} and this process may write {in_bytes(limit)} into one "
            "(RLIMIT_FSIZE); raise the limit (ulimit -f)"
        )


class Locked(Exception):
    """Another process holds the lock; the message says which."""


_HELD: set[str] = set()  # by this process; the system's locks do not exclude their own process


@contextmanager
def lock(path: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`. The system releases it when the process ends, however it ends.

    waiting: called with the holder before waiting for the lock; if None, `Locked` is raised instead. On a file system
    without locks (some network mounts) a warning is issued and nothing is held.
    """
    key = os.path.realpath(path)
    while key in _HELD:
        if waiting is None:
            raise Locked(f"process {os.getpid()} on {socket.gethostname()}")
        time.sleep(0.05)
    handle = _locked(path, waiting)
    _HELD.add(key)
    try:
        yield
    finally:
        _HELD.discard(key)
        if handle is not None:
            with suppress(OSError):  # releasing the lock matters more than removing the file
                path.unlink(missing_ok=True)  # while holding it: a waiting process then creates a new file
            os.close(handle)


def _locked(path: Path, waiting: Callable[[str], None] | None) -> int | None:
    if fcntl is None:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(handle, waiting)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            warnings.warn(
                f"the file system of {path.parent} has no locks ({error.strerror}); make sure that no other process "
                "works there at the same time",
                stacklevel=2,
            )
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it


def _take(handle: int, waiting: Callable[[str], None] | None) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        holder = _holder(handle)
        if waiting is None:
            raise Locked(holder) from error
        waiting(holder)
        fcntl.lockf(handle, fcntl.LOCK_EX)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(told['pid'])} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has not written its number yet


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # in the words of safetensors
    return int(found[1]) if found else None


def _free_in_words(path: Path) -> str:
    try:
        return f" ({in_bytes(free_space(path))} free)"
    except OSError:
        return ""


def _check_names(folder: Path, within: Path) -> None:
    """Look up the missing folders, which raises `OSError` for names that are too long."""
    folder = folder.absolute()
    for part in (folder, *folder.parents):
        if part == within:
            return
        try:
            os.lstat(part)
        except FileNotFoundError:
            continue


def _limit_of_a_file() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft
