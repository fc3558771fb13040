"""The CUDA kernels of the backend "native", run on the CPU by an emulation of CUDA, against float64.

The kernels' tiles are 32 x 128 forward and 64 x 128 backward; blocks of 64 x 128, so 130 pairs are three by two.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_cuda import build
from kernel_checks import *  # noqa: F403
from kernel_checks import Subject, check, some_groups
from native_buffers import CANARY, FAULTS, UNREADABLE, as_buffers, forged, written
from sweep_cases import outcome, random_batch
from torch_defaults import DEFAULTS, assert_independent

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.blocks import block_shape
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.native.extension import as_buffer

NAME = "native_cuda_emulated"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(scope="module")
def sweep(kernels):
    return as_sweep(CudaKernels(kernels, NAME, block_columns=128))


@pytest.fixture
def subject(sweep):
    return Subject(
        sweep,
        NAME,
        CudaKernels,
        kept_row_bytes=lambda batch: 4 * -(-len(batch.image) // 8) * 8 * (1 + batch.want_consistency),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_block_and_many_agree_with_float64(kernels, subject, dtype):
    whole = as_sweep(CudaKernels(kernels, f"{NAME}_whole_{str(dtype)[6:]}"))
    batch = grouped(random_batch(300))
    check(subject, batch, dtype, strip_rows=64)
    first, second = (outcome(run, batch.to(dtype)) for run in (whole, subject.sweep))
    torch.testing.assert_close(first.retention, second.retention)
    torch.testing.assert_close(first.consistency, second.consistency)


def grouped(batch):
    return replace(batch, group_ids=some_groups(len(batch.image)))


def test_the_order_of_threads_between_barriers_does_not_matter(kernels, subject):
    batch = grouped(random_batch(130)).to(torch.bfloat16)
    plain = outcome(subject.sweep, batch)
    kernels.reverse_threads(True)
    try:
        reversed_ = outcome(subject.sweep, batch)
    finally:
        kernels.reverse_threads(False)
    for ours, theirs in zip(plain.tensors(), reversed_.tensors(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_results_do_not_depend_on_the_defaults_of_torch(subject, keep, default):
    for dtype in (torch.float32, torch.float16):
        batch = grouped(random_batch(130)).to(dtype)
        assert_independent(default, lambda batch=batch: outcome(subject.sweep, batch, keep=keep).tensors())


def as_block(kernels, student, columns=None, pair_offset=0, **tensors):
    """student: [rows, columns and their padding]."""
    tensors = {"student": student, "scalars": torch.ones(3, dtype=torch.float32), **tensors}
    columns = student.shape[1] if columns is None else columns
    return kernels.Block(columns=columns, pair_offset=pair_offset, **as_buffers(kernels, tensors))


def padded(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """[rows, columns and their padding] random numbers, NaN behind each row."""
    full = torch.full((rows, -(-columns // 4) * 4), torch.nan)
    full[:, :columns] = 5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return full


# 17,000 rows are more tiles than programs, so that each program walks all three tiles of columns; -7 and 295: only some
# rows have their pair in the block
@pytest.mark.parametrize(("rows", "columns", "pair_offset"), [(17_000, 301, -7), (37, 301, 295), (3, 5, 9), (40, 1, 0)])
def test_a_rectangle_of_own_rows_and_all_columns(kernels, rows, columns, pair_offset):
    student, teacher = padded(rows, columns), padded(rows, columns, seed=1)
    scalars = torch.tensor([0.5, 2.0, 0.25])
    block = as_block(kernels, student, columns, pair_offset, teacher=teacher, scalars=scalars)
    student, teacher = student[:, :columns], teacher[:, :columns]
    row_stats, column_stats = torch.full((5, rows), torch.nan), torch.full((5, columns + 3), torch.nan)
    diagonals = torch.full((2, rows), torch.nan)
    workspace = torch.full((kernels.forward_workspace(block) + 1,), torch.nan)
    outputs = {
        "row_stats": row_stats, "column_stats": column_stats[:, :columns], "diagonal": diagonals[0],
        "teacher_diagonal": diagonals[1], "workspace": workspace[:-1],
    }  # fmt: skip
    kernels.forward(block, row_fresh=True, column_fresh=True, stream=0, **as_buffers(kernels, outputs))
    assert workspace[-1].isnan() and column_stats[:, columns:].isnan().all()
    s, t = 0.5 * student.double(), 2.0 * teacher.double()
    paired = torch.arange(rows)[:, None] + pair_offset == torch.arange(columns)
    for found, of in zip(diagonals, (s, t), strict=True):
        expected = of.masked_fill(~paired, 0).sum(1).float()
        torch.testing.assert_close(found[paired.any(1)], expected[paired.any(1)])
        assert found[~paired.any(1)].isnan().all()
    for dim, sums in ((1, row_stats), (0, column_stats[:, :columns])):
        some = (~paired).any(dim)  # something off the diagonal
        sums = sums.double()[:, some]
        for maximum, total, of in ((sums[0], sums[1], s), (sums[2], sums[3], t)):
            expected = of.masked_fill(paired, -torch.inf).logsumexp(dim)[some]
            torch.testing.assert_close(maximum * 0.6931471805599453 + total.log(), expected, rtol=1e-5, atol=1e-5)
        weights = t.masked_fill(paired, -torch.inf).softmax(dim).nan_to_num()
        expected = (weights * (t - s - 0.25)).sum(dim)[some]
        torch.testing.assert_close(sums[4] / sums[3] * 0.6931471805599453, expected, rtol=1e-4, atol=1e-4)


ROWS, COLUMNS, PADDED = 8, 6, 8


def of_block():
    ids = torch.arange(ROWS) // 2
    return {
        "student": padded(ROWS, COLUMNS), "teacher": padded(ROWS, COLUMNS, seed=1), "scalars": torch.ones(3),
        "row_groups": ids, "column_groups": ids[:COLUMNS].clone(),
    }  # fmt: skip


def of_forward(kernels):
    workspace = kernels.forward_workspace(
        kernels.Block(columns=COLUMNS, pair_offset=0, **as_buffers(kernels, of_block()))
    )
    return {
        "row_stats": torch.full((7, ROWS), CANARY), "column_stats": torch.full((7, COLUMNS), CANARY),
        "diagonal": torch.full((ROWS,), CANARY), "teacher_diagonal": torch.full((ROWS,), CANARY),
        "workspace": torch.full((workspace,), CANARY),
    }  # fmt: skip


def of_backward(kernels):
    return {
        "row_terms": torch.zeros(6, ROWS), "column_terms": torch.zeros(6, COLUMNS), "diagonal": torch.zeros(ROWS),
        "gradient": torch.full((ROWS, PADDED), CANARY, dtype=torch.bfloat16),
    }  # fmt: skip


@pytest.mark.parametrize("name", of_block())
def test_a_block_of_what_cannot_be_read_as_such_is_refused(kernels, name):
    tensors = of_block()
    for change in FAULTS.values():
        changed = {**as_buffers(kernels, tensors), name: as_buffer(kernels, change(tensors[name]))}
        with pytest.raises(ValueError, match=r"^(student|teacher|scalars|row_groups|column_groups) must be"):
            kernels.Block(columns=COLUMNS, pair_offset=0, **changed)
    for address in (*UNREADABLE.values(), lambda address: address + 4):
        if name == "scalars" and address(0) == 4:
            continue  # is aligned
        changed = {**as_buffers(kernels, tensors), name: forged(kernels, tensors[name], address)}
        with pytest.raises(ValueError, match=f"^{name} (must begin|is a null pointer|reaches beyond)"):
            kernels.Block(columns=COLUMNS, pair_offset=0, **changed)


@pytest.mark.parametrize(("call", "buffers"), [("forward", of_forward), ("backward", of_backward)])
def test_a_buffer_that_is_not_what_the_kernels_need_is_refused_and_nothing_is_written(kernels, call, buffers):
    tensors = buffers(kernels)
    block = kernels.Block(columns=COLUMNS, pair_offset=0, **as_buffers(kernels, of_block()))
    fresh = {"row_fresh": True, "column_fresh": True} if call == "forward" else {}

    def run(changed):
        getattr(kernels, call)(block, stream=0, **fresh, **{**as_buffers(kernels, tensors), **changed})

    run({})  # as it should be
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        bad = {fault: as_buffer(kernels, change(tensor)) for fault, change in FAULTS.items()}
        bad |= {fault: forged(kernels, tensor, address) for fault, address in UNREADABLE.items()}
        if name == "workspace":
            del bad["too large"]
        for buffer in bad.values():
            with pytest.raises(ValueError, match=f"^{name} (must|is a null|reaches)"):
                run({name: buffer})
        assert written(tensors, before) == []


def test_what_the_kernels_cannot_count_or_find_is_refused(kernels):
    tensors = of_block()
    for columns, message in ((0, "columns = 0"), (9, "student must be"), (2**60, "columns = 1152921504606846976")):
        with pytest.raises(ValueError, match=message):
            kernels.Block(columns=columns, pair_offset=0, **as_buffers(kernels, tensors))
    for missing in ("row_groups", "column_groups"):
        some = {name: tensor for name, tensor in tensors.items() if name != missing}
        with pytest.raises(ValueError, match="must be given together"):
            kernels.Block(columns=COLUMNS, pair_offset=0, **as_buffers(kernels, some))
    far = {**tensors, "teacher": padded(ROWS, 12)[:, :PADDED]}
    with pytest.raises(ValueError, match="the same stride"):
        kernels.Block(columns=COLUMNS, pair_offset=0, **as_buffers(kernels, far))
    huge = kernels.Buffer(16, "float32", (2**61, PADDED), (PADDED, 1), "cpu")
    with pytest.raises(ValueError, match="student reaches beyond 64 bits"):
        kernels.Block(columns=COLUMNS, pair_offset=0, student=huge, scalars=as_buffer(kernels, tensors["scalars"]))
    block = kernels.Block(columns=COLUMNS, pair_offset=0, **as_buffers(kernels, tensors))
    outputs = of_forward(kernels)
    del outputs["teacher_diagonal"]
    with pytest.raises(ValueError, match="teacher_diagonal is needed"):
        kernels.forward(block, row_fresh=True, column_fresh=True, stream=0, **as_buffers(kernels, outputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulated_rounding_is_that_of_torch(kernels, dtype):
    # the terms make dS one column's factor: numbers of all sizes, ties, subnormals and what is too large
    values = torch.cat(
        [torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 2.0**e for e in range(-27, 18, 4)]
    )
    values = torch.cat(
        [values, torch.arange(-4, 4).float() * 2**-25, torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12])]
    )
    values = torch.cat([values, torch.zeros(-len(values) % 4)])
    n = len(values)
    student, row_terms, diagonal = torch.zeros(1, n), torch.zeros(2, 1), torch.zeros(1)
    column_terms = torch.stack((torch.zeros(n), values))
    gradient = torch.empty(1, n, dtype=dtype)
    tensors = {"row_terms": row_terms, "column_terms": column_terms, "diagonal": diagonal, "gradient": gradient}
    kernels.backward(as_block(kernels, student, pair_offset=n), stream=0, **as_buffers(kernels, tensors))
    assert torch.equal(gradient[0], values.to(dtype))


def test_a_million_pairs_fit_one_gpu(kernels):
    # bf16 features [2^20, 768], student and teacher: 139 GiB hold them, their gradients and all that a sweep works with
    n, width, budget = 1 << 20, 768, 128 << 20
    features, gradients = 4 * n * width * 2, 2 * n * width * 2
    rows, columns = block_shape(n, n, 2 * 4, budget)
    products = kernels.Buffer(16, "float32", (rows, columns), (columns, 1), "cpu")
    scalars = kernels.Buffer(16, "float32", (3,), (1,), "cpu")
    block = kernels.Block(columns=columns, pair_offset=0, student=products, teacher=products, scalars=scalars)
    workspace = 4 * kernels.forward_workspace(block)
    assert workspace < budget / 8
    forward = budget + workspace + 4 * n * (2 * 5 + 2)
    rows, columns = block_shape(n, n, 2 * 4 + 2, budget)
    state, terms = 4 * n * 8, 4 * n * (2 * 4 * 2 + 4)
    backward = budget + state + terms + 4 * n * width + 2 * n * width + 2 * 4 * rows * width
    assert features + gradients + max(forward, backward) < 16 << 30
