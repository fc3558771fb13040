"""Score what attacks on copies of the models bring back: probes, relearning, soft prompts and rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cliperase_fast.auditing import attacks, relearning
from cliperase_fast.auditing.attacks import BITS, ForgetTest, prompt_attack, quantised
from cliperase_fast.auditing.estimates import Estimate, mean_estimate, missing, stratified_mean
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.probing import probe_hits
from cliperase_fast.auditing.relearning import SHOTS, relearn
from cliperase_fast.auditing.scores import View
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data.drawing import seeded
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.progress import Steps


def check_depth(depth: bool | str) -> None:
    """Raise InputError unless depth is False, True or "full"."""
    if not isinstance(depth, bool) and depth != "full":
        raise InputError(f"depth={depth!r} is not one of False, True, 'full'")


@dataclass(frozen=True)
class Attack:
    """Hold one attack on one model. key: the model, the attack and its variant. steps: of progress."""

    key: tuple[Any, ...]
    steps: int
    run: Callable[[Steps], Any]


def score_depth(
    models: Mapping[str, ClipAdapter], views: Mapping[str, View], sets: AuditSets, how: Encoding, *, full: bool
) -> dict[str, dict[str, Estimate]]:
    """Attack copies of the models; return the scores by model and name. The models themselves are not changed.

    probe: balanced accuracy of a linear probe, forget against rest, after the block where it is highest ("block");
        "blocks" has all of them. 0.5 is chance.
    relearn@S: share of forget test images named after S steps of training on 16 forget and 112 retain pairs, the mean
        of three draws; relearn_area: the mean over the numbers of steps. With `full` also `relearn_area:KIND` for the
        other kinds of data, its "curve" by steps.
    prompt_attack: the same with 4 trained soft tokens in the caption.
    quantised_top1@B: the same after rounding all matrices to B bits.
    `probing`, `relearning` and `attacks` describe each attack. Classes have equal weight. Ranks share the attacks.
    """
    tests = {
        name: ForgetTest.of(adapter, sets, views[name].layout, how.for_model(adapter, models["before"], sets.test))
        for name, adapter in models.items()
    }
    todo = [
        attack
        for name, adapter in models.items()
        for attack in _attacks(
            name, adapter, views[name], sets, tests[name], how.for_model(adapter, models["before"], sets.test), full
        )
    ]
    own = todo[how.ranks.rank :: how.ranks.size]

    def work() -> dict[tuple[Any, ...], Any]:
        found = {}
        with Steps(sum(attack.steps for attack in own), "attacking", "step", bar=how.progress) as steps:
            for attack in own:
                before = steps.done
                with seeded(how.seed):
                    found[attack.key] = attack.run(steps)
                steps.update(before + attack.steps - steps.done)  # what it did not report itself
        return found

    found = {key: result for of_rank in how.ranks.gather_results(work) for key, result in of_rank.items()}
    return {name: _scores(name, found, views[name], tests[name]) for name in models}


def _attacks(
    name: str, adapter: ClipAdapter, view: View, sets: AuditSets, test: ForgetTest, how: Encoding, full: bool
) -> list[Attack]:
    """List the attacks on one model; `_scores` combines what they return."""
    found = [Attack((name, "probe"), 1, partial(_probe, adapter, view, sets, how))]
    for kind, (pairs, shots) in relearning.shot_sources(view, sets, full=full).items():
        for draw in range(relearning.DRAWS):
            train = partial(_relearn, adapter, pairs, shots, sets, test, how, draw)
            found.append(Attack((name, "relearn", kind, draw), relearning.STEPS[-1], train))
    found.append(Attack((name, "prompt"), attacks.STEPS, partial(prompt_attack, adapter, sets, test, how)))
    for bits in BITS:
        found.append(Attack((name, "quantised", bits), 1, partial(_quantised, adapter, bits, test, how)))
    return found


def _scores(name: str, found: Mapping[tuple[Any, ...], Any], view: View, test: ForgetTest) -> dict[str, Estimate]:
    """Turn the results of the attacks on one model into estimates."""
    scores = {"probe": found[name, "probe"]}
    kinds = dict.fromkeys(key[2] for key in found if key[:2] == (name, "relearn"))
    for kind in kinds:
        draws = [found[name, "relearn", kind, draw] for draw in range(relearning.DRAWS)]
        named = {step: np.mean([draw[step] for draw in draws], axis=0) for step in relearning.STEPS}
        estimates = {step: view.mean(hits, test.images) for step, hits in named.items()}
        area = mean_estimate(list(estimates.values()))
        if kind == f"{SHOTS} shots":
            scores |= {f"relearn@{step}": estimate for step, estimate in estimates.items()}
            scores["relearn_area"] = area
        else:
            values = {str(step): estimate.value for step, estimate in estimates.items()}
            scores[f"relearn_area:{kind}"] = Estimate(area.value, area.draws, {"curve": values})
    named, reason = found[name, "prompt"]
    scores["prompt_attack"] = missing(reason) if named is None else view.mean(named, test.images)
    for bits in BITS:
        scores[f"quantised_top1@{bits}"] = view.mean(found[name, "quantised", bits], test.images)
    return scores


def _probe(adapter: ClipAdapter, view: View, sets: AuditSets, how: Encoding, steps: Steps) -> Estimate:
    if len(sets.forget) < 2:
        return missing("needs at least two forget training pairs")
    hits, truth = probe_hits(adapter, sets, view.layout, how)
    blocks = {
        block: stratified_mean(right, truth.astype(np.int64), seed=how.seed) for block, right in hits.items()
    }  # the mean over forget and rest of the share that is right
    best = max(blocks, key=lambda block: blocks[block].value or 0.0)
    values = {block: estimate.value for block, estimate in blocks.items()}
    return Estimate(blocks[best].value, blocks[best].draws, {"block": best, "blocks": values})


def _relearn(
    adapter: ClipAdapter, pairs: Any, shots: int, sets: AuditSets, test: ForgetTest, how: Encoding, draw: int,
    steps: Steps,
) -> Mapping[int, np.ndarray]:  # fmt: skip
    batch = relearning.draw_batch(adapter, pairs, sets.retain, shots, how.seed + draw, how.cache)
    return relearn(adapter, batch, test, how, draw, steps)


def _quantised(adapter: ClipAdapter, bits: int, test: ForgetTest, how: Encoding, steps: Steps) -> np.ndarray:
    return test.named(quantised(adapter, bits), how)
