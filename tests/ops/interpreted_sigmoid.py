"""Compare the Triton sigmoid loss in the interpreter with float64; run by `test_triton_interpreter.py`."""

from __future__ import annotations

import pytest
import torch
from sigmoid_checks import *  # noqa: F403
from sigmoid_checks import Subject, check, random_case

from cliperase_fast.contrastive import sigmoid_loss
from cliperase_fast.ops.sigmoid import as_sigmoid
from cliperase_fast.ops.triton.sigmoid import TritonSigmoid

NAME = "triton_in_blocks"
in_blocks = as_sigmoid(TritonSigmoid(NAME, block_columns=64))  # dS: blocks of two tiles of columns


@pytest.fixture
def subject():
    return Subject(in_blocks.loss, NAME, rounds_ds=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_groups_of_row_blocks_match_float64(subject, dtype):
    check(subject, random_case(300, 70, 70), dtype)  # ten row tiles of 32, walked in groups of eight


def test_the_public_loss_accepts_the_backend_by_name():
    case = random_case(37).to(torch.float32)
    tensors = (case.image, case.text, case.scale, case.bias)
    losses = [sigmoid_loss(*tensors, backend=name) for name in ("triton", "eager")]
    torch.testing.assert_close(*losses)
