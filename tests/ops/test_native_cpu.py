"""The C++ sweep on the CPU against float64: more than one tile (256 x 128), strip (1024 rows) and instruction set.

The accuracy of one tile, over scales and kinds of data, is in `test_sweep_accuracy.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from accuracy_cases import INSTRUCTION_SETS, REGIMES, errors, native_errors, regime, runs_here
from rectangles import in_pieces
from sweep_cases import Batch, Outcome, outcome, random_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cliperase_fast import functional
from cliperase_fast.errors import InputError
from cliperase_fast.functional import clip_loss
from cliperase_fast.ops import backends, eager
from cliperase_fast.ops.autograd import flatten
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.cpu import kernels, release_memory, sweep
from cliperase_fast.ops.spec import SimilarityInputs
from cliperase_fast.validation import choose

FORMS = {"both": (True, True), "rm": (True, False), "kl": (False, True)}


def formed(batch: Batch, form: str) -> Batch:
    batch = replace(batch, want_retention=FORMS[form][0])
    return batch if FORMS[form][1] else batch.without_teacher()


def check(batch: Batch, dtype: torch.dtype = torch.float32, **options: int | str) -> Outcome:
    """`batch` in `dtype` against float64; returns what the sweep gave."""
    batch = batch.to(dtype).to(torch.float64)
    truth = outcome(eager.sweep, batch)
    result = outcome(sweep, batch.to(dtype), **options)
    assert result.image.dtype == result.text.dtype == dtype
    allowed = native_errors(batch, truth, dtype)
    for key, error in errors(result, truth).items():
        assert error <= allowed[key], (key, error, allowed[key])
    return result


def same_bits(one: Outcome, other: Outcome) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def some_groups(n: int) -> Tensor:
    ids = torch.randint(-3, max(1, n // 3), (n,), generator=torch.Generator().manual_seed(1))
    return ids * 2**40  # beyond 32 bits


# 1 and 2: nothing or one thing off the diagonal; 129: a block of one column; 257: a tile of one row; 700: three tiles
@pytest.mark.parametrize("n", [1, 2, 129, 257, 700])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_every_form_and_size(form, groups, n, keep):
    # widths: 40 and 24 are not multiples of a register tile's
    batch = random_batch(n, width=40, teacher_width=24)
    check(formed(replace(batch, group_ids=some_groups(n) if groups else None), form), keep=keep)


@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_several_strips(keep):
    n = 1100
    check(replace(random_batch(n, width=16, teacher_width=20), group_ids=some_groups(n)), keep=keep)


# 300 is more than one cache block of depth (256); 1 and 3 less than a vector
@pytest.mark.parametrize(("width", "teacher_width"), [(300, 17), (16, 300), (1, 3), (47, 49), (96, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_width_and_dtype(width, teacher_width, dtype):
    check(random_batch(140, width=width, teacher_width=teacher_width), dtype)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_each_instruction_set_that_runs_here(monkeypatch, name, keep):
    monkeypatch.setenv("CLIPERASE_CPU", name)
    missing = extension.why_missing()
    if not runs_here(name):
        assert missing is not None and f"CLIPERASE_CPU={name}" in missing
        return
    assert missing is None
    for wanted in FORMS:
        check(formed(replace(random_batch(300), group_ids=some_groups(300)), wanted), keep=keep)
    check(random_batch(200, width=70), torch.bfloat16, keep=keep)


@pytest.mark.parametrize(
    ("name", "for_others"), [("avx512_bf16", "avx512"), ("amx", "avx512"), ("amx_emulated", "portable")]
)
def test_products_of_bfloat16_are_chosen_where_all_features_are_bfloat16(monkeypatch, name, for_others):
    def with_instructions(chosen: str, batch: Batch) -> Outcome:
        monkeypatch.setenv("CLIPERASE_CPU", chosen)
        return outcome(sweep, batch)

    batch = random_batch(300).to(torch.bfloat16)
    one_is_float32 = [replace(batch, **{name: getattr(batch, name).float()}) for name in ("text", "teacher_image")]
    if not runs_here(name):
        with pytest.raises(ValueError, match=f"{name} is not available"):
            extension.load().cpu.instruction_set(name)
        return
    assert not same_bits(with_instructions(name, batch), with_instructions(for_others, batch))
    for other in (batch.to(torch.float32), batch.to(torch.float16), *one_is_float32):
        assert same_bits(with_instructions(name, other), with_instructions(for_others, other))


@pytest.fixture
def flushed():
    """Numbers below the smallest normal one are 0 in this thread."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flushing_of_small_numbers_is_that_of_the_caller_in_every_thread(flushed, dtype):
    batch = random_batch(600, width=70).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(sweep, batch))
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def test_small_float16_numbers_count_where_small_numbers_are_flushed(flushed):
    small = (torch.randn(8, 4) * 1e-5).half()
    assert small.abs().max() < torch.finfo(torch.float16).tiny
    found = clip_loss(small, small, 1e8, backend="native")
    torch.set_flush_denormal(False)
    assert found.item() == pytest.approx(clip_loss(small, small, 1e8, backend="eager").item(), rel=1e-5)


