"""Processes for tests, forked from one that has loaded torch and the package, which takes seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def context() -> ForkServerContext:
    """Starts processes fast, each as fresh as a spawned one but for these modules and the environment of the first."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch.multiprocessing", "open_clip", "cliperase_fast.unlearning.api"])
    return found
