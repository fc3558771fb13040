"""From a run that is done to its result: result.json's content, and the evidence for the report."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from typing import Any

from cliperase_fast._version import installed_versions
from cliperase_fast.data.intake import Tally
from cliperase_fast.evaluation import pair_similarities
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import weight_dtypes
from cliperase_fast.plurals import counted
from cliperase_fast.report import verdict
from cliperase_fast.unlearning.checkpoints import TrainState
from cliperase_fast.unlearning.evaluator import by_set, embeddings, lowest, per_class
from cliperase_fast.unlearning.methods.base import Method
from cliperase_fast.unlearning.output_model import OutputModel
from cliperase_fast.unlearning.recipe import Course, Probe, choose
from cliperase_fast.unlearning.result import UnlearnResult
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.sampling import sample_notes, test_intervals
from cliperase_fast.unlearning.selection import Candidate, wilson

ENOUGH_PAIRS = 100  # of each kind in the validation split; with fewer the result says how uncertain the choice is


def record(run: Run, method: Method, state: TrainState, output: OutputModel) -> UnlearnResult:
    """Put the result together, and save it if the run has a directory."""
    content = _content(run, method, state, output)
    content["verdict"] = asdict(verdict(content))
    test, before = run.data.test, run.baseline.encoded
    result = UnlearnResult(
        adapter=output.adapter,
        config=run.settings,
        history=state.metrics,
        record=content,
        similarities={
            "before": by_set(pair_similarities(before), test),
            "after": by_set(pair_similarities(output.encoded), test),
        },
        **embeddings(before, output.encoded, test, run.settings.seed),
    )
    directory = run.setup.directory
    if directory.path is not None:
        run.say("writing the model and the result to %s", directory.path)
        run.ranks.run_on_first(lambda: directory.save(result))
    if run.ranks.local_rank == 0:
        shutil.rmtree(run.directory / "cache", ignore_errors=True)  # the teacher's features are no longer needed
    return result


def _content(run: Run, method: Method, state: TrainState, output: OutputModel) -> dict[str, Any]:
    """Return the content of result.json, without the verdict."""
    before = run.baseline.scores
    intervals = _test_intervals(run, output)
    return {
        "before": {name: before[name] for name in ("forget", "retain")},
        "after": {name: output.scores[name] for name in ("forget", "retain")},
        "test_intervals": intervals,
        "per_class": per_class(before["per_class"], output.scores["per_class"]),
        "selection": _selection(run, method, state),
        "recipe": _recipe(run, state) if method.trains else None,
        "notes": [
            *run.notes,
            *sample_notes(run.data.sampled, output.scores, intervals and intervals["after"]),
            *_uncertain_choice(run, state),
            *method.notes(state),
            *([output.note] if output.note else []),
            *_cut_captions(run.student),
        ],
        "weights": {**run.setup.models.dtypes, "returned": weight_dtypes(output.adapter)},
        "model": run.setup.inputs.model_name,
        "library": output.adapter.library or output.adapter.kind,
        "method": {"name": method.name, "summary": method.summary, "source": method.source},
        "inputs": run.setup.inputs.named(),
        "data": _data(run, state),
        "config": run.settings.to_dict(),
        "precision": run.setup.precision.to_dict(),
        "seconds": {
            "total": time.perf_counter() - run.began,
            "train": state.seconds,
            "evaluate": run.evaluator.seconds,
        },
        "ranks": run.ranks.size,
        "pairs_per_second": _pairs_per_second(run, state) if method.trains else None,
        "versions": installed_versions("torch", "open_clip_torch", "transformers", "numpy"),
        "seed": run.settings.seed,
        "audit": None,
    }


def _selection(run: Run, method: Method, state: TrainState) -> dict[str, Any]:
    """Describe which candidate was chosen, and why."""
    best, selection, before = state.best, run.selection, run.baseline.validation
    assert best is not None
    return {
        "epoch": best.epoch,
        "step": best.step,
        "reason": selection.reason(best, state.evaluations, method.describe(best), method.unused_settings),
        "within_floor": selection.within(best),
        "outside_floors": sum(not selection.within(one) for one in state.evaluations),
        "target": None if run.target is None else run.target.to_dict(),
        "target_reached": None if run.target is None else run.target.reached(best),
        "validation": {
            "forget": best.forget,
            "retain": best.retain,
            "forget_before": before.forget,
            "retain_before": before.retain,
        },
        "lowest": lowest(state.evaluations),
        "stopped_early": state.stopped_early,
        "association": best.forget_similarity,
        "background": None if run.target is None else run.target.background,
        "divergence": None if best.divergence is None else best.divergence.to_dict(),
        "moved": best.moved,
        "pairs": validation_pairs(run),
        "intervals": _intervals(run, best),
    }


def _recipe(run: Run, state: TrainState) -> dict[str, Any] | None:
    """Describe how the run found its learning rate and its number of steps; None if both were given."""
    settings = run.settings
    if not settings.automatic:
        return None
    assert run.target is not None
    probes = [Probe(**probe) for probe in state.probes]
    course = run.course(state.evaluations) if settings.open_ended else Course()
    return {
        "target": run.target.to_dict(),
        "probes": state.probes,
        "learning_rate": state.rate or settings.learning_rate,
        "why": choose(probes)[1] if probes else "it was given",
        "steps": state.step,
        "lowered": list(course.lowered),
        "pressed": list(course.pressed),
        "stop": state.stop or f"the number of {'steps' if settings.steps else 'epochs'} was given",
    }


def validation_pairs(run: Run) -> dict[str, int]:
    part = run.data.validation
    return {"forget": part.n_forget, "retain": len(part.pairs) - part.n_forget}


def _intervals(run: Run, best: Candidate) -> dict[str, list[float]]:
    """Return the 95 % intervals of the chosen candidate's scores on the validation split."""
    return {name: list(wilson(getattr(best, name), count)) for name, count in validation_pairs(run).items()}


