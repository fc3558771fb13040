"""The calibrated loss of the backend "triton" in Triton's interpreter against float64; by `test_triton_interpreter.py`.

Blocks are 32 x 32 here. 50 pairs are 36 retain and 14 forget pairs: two tiles and one.
"""

from __future__ import annotations

import pytest
from calibrated_checks import *  # noqa: F403
from calibrated_checks import CalibratedSubject, let_the_public_loss_use

from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.triton import forward
from cliperase_fast.ops.triton.sweep import TritonKernels

NAME = "triton_in_blocks_calibrated"
in_blocks = as_calibrated(TritonKernels(name=NAME, block_columns=32))  # dS: blocks of one tile of columns


@pytest.fixture
def calibrated(monkeypatch):
    """The public loss with small blocks of dS, and chunks of several tiles; 32 of the 36 retain rows are kept."""
    monkeypatch.setattr(forward, "_PROGRAMS", 2)
    let_the_public_loss_use(monkeypatch, "triton", in_blocks.loss)
    return CalibratedSubject("triton", TritonKernels, pairs=50, cached_rows=8, budget=8 * 50 * 24)
