"""All of `kernel_checks.py` for the kernels with one exponential: minutes; run by `test_triton_interpreter.py`."""

from __future__ import annotations

import pytest
from kernel_checks import *  # noqa: F403
from shared_subject import SUBJECT


@pytest.fixture
def subject():
    return SUBJECT
