"""A few checks of the Triton kernels with one exponential for an entry, against float64: those of `make test`.

Run by `test_triton_interpreter.py`. Blocks are 32 x 32; blocks of dS have two tiles of columns.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy_cases import regime
from compact_checks import check_compact
from kernel_checks import FORMS, check, formed, some_groups
from shared_subject import SUBJECT
from sweep_cases import outcome, random_batch

from cliperase_fast.ops.triton import shared


# equal widths are multiplied in one loop; 40 is not a multiple of a block's depth; 65 pairs end in a block of one
@pytest.mark.parametrize(("n", "widths", "dtype"), [
    (65, (40, 24), torch.float32), (37, (40, 40), torch.bfloat16), (33, (64, 64), torch.float16),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_float64(form, n, widths, dtype):
    batch = replace(random_batch(n, *widths), group_ids=some_groups(n) if n != 33 else None)
    check(SUBJECT, formed(batch, form), dtype, strip_rows=32)


# At scale 1000 the entries of many tiles lie further apart than one exponential reaches.
@pytest.mark.parametrize("name", ["half converged", "collapsed teacher"])
def test_tiles_that_one_exponential_does_not_reach_are_exact(name):
    check(SUBJECT, regime(name, 1000.0, 40))


def test_columns_out_of_reach_are_noticed_where_all_rows_are_within():
    batch = random_batch(40, scale=200.0)
    image, text = (batch.image[:1] + 0.1 * features for features in (batch.image, batch.text))  # all alike
    text[3] *= -1  # the entries of this column lie far below all others
    check(SUBJECT, replace(batch, image=image, text=text).to(torch.float32).to(torch.float64))


def test_kept_similarities_give_what_forming_them_again_gives():
    batch = random_batch(40, 40, 40).to(torch.float32)
    kept, again = (outcome(SUBJECT.sweep, batch, keep=keep) for keep in ("similarities", "nothing"))
    torch.testing.assert_close(kept.tensors(), again.tensors())


# at scale 1000 tiles are out of reach of one exponential
@pytest.mark.parametrize(("name", "scale"), [("random", 100.0), ("half converged", 1000.0)])
def test_similarities_kept_in_16_bits_cost_no_more_than_stated(name, scale):
    check_compact(SUBJECT, replace(regime(name, scale, 40), group_ids=some_groups(40)))


def test_ordinary_tiles_are_formed_once(monkeypatch):
    launched = []
    launch = type(shared.repair_kernel).__getitem__

    def watched(kernel, grid):
        def run(*arguments, **constants):
            if kernel is shared.repair_kernel:
                launched.append(arguments[9].clone())  # p_missing
            return launch(kernel, grid)(*arguments, **constants)

        return run

    monkeypatch.setattr(type(shared.repair_kernel), "__getitem__", watched)
    outcome(SUBJECT.sweep, random_batch(64).to(torch.float32))
    assert [missing.tolist() for missing in launched] == [[[0, 0], [0, 0]]]
