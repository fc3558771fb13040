from __future__ import annotations

import pytest
from ranks import Ranks


def _started(size, tmp_path_factory):
    ranks = Ranks(size, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    yield from _started(2, tmp_path_factory)


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    yield from _started(4, tmp_path_factory)
