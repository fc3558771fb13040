"""The CUDA kernels of the backend "native", run on the CPU by an emulation of CUDA, against float64.

The kernels' tiles are 32 x 128 forward and 64 x 128 backward; blocks of 64 x 128, so 130 pairs are three by two.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated_cases import STUDENT, batch
from calibrated_checks import *  # noqa: F403
from calibrated_checks import CalibratedSubject, let_the_public_loss_use
from emulated_cuda import build
from kernel_checks import *  # noqa: F403
from kernel_checks import Subject, check, some_groups
from native_buffers import CANARY, FAULTS, UNREADABLE, as_buffers, forged, written
from sweep_cases import outcome, random_batch
from torch_defaults import DEFAULTS, assert_independent

from cliperase_fast.ops import streaming
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.blocks import block_shape
from cliperase_fast.ops.calibrated import Edit, Pull
from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.native import cuda
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.native.extension import as_buffer
from cliperase_fast.ops.spec import GradientTerms, Need, SimilarityInputs, Softmax

NAME = "native_cuda_emulated"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(scope="module")
def sweep(kernels):
    return as_sweep(CudaKernels(kernels, NAME, block_columns=128))


@pytest.fixture
def subject(sweep):
    return Subject(sweep, NAME, CudaKernels, row_unit=8)


@pytest.fixture(scope="module")
def calibrated_loss_of_kernels(kernels):
    return as_calibrated(CudaKernels(kernels, f"{NAME}_calibrated", block_columns=128)).loss


@pytest.fixture
def calibrated(calibrated_loss_of_kernels, monkeypatch):
    """Blocks of 64 x 128: the retain rows are two blocks, of which the first is kept."""
    monkeypatch.setattr(cuda, "strip_bytes", lambda: 64 * 128 * 8)
    let_the_public_loss_use(monkeypatch, "native", calibrated_loss_of_kernels)
    return CalibratedSubject("native", CudaKernels, pairs=150, cached_rows=64, budget=8 * 160 * 64)


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


def test_the_order_of_threads_does_not_matter_to_the_calibrated_loss(kernels, calibrated):
    b = batch(calibrated.pairs, 24, 24, torch.bfloat16)
    plain = calibrated.step(b)
    kernels.reverse_threads(True)
    try:
        reversed_ = calibrated.step(b)
    finally:
        kernels.reverse_threads(False)
    assert all(torch.equal(plain[name], reversed_[name]) for name in plain)


def double(tensors):
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors)


# the columns of one process meet the rows of another, or hold the rows' pairs from `pair_offset` on
@pytest.mark.parametrize(("n", "m", "pair_offset"), [(70, 150, 40), (130, 33, 33), (1, 1, 0)])
@pytest.mark.parametrize("form", ["edited", "groups", "neither"])
def test_a_rectangle_of_the_calibrated_loss(kernels, form, n, m, pair_offset):
    random = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=random) - 0.5

    ids = torch.arange(m) % 4, torch.arange(n) % 5
    features = uniform(n, 16), uniform(m, 16), torch.tensor(3.0), uniform(n, 8), uniform(m, 8), torch.tensor(-2.0)
    options = {"group_ids": ids[1], "column_group_ids": ids[0]} if form == "groups" else {"want_retention": False}
    edit = Edit(ids[1], ids[0], uniform(n), uniform(m)) if form == "edited" else None
    softmaxes = [Softmax((uniform(n), uniform(n)), (uniform(m), uniform(m))) for _ in range(3)]
    diagonal = uniform(n) if pair_offset < m else torch.zeros(n)
    masked = softmaxes[2] if form == "groups" else None
    terms = GradientTerms(softmaxes[0], masked, softmaxes[1], diagonal, torch.tensor(50.0))
    pull, empty = Pull(torch.tensor(2.0), torch.tensor(-3.0)), torch.empty(0, dtype=torch.uint8)

    inputs = SimilarityInputs(*features, pair_offset=pair_offset, strip_rows=64, **options)
    ours = CudaKernels(kernels, block_columns=128)
    stats, sums = ours.calibrated_forward(inputs, edit, empty)
    found = ours.calibrated_backward(inputs, edit, terms, pull, empty, Need())

    exact = SimilarityInputs(*double(features), pair_offset=pair_offset, **options)
    edit = None if edit is None else Edit(*double(edit))
    exact_stats, exact_sums = streaming.kernels.calibrated_forward(exact, edit, empty)
    terms = GradientTerms(
        *(softmax and Softmax(double(softmax.rows), double(softmax.columns)) for softmax in terms[:3]),
        diagonal.double(),
    )
    torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-5, atol=1e-6)
    for one, other in ((stats.rows, exact_stats.rows), (stats.columns, exact_stats.columns)):
        if n > 1:  # else nothing is off the diagonal
            torch.testing.assert_close(logs(one), logs(other), rtol=1e-5, atol=1e-5)
            gaps = (
                (of[-1] / of[-2]).double() + shift for of, shift in ((one, stats.shift), (other, exact_stats.shift))
            )
            torch.testing.assert_close(*gaps, rtol=1e-5, atol=1e-5)
    if pair_offset < m:
        torch.testing.assert_close(stats.diagonal.double(), exact_stats.diagonal, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.teacher_diagonal.double(), exact_stats.teacher_diagonal, rtol=1e-5, atol=1e-6)
    expected = streaming.kernels.calibrated_backward(exact, edit, terms, Pull(*double(pull)), empty, Need())
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= 1e-5 * (1 + other.abs().max())


def logs(stats):
    """The logarithms of the totals of rows or columns, whatever the maxima that they are relative to."""
    return torch.stack([stats[at].double() + stats[at + 1].double().log() for at in range(0, len(stats) - 1, 2)])


def gaps(stats, shift):
    return stats[-1].double() / stats[-2].double() + shift


def test_the_operators_of_the_calibrated_loss_keep_the_rules_of_torch_library(calibrated):
    b = batch(5, 4, 3, dtype=torch.float32)
    leaves = [b[name].requires_grad_() for name in STUDENT]
    flat = (
        *leaves, b["teacher_image"], b["teacher_text"], b["teacher_logit_scale"], b["forget_mask"],
        b["background_image"], b["background_text"], b["group_ids"], 2,
    )  # fmt: skip
    forward = getattr(torch.ops.cliperase_fast, f"{NAME}_calibrated_calibrated").default
    backward = getattr(torch.ops.cliperase_fast, f"{NAME}_calibrated_calibrated_backward").default
    torch.library.opcheck(forward, (*flat, 0))
    _, *saved = (output.detach() for output in forward(*flat, 0))
    frozen = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in flat]
    torch.library.opcheck(backward, (torch.ones(4), *saved, *frozen, True, False, True))


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


ROWS, COLUMNS, PADDED = 8, 134, 136  # two blocks of threads


def of_block():
    return {
        "student": padded(ROWS, COLUMNS), "teacher": padded(ROWS, COLUMNS, seed=1), "scalars": torch.ones(3),
        "row_groups": torch.arange(ROWS) // 2, "column_groups": torch.arange(COLUMNS) // 2,
    }  # fmt: skip


def of_edit():
    return {
        "row_ids": torch.zeros(ROWS, dtype=torch.int64), "column_ids": torch.zeros(COLUMNS, dtype=torch.int64),
        "row_levels": torch.zeros(ROWS), "column_levels": torch.zeros(COLUMNS),
    }  # fmt: skip


def of_edited_block():
    return {**{name: tensor for name, tensor in of_block().items() if "groups" not in name}, **of_edit()}


def as_whole_block(kernels, compares=False, tensors=None):
    tensors = of_block() if tensors is None else tensors
    return kernels.Block(columns=COLUMNS, pair_offset=0, compares=compares, **as_buffers(kernels, tensors))


def of_forward(kernels):
    workspace = kernels.forward_workspace(as_whole_block(kernels))
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


def of_compared_forward(kernels):
    programs = kernels.forward_programs(as_whole_block(kernels))
    return {**of_forward(kernels), "squares": torch.full((2, programs), CANARY)}


def of_compared_backward(kernels):
    programs = kernels.backward_programs(as_whole_block(kernels))
    return {**of_backward(kernels), "pull": torch.ones(2), "dots": torch.full((programs,), CANARY)}


@pytest.mark.parametrize(
    ("tensors", "name"), [(of_block(), name) for name in of_block()] + [(of_edited_block(), name) for name in of_edit()]
)
def test_a_block_of_what_cannot_be_read_as_such_is_refused(kernels, tensors, name):
    compares = "row_ids" in tensors
    for change in FAULTS.values():
        changed = {**as_buffers(kernels, tensors), name: as_buffer(kernels, change(tensors[name]))}
        with pytest.raises(ValueError, match=r"^\w+ must be"):
            kernels.Block(columns=COLUMNS, pair_offset=0, compares=compares, **changed)
    for address in (*UNREADABLE.values(), lambda address: address + 4):
        if name in ("scalars", "row_levels", "column_levels") and address(0) == 4:
            continue  # is aligned
        changed = {**as_buffers(kernels, tensors), name: forged(kernels, tensors[name], address)}
        with pytest.raises(ValueError, match=f"^{name} (must begin|is a null pointer|reaches beyond)"):
            kernels.Block(columns=COLUMNS, pair_offset=0, compares=compares, **changed)


@pytest.mark.parametrize(
    ("call", "buffers"),
    [
        ("forward", of_forward), ("backward", of_backward),
        ("forward", of_compared_forward), ("backward", of_compared_backward),
    ],
)  # fmt: skip
def test_a_buffer_that_is_not_what_the_kernels_need_is_refused_and_nothing_is_written(kernels, call, buffers):
    tensors = buffers(kernels)
    block = as_whole_block(kernels, compares="squares" in tensors or "dots" in tensors)
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
    for columns, message in ((0, "columns = 0"), (137, "student must be"), (2**60, "columns = 1152921504606846976")):
        with pytest.raises(ValueError, match=message):
            kernels.Block(columns=columns, pair_offset=0, **as_buffers(kernels, tensors))
    for missing in ("row_groups", "column_groups"):
        some = {name: tensor for name, tensor in tensors.items() if name != missing}
        with pytest.raises(ValueError, match="must be given together"):
            kernels.Block(columns=COLUMNS, pair_offset=0, **as_buffers(kernels, some))
    far = {**tensors, "teacher": padded(ROWS, 140)[:, :PADDED]}
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


def test_a_comparison_that_lacks_what_it_needs_is_refused(kernels):
    edited = of_edited_block()
    for missing in of_edit():
        some = {name: tensor for name, tensor in edited.items() if name != missing}
        with pytest.raises(ValueError, match="levels of rows and columns must be given together"):
            as_whole_block(kernels, True, some)
    with pytest.raises(ValueError, match="ids and levels need a comparison"):
        as_whole_block(kernels, False, edited)
    with pytest.raises(ValueError, match="a comparison needs a teacher"):
        as_whole_block(kernels, True, {name: edited[name] for name in ("student", "scalars")})
    with pytest.raises(ValueError, match="a block with groups cannot be edited"):
        as_whole_block(kernels, True, {**of_block(), **of_edit()})
    block, outputs = as_whole_block(kernels, True), as_buffers(kernels, of_forward(kernels))
    with pytest.raises(ValueError, match="squares is needed with a comparison"):
        kernels.forward(block, row_fresh=True, column_fresh=True, stream=0, **outputs)
    with pytest.raises(ValueError, match="pull and dots are needed with a comparison"):
        kernels.backward(block, stream=0, **as_buffers(kernels, of_backward(kernels)))


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


@pytest.mark.parametrize("calibrated_loss", [False, True], ids=["sweep", "calibrated"])
def test_a_million_pairs_fit_one_gpu(kernels, calibrated_loss):
    # bf16 features [2^20, 768], student and teacher: 139 GiB hold them, their gradients and all that a sweep works with
    n, width, budget = 1 << 20, 768, 128 << 20
    features, gradients = 4 * n * width * 2, 2 * n * width * 2
    rows, columns = block_shape(n, n, 2 * 4, budget)
    products = kernels.Buffer(16, "float32", (rows, columns), (columns, 1), "cpu")
    scalars = kernels.Buffer(16, "float32", (3,), (1,), "cpu")
    block = kernels.Block(
        columns=columns, pair_offset=0, student=products, teacher=products, scalars=scalars, compares=calibrated_loss
    )
    workspace = 4 * kernels.forward_workspace(block) + calibrated_loss * 8 * kernels.forward_programs(block)
    assert workspace < budget / 8
    forward = budget + workspace + 4 * n * (2 * 5 + 2)
    rows, columns = block_shape(n, n, 2 * 4 + 2, budget)
    state, terms = 4 * n * 8, 4 * n * (2 * 4 * 2 + 4)
    backward = budget + state + terms + 4 * n * width + 2 * n * width + 2 * 4 * rows * width
    limit = 16 << 30
    if calibrated_loss:
        # statistics of the whole and of a block of one kind, merged from two; ids and levels
        forward += 4 * n * (2 * (5 + 2) + 2 + 3 * 5) + 24 * n
        # gradients in float32, of the whole and of a block
        backward += 4 * kernels.backward_programs(block) + 24 * n + 3 * 4 * n * width
        limit = 26 << 30
    assert features + gradients + max(forward, backward) < limit
