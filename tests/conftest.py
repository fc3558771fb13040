import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# benchmarks/ is not installed; the tests use its measurements.
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory):
    """A folder of small trained models, shared by all test processes; the digits' is in it already."""
    from cliperase_fast.demo import RECIPES, cached_small_clip

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "models"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        cached_small_clip("demo", RECIPES["demo"], cache_dir=folder)
    return folder
