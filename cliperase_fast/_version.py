"""The version of the package and of the libraries it uses."""

from __future__ import annotations

__version__ = "0.2.0"


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the versions of this package, of Python and of the given distributions, for the record of a run."""
    import importlib.metadata
    import platform

    versions = {"cliperase_fast": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
