"""Audit a state of the ledger: each request's pairs in the base and in the weights of that state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cliperase_fast.auditing import Audit
from cliperase_fast.auditing.comparison import audit_models
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.loading import PixelCache
from cliperase_fast.distributed import Ranks
from cliperase_fast.evaluation import association_margin
from cliperase_fast.ledger.pairs import RequestPairs, without
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import FORGET_SCORE

_NORMAL = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Measured:
    """A request whose pairs are at hand.

    undone: whether it was taken back, so that the model should know it again. target: the association at which its run
    called it forgotten; None if the run had no target. in_full: whether training pairs are told from test pairs too,
    which takes longer than all else.
    """

    id: str
    pairs: RequestPairs
    undone: bool
    target: float | None
    in_full: bool = False


def encoding(settings: UnlearnConfig, ranks: Ranks, progress: bool) -> Encoding:
    """Return how the audits encode: as the runs of these settings do, with precision="auto" in float32."""
    runtime = Runtime.from_config(settings, progress, ranks)
    return Encoding(
        runtime.batch_size, runtime.device, runtime.precision, settings.seed, runtime.progress, ranks,
        runtime.num_workers, PixelCache(settings.image_cache_mib * 2**20),
    )  # fmt: skip


def audit_requests(
    base: ClipAdapter, current: ClipAdapter, requests: Sequence[Measured], how: Encoding
) -> dict[str, Audit]:
    """Audit the requests by name. The retain pairs of each are its own without those of requests that are in force."""
    base, current = (adapter.clone() for adapter in (base, current))
    for adapter in (base, current):
        adapter.module.to(how.device)
        adapter.truncate = True  # captions that are too long were refused by the run, or cut as well
    gone = [part for one in requests if not one.undone for part in one.pairs.forgotten]
    found = {}
    with seeded(how.seed):
        for one in requests:
            retain, retain_test = (without(part, gone, "retain") for part in (one.pairs.retain, one.pairs.test[1]))
            forget = one.pairs.forget if one.in_full else one.pairs.test[0]
            sets = AuditSets.of(forget, retain, (one.pairs.test[0], retain_test), names=one.pairs.names)
            found[one.id] = audit_models({"before": base, "after": current}, sets, how)
    return found


def stored_audit(audit: Audit) -> dict[str, Any]:
    """Return what the ledger stores of an audit: scores and verdicts, and nothing that may quote a pair."""
    content = audit.to_dict()
    kept = ("forget_test_pairs", "retain_test_pairs")
    return {
        **{key: content[key] for key in ("format", "scores", "gap", "background", "over_forgotten", "verdicts")},
        "notes": [],
        "data": {key: content["data"][key] for key in kept},
        "over_forgotten_below": content["over_forgotten_below"],
        "evidence": {},
    }


def summarise(audit: Audit, request: Measured, base: ClipAdapter) -> dict[str, Any]:
    """Return the scores that the log holds.

    at_target: whether the pairs are forgotten: the association, up to one standard error, is at most the target of the
    request's run, or the background level of the base plus `association_margin` where the run had none, and at most
    `FORGET_SCORE` of the images are named.
    """
    before, after = (audit.scores[name] for name in ("before", "after"))

    def value(scores: Mapping[str, Any], group: str, name: str) -> float | None:
        return scores[group].get(name, {}).get("value")

    found = {
        name: {"base": value(before, group, score), "now": value(after, group, score)}
        for name, group, score in (
            ("association", "forgetting", "association"),
            ("forget_top1", "forgetting", "zero_shot_top1"),
            ("retain_top1", "collateral", "retain_top1"),
            ("retain_association", "collateral", "retain_association"),
        )
    }
    target = request.target
    if target is None and audit.background is not None:
        target = audit.background + association_margin(float(base.logit_scale().detach()))
    return {
        **found,
        "background": audit.background,
        "forget_pairs": audit.data["forget_test_pairs"],
        "target": target,
        "undone": request.undone,
        "at_target": _at_target(after["forgetting"], target),
    }


def _at_target(scores: Mapping[str, Any], target: float | None) -> bool | None:
    association, top1 = scores["association"], scores.get("zero_shot_top1", {}).get("value")
    if association["value"] is None or target is None:
        return None
    low, high = association.get("low"), association.get("high")
    error = 0.0 if low is None or high is None else (high - low) / (2 * _NORMAL)
    near = association["value"] - error <= target
    return bool(near and (top1 is None or top1 <= FORGET_SCORE + 1e-9))
