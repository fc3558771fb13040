"""The scores of attacks on copies of a model: what probes, training, prompts and rounding bring back."""

from __future__ import annotations

import numpy as np

from cliperase_fast.auditing.attacks import BITS, ForgetTest, prompt_attack, quantised
from cliperase_fast.auditing.estimates import Estimate, mean_estimate, missing, stratified_mean
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.probing import probe_hits
from cliperase_fast.auditing.relearning import SHOTS, relearning_curves
from cliperase_fast.auditing.scores import View
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data.drawing import seeded
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter


def check_depth(depth: bool | str) -> None:
    """Raise InputError unless depth is False, True or "full"."""
    if depth not in (False, True, "full"):
        raise InputError(f"depth={depth!r} is not one of False, True, 'full'")


def score_depth(adapter: ClipAdapter, view: View, sets: AuditSets, how: Encoding, *, full: bool) -> dict[str, Estimate]:
    """The scores by name; the model stays as it is, to the last bit.

    probe: balanced accuracy of a linear probe, forget against rest, after the block where it is highest ("block");
        "blocks" has all of them. 0.5 is chance.
    relearn@S: share of forget test images named after S steps of training on 16 forget and 112 retain pairs, the mean
        of three draws; relearn_area: the mean over the numbers of steps. With `full` also `relearn_area:KIND` for the
        other kinds of data, its "curve" by steps.
    prompt_attack: the share with 4 trained soft tokens in front of the caption.
    quantised_top1@B: the share after rounding all matrices to B bits.
    See `probing`, `relearning` and `attacks` for how. Classes weigh the same.
    """
    with seeded(how.seed):
        test = ForgetTest.of(adapter, sets, view.layout, how.seed)
        found = {"probe": _probe(adapter, view, sets, how)}
        for kind, curve in relearning_curves(adapter, view, sets, test, how, full=full).items():
            estimates = {step: view.mean(named, test.images) for step, named in curve.items()}
            area = mean_estimate(list(estimates.values()))
            if kind == f"{SHOTS} shots":
                found |= {f"relearn@{step}": estimate for step, estimate in estimates.items()}
                found["relearn_area"] = area
            else:
                values = {str(step): estimate.value for step, estimate in estimates.items()}
                found[f"relearn_area:{kind}"] = Estimate(area.value, area.draws, {"curve": values})
        named, reason = prompt_attack(adapter, sets, test, how)
        found["prompt_attack"] = missing(reason) if named is None else view.mean(named, test.images)
        for bits in BITS:
            found[f"quantised_top1@{bits}"] = view.mean(test.named(quantised(adapter, bits), how), test.images)
    return found


def _probe(adapter: ClipAdapter, view: View, sets: AuditSets, how: Encoding) -> Estimate:
    if len(sets.forget) < 2:
        return missing("needs at least two forget training pairs")
    hits, truth = probe_hits(adapter, sets, view.layout, how)
    blocks = {
        block: stratified_mean(right, truth.astype(np.int64), seed=how.seed) for block, right in hits.items()
    }  # the mean over forget and rest of the share that is right
    best = max(blocks, key=lambda block: blocks[block].value or 0.0)
    values = {block: estimate.value for block, estimate in blocks.items()}
    return Estimate(blocks[best].value, blocks[best].draws, {"block": best, "blocks": values})
