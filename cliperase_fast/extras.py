"""Import optional libraries and check their versions; errors say in one line how to install them."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from cliperase_fast.errors import InputError

# Each extra of pyproject.toml and the module that shows whether its library is installed.
EXTRAS = {
    "transformers": "transformers",
    "lora": "peft",
    "webdataset": "webdataset",
    "parquet": "pyarrow",
    "deepspeed": "deepspeed",
    "open-clip-training": "open_clip_train.main",
    "lightning": "lightning",
    "diffusers": "diffusers",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def install_hint(extra: str) -> str:
    """Return how to install an extra: from a checkout, because this package is not on an index."""
    return f"pip install '.[{extra}]' in the folder of cliperase_fast's source"


def import_extra(extra: str, what: str, module: str | None = None) -> ModuleType:
    """Import the library of an extra, or one module of it.

    what: what needs it; the `InputError` for a missing library starts with it.
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
    """Exit with a one-line message if the library of an extra is missing. For scripts, such as the examples."""
    for extra in extras:
        try:
            import_extra(extra, "this program")
        except InputError as error:
            raise SystemExit(f"error: {error}") from None


def require_version(package: str, supported: str, extra: str | None = None) -> None:
    """Raise `InputError` unless a package of the index is installed in a supported version.

    supported: as in a requirement, such as ">=3.0,<5". extra: the one that installs the package, if any.
    """
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        remedy = f'pip install "{package}{supported}"' if extra is None else install_hint(extra)
        raise InputError(f"this needs {package}, which is not installed: {remedy}") from error
    if not SpecifierSet(supported).contains(version, prereleases=True):
        raise InputError(f'{package} {version} is not supported: pip install "{package}{supported}"')
