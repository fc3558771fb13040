import os
from dataclasses import replace

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:  # set for this process by the Makefile; xdist passes it to workers
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory):
    """A folder of small trained models, shared by all test processes; the digits' is in it already."""
    from cliperase_fast.demo_models import DEMO_MODELS

    return _with_digits(tmp_path_factory, DEMO_MODELS["demo"])


@pytest.fixture
def quick_model_cache(tmp_path_factory, monkeypatch):
    """The same with a smaller model of the digits, less trained, for the demo too."""
    from cliperase_fast.demo_models import DEMO_MODELS

    demo = DEMO_MODELS["demo"]
    smaller = replace(demo, vision={**demo.vision, "patch_size": 8, "width": 64, "layers": 2}, epochs=16)
    monkeypatch.setitem(DEMO_MODELS, "demo", smaller)
    return _with_digits(tmp_path_factory, smaller)


def _with_digits(tmp_path_factory, recipe):
    from cliperase_fast.demo import cached_small_clip

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "models"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        cached_small_clip("demo", recipe, cache_dir=folder)
    return folder
