"""The Triton sweep in Triton's interpreter against float64; run by `test_triton_interpreter.py`.

Blocks are 32 x 32 here, so 65 pairs are three blocks, the last of one row, and strip_rows=1 makes each a strip.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy_cases import regime
from compact_checks import check_compact
from kernel_checks import *  # noqa: F403
from kernel_checks import FORMS, Subject, formed, some_groups, watch_kept
from rectangles import in_pieces
from sweep_cases import outcome, random_batch

from cliperase_fast import functional
from cliperase_fast.errors import InputError
from cliperase_fast.ops import backends, eager
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.triton import features_kl, forward
from cliperase_fast.ops.triton import sweep as triton_sweep
from cliperase_fast.validation import choose

NAME = "triton_in_blocks"
in_blocks = as_sweep(triton_sweep.TritonKernels(name=NAME, block_columns=64))  # dS: blocks of two tiles of columns


@pytest.fixture
def subject():
    return Subject(
        in_blocks,
        NAME,
        triton_sweep.TritonKernels,
        few_programs=lambda monkeypatch: monkeypatch.setattr(forward, "_PROGRAMS", 6),
    )


# 35 pairs end in tiles of three rows and columns; "half converged" at scale 1000 has tiles that span 2000
@pytest.mark.parametrize(("form", "dtype"), [("both", torch.bfloat16), ("rm", torch.bfloat16), ("kl", torch.float16)])
def test_similarities_kept_in_16_bits_cost_no_more_than_stated(subject, monkeypatch, form, dtype):
    batch = formed(replace(random_batch(35, scale=100.0, teacher_scale=60.0), group_ids=some_groups(35)), form)
    kept = watch_kept(subject, monkeypatch)
    check_compact(subject, batch, dtype)
    assert kept == [16 * 4 + 2 * 35 * 35 * (1 + batch.want_consistency) + 1]


@pytest.mark.parametrize(("name", "scale"), [("half converged", 1000.0), ("collapsed", 100.0), ("converged", 100.0)])
def test_16_bits_serve_tiles_that_span_little_or_much(subject, name, scale):
    check_compact(subject, regime(name, scale, 33))


def test_float32_features_keep_float32_similarities_and_so_do_batches_too_large_for_16_bits(subject, monkeypatch):
    kept = watch_kept(subject, monkeypatch)
    for dtype, budget in ((torch.float32, 1 << 20), (torch.bfloat16, 4 * 1000)):
        monkeypatch.setattr(triton_sweep, "cache_budget", lambda device, budget=budget: budget)
        outcome(subject.sweep, random_batch(35).to(dtype), keep="compact")
    assert kept == [8 * 35 * 35] * 2


@pytest.mark.parametrize("forget", ["cosine", "contrastive", "hinge"])
@pytest.mark.parametrize("consistency", ["logits", "intra", "features"])
def test_the_public_loss_in_all_its_options(forget, consistency):
    batch = random_batch(20, teacher_width=40).to(torch.float32)
    terms, gradients = [], []
    for backend in ("triton", "eager"):
        leaves = [t.clone().requires_grad_() for t in (batch.image[:7], batch.text[:7], batch.image, batch.text)]
        scale = batch.scale.clone().requires_grad_()
        result = functional.cliperase_loss(
            *leaves, batch.teacher_image, batch.teacher_text, scale, 9.0, forget=forget, consistency=consistency,
            group_ids=some_groups(20), backend=backend,
        )  # fmt: skip
        result.total.backward()
        terms.append(torch.stack(result).detach())
        gradients.append([tensor.grad for tensor in (*leaves, scale)])
    torch.testing.assert_close(*terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


# 1: one entry; 40: less than a block; 2048 fills a block of one row; 3000 is more than one row's share of the registers
@pytest.mark.parametrize(("n", "width"), [(1, 1), (33, 40), (5, 2048), (3, 3000)])
@pytest.mark.parametrize("size", ["normalised", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_divergence_of_features_is_exact_where_it_is_tiny_too(dtype, size, n, width):
    batch = random_batch(n, width=width, teacher_width=width)
    factor = 30.0 if size == "large" else 1.0
    student, teacher = ((tensor * factor).to(dtype) for tensor in (batch.image, batch.teacher_image))
    losses, gradients = [], []
    for function, tensor in ((features_kl.features_kl, student), (eager.features_kl, student.double())):
        leaf = tensor.clone().requires_grad_()
        loss = function(leaf, teacher.to(leaf.dtype))
        (2.5 * loss).backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    assert losses[0].dtype == torch.float32 and gradients[0].dtype == dtype
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=3e-6, atol=1e-12)
    eps = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny * eps  # float16 has no smaller numbers
    largest = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=eps, atol=4e-6 * largest + smallest)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_the_divergence_of_features_takes_any_strides(kind):
    full = random_batch(24, width=24, teacher_width=24).to(torch.float32)
    student = {"transposed": full.image.T, "expanded": full.image[:1].expand(24, 24), "sliced": full.image[::2, 1::2]}
    teacher = full.teacher_image[: len(student[kind]), : student[kind].shape[1]]
    expected = eager.features_kl(student[kind].double(), teacher.double())
    torch.testing.assert_close(
        features_kl.features_kl(student[kind], teacher).double(), expected, rtol=1e-5, atol=1e-12
    )


def test_the_divergence_of_equal_features_is_zero_and_of_wide_ones_is_left_to_torch():
    student = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = features_kl.features_kl(student, student.detach())
    loss.backward()
    assert loss == 0 and student.grad.abs().max() < 1e-8
    wide = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features_kl.features_kl(wide, wide.flip(0)), eager.features_kl(wide, wide.flip(0)))


def test_the_divergence_of_features_keeps_the_rules_of_torch_library_and_compiles_into_one_graph():
    student, teacher = (t.to(torch.float32).detach() for t in (random_batch(5).image, random_batch(5, seed=1).image))
    ops = torch.ops.cliperase_fast
    torch.library.opcheck(ops.triton_features_kl.default, (student.clone().requires_grad_(), teacher))
    torch.library.opcheck(ops.triton_features_kl_backward.default, (torch.tensor(2.0), student, teacher))
    compiled = torch.compile(features_kl.features_kl, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(student, teacher), features_kl.features_kl(student, teacher))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_show_in_the_divergence_of_features(bad):
    student, teacher = (t.to(torch.float32) for t in (random_batch(5).image, random_batch(5, seed=1).image))
    student[3, 2] = bad
    assert not features_kl.features_kl(student, teacher).isfinite()


def test_autocast_around_the_losses_changes_nothing():
    batch = random_batch(17, teacher_width=40).to(torch.float32)
    for consistency in ("logits", "intra", "features"):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                leaf = batch.image.clone().requires_grad_()
                terms = functional.cliperase_loss(
                    leaf[:3], batch.text[:3], leaf, batch.text, batch.teacher_image, batch.teacher_text,
                    batch.scale, 9.0, consistency=consistency, backend="triton",
                )  # fmt: skip
                terms.total.backward()
            results.append((*terms, leaf.grad))
        torch.testing.assert_close(*results)  # bfloat16 would be off by 1e-3


def test_an_empty_batch_has_no_divergence_and_zero_gradients():
    empty = torch.zeros(0, 8, requires_grad=True)
    for consistency in ("logits", "intra", "features"):
        terms = functional.cliperase_loss(
            empty, empty, empty, empty, empty.detach(), empty.detach(), 1.0, 1.0, consistency=consistency,
            backend="triton",
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(terms.total, empty)
        assert terms.total == 0 and gradient.shape == (0, 8)


def test_float64_raises_an_error_that_names_it():
    assert backends()["triton"].available
    batch = random_batch(4)
    with pytest.raises(InputError, match=r"'triton' does not support torch\.float64"):
        functional.clip_loss(batch.image, batch.text, 1.0, backend="triton")
    halves = random_batch(4).to(torch.float32)
    with pytest.raises(InputError, match=r"'triton' does not support torch\.float64"):
        choose("triton", halves.image, halves.text, batch.teacher_image, batch.teacher_text)


# one process's rows against all columns, and blocks without own pairs; 65 pairs are three blocks of columns
@pytest.mark.parametrize("cuts", [([0, 20, 65], [0, 65]), ([0, 20, 65], [0, 20, 65]), ([0, 1, 65], [0, 1, 65])])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_rectangles_add_up_to_the_whole(keep, groups, cuts):
    batch = replace(random_batch(65), group_ids=some_groups(65) if groups else None)
    exact = outcome(eager.sweep, batch, (0.7, 1.3))
    found = in_pieces(triton_sweep.kernels, batch.to(torch.float32), *cuts, strip_rows=1, keep=keep)
    for ours, theirs in zip(found, exact.tensors(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("form", "keep"), [*((form, "nothing") for form in FORMS), ("both", "compact")])
def test_rectangles_of_half_precision_give_summands_in_float32(form, keep):
    batch = formed(random_batch(40), form).to(torch.bfloat16)
    exact = outcome(eager.sweep, batch.to(torch.float64), (0.7, 1.3))
    found = in_pieces(triton_sweep.kernels, batch, [0, 7, 40], [0, 7, 40], keep=keep)
    for ours, theirs in zip(found[2:4], (exact.image, exact.text), strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() <= 4e-3 * theirs.norm()


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
def test_saturated_softmaxes_are_exact_however_large_the_logits(scale):
    image, text, *teacher = (unit_features(37, 24, seed) for seed in range(4))

    def gradients(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (image, text)]
        frozen = [tensor.to(dtype) for tensor in teacher]
        loss = functional.clip_loss(*leaves, scale, backend=backend)
        loss = loss + functional.similarity_kl(*leaves, scale, *frozen, 10.0, backend=backend)
        return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]

    # Where the largest entries of a softmax lie far apart it is 0 and 1: no rounding of the logits shows.
    for found, truth in zip(gradients(torch.float32, "triton"), gradients(torch.float64, "eager"), strict=True):
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e6])
def test_the_divergence_of_features_far_apart_is_finite_and_right(factor):
    student, teacher = (factor * unit_features(7, 24, seed) for seed in range(2))
    leaves = student.clone().requires_grad_(), student.double().requires_grad_()
    losses = features_kl.features_kl(leaves[0], teacher), eager.features_kl(leaves[1], teacher.double())
    found, truth = (torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True))
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-5 * truth.abs().max().item())


def unit_features(n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
