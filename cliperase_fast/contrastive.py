"""Compute contrastive losses of other trainers: open_clip's distillation, a rank's own rows, SigLIP's sigmoid.

Conventions, dtypes and errors are those of `functional.py`: L2-normalised features [rows, width], exponentiated scales,
losses in the computing dtype, autocast off inside, `InputError` before anything is computed. No N x N matrix is held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.distributed import LOCAL, resolve_group, sharded_sigmoid
from cliperase_fast.errors import InputError
from cliperase_fast.functional import agreed, contrast, described
from cliperase_fast.ops import eager
from cliperase_fast.ops.registry import Backend
from cliperase_fast.ops.rows import row_losses
from cliperase_fast.ops.spec import SimilarityInputs, compute_dtype, no_autocast, savable
from cliperase_fast.validation import (
    as_scale,
    check_device,
    check_features,
    check_gather,
    check_pairs,
    check_teacher,
    choose,
    implementation,
    shape_of,
    transformed,
)


def distill_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    process_group: Any = LOCAL,
    own_values: bool = False,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute (contrastive, distill) as open_clip's DistillClipLoss defines them, each a 0-d tensor.

    contrastive is RM of `functional.py`. distill is the mean of the row and column cross-entropies with the teacher's
    softmaxes: half of CM plus half of the teacher's row and column entropies, which have no gradient.
    image_features, text_features: [N, D]; teacher_image, teacher_text: [N, D°], the same pairs, without gradient.
    process_group, gather, backend, keep: see `functional.cliperase_loss`. own_values: see `functional.contrast`.
    """
    teacher = (teacher_image, teacher_text, teacher_logit_scale)
    options: dict[str, Any] = {
        "process_group": process_group, "own_values": own_values, "gather": gather, "backend": backend, "keep": keep,
    }  # fmt: skip
    contrastive, divergence = contrast(
        "distill_clip_loss", image_features, text_features, logit_scale, teacher, **options
    )
    nothing = image_features.new_zeros(len(image_features), 1)  # similarities that are all 0: a uniform student
    with torch.no_grad():
        log_n, from_uniform = contrast("entropies", nothing, nothing, 1.0, teacher, **options)  # log N - entropy, twice
    return contrastive, log_n + 0.5 * (divergence - from_uniform)


def local_clip_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    pair_offset: int,
    *,
    teacher_query: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    teacher_logit_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (contrastive, distill) of a rank's rows and all ranks' keys, one direction of open_clip's `local_loss`.

    query: [n, D], of one modality; keys: [N, D], of the other, where row pair_offset + i belongs to query i.
    teacher_query, teacher_keys: [n, D°] and [N, D°], without gradient; without them distill is 0.
    contrastive = mean_i -log softmax(S_i)_own and distill = mean_i -Σ_j P°_ij log P_ij, with S = s Q Kᵀ [n, N].
    """
    _check_rows("query", query, "keys", keys)
    if not 0 <= pair_offset <= len(keys) - len(query):
        raise InputError(
            f"pair_offset={pair_offset} is out of range; keys {shape_of(keys)} must have {len(query)} rows from there"
        )
    scale = as_scale("logit_scale", logit_scale, query)
    teacher_scale = None
    if teacher_query is not None or teacher_keys is not None:
        teacher_scale = check_teacher("query", query, teacher_query, teacher_query, teacher_logit_scale)
        check_teacher("keys", keys, teacher_keys, teacher_keys, teacher_logit_scale)
        assert teacher_query is not None and teacher_keys is not None
        _check_rows("teacher_query", teacher_query, "teacher_keys", teacher_keys)
    if len(query) == 0:
        zero = query.sum(dtype=compute_dtype(query, keys)) + 0 * (keys.sum() + scale)
        return zero, zero.detach()
    with no_autocast(query):
        query, keys, teacher_query, teacher_keys = savable(query, keys, teacher_query, teacher_keys)
        inputs = SimilarityInputs(
            query, keys, scale, teacher_query, teacher_keys, teacher_scale, pair_offset=pair_offset
        )
        in_eager = transformed(query, keys, scale, teacher_query, teacher_keys, teacher_scale)
        return eager.row_losses(inputs) if in_eager else row_losses(inputs)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    negative_only: bool = False,
    process_group: Any = LOCAL,
    own_values: bool = False,
    gather: str = "ring",
    backend: str = "auto",
) -> Tensor:
    """Compute SigLIP's loss (arXiv 2303.15343, algorithm 1): mean_i Σ_j log(1 + exp(-z_ij (s <I_i, T_j> + b))).

    z_ij is 1 where i = j and -1 elsewhere; with negative_only (texts of another rank) it is -1 everywhere.
    image_features: [n, D]; text_features: [m, D], m = n unless negative_only. logit_bias: b; None means 0.
    process_group: the ranks that share the batch; n is this rank's. gather: with "ring" texts pass from rank to rank,
    and no rank holds more than three ranks' share of them; with "all" every rank holds all. own_values: return the mean
    over this rank's own rows, as open_clip does; gradients are those of the whole batch's mean, see
    `functional.clip_loss`. backend: see `functional.cliperase_loss`.
    Returns a 0-d tensor, 0 for n = 0; differentiable in all four. The gradients are kept for the backward pass.
    """
    process_group = resolve_group(process_group)
    check_rows = _check_rows if negative_only else check_pairs

    def check() -> tuple[Tensor, Tensor, Backend]:
        check_gather(gather)
        check_rows("image_features", image_features, "text_features", text_features)
        scale = as_scale("logit_scale", logit_scale, image_features)
        bias = as_scale("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        if negative_only and process_group is not None:
            raise InputError(
                "negative_only is for texts of another rank, which a process_group gathers itself; leave one out"
            )
        chosen = choose(backend, image_features, text_features, sharded=process_group is not None, loss="sigmoid")
        return scale, bias, chosen

    (scale, bias, chosen), (shards,) = agreed(
        process_group,
        check,
        lambda found: described(
            "sigmoid_loss", gather, found[2], "auto", image_features, text_features, found[0], None, None, None,
            own_values=own_values, logit_bias=found[1],
        ),
        gather,
        (image_features,),
        own_values,
    )  # fmt: skip
    image_features, text_features = savable(image_features, text_features)
    if (len(image_features) if shards is None else shards.total) == 0:
        zero = image_features.sum(dtype=compute_dtype(image_features, text_features))
        return zero + 0 * (text_features.sum() + scale + bias)
    sigmoid = implementation(chosen, image_features.device).sigmoid
    with no_autocast(image_features):
        pair_offset = len(text_features) if negative_only else 0
        inputs = SimilarityInputs(image_features, text_features, scale, bias=bias, pair_offset=pair_offset)
        if shards is None:
            return sigmoid.loss(inputs)
        assert sigmoid.kernels is not None
        return sharded_sigmoid(sigmoid.kernels, shards, inputs)


def _check_rows(name: str, rows: Tensor, other_name: str, others: Tensor) -> None:
    check_features(name, rows)
    check_features(other_name, others)
    check_device(other_name, others, name, rows)
    if rows.shape[1] != others.shape[1]:
        raise InputError(f"{name} {shape_of(rows)} and {other_name} {shape_of(others)} differ in width")
