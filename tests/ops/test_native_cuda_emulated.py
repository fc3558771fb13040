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
from sweep_cases import outcome, random_batch
from torch_defaults import DEFAULTS, assert_independent

from cliperase_fast.errors import InputError
from cliperase_fast.ops.engine import as_sweep
from cliperase_fast.ops.native import cuda
from cliperase_fast.ops.native.cuda import CudaEngine, block_shape
from cliperase_fast.ops.problem import Problem

NAME = "native_cuda_emulated"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(scope="module")
def sweep(kernels):
    return as_sweep(CudaEngine(kernels, NAME, block_columns=128))


@pytest.fixture
def subject(sweep):
    return Subject(
        sweep,
        NAME,
        cuda,
        CudaEngine,
        kept_row_bytes=lambda batch: 4 * -(-len(batch.image) // 8) * 8 * (1 + batch.want_consistency),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_block_and_many_agree_with_float64(kernels, subject, dtype):
    whole = as_sweep(CudaEngine(kernels, f"{NAME}_whole_{str(dtype)[6:]}"))
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


ONES = torch.ones(3)  # kept alive: a block has only its address


def as_block(kernels, student, **options):
    arguments = {
        "rows": len(student), "columns": student.shape[1], "leading": student.stride(0), "diagonal": 0,
        "student": student.data_ptr(), "scalars": ONES.data_ptr(), **options,
    }  # fmt: skip
    return kernels.Block(**arguments)


def padded(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """[rows, columns] random numbers, NaN behind each row."""
    full = torch.full((rows, -(-columns // 4) * 4), torch.nan)
    full[:, :columns] = 5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return full[:, :columns]


# 17,000 rows are more tiles than programs, so that each program walks all three tiles of columns; -7 and 295: only some
# rows have their pair in the block
@pytest.mark.parametrize(("rows", "columns", "diagonal"), [(17_000, 301, -7), (37, 301, 295), (3, 5, 9), (40, 1, 0)])
def test_a_rectangle_of_own_rows_and_all_columns(kernels, rows, columns, diagonal):
    student, teacher = padded(rows, columns), padded(rows, columns, seed=1)
    scalars = torch.tensor([0.5, 2.0, 0.25])
    block = as_block(kernels, student, diagonal=diagonal, teacher=teacher.data_ptr(), scalars=scalars.data_ptr())
    row_sums, column_sums = torch.full((5, rows), torch.nan), torch.full((5, columns + 3), torch.nan)
    diagonals = torch.full((2, rows), torch.nan)
    workspace = torch.full((kernels.forward_workspace(block) + 1,), torch.nan)
    kernels.forward(
        block, row_sums=row_sums.data_ptr(), row_stride=rows, row_fresh=True,
        column_sums=column_sums.data_ptr(), column_stride=columns + 3, column_fresh=True,
        diagonal=diagonals[0].data_ptr(), teacher_diagonal=diagonals[1].data_ptr(),
        workspace=workspace.data_ptr(), workspace_size=len(workspace) - 1, stream=0,
    )  # fmt: skip
    assert workspace[-1].isnan() and column_sums[:, columns:].isnan().all()
    s, t = 0.5 * student.double(), 2.0 * teacher.double()
    paired = torch.arange(rows)[:, None] + diagonal == torch.arange(columns)
    for found, of in zip(diagonals, (s, t), strict=True):
        expected = of.masked_fill(~paired, 0).sum(1).float()
        torch.testing.assert_close(found[paired.any(1)], expected[paired.any(1)])
        assert found[~paired.any(1)].isnan().all()
    for dim, sums in ((1, row_sums), (0, column_sums[:, :columns])):
        some = (~paired).any(dim)  # something off the diagonal
        sums = sums.double()[:, some]
        for maximum, total, of in ((sums[0], sums[1], s), (sums[2], sums[3], t)):
            expected = of.masked_fill(paired, -torch.inf).logsumexp(dim)[some]
            torch.testing.assert_close(maximum * 0.6931471805599453 + total.log(), expected, rtol=1e-5, atol=1e-5)
        weights = t.masked_fill(paired, -torch.inf).softmax(dim).nan_to_num()
        expected = (weights * (t - s - 0.25)).sum(dim)[some]
        torch.testing.assert_close(sums[4] / sums[3] * 0.6931471805599453, expected, rtol=1e-4, atol=1e-4)


def test_what_would_read_or_write_astray_is_refused(kernels):
    student = padded(8, 8)
    block = as_block(kernels, student)
    for options, message in (
        ({"rows": 0}, "at least 1"),
        ({"scalars": 0}, "address of the student's products or of the scalars"),
        ({"teacher": student.data_ptr() + 4}, "multiple of 16 bytes"),
        ({"leading": 7}, "leading must be a multiple of 4"),
        ({"columns": 9}, "leading must be a multiple of 4"),
        ({"rows": 2**61}, "overflows 64 bits"),
        ({"row_groups": student.data_ptr()}, "come together"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.forward_workspace(as_block(kernels, student, **options))
    memory = torch.zeros(4096)
    good = {
        "row_sums": memory.data_ptr(), "row_stride": 8, "row_fresh": True, "column_sums": memory.data_ptr(),
        "column_stride": 8, "column_fresh": True, "diagonal": memory.data_ptr(), "workspace": memory.data_ptr(),
        "workspace_size": 4096, "stream": 0,
    }  # fmt: skip
    for options, message in (
        ({"workspace_size": kernels.forward_workspace(block) - 1}, "workspace is too small"),
        ({"row_sums": 0}, "address of the sums"),
        ({"column_stride": 7}, "planes of the sums overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.forward(block, **{**good, **options})
    good = {
        "row_terms": memory.data_ptr(), "row_stride": 8, "column_terms": memory.data_ptr(), "column_stride": 8,
        "diagonal": memory.data_ptr(), "gradient": memory.data_ptr(), "gradient_leading": 8,
        "format": kernels.Format.bfloat16, "stream": 0,
    }  # fmt: skip
    for options, message in (
        ({"gradient_leading": 6}, "rows of the gradient"),
        ({"gradient": memory.data_ptr() + 2}, "rows of the gradient"),
        ({"row_terms": 0}, "address of the terms"),
        ({"row_stride": 7}, "planes of the terms overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.backward(block, **{**good, **options})


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
    kernels.backward(
        as_block(kernels, student, diagonal=n), row_terms=row_terms.data_ptr(), row_stride=1,
        column_terms=column_terms.data_ptr(), column_stride=n, diagonal=diagonal.data_ptr(),
        gradient=gradient.data_ptr(), gradient_leading=n, format=getattr(kernels.Format, str(dtype)[6:]), stream=0,
    )  # fmt: skip
    assert torch.equal(gradient[0], values.to(dtype))


@pytest.mark.parametrize("n", [1, 100, 4096, 8191, 1 << 20, 1 << 31])
@pytest.mark.parametrize("budget", [1 << 20, 128 << 20, 12_000 << 20])
@pytest.mark.parametrize("strip_rows", [0, 1, 1000])
def test_blocks_fit_their_memory_whatever_the_number_of_pairs(n, budget, strip_rows):
    rows, columns = block_shape(n, n, 10, budget, strip_rows)
    assert rows % 64 == 0 and columns % 128 == 0
    assert rows <= n + 63 and columns <= n + 127
    assert rows * columns * 10 <= budget or rows == 64 or (strip_rows and columns == 128)
    if not strip_rows and rows < n:  # no less than half of it is used
        assert rows * columns * 10 > budget / 2 or budget == 1 << 20


def test_a_million_pairs_fit_one_gpu(kernels):
    # bf16 features [2^20, 768], student and teacher: 139 GiB hold them, their gradients and all that a sweep works with
    n, width, budget = 1 << 20, 768, 128 << 20
    features, gradients = 4 * n * width * 2, 2 * n * width * 2
    rows, columns = block_shape(n, n, 2 * 4, budget)
    block = kernels.Block(rows=rows, columns=columns, leading=columns, diagonal=0, student=16, teacher=16, scalars=16)
    workspace = 4 * kernels.forward_workspace(block)
    assert workspace < budget / 8
    forward = budget + workspace + 4 * n * (2 * 5 + 2)
    rows, columns = block_shape(n, n, 2 * 4 + 2, budget)
    state, terms = 4 * n * 8, 4 * n * (2 * 4 * 2 + 4)
    backward = budget + state + terms + 4 * n * width + 2 * n * width + 2 * 4 * rows * width
    assert features + gradients + max(forward, backward) < 16 << 30


def test_float64_and_other_devices_are_refused_in_words(kernels):
    batch = random_batch(4)
    with pytest.raises(InputError, match=r"'native' does not take torch\.float64 on a GPU; use backend='torch'"):
        as_sweep(CudaEngine(kernels, f"{NAME}_refusing"))(*batch.arguments())
    problem = Problem(*batch.to(torch.float32).arguments())
    with pytest.raises(InputError, match="do not take features on cpu; move them to a GPU"):
        CudaEngine().check(problem)
