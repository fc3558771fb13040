"""The streamed losses of rows, against their formula written plainly, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sweep_cases import features

from cliperase_fast.contrastive import local_clip_loss
from cliperase_fast.ops.rows import row_losses
from cliperase_fast.ops.spec import SimilarityInputs


def losses(query, keys, scale, teacher_query, teacher_keys, teacher_scale, pair_offset, strip_rows=0):
    return row_losses(
        SimilarityInputs(
            query, keys, scale, teacher_query, teacher_keys, teacher_scale, pair_offset=pair_offset,
            strip_rows=strip_rows,
        )
    )  # fmt: skip


def plain_row_losses(query, keys, scale, teacher_query, teacher_keys, teacher_scale, pair_offset):
    log_p = F.log_softmax(scale * query @ keys.T, 1)
    contrastive = -log_p.diagonal(pair_offset).mean()
    if teacher_query is None:
        return contrastive, torch.zeros_like(contrastive)
    p_teacher = (teacher_scale * teacher_query @ teacher_keys.T).softmax(1)
    return contrastive, -(p_teacher * log_p).sum(1).mean()


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def rows_case(n, keys, teacher, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    frozen = (features(n, 9, g).to(dtype), features(keys, 9, g).to(dtype), torch.tensor(8.0, dtype=dtype))
    student = leaves(features(n, 12, g).to(dtype), features(keys, 12, g).to(dtype), torch.tensor(14.0, dtype=dtype))
    return student, frozen if teacher else (None, None, None)


# one row; the first and the last place among the keys; a strip that does not divide the rows; a single key
@pytest.mark.parametrize(
    ("n", "keys", "pair_offset", "strip_rows"),
    [(1, 5, 2, 0), (7, 21, 0, 3), (7, 21, 14, 3), (7, 7, 0, 2), (1, 1, 0, 0)],
)
@pytest.mark.parametrize("teacher", [False, True])
def test_row_losses_and_their_gradients_are_those_of_the_formula(n, keys, pair_offset, strip_rows, teacher):
    student, frozen = rows_case(n, keys, teacher)
    ours = losses(*student, *frozen, pair_offset, strip_rows)
    plain = plain_row_losses(*student, *frozen, pair_offset)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for weights in ((1.0, 0.0), (0.3, 2.0)):  # the two losses are weighed apart in the gradient
        gradients = [
            torch.autograd.grad(weights[0] * a + weights[1] * b, student, retain_graph=True) for a, b in (ours, plain)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_computed_in_float32_at_least_and_gradients_come_back_in_their_dtype(dtype):
    student, frozen = rows_case(6, 18, True, dtype)
    exact = leaves(*(tensor.double() for tensor in student))
    loss = sum(losses(*student, *frozen, 6, 4))
    truth = sum(plain_row_losses(*exact, *(tensor.double() for tensor in frozen), 6))
    loss.backward()
    truth.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for ours, right in zip(student, exact, strict=True):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), right.grad, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)


def test_rows_keep_their_digits_where_pairs_are_nearly_perfect():
    """-log softmax of a perfect pair at scale 100 is about exp(-100): it must not come out as 0 or as rounding."""
    query = torch.eye(4, 8).requires_grad_()
    contrastive, _ = losses(query, torch.eye(12, 8), torch.tensor(60.0), None, None, None, 0)
    truth, _ = plain_row_losses(
        torch.eye(4, 8).double(), torch.eye(12, 8).double(), torch.tensor(60.0).double(), None, None, None, 0
    )
    expected = 11 * torch.exp(torch.tensor(-60.0, dtype=torch.float64))
    assert truth.item() == pytest.approx(0.0, abs=1e-15)
    assert contrastive.item() == pytest.approx(expected.item(), rel=1e-4)
    contrastive.backward()
    assert query.grad.abs().max() > 0


@pytest.mark.parametrize("factor", [1e5, 1e7])
def test_large_logits_cost_no_digits_of_the_gradients(factor):
    student, frozen = rows_case(40, 90, True, torch.float32)
    student[2].data.mul_(factor)
    frozen[2].mul_(factor)
    exact = leaves(*(tensor.double() for tensor in student))
    sum(losses(*student, *frozen, 6)).backward()
    sum(plain_row_losses(*exact, *(tensor.double() for tensor in frozen), 6)).backward()
    for ours, right in zip(student, exact, strict=True):  # one entry of each softmax is 1, the rest vanish
        assert (ours.grad.double() - right.grad).abs().max() <= 90 * 2.0**-23 * right.grad.abs().max()


def test_a_rank_without_rows_has_zeros_and_zero_gradients():
    student = leaves(torch.ones(0, 3), torch.ones(5, 3), torch.tensor(7.0))
    contrastive, distill = local_clip_loss(*student, 2)
    contrastive.backward()
    assert contrastive == 0 and distill == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in student)


def test_the_op_keeps_the_rules_of_torch_and_compiles_whole():
    student, frozen = rows_case(5, 15, True)
    torch.library.opcheck(torch.ops.cliperase_fast.row_losses, (*student, *frozen, 5, 2))

    def step(query, keys, scale):
        return sum(losses(query, keys, scale, *frozen, 5, 2))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(run(*student), student) for run in (step, compiled)]
    torch.testing.assert_close(*gradients)
