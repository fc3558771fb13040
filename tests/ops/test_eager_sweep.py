"""The eager sweep is the oracle of the others, so it is held against the formulas and finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sweep_cases import BACKENDS, naive_sweep, outcome, random_batch

from cliperase_fast.ops.eager import sweep
from cliperase_fast.ops.registry import REGISTRY

GROUPS = {
    "no groups": None,
    "pairs": [0, 0, 1, 2, 2, 3, 4],
    "one group": [5] * 7,
    "all different": [0, 1, 2, 3, 4, 5, -6],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "rm", "kl"])
def test_eager_agrees_with_the_formulas_written_with_log_softmax(wanted, groups):
    ids = None if groups is None else torch.tensor(groups)
    batch = random_batch(7) if wanted[1] else random_batch(7).without_teacher()
    batch = replace(batch, group_ids=ids, want_retention=wanted[0])
    ours, naive = outcome(sweep, batch, (0.7, 1.3)), outcome(naive_sweep, batch, (0.7, 1.3))
    for a, b in zip(ours.tensors(), naive.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert (ours.retention > 0) == (wanted[0] and groups != GROUPS["one group"])
    assert (ours.consistency > 0) == wanted[1]


def test_values_of_two_pairs_worked_out_by_hand():
    # S = [[3, 1], [0, 2]]: row odds e^-2 and e^-2, column odds e^-3 and e^-1
    batch = random_batch(2)
    eye = torch.eye(2, dtype=torch.float64)
    batch = replace(
        batch, image=torch.tensor([[3.0, 1.0], [0.0, 2.0]]).double(), text=eye, scale=torch.ones(()).double()
    )
    batch = replace(batch, teacher_image=torch.zeros(2, 3).double(), teacher_text=torch.ones(2, 3).double())
    retention, consistency = sweep(batch)
    odds = torch.tensor([-2.0, -2.0, -3.0, -1.0], dtype=torch.float64)
    expected = torch.log1p(odds.exp()).sum() / 4
    torch.testing.assert_close(retention, expected)
    # the teacher is uniform: KL = Σ ½ (log ½ - log p), p = 1 / (1 + e^odds) and its complement
    p = 1 / (1 + odds.exp())
    expected = (0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()).sum() / 2
    torch.testing.assert_close(consistency, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2, 1], [3] * 5], ids=["no groups", "groups", "one group"])
@pytest.mark.parametrize("n", [1, 5])
def test_gradients_agree_with_finite_differences(backend, groups, n):
    batch = random_batch(n, width=4, teacher_width=3, scale=5.0)
    ids = None if groups is None else torch.tensor(groups[:n])
    run = REGISTRY[backend].load("cpu").sweep

    def losses(image, text, scale):
        return run(batch.inputs(image, text, scale, group_ids=ids))

    leaves = [t.clone().requires_grad_() for t in (batch.image, batch.text, batch.scale)]
    assert torch.autograd.gradcheck(losses, leaves)
