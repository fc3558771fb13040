"""`lambda_hidden` of `method="calibrated"`: the hidden states of retained captions stay where they are."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.evaluation import Divergence
from cliperase_fast.models.hidden_states import movement
from cliperase_fast.unlearning import recipe
from cliperase_fast.unlearning.methods import calibrated
from cliperase_fast.unlearning.selection import MOVED, Candidate

HOLD = {"method_options": {"lambda_hidden": 5.0}}


def steps(result):
    return [line for line in result.history if "total" in line]


def run(**changes):
    forget, retain = split_pairs(make_pairs(), "red")
    settings = {**QUICK, "method": "calibrated", "trainable": "text", **changes}
    return cf.unlearn(make_tiny_clip(), forget, retain, **settings)


@pytest.fixture(scope="module")
def held():
    """A run, and what the term saw in its first step."""
    seen = []
    own = calibrated.hidden_term
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "hidden_term", lambda *given: seen.append(given) or own(*given))
        return run(**HOLD), *seen[0]


def test_the_term_is_part_of_every_step(held):
    weights = {"retain": 1, "forget": 3, "consistency": 3, "anchor": 30, "held": 3000, "level": 33, "hidden": 5}
    for line in steps(held[0]):
        assert line["total"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-5)


def test_the_term_starts_with_the_forget_captions_alone(held):
    _, features, layout = held
    count = features.n_forget
    moved = movement(layout.unflatten(features.text_tower), layout.unflatten(features.teacher_text_tower))
    assert (moved[:count] > 0.01).all() and moved[count:].max() < 1e-9
    assert calibrated.hidden_term(features, layout).item() == pytest.approx(moved[:count].mean().item())


@pytest.mark.parametrize("changes", [{"grad_cache_chunk": 2}, {"teacher_cache": "off"}])
def test_chunks_and_a_live_teacher_give_the_same_terms(held, changes):
    for one, other in zip(steps(held[0]), steps(run(**HOLD, **changes)), strict=True):
        for name in ("total", "hidden", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_a_run_that_holds_them_moves_them_less():
    free, bound = (
        run(method_options={"lambda_hidden": weight}, learning_rate=1e-2, select="last").selection["moved"]
        for weight in (1e-6, 1000.0)
    )
    assert 0 < bound < 0.8 * free


def test_a_rate_that_moves_them_much_disturbs_the_rest():
    calm = recipe.Probe(1e-3, 30, 0.5, 0.9, 0.5, 0.01, 0.4, False, moved=0.01)
    rough = dataclasses.replace(calm, rate=1e-2, progress=0.9, moved=0.2)
    assert recipe.choose([calm, dataclasses.replace(rough, moved=None)])[0].rate == 1e-2
    assert recipe.choose([calm, rough])[0] is calm
    assert not rough.gentle and calm.gentle
    small = Candidate(1, 1, 0.0, 0.9, 0.0, Divergence(0.1, 0.0, 50, "cat", None, None, 10), 0.0, 0.2)
    assert small.diverged == pytest.approx(MOVED * 0.2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainable": "image"}, "trainable='image' does not change: train 'text' or 'all'"),
        ({"deepspeed": "zero1"}, "lambda_hidden=5 does not work with DeepSpeed"),
        ({"teacher": make_tiny_clip(seed=5)}, "lambda_hidden=5 .* leave out teacher="),
        ({"method_options": {"lambda_hidden": -1.0}}, "lambda_hidden=-1.0 must be a finite number"),
        ({"method_options": {"hidden_skip": 1}}, "hidden_skip=1 has no effect with lambda_hidden=0"),
        ({"method_options": {"lambda_hidden": 5.0, "hidden_skip": 3}}, "hidden_skip=3 leaves no layer"),
    ],
)
def test_runs_that_cannot_hold_them_are_refused_before_they_write(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        run(**{**HOLD, **changes}, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_states_that_do_not_fit_in_memory_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(calibrated, "MEMORY_LIMIT", 1000)
    with pytest.raises(InputError, match=r"hidden states of 3 captions take .* set teacher_cache='off'"):
        run(**HOLD)