def _uncertain_choice(run: Run, state: TrainState) -> list[str]:
    """Return a note if few validation pairs decided which candidate was chosen."""
    best, pairs = state.best, validation_pairs(run)
    assert best is not None
    if run.settings.select != "divergence" or min(pairs.values()) >= ENOUGH_PAIRS:
        return []
    forget, retain = (f"{low:.1%} to {high:.1%}" for low, high in _intervals(run, best).values())
    text = (
        f"The choice of the checkpoint rests on {pairs['forget']} forget and "
        f"{counted(pairs['retain'], 'retain pair')} of the validation split: the 95 % intervals are {forget} for the "
        f"forget score and {retain} for the retain score"
    )
    found = best.divergence
    if found is not None and found.worst_class is not None and found.worst_mean is not None:
        error = "unknown" if found.worst_error is None else f"{found.worst_error:.3f}"
        text += (
            f"; the worst class, {found.worst_class!r} with {counted(found.worst_pairs or 0, 'pair')}, diverges by "
            f"{found.worst_mean:.3f} nats (standard error {error})"
        )
    return [text]


def _test_intervals(run: Run, output: OutputModel) -> dict[str, Any] | None:
    """Return the 95 % intervals of the test scores before and after if the test split was sampled, else None."""
    test, sampled = run.data.test, run.data.sampled
    if not {"forget test", "retain test"} & sampled.keys():
        return None
    found = {"before": (run.baseline.scores, run.baseline.encoded), "after": (output.scores, output.encoded)}
    return {
        when: test_intervals(scores, by_set(pair_similarities(encoded), test))
        for when, (scores, encoded) in found.items()
    }


def _skipped(run: Run) -> Tally:
    """Return what was left out before training and, on any rank, while training."""
    skipped = Tally()
    skipped.update(run.data.intake.skipped)
    own = run.loader.substitutes.found if run.loader.substitutes is not None else {}
    of_ranks = run.ranks.gather_results(lambda: own)
    for image in {row: image for found in of_ranks for row, image in found.items()}.values():
        skipped.add(image.reason, image.message)
    return skipped


def _stream(run: Run, state: TrainState) -> dict[str, int] | None:
    """Return how many retain pairs came from a stream, None if they have an index."""
    stream = run.data.stream
    if stream is None:
        return None
    drawn = state.step * run.settings.accumulate * run.loader.plan.sizes[1]
    return {"pairs": drawn, "head": len(stream.head), "shards": len(stream.shards)}


def _data(run: Run, state: TrainState) -> dict[str, Any]:
    data = run.data
    return {
        **data.names,
        "fingerprint": data.fingerprint(),
        "forget_pairs": data.train.n_forget,
        "retain_pairs": len(data.train.pairs) - data.train.n_forget,
        "sampled": data.sampled,
        "stream": _stream(run, state),
        "skipped": _skipped(run).to_dict(),
        "ignored": data.intake.ignored.to_dict(),
        "cut_captions": len(run.student.cut_captions),
    }


def _pairs_per_second(run: Run, state: TrainState) -> float:
    return state.step * run.settings.accumulate * sum(run.loader.plan.sizes) / state.seconds


def _cut_captions(adapter: ClipAdapter) -> list[str]:
    """Return a note if captions were cut to the model's context."""
    if not adapter.cut_captions:
        return []
    caption, count = next(iter(adapter.cut_captions.items()))
    cut = len(adapter.cut_captions)
    return [
        f"{counted(cut, 'different caption')} {'was' if cut == 1 else 'were'} cut to the {adapter.context_length} "
        f"tokens of the model's context (the first has {count}: {caption[:80]!r})"
    ]
