"""Which versions of a library an integration was written for."""

from __future__ import annotations

import importlib.metadata
import re

from cliperase_fast.errors import InputError


def require(package: str, oldest: tuple[int, int], before: tuple[int, int], install: str) -> None:
    """Raise InputError unless oldest <= the installed version < before. install: what pip is to be given."""
    supported = f">={_dotted(oldest)},<{_dotted(before)}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f'this needs {package}, which is not installed: pip install "{install}"') from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not oldest <= numbers < before:
        raise InputError(
            f"{package} {version} is installed; this works with {package} {supported}: "
            f'pip install "{package}{supported}"'
        )


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
