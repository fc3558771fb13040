"""A streamed sweep may be cut into rectangles of own rows and other columns: together they are the whole sweep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rectangles import in_pieces
from sweep_cases import outcome, random_batch

from cliperase_fast.ops import eager, streaming

# rows of one process against all columns; a ring of three (two without own pairs); one row, one column
CUTS = {"gathered": ([0, 5, 11, 17], [0, 17]), "ring": ([0, 5, 11, 17],) * 2, "ones": ([0, 1, 16, 17],) * 2}
WANTED = {"both": (True, True), "rm": (True, False), "kl": (False, True)}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("strip_rows", [0, 2])
def test_rectangles_add_up_to_the_whole(strip_rows, groups, wanted, cuts):
    batch = replace(random_batch(17), group_ids=torch.arange(17) % 5 if groups else None)
    batch = batch if WANTED[wanted][1] else batch.without_teacher()
    batch = replace(batch, want_retention=WANTED[wanted][0])
    found = in_pieces(streaming.kernels, batch, *CUTS[cuts], strip_rows=strip_rows)
    for ours, exact in zip(found, outcome(eager.sweep, batch, (0.7, 1.3)).tensors(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_parts_whose_gaps_lie_far_apart_keep_their_digits():
    # S° - S differs by hundreds between the blocks, and hardly at all inside of them
    batch = random_batch(12, width=8, teacher_width=8, scale=1.0, teacher_scale=1.0).to(torch.float32)
    batch = replace(batch, teacher_image=batch.image.clone(), teacher_text=batch.text.clone(), want_retention=False)
    batch.teacher_text[6:] *= 300
    exact = outcome(eager.sweep, batch.to(torch.float64), (0.7, 1.3))
    found = in_pieces(streaming.kernels, batch, [0, 6, 12], [0, 6, 12])
    assert (found[1].double() - exact.consistency).abs() <= 1e-6 * exact.consistency
    assert (found[2].double() - exact.image).norm() <= 1e-5 * exact.image.norm()