def test_an_instruction_set_that_is_not_there_is_an_error_whichever_backend_is_asked_for(monkeypatch):
    monkeypatch.setenv("CLIPERASE_CPU", "avx51")  # after the first loss
    with pytest.raises(InputError, match="CLIPERASE_CPU=avx51: instruction set avx51 is not available"):
        clip_loss(torch.ones(3, 2), torch.ones(3, 2), 1.0)
    monkeypatch.setattr("cliperase_fast.validation.WRONG_INSTRUCTIONS", extension.wrong_instruction_set())
    monkeypatch.setattr("cliperase_fast.validation._serves", lambda *given: False)  # as before the first loss
    with pytest.raises(InputError, match="CLIPERASE_CPU=avx51"):
        clip_loss(torch.ones(3, 2), torch.ones(3, 2), 1.0)


def test_the_emulated_instructions_are_never_chosen_by_themselves(monkeypatch):
    monkeypatch.delenv("CLIPERASE_CPU", raising=False)
    assert extension.load().cpu.instruction_set() != "amx_emulated"


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
def test_kept_similarities_are_as_good(name, scale):
    # at scale 1000 no reference serves a whole tile, and the entries themselves are kept
    check(regime(name, scale, 150), keep="similarities")


@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_groups_that_take_every_rows_only_near_match(keep):
    # Pairs 2 k and 2 k + 1 have each other's text: what groups leave of a row lies far below the tile's largest entry,
    # out of the reach of the reference that serves everything else. One tile, else some rows have no near match in it.
    batch = regime("random", 200.0, 120)
    swapped = batch.image.view(60, 2, -1).flip(1).reshape(120, -1)
    batch = replace(batch, text=swapped, group_ids=torch.arange(120) // 2)
    check(batch, keep=keep)
    check(batch.without_teacher(), keep=keep)


def test_rows_and_columns_that_differ_by_orders_of_magnitude():
    # features are not normalised here: references grow from tile to tile
    batch = random_batch(300, scale=300.0, teacher_scale=500.0)
    growing = torch.linspace(0.01, 1.0, 300, dtype=torch.float64)[:, None]
    check(replace(batch, image=batch.image * growing, teacher_text=batch.teacher_text * growing.flip(0)))


@pytest.mark.parametrize("kept_tiles", [1, 2])
def test_part_of_the_similarities_is_kept(monkeypatch, kept_tiles):
    batch = replace(random_batch(700), group_ids=some_groups(700))
    tile_rows = 4 * 6 * (16 + 2 * 256 * 128)  # six blocks of columns
    monkeypatch.setattr("cliperase_fast.ops.native.cpu.cache_budget", lambda device: kept_tiles * tile_rows + 100)
    sizes = watch_workspaces(monkeypatch)
    check(batch, keep="similarities")
    assert sizes == [kept_tiles * tile_rows]


def watch_workspaces(monkeypatch) -> list[int]:
    from cliperase_fast.ops.native.cpu import CpuKernels

    sizes = []
    original = CpuKernels._workspace

    def watched(self, size):
        sizes.append(size)
        return original(self, size)

    monkeypatch.setattr(CpuKernels, "_workspace", watched)
    return sizes


def test_nothing_is_kept_without_a_backward_pass(monkeypatch):
    sizes = watch_workspaces(monkeypatch)
    batch = random_batch(17).to(torch.float32)
    sweep(batch.inputs(keep="similarities"))
    with torch.no_grad():
        sweep(batch.inputs(batch.image.requires_grad_(), keep="similarities"))
    assert sizes == [0, 0]


# 300 rows are two tiles, 300 columns three blocks; the offsets are not multiples of either
@pytest.mark.parametrize("cuts", [([0, 20, 300], [0, 300]), ([0, 131, 300], [0, 131, 300])])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_rectangles_add_up_to_the_whole(keep, groups, cuts):
    batch = replace(random_batch(300), group_ids=some_groups(300) if groups else None)
    exact = outcome(eager.sweep, batch, (0.7, 1.3))
    found = in_pieces(kernels, batch.to(torch.float32), *cuts, keep=keep)
    for ours, theirs in zip(found, exact.tensors(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_the_same_bits_in_every_run_and_for_any_number_of_threads(keep):
    batch = replace(random_batch(1300, width=150), group_ids=some_groups(1300)).to(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7, 2):
            torch.set_num_threads(threads)
            results.append(outcome(sweep, batch, keep=keep))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(results[0], result) for result in results[1:])


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest_even_in_every_range(instructions, dtype):
    if not runs_here(instructions):
        pytest.skip(f"{instructions} does not run here")
    # With one pair, image features of 0 and scale 2, the gradient of the image is the text features, negated.
    bits = torch.randint(-(2**31), 2**31, (1, 1 << 17), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(0, 1 << 31, 1 << 12)[None]  # halfway between numbers of either dtype, among others
    text = torch.cat((bits, ties), 1).to(torch.int32).view(torch.float32).nan_to_num(0, 1, 1)
    cpu, image, found = extension.load().cpu, torch.zeros_like(text), {}
    problem = cpu.SimilarityInputs(
        image=extension.as_buffer(cpu, image), text=extension.as_buffer(cpu, text), pair_offset=0, scale=2.0
    )
    for of in (torch.float32, dtype):
        found[of] = torch.empty(text.shape, dtype=of)
        cpu.sigmoid(problem, bias=0.0, grad_image=extension.as_buffer(cpu, found[of]), instruction_set=instructions)
    exact = found[torch.float32]
    assert torch.equal(exact[text.abs() > 1e-37], -text[text.abs() > 1e-37])
    assert torch.equal(found[dtype].view(torch.int16), exact.to(dtype).view(torch.int16))


def test_uninitialised_memory_is_never_read():
    batch = replace(random_batch(300), group_ids=some_groups(300)).to(torch.float32)
    first = outcome(sweep, batch, keep="similarities")
    cpu = extension.load().cpu
    for size in (1 << 20, 1 << 22, 1 << 23, 1 << 24):  # whatever the pool hands out next is full of NaN
        block = torch.frombuffer(cpu.Workspace(size), dtype=torch.float32)
        block.fill_(torch.nan)
        del block
    assert cpu.pooled_bytes() > 0
    assert same_bits(first, outcome(sweep, batch, keep="similarities"))
    assert same_bits(first, outcome(sweep, batch, keep="similarities"))


def strided(tensor: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return tensor.T.contiguous().T
    if kind == "every other column":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 2).flatten(1)[:, ::2]
    return tensor[:1].expand_as(tensor)  # all rows are one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["transposed", "every other column", "expanded"])
def test_strides_do_not_matter(kind, dtype):
    batch = random_batch(140).to(dtype)
    names = ("image", "text", "teacher_image", "teacher_text")
    odd = replace(batch, **{name: strided(getattr(batch, name), kind) for name in names})
    plain = replace(batch, **{name: getattr(odd, name).contiguous() for name in names})
    leaves = [odd.image.requires_grad_(), odd.text.requires_grad_()]
    losses = sweep(odd.inputs(*leaves))
    gradients = torch.autograd.grad(sum(losses), leaves)
    expected = outcome(sweep, plain)
    for ours, theirs in zip((*losses, *gradients), expected.tensors()[:4], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needed", ["image", "text", "scale"])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_a_single_input_may_need_the_gradient(needed, keep):
    batch = random_batch(140).to(torch.float32)
    expected = outcome(sweep, batch, keep=keep)
    inputs = {name: getattr(batch, name).clone() for name in ("image", "text", "scale")}
    inputs[needed].requires_grad_()
    sum(sweep(batch.inputs(*inputs.values(), keep=keep))).backward()
    assert torch.equal(inputs[needed].grad, getattr(expected, needed))
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [needed]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (-2.5, 1e4), (1e-20, 1e-20)])
def test_incoming_gradients_other_than_one(weights):
    batch = random_batch(140)
    truth, result = outcome(eager.sweep, batch, weights), outcome(sweep, batch.to(torch.float32), weights)
    for ours, theirs in zip(result.tensors()[2:], truth.tensors()[2:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_backward_twice_over_a_retained_graph_doubles_the_gradient():
    batch = random_batch(140).to(torch.float32)
    image = batch.image.clone().requires_grad_()
    total = sum(sweep(batch.inputs(image, keep="similarities")))
    total.backward(retain_graph=True)
    once = image.grad.clone()
    total.backward()
    assert torch.equal(image.grad, 2 * once)


def test_two_graphs_at_once_keep_their_own_similarities():
    batches = [random_batch(300, seed=seed).to(torch.float32) for seed in (1, 2)]
    expected = [outcome(sweep, batch, keep="nothing").image for batch in batches]
    images = [batch.image.clone().requires_grad_() for batch in batches]
    totals = [
        sum(sweep(batch.inputs(image, keep="similarities"))) for image, batch in zip(images, batches, strict=True)
    ]
    for total, image, gradient in zip(totals, images, expected, strict=True):
        total.backward()
        torch.testing.assert_close(image.grad, gradient, rtol=1e-4, atol=1e-7)


def test_scale_zero_has_the_gradient_of_the_scale():
    batch = replace(random_batch(140), scale=torch.zeros((), dtype=torch.float64))
    assert check(batch).scale.abs() > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_features_yield_nan(value):
    batch = random_batch(300).to(torch.float32)
    batch.image[270, 3] = value
    for keep in ("nothing", "similarities"):
        result = outcome(sweep, batch, keep=keep)
        assert result.retention.isnan() and result.image.isnan().any()


def test_no_memory_for_the_similarities_is_one_warning_and_the_same_gradients(monkeypatch):
    from cliperase_fast.ops.native import cpu

    half = cpu.CpuKernels()

    class NoMemory:
        def __getattr__(self, name):
            return getattr(extension.load().cpu, name)

        def Workspace(self, size):
            raise MemoryError

    half._cpu = NoMemory()
    inputs = random_batch(140).to(torch.float32).inputs(keep="similarities")
    with pytest.warns(UserWarning, match="no memory to keep the similarities, .* MiB.*CLIPERASE_KEEP_MIB"):
        _, cache = half.forward(inputs, half.cache_size(inputs))
    assert cache.numel() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half.forward(inputs, half.cache_size(inputs))


def test_opcheck_and_a_full_graph():
    batch = random_batch(33).to(torch.float32)
    leaves = [batch.image.requires_grad_(), batch.text.requires_grad_(), batch.scale.requires_grad_()]
    op = torch.ops.cliperase_fast.native_sweep.default
    torch.library.opcheck(op, (*flatten(batch.inputs(*leaves)), 0))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(image, text, scale):
        losses = sweep(batch.inputs(image, text, scale, keep="similarities"))
        return losses[0] + 2 * losses[1]

    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    plain = sweep(batch.inputs(*leaves, keep="similarities"))
    expected = torch.autograd.grad(plain[0] + 2 * plain[1], leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_called_directly_or_as_an_op_where_operations_are_watched_it_gives_the_same_bits():
    batch = random_batch(140).to(torch.float32)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            seen.append(str(operation))
            return operation(*arguments, **(options or {}))

    direct = outcome(sweep, batch, keep="similarities")
    with Watching():
        watched = outcome(sweep, batch, keep="similarities")
    assert same_bits(direct, watched)
    # One op each way: what they do inside is not seen.
    assert sum("native_sweep." in name for name in seen) == sum("native_sweep_backward." in name for name in seen) == 1


def test_autocast_does_not_reach_inside():
    batch = random_batch(140).to(torch.float32)
    arguments = batch.image, batch.text, 14.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = functional.clip_loss(*arguments, backend="native")
    assert torch.equal(inside, functional.clip_loss(*arguments, backend="native"))


def test_float64_is_refused():
    from cliperase_fast.errors import InputError

    features = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"'native' does not support torch\.float64"):
        choose("native", features, features)


def test_the_extension_is_built_wherever_there_is_a_compiler():
    assert backends()["native"].available, backends()["native"].reason


def kept_mib(keep: str, width: int, teacher_width: int = 0, n: int = 8192) -> float:
    image, teacher = torch.empty(n, width), torch.empty(n, teacher_width) if teacher_width else None
    scale = torch.ones(())
    inputs = SimilarityInputs(image, image, scale, teacher, teacher, scale, keep=keep)
    return kernels.cache_size(inputs) / 2**20


@pytest.mark.parametrize("teacher_width", [0, 16, 32])
def test_auto_keeps_no_matrix_of_narrow_features_which_are_cheap_to_form_again(teacher_width):
    assert kept_mib("similarities", 32, teacher_width) > 250
    assert kept_mib("auto", 32, teacher_width) <= 16
    assert kept_mib("auto", 32, teacher_width, n=512) == kept_mib("similarities", 32, teacher_width, n=512)


@pytest.mark.parametrize(("width", "teacher_width"), [(64, 0), (512, 512), (32, 512)])
def test_auto_keeps_what_fits_the_budget_of_wide_features(monkeypatch, width, teacher_width):
    assert kept_mib("auto", width, teacher_width) == kept_mib("similarities", width, teacher_width) > 250
    monkeypatch.setenv("CLIPERASE_KEEP_MIB", "8")
    assert kept_mib("auto", width, teacher_width) <= 8 and kept_mib("auto", 16) <= 8


def test_the_pool_holds_no_more_than_the_budget_allows_and_can_be_released(monkeypatch):
    cpu = extension.load().cpu
    release_memory()
    assert cpu.pooled_bytes() == 0
    for rows in (900, 1400, 2000):
        check(random_batch(rows), keep="similarities")
    assert cpu.pooled_bytes() > 16 << 20
    monkeypatch.setattr("cliperase_fast.ops.native.cpu._SCRATCH", 1 << 20)
    monkeypatch.setenv("CLIPERASE_KEEP_MIB", "1")
    check(random_batch(900), keep="similarities")
    assert cpu.pooled_bytes() <= 2 << 20
    release_memory()
    assert cpu.pooled_bytes() == 0
