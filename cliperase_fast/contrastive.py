"""Compute further contrastive losses: open_clip's distillation, a rank's own rows, SigLIP's sigmoid and its CLIPErase.

Conventions, dtypes and errors are those of `functional.py`: L2-normalised features [rows, width], exponentiated scales,
losses in the computing dtype, autocast off inside, `InputError` before anything is computed. No N x N matrix is held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.distributed import LOCAL, Shards, bernoulli_terms, resolve_group, sharded_sigmoid
from cliperase_fast.errors import InputError
from cliperase_fast.functional import (
    WITHIN_A_MODALITY,
    LossTerms,
    agreed,
    contrast,
    described,
    forget_term_of,
    group_of,
)
from cliperase_fast.ops import eager
from cliperase_fast.ops.bernoulli import BernoulliInputs
from cliperase_fast.ops.registry import Backend
from cliperase_fast.ops.rows import row_losses
from cliperase_fast.ops.spec import SimilarityInputs, compute_dtype, no_autocast, savable
from cliperase_fast.terms import FORGET_LOSSES
from cliperase_fast.validation import (
    as_scale,
    check_batches,
    check_consistency,
    check_device,
    check_features,
    check_frozen,
    check_gather,
    check_options,
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
    if not isinstance(pair_offset, (int, np.integer)) or not 0 <= pair_offset <= len(keys) - len(query):
        raise InputError(
            f"pair_offset={pair_offset!r} must be an integer from which keys {shape_of(keys)} has {len(query)} rows"
        )
    scale = as_scale("logit_scale", logit_scale, query)
    teacher_scale = None
    if teacher_query is not None or teacher_keys is not None:
        teacher_scale = check_teacher("query", query, teacher_query, teacher_query, teacher_logit_scale)
        check_teacher("keys", keys, teacher_keys, teacher_keys, teacher_logit_scale)
        assert teacher_query is not None and teacher_keys is not None
        _check_rows("teacher_query", teacher_query, "teacher_keys", teacher_keys)
    if len(query) == 0:
        dtype = compute_dtype(query, keys)
        zero = query.sum(dtype=dtype) + 0 * (keys.sum(dtype=dtype) + scale)
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
        dtype = compute_dtype(image_features, text_features)
        return image_features.sum(dtype=dtype) + 0 * (text_features.sum(dtype=dtype) + scale + bias)
    sigmoid = implementation(chosen, image_features.device).sigmoid
    with no_autocast(image_features):
        pair_offset = len(text_features) if negative_only else 0
        inputs = SimilarityInputs(image_features, text_features, scale, bias=bias, pair_offset=pair_offset)
        if shards is None:
            return sigmoid.loss(inputs)
        assert sigmoid.kernels is not None
        return sharded_sigmoid(sigmoid.kernels, shards, inputs)


def sigmoid_cliperase_loss(
    forget_image: Tensor,
    forget_text: Tensor,
    retain_image: Tensor,
    retain_text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    teacher_logit_scale: Tensor | float | None,
    teacher_logit_bias: Tensor | float | None,
    *,
    lambda_retain: float = 1.0,
    lambda_forget: float = 3.0,
    lambda_consistency: float = 3.0,
    forget: str = "cosine",
    margin: float = 0.0,
    consistency: str = "logits",
    group_ids: Tensor | None = None,
    process_group: Any = LOCAL,
    backend: str = "auto",
) -> LossTerms:
    """Compute the CLIPErase loss of a model that was trained with the sigmoid loss. It is this library's own.

    With X = s I Tᵀ + b [N, N] of the retain pairs, X° of the teacher, and z_ij = 1 for pairs and -1 elsewhere,

        retention    RM = mean_i Σ_j log(1 + exp(-z_ij X_ij)), without other pairs of equal group id
        consistency  CM = mean_i Σ_j KL(Bernoulli(sigmoid(X°_ij)) || Bernoulli(sigmoid(X_ij)))

    FM and the total are those of `functional.cliperase_loss`, as are the arguments, except:

    logit_bias, teacher_logit_bias: b and b°, a number or a tensor of one element.
    forget: "contrastive" is minus the sigmoid loss of the forget pairs. consistency: "logits" (CM above) or "features";
        "intra" is not defined for these models. process_group: texts are gathered at once.
    backend: "eager" or "torch", which holds no N x N matrix, or "auto".

    Returns LossTerms(total, retain, forget, consistency); only `total` has a gradient on the backend "torch".
    Raises InputError, before anything is computed, if an argument is not as above.
    """
    process_group = group_of(process_group)
    weights = (lambda_retain, lambda_forget, lambda_consistency)

    def check() -> tuple[Backend, Tensor, list[Tensor | None]]:
        check_options(*weights, forget, margin, consistency)
        if consistency == "intra" and lambda_consistency > 0:
            raise InputError(
                "consistency='intra' is not defined for a model with a logit_bias, which has no softmax over "
                "similarities; use 'logits' or 'features'"
            )
        check_batches(forget_image, forget_text, retain_image, retain_text, group_ids)
        scale = as_scale("logit_scale", logit_scale, retain_image)
        others: list[Tensor | None] = [as_scale("logit_bias", logit_bias, retain_image), None, None]
        if lambda_consistency > 0:
            others[1] = check_consistency(consistency, retain_image, teacher_image, teacher_text, teacher_logit_scale)
            if teacher_logit_bias is None and consistency == "logits":
                raise InputError(
                    "teacher_logit_bias is missing: the consistency needs a teacher that was trained with the sigmoid "
                    "loss too; use consistency='features', or lambda_consistency=0"
                )
            frozen_bias = 0.0 if teacher_logit_bias is None else teacher_logit_bias
            others[2] = frozen_bias = as_scale("teacher_logit_bias", frozen_bias, retain_image)
            check_frozen("teacher_logit_bias", frozen_bias)
        sharded = process_group is not None
        return choose(backend, retain_image, retain_text, sharded=sharded, loss="bernoulli"), scale, others

    (chosen, scale, (bias, teacher_scale, teacher_bias)), (retain_shards, forget_shards) = agreed(
        process_group,
        check,
        lambda found: described(
            "sigmoid_cliperase_loss", "all", found[0], "auto", retain_image, retain_text, found[1], teacher_image,
            teacher_text, group_ids, weights=weights, forget=forget, margin=margin, consistency=consistency,
        ),
        "all",
        (retain_image, forget_image),
    )  # fmt: skip
    forget_image, forget_text, retain_image, retain_text, group_ids, teacher_image, teacher_text = savable(
        forget_image, forget_text, retain_image, retain_text, group_ids, teacher_image, teacher_text
    )
    zero = retain_image.new_zeros((), dtype=compute_dtype(retain_image, retain_text))
    fused = lambda_consistency > 0 and consistency == "logits"
    run = implementation(chosen, retain_image.device)
    total = retain_term = forget_term = consistency_term = zero
    with no_autocast(retain_image):
        if lambda_retain > 0 or fused:
            teacher: tuple[Any, Any, Any] = (None, None, None)
            if fused:
                teacher = (teacher_image, teacher_text, teacher_scale)
            inputs = SimilarityInputs(retain_image, retain_text, scale, *teacher, group_ids, bias=bias)
            own = (lambda_retain, lambda_consistency if fused else 0.0)
            total, retain_term, consistency_term = _bernoulli(inputs, teacher_bias, own, chosen, retain_shards)
            if lambda_retain == 0:
                retain_term = zero
        if lambda_forget > 0:
            inputs = SimilarityInputs(forget_image, forget_text, scale, bias=bias)
            if FORGET_LOSSES[forget].sum_over_pairs is None:
                forget_term = _bernoulli(inputs, None, (-1.0, 0.0), chosen, forget_shards)[0]
            else:
                forget_term = forget_term_of(inputs, forget, margin, run, forget_shards)
            total = torch.add(total, forget_term, alpha=lambda_forget)
        if lambda_consistency > 0 and not fused:
            assert teacher_image is not None and teacher_text is not None
            for student, frozen in ((retain_image, teacher_image), (retain_text, teacher_text)):
                inputs = SimilarityInputs(student, student, scale, frozen, frozen, teacher_scale, want_retention=False)
                consistency_term = consistency_term + WITHIN_A_MODALITY[consistency](inputs, run, retain_shards)
            total = torch.add(total, consistency_term, alpha=lambda_consistency)
    return LossTerms(total, retain_term, forget_term, consistency_term)


def _bernoulli(
    inputs: SimilarityInputs,
    teacher_bias: Tensor | None,
    weights: tuple[float, float],
    chosen: Backend,
    shards: Shards | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weighted sum, retention, consistency) of a batch; zeros with zero gradients for an empty one."""
    if (inputs.n if shards is None else shards.total) == 0:
        zero = inputs.image.sum(dtype=inputs.dtype) + inputs.text.sum(dtype=inputs.dtype)
        assert inputs.bias is not None
        zero = zero + 0 * (inputs.scale + inputs.bias).to(inputs.dtype)
        return zero, zero, zero
    if chosen.name == "eager":
        retain, consistency = eager.bernoulli(inputs, teacher_bias)
        return weights[0] * retain + weights[1] * consistency, retain, consistency
    return bernoulli_terms(shards, BernoulliInputs(inputs, teacher_bias, *weights))


def _check_rows(name: str, rows: Tensor, other_name: str, others: Tensor) -> None:
    check_features(name, rows)
    check_features(other_name, others)
    check_device(other_name, others, name, rows)
    if rows.shape[1] != others.shape[1]:
        raise InputError(f"{name} {shape_of(rows)} and {other_name} {shape_of(others)} differ in width")
