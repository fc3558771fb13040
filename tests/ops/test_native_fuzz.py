"""Random shapes, strides, dtypes and values: never a crash, and the result of float64 where that is finite.

`make native-sanitize` runs this under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from accuracy_cases import allowed_errors, errors, rounding_of_ds, rounds_ds
from calibrated_cases import batch as joint_batch
from calibrated_cases import exact, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep_cases import Batch, Outcome, outcome, random_batch
from torch import Tensor

from cliperase_fast.ops import eager
from cliperase_fast.ops.native.cpu import sweep

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([127, 128, 129, 255, 256, 257, 300, 513]))
WIDTHS = st.one_of(st.integers(1, 20), st.sampled_from([31, 48, 64, 96, 97]))


def with_stride(tensor: Tensor, kind: str) -> Tensor:
    """Return the same values with another memory layout."""
    rows, width = tensor.shape
    if kind == "transposed":
        return tensor.T.contiguous().T
    if kind == "part of a wider one":
        return torch.full((rows, width + 3), torch.nan, dtype=tensor.dtype)[:, 1:-2].copy_(tensor)
    if kind == "every other row":
        return torch.full((2 * rows, width), torch.nan, dtype=tensor.dtype)[::2].copy_(tensor)
    return tensor


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    n = draw(SIZES)
    scales = st.sampled_from([0.0, 1.0, 14.0, 100.0, 1000.0, 0.01])
    batch = random_batch(n, draw(WIDTHS), draw(WIDTHS), draw(scales), draw(scales), seed=draw(st.integers(0, 9)))
    groups = draw(st.sampled_from(["none", "one", "some", "all different"]))
    if groups != "none":
        ids = {"one": torch.zeros(n), "some": torch.arange(n) // 3, "all different": torch.arange(n)}[groups]
        batch = replace(batch, group_ids=ids.to(torch.int64) - 2**62)
    form = draw(st.sampled_from(["both", "rm", "kl"]))
    if form == "rm":
        batch = batch.without_teacher()
    return replace(batch, want_retention=form != "kl")


def laid_out(draw: st.DrawFn, batch: Batch) -> Batch:
    """Give each tensor its own dtype and strides."""
    kinds = st.sampled_from(["plain", "transposed", "part of a wider one", "every other row"])
    changed = {}
    for name in ("image", "text", "teacher_image", "teacher_text"):
        tensor = getattr(batch, name)
        if tensor is not None:
            changed[name] = with_stride(tensor.to(draw(st.sampled_from(DTYPES))), draw(kinds))
    scales = {"scale": batch.scale.float()}
    if batch.teacher_scale is not None:
        scales["teacher_scale"] = batch.teacher_scale.float()
    return replace(batch, **changed, **scales)


def run(batch: Batch, keep: str) -> Outcome:
    leaves = [batch.image.requires_grad_(), batch.text.requires_grad_(), batch.scale.clone().requires_grad_()]
    losses = sweep(batch.inputs(*leaves, keep=keep))
    return Outcome(*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), leaves))


FUZZ = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(st.data(), batches(), st.sampled_from(["nothing", "similarities"]), st.integers(1, 3))
def test_any_shape_stride_and_dtype_matches_float64(data, batch, keep, threads):
    batch = laid_out(data.draw, batch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = run(batch, keep)
    finally:
        torch.set_num_threads(before)
    exact = replace(batch.to(torch.float64), image=batch.image.detach().double(), text=batch.text.detach().double())
    truth = outcome(eager.sweep, exact)
    allowed = allowed_errors(exact, truth, batch.image.dtype)
    allowed["text"] = allowed_errors(exact, truth, batch.text.dtype)["text"]  # a gradient has its tensor's dtype
    features = (batch.image, batch.text, batch.teacher_image, batch.teacher_text)
    if rounds_ds("native", *(tensor.dtype for tensor in features if tensor is not None)):
        for key, value in rounding_of_ds(exact, truth, torch.bfloat16).items():
            allowed[key] += value
    for key, error in errors(result, truth).items():
        assert error <= 8 * allowed[key] + 1e-30, (key, error, allowed[key])


@FUZZ
@given(
    st.data(),
    batches(),
    st.sampled_from(["nothing", "similarities"]),
    st.sampled_from(["nan", "inf", "-inf", "3e38", "1e-42", "0"]),
)
def test_nonfinite_and_extreme_values_never_crash(data, batch, keep, value):
    batch = laid_out(data.draw, batch)
    spoiled = data.draw(
        st.sampled_from([name for name in ("image", "text", "teacher_image") if getattr(batch, name) is not None])
    )
    tensor = getattr(batch, spoiled)
    rows = data.draw(st.sampled_from(["one row", "all"]))
    with torch.no_grad():
        tensor[: 1 if rows == "one row" else None] = torch.tensor(float(value)).to(tensor.dtype)
    result = run(batch, keep)
    assert result.image.shape == batch.image.shape and result.text.shape == batch.text.shape
    if value == "nan" and len(batch.image) > 1 and (spoiled != "teacher_image" or batch.want_consistency):
        assert (result.retention + result.consistency).isnan()


@st.composite
def joint_batches(draw: st.DrawFn) -> dict:
    """Arguments of the calibrated loss, with forget pairs first, last or anywhere."""
    n = draw(SIZES)
    b = joint_batch(n, draw(WIDTHS), draw(WIDTHS), torch.float32, groups=draw(st.booleans()))
    place, forgotten = torch.arange(n), draw(st.integers(0, n))
    order = draw(st.sampled_from(["first", "last", "anywhere"]))
    b["forget_mask"] = {
        "first": place < forgotten, "last": place >= n - forgotten, "anywhere": place * 5 % 7 < 2,
    }[order]  # fmt: skip
    kinds = st.sampled_from(["plain", "transposed", "part of a wider one", "every other row"])
    for name in ("image_features", "text_features", "teacher_image", "teacher_text"):
        b[name] = with_stride(b[name].to(draw(st.sampled_from(DTYPES))), draw(kinds))
    return b


@FUZZ
@given(joint_batches(), st.sampled_from(["nothing", "similarities"]), st.integers(1, 3))
def test_any_joint_batch_of_the_calibrated_loss_matches_float64(b, keep, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = step(b, backend="native", keep=keep)
    finally:
        torch.set_num_threads(before)
    for name, expected in step(exact(b), backend="eager").items():
        allowed = 5e-6 + (0 if found[name].dtype == torch.float32 else torch.finfo(found[name].dtype).eps)
        error = (found[name].double() - expected).norm().item()
        assert error <= allowed * (1e-3 + expected.norm().item()), (name, error)


@FUZZ
@given(joint_batches(), st.sampled_from(["nothing", "similarities"]), st.sampled_from(["nan", "inf", "3e38", "1e-42"]))
def test_nonfinite_and_extreme_values_never_crash_the_calibrated_loss(b, keep, value):
    b["image_features"][0] = torch.tensor(float(value)).to(b["image_features"].dtype)
    found = step(b, backend="native", keep=keep)
    assert value != "nan" or found["total"].isnan()
