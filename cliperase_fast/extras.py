"""Libraries that not every use needs: import them, check their versions, and say in one line how to get them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType

from cliperase_fast.errors import InputError

# the extra of pyproject.toml that brings a library, and the module that shows whether it is there
EXTRAS = {
    "transformers": "transformers",
    "lora": "peft",
    "webdataset": "webdataset",
    "deepspeed": "deepspeed",
    "open-clip-training": "open_clip_train.main",
    "lightning": "lightning",
    "diffusers": "diffusers",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def install_hint(extra: str) -> str:
    """How to install an extra: from a checkout, as this package is on no index."""
    return f"pip install '.[{extra}]' in the folder of cliperase_fast's source"


def import_extra(extra: str, what: str, module: str | None = None) -> ModuleType:
    """Import the library of an extra, or one module of it.

    what: what needs it, the beginning of the InputError where it cannot be imported.
    """
    name = EXTRAS[extra] if module is None else module
    library = name.partition(".")[0]
    try:
        importlib.import_module(library)
        return importlib.import_module(name)
    except ImportError as error:
        remedy = install_hint(extra)
        raise InputError(f"{what} needs {library}, which cannot be imported ({error}): {remedy}") from error


def exit_without(*extras: str) -> None:
    """End this program with one line where the library of an extra is missing. For scripts, such as the examples."""
    for extra in extras:
        try:
            import_extra(extra, "this program")
        except InputError as error:
            raise SystemExit(f"error: {error}") from None


def require_version(package: str, oldest: tuple[int, int], before: tuple[int, int], extra: str | None = None) -> None:
    """Raise InputError unless oldest <= the installed version of a package of the index < before.

    extra: the one that brings it, if any.
    """
    supported = f">={_dotted(oldest)},<{_dotted(before)}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        remedy = f'pip install "{package}{supported}"' if extra is None else install_hint(extra)
        raise InputError(f"this needs {package}, which is not installed: {remedy}") from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not oldest <= numbers < before:
        raise InputError(
            f"{package} {version} is installed; this works with {package} {supported}: "
            f'pip install "{package}{supported}"'
        )


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
