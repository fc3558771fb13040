"""Every buffer that crosses into C++ is checked against what is read or written there: an exception, never a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native_buffers import CANARY, FAULTS, UNREADABLE, as_buffers, forged, written
from torch import Tensor

from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.extension import as_buffer
from cliperase_fast.ops.spec import NUM_SAVED

N, WIDTH, TEACHER_WIDTH = 300, 24, 17
STATS = 2 + 2 + 3  # of the student, masked, of the teacher
CACHE_SIZE = 2 * 4 * 3 * (16 + 2 * 256 * 128)  # two by three tiles of S and S°
FEATURES = ("image", "text", "teacher_image", "teacher_text")


@pytest.fixture(scope="module")
def cpu():
    return extension.load().cpu


def floats(*shape: int) -> Tensor:
    return torch.full(shape, CANARY, dtype=torch.float32)


def features(width: int, rows: int = N) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator("cpu").manual_seed(width), dtype=torch.float32)


def of_inputs() -> dict[str, Tensor]:
    ids = (torch.arange(N) // 2).to(torch.int32)
    return {
        "image": features(WIDTH), "text": features(WIDTH), "teacher_image": features(TEACHER_WIDTH),
        "teacher_text": features(TEACHER_WIDTH), "row_groups": ids, "column_groups": ids.clone(),
    }  # fmt: skip


def inputs(cpu, buffers, **changes):
    options = {"pair_offset": 0, "scale": 10.0, "teacher_scale": 8.0, **changes}
    return cpu.SimilarityInputs(**buffers, **options)


def of_comparison() -> dict[str, Tensor]:
    ids = (torch.arange(N) // 3).to(torch.int32)
    return {
        **of_inputs(), "row_ids": ids, "column_ids": ids.clone(), "row_levels": floats(N), "column_levels": floats(N),
    }  # fmt: skip


def cache() -> Tensor:
    return torch.zeros(CACHE_SIZE, dtype=torch.uint8)


def losses(cpu, of, buffers):
    cpu.losses(of, want_retention=True, **buffers)


def forward(cpu, of, buffers):
    cpu.forward(of, **buffers)


def backward(cpu, of, buffers):
    cpu.backward(of, want_retention=True, weight_retention=0.5, weight_consistency=0.5, need_scale=True, **buffers)


def sigmoid(cpu, of, buffers):
    plain = {name: as_buffer(cpu, tensor) for name, tensor in of_inputs().items() if name in FEATURES[:2]}
    cpu.sigmoid(inputs(cpu, plain), bias=0.0, need_scale=True, need_bias=True, **buffers)


def compared_backward(cpu, of, buffers):
    of = inputs(cpu, as_buffers(cpu, of_comparison()), compares=True)
    cpu.compared_backward(of, pull_forget=0.5, pull_anchor=0.5, **buffers)


def joint(cpu, **changes):
    return inputs(cpu, as_buffers(cpu, of_comparison()), **{"compares": True, "forget": (0, 256), **changes})


def calibrated(cpu, of, buffers):
    cpu.calibrated(joint(cpu), **buffers)


def calibrated_backward(cpu, of, buffers):
    cpu.calibrated_backward(joint(cpu), **buffers)


ENTRY_POINTS: dict[Callable, Callable[[], dict[str, Tensor]]] = {
    forward: lambda: {
        "diagonal": floats(N), "teacher_diagonal": floats(N), "row_stats": floats(STATS, N),
        "column_stats": floats(STATS, N), "cache": cache(),
    },
    losses: lambda: {
        "retention": floats(), "consistency": floats(), "saved_stats": floats(NUM_SAVED, 2 * N), "cache": cache(),
    },
    backward: lambda: {
        "saved_stats": floats(NUM_SAVED, 2 * N), "grad_image": floats(N, WIDTH),
        "grad_text": floats(N, WIDTH), "cache": cache(),
    },
    compared_backward: lambda: {
        "terms": floats(3, 4 * N), "diagonal": floats(N), "grad_image": floats(N, WIDTH), "grad_text": floats(N, WIDTH),
        "cache": cache(),
    },
    calibrated: lambda: {
        "terms": floats(4), "factors": floats(4), "saved": floats(NUM_SAVED + 1, 2 * N), "cache": cache(),
    },
    calibrated_backward: lambda: {
        "saved": floats(NUM_SAVED + 1, 2 * N), "weights": floats(4), "grad_image": floats(N, WIDTH),
        "grad_text": floats(N, WIDTH), "cache": cache(),
    },
    sigmoid: lambda: {"grad_image": floats(N, WIDTH), "grad_text": floats(N, WIDTH)},
}  # fmt: skip


@pytest.mark.parametrize("call", ENTRY_POINTS)
def test_a_buffer_that_is_not_what_the_call_needs_is_refused_and_nothing_is_written(cpu, call):
    tensors = ENTRY_POINTS[call]()
    of = inputs(cpu, as_buffers(cpu, of_inputs()))
    call(cpu, of, as_buffers(cpu, tensors))  # as it should be
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        bad = {fault: as_buffer(cpu, change(tensor)) for fault, change in FAULTS.items()}
        bad |= {fault: forged(cpu, tensor, address) for fault, address in UNREADABLE.items()}
        for fault, buffer in bad.items():
            if name == "cache" and fault == "too large":
                continue  # below: what is too large for the problem
            with pytest.raises(ValueError, match=f"^{name} (must|is a null|has|reaches)") as error:
                call(cpu, of, {**as_buffers(cpu, tensors), name: buffer})
            assert "\n" not in str(error.value), fault
        assert written(tensors, before) == []


@pytest.mark.parametrize("call", [backward, compared_backward, calibrated_backward, sigmoid])
def test_gradients_are_written_in_the_dtype_of_their_buffers(cpu, call):
    found = []
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        tensors = {
            name: torch.ones_like(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in ENTRY_POINTS[call]().items()
        }
        for name, dtype in zip(("grad_image", "grad_text"), dtypes, strict=True):
            tensors[name] = floats(N, WIDTH).to(dtype)
        call(cpu, inputs(cpu, as_buffers(cpu, of_inputs())), as_buffers(cpu, tensors))
        found.append((tensors["grad_image"], tensors["grad_text"]))
    for image, text in found[1:]:
        assert torch.equal(image, found[0][0].to(image.dtype)) and torch.equal(text, found[0][1].to(text.dtype))


@pytest.mark.parametrize("missing", ["diagonal", "teacher_diagonal"])
def test_a_diagonal_that_is_needed_is_not_left_out(cpu, missing):
    tensors = ENTRY_POINTS[forward]()
    del tensors[missing]
    with pytest.raises(ValueError, match=f"^{missing} is a null pointer"):
        forward(cpu, inputs(cpu, as_buffers(cpu, of_inputs())), as_buffers(cpu, tensors))


@pytest.mark.parametrize("name", of_inputs())
def test_features_and_groups_that_cannot_be_read_as_such_are_refused(cpu, name):
    tensors = of_inputs()
    for fault, change in FAULTS.items():
        changed = {**as_buffers(cpu, tensors), name: as_buffer(cpu, change(tensors[name]))}
        if name in FEATURES and fault in ("with gaps", "transposed", "all one element"):
            inputs(cpu, changed)  # features may have any strides
            continue
        # one that sets the size is taken at its word, and the other does not go with it
        with pytest.raises(
            ValueError, match=r"^(image|text|teacher_image|teacher_text|row_groups|column_groups) must be"
        ):
            inputs(cpu, changed)
    for address in UNREADABLE.values():
        with pytest.raises(ValueError, match=f"^{name} (must begin|is a null pointer|reaches beyond)"):
            inputs(cpu, {**as_buffers(cpu, tensors), name: forged(cpu, tensors[name], address)})


@pytest.mark.parametrize("fault", [1, 3 * 4, CACHE_SIZE // 2 + 4, 2 * CACHE_SIZE])
def test_memory_for_what_is_kept_has_whole_tiles_and_no_more_than_the_problem(cpu, fault):
    of = inputs(cpu, as_buffers(cpu, of_inputs()))
    tensors = {**ENTRY_POINTS[losses](), "cache": torch.zeros(fault, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"^cache (has|must be)"):
        losses(cpu, of, as_buffers(cpu, tensors))


def test_fewer_kept_tiles_than_rows_are_fine(cpu):
    of = inputs(cpu, as_buffers(cpu, of_inputs()))
    whole, half, none = (ENTRY_POINTS[losses]() for _ in range(3))
    half["cache"] = torch.zeros(CACHE_SIZE // 2, dtype=torch.uint8)
    del none["cache"]
    for tensors in (whole, half, none):
        losses(cpu, of, as_buffers(cpu, tensors))
    assert torch.equal(whole["saved_stats"], half["saved_stats"]) and torch.equal(
        whole["saved_stats"], none["saved_stats"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_offset": 1}, "pair_offset = 1 must lie between 0 and 0"),
        ({"pair_offset": -1}, "pair_offset = -1 must lie between 0 and 0"),
        ({"threads": 0}, "threads = 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(cpu, change, message):
    with pytest.raises(ValueError, match=message):
        inputs(cpu, as_buffers(cpu, of_inputs()), **change)


@pytest.mark.parametrize("missing", ["teacher_text", "column_groups", "row_groups"])
def test_what_comes_in_pairs_is_not_taken_alone(cpu, missing):
    tensors = of_inputs()
    del tensors[missing]
    with pytest.raises(ValueError, match="must be given together"):
        inputs(cpu, as_buffers(cpu, tensors))


@pytest.mark.parametrize(
    ("sizes", "strides", "message"),
    [
        ((N, WIDTH), (-3, 1), r"image must be .* with strides \[-3, 1\]"),
        ((N, WIDTH), (2**62, 1), "image reaches beyond 64 bits"),
        ((2**40, WIDTH), (WIDTH, 1), "rows = 1099511627776 must lie between 1 and"),
        ((0, WIDTH), (WIDTH, 1), r"image must be .*at least 1.*, not float32 \[0, 24\]"),
        ((N, 0), (1, 1), r"image must be .*at least 1.*, not float32 \[300, 0\]"),
        ((N, 2**21), (2**21, 1), "width = 2097152 must lie between"),
        ((N, -1), (1, 1), "a size of -1"),
        ((N,), (1, 1), "as many strides as sizes"),
        ((1,) * 5, (1,) * 5, "at most 4"),
    ],
)
def test_sizes_and_strides_that_cannot_be_addressed_are_refused(cpu, sizes, strides, message):
    image = features(WIDTH)
    text = as_buffer(cpu, image if sizes[-1] in (WIDTH, 0) else image[:1].expand(N, WIDTH))
    with pytest.raises(ValueError, match=message):
        buffer = cpu.Buffer(image.data_ptr(), "float32", sizes, strides, "cpu")
        if sizes[-1] == 2**21:
            text = cpu.Buffer(image.data_ptr(), "float32", sizes, strides, "cpu")
        cpu.SimilarityInputs(image=buffer, text=text, pair_offset=0, scale=1.0)


def test_a_problem_keeps_its_memory_alive(cpu):
    import weakref

    image = features(WIDTH)
    gone = weakref.ref(image)
    of = cpu.SimilarityInputs(
        image=as_buffer(cpu, image), text=as_buffer(cpu, features(WIDTH)), pair_offset=0, scale=1.0
    )
    del image
    assert gone() is not None
    del of
    assert gone() is None


@pytest.mark.parametrize("name", ["row_ids", "column_ids", "row_levels", "column_levels"])
def test_edited_entries_that_cannot_be_read_as_such_are_refused(cpu, name):
    tensors = of_comparison()
    for change in FAULTS.values():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            inputs(cpu, {**as_buffers(cpu, tensors), name: as_buffer(cpu, change(tensors[name]))}, compares=True)
    for address in UNREADABLE.values():
        changed = {**as_buffers(cpu, tensors), name: forged(cpu, tensors[name], address)}
        with pytest.raises(
            ValueError, match=f"^({name} (must begin|is a null|reaches)|the ids and levels .* is a null)"
        ):
            inputs(cpu, changed, compares=True)
    del tensors[name]
    with pytest.raises(ValueError, match="the ids and levels of edited entries is a null pointer"):
        inputs(cpu, as_buffers(cpu, tensors), compares=True)


def test_a_comparison_needs_a_teacher_and_scales_that_are_not_zero(cpu):
    tensors = as_buffers(cpu, of_comparison())
    with pytest.raises(ValueError, match="edited entries need a comparison"):
        inputs(cpu, tensors)
    with pytest.raises(ValueError, match="and that a teacher"):
        inputs(cpu, {name: tensor for name, tensor in tensors.items() if not name.startswith("teacher")}, compares=True)
    for scale in ("scale", "teacher_scale"):
        with pytest.raises(ValueError, match="must not be 0 for a comparison"):
            inputs(cpu, tensors, compares=True, **{scale: 0.0})
    of = inputs(cpu, tensors, compares=True)
    with pytest.raises(ValueError, match="losses takes no comparison"):
        losses(cpu, of, as_buffers(cpu, ENTRY_POINTS[losses]()))
    plain, buffers = inputs(cpu, as_buffers(cpu, of_inputs())), as_buffers(cpu, ENTRY_POINTS[compared_backward]())
    with pytest.raises(ValueError, match="compared_backward needs inputs with a comparison"):
        cpu.compared_backward(plain, pull_forget=0.5, pull_anchor=0.5, **buffers)


def test_a_joint_batch_that_is_not_one_is_refused(cpu):
    for forget in ((0, N + 1), (-1, 5), (5, 4)):
        with pytest.raises(ValueError, match=r"^forget_(begin|end) = -?[0-9]+ must lie between"):
            joint(cpu, forget=forget)
    with pytest.raises(ValueError, match="must be the first or the last ones"):
        joint(cpu, forget=(1, N - 1))
    with pytest.raises(ValueError, match="a joint batch needs a comparison, and that a teacher"):
        joint(cpu, compares=False)
    with pytest.raises(ValueError, match="as many rows as columns, and pair_offset = 0"):
        joint(cpu, pair_offset=N)
    with pytest.raises(ValueError, match="must not be 0 for a comparison"):
        joint(cpu, scale=0.0)
    tensors = of_comparison()
    for name, message in (
        ("row_ids", "all of row_ids, column_ids, row_groups and column_groups, or none"),
        ("column_levels", "the levels of edited entries is a null pointer"),
    ):
        some = as_buffers(cpu, {other: tensor for other, tensor in tensors.items() if other != name})
        with pytest.raises(ValueError, match=message):
            inputs(cpu, some, compares=True, forget=(0, 5))


def test_a_joint_batch_and_blocks_are_not_taken_for_each_other(cpu):
    blocks = inputs(cpu, as_buffers(cpu, of_comparison()), compares=True)
    with pytest.raises(ValueError, match="needs inputs of a joint batch"):
        cpu.calibrated(blocks, **as_buffers(cpu, ENTRY_POINTS[calibrated]()))
    with pytest.raises(ValueError, match="needs inputs of a joint batch"):
        cpu.calibrated_backward(blocks, **as_buffers(cpu, ENTRY_POINTS[calibrated_backward]()))
    with pytest.raises(ValueError, match="compared_backward takes no joint batch"):
        buffers = as_buffers(cpu, ENTRY_POINTS[compared_backward]())
        cpu.compared_backward(joint(cpu), pull_forget=0.5, pull_anchor=0.5, **buffers)


def test_the_sigmoid_loss_takes_neither_a_teacher_nor_groups(cpu):
    tensors = of_inputs()
    for left_out in (("row_groups", "column_groups"), FEATURES[2:]):
        of = inputs(cpu, as_buffers(cpu, {name: tensor for name, tensor in tensors.items() if name not in left_out}))
        with pytest.raises(ValueError, match="takes neither a teacher nor groups"):
            cpu.sigmoid(of, bias=0.0)


def test_the_gradient_of_the_scale_needs_that_of_the_image(cpu):
    tensors = ENTRY_POINTS[backward]()
    del tensors["grad_image"]
    of = inputs(cpu, as_buffers(cpu, of_inputs()))
    with pytest.raises(ValueError, match="the gradient of scale needs grad_image"):
        backward(cpu, of, as_buffers(cpu, tensors))
    plain = cpu.SimilarityInputs(
        image=as_buffer(cpu, features(WIDTH)), text=as_buffer(cpu, features(WIDTH)), pair_offset=0, scale=1.0
    )
    with pytest.raises(ValueError, match="the gradient of scale needs grad_image"):
        cpu.sigmoid(plain, bias=0.0, need_scale=True)
