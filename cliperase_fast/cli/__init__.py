"""The command line, `cliperase-fast COMMAND`."""

from cliperase_fast.cli.running import main

__all__ = ["main"]
