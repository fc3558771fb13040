"""The Hugging Face hub without long waits where it cannot be reached."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

_PROBE_SECONDS = 5.0


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let the hub's client look into its cache only, when the hub does not answer.

    Otherwise every file it is asked for costs about 20 seconds of retries, even one that is in the cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def answers(address: str) -> bool:
    """Whether anything, an error page included, comes back from `address` within a few seconds."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
