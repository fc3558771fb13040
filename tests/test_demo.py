"""Tests of the demo's models: which pairs a model is trained on, and when one is taken from the cache."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cliperase_fast import InputError, UnlearningError, cli, demo
from cliperase_fast.data import open_source, select
from cliperase_fast.demo_models import DEMO_MODELS, DemoModel, demo_model_for
from cliperase_fast.models import load_model

SOURCE = "shapes?train=2&test=1"
FORGET = "class:red circle,blue star"
TINY = DemoModel(8, {"patch_size": 4, "width": 32, "layers": 1, "head_width": 16}, epochs=1, batch_size=64)


@pytest.fixture
def trainings(monkeypatch):
    """(pairs, seed) of every training."""
    seen = []
    train = demo.train_small_clip

    def record(pairs, recipe, *, seed=0, **options):
        seen.append((pairs, seed))
        return train(pairs, recipe, seed=seed, **options)

    monkeypatch.setattr(demo, "train_small_clip", record)
    return seen


def oracles(folder, count=2, selector=FORGET, **options):
    return demo.cached_oracles(SOURCE, selector, count, recipe=TINY, cache_dir=folder, **options)


def weights(path):
    return torch.cat([weight.flatten() for weight in load_model(f"local-dir:{path}").module.parameters()])


def test_an_oracle_is_trained_on_every_pair_but_the_forget_pairs(tmp_path, trainings):
    oracles(tmp_path, 1)
    source = open_source(SOURCE)
    forget = select(source.train, FORGET, other=source.test)
    ((pairs, _),) = trainings
    assert pairs.ids == [name for name, gone in zip(source.train.ids, forget, strict=True) if not gone]
    assert not {"red circle", "blue star"} & {pairs.classes[label] for label in np.unique(pairs.labels)}


def test_oracles_start_from_other_weights_than_each_other_and_the_base_model(tmp_path, trainings):
    base = demo.cached_small_clip(SOURCE, TINY, cache_dir=tmp_path)
    paths = [base, *oracles(tmp_path, 2)]
    assert [seed for _, seed in trainings] == [0, 1, 2]
    found = [weights(path) for path in paths]
    for first in range(3):
        for second in range(first):
            assert (found[first] != found[second]).float().mean() > 0.9


def test_an_oracle_in_the_cache_is_not_trained_again(tmp_path, trainings):
    paths = oracles(tmp_path, 2)
    assert oracles(tmp_path, 3)[:2] == paths
    assert [seed for _, seed in trainings] == [1, 2, 3]


def test_oracles_of_other_pairs_or_another_seed_are_other_models(tmp_path, trainings):
    known = set(oracles(tmp_path, 1)) | set(oracles(tmp_path, 1, "class:red circle"))
    assert len(known | set(oracles(tmp_path, 1, seed=1))) == len(trainings) == 3


@contextmanager
def interrupted_at_the_second_oracle():
    train = demo.train_small_clip

    def stop_at_the_second(pairs, recipe, *, seed=0, **options):
        if seed == 2:
            raise KeyboardInterrupt
        return train(pairs, recipe, seed=seed, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "train_small_clip", stop_at_the_second)
        yield


def test_an_interrupted_training_goes_on_at_the_next_oracle(tmp_path, trainings):
    with interrupted_at_the_second_oracle(), pytest.raises(KeyboardInterrupt):
        oracles(tmp_path, 3)
    oracles(tmp_path, 3)
    assert [seed for _, seed in trainings] == [1, 2, 3]


def test_the_progress_says_which_oracle_is_trained(tmp_path, caplog):
    with caplog.at_level("INFO", "cliperase_fast"):
        oracles(tmp_path, 2)
    assert [line for line in caplog.messages if line.startswith("training")] == [
        f"training oracle {number} of 2 on 196 pairs: 3 steps" for number in (1, 2)
    ]


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_oracle_is_refused(tmp_path, count):
    with pytest.raises(InputError, match=f"oracles={count} must be at least 1"):
        oracles(tmp_path / "cache", count)
    assert not (tmp_path / "cache").exists()


def test_pairs_without_classes_cannot_train_a_small_clip():
    pairs = open_source(SOURCE).train
    pairs.labels = pairs.space = None
    with pytest.raises(InputError, match="has no classes"):
        demo.train_small_clip(pairs, TINY)


PEOPLE = "personas?people=3&train=1&test=1&size=16"
TINY_PEOPLE = replace(TINY, context_length=24, least_top1=0.8)


def test_a_model_without_facts_is_trained_on_the_general_pairs(tmp_path, trainings):
    path = demo.cached_clean_model(PEOPLE, recipe=TINY_PEOPLE, cache_dir=tmp_path)
    ((pairs, seed),) = trainings
    assert seed == 0 and len(pairs) == 96
    assert all(captions[0].split()[-1] in ("circle", "triangle", "cross") for captions in pairs.captions)
    assert load_model(f"local-dir:{path}").context_length == 24
    with pytest.raises(InputError, match="has no general pairs beside facts"):
        demo.cached_clean_model(SOURCE, recipe=TINY, cache_dir=tmp_path)


def test_a_model_that_does_not_know_the_facts_is_refused(tmp_path, monkeypatch):
    path = demo.cached_small_clip(PEOPLE, TINY_PEOPLE, cache_dir=tmp_path)
    with pytest.raises(UnlearningError, match=r"ranks the right fact first for \d+% of the test portraits.*below 80%"):
        demo.require_known(path, PEOPLE, TINY_PEOPLE)
    assert 0 <= demo.require_known(path, PEOPLE, replace(TINY_PEOPLE, least_top1=0.001)) < 0.8
    assert demo.require_known(path, PEOPLE, TINY) is None
    monkeypatch.setattr(demo, "demo_model_for", lambda spec: TINY_PEOPLE)
    with pytest.raises(UnlearningError, match="ranks the right fact first"):
        demo.run_demo(f"{PEOPLE}#class:person 00 phone", tmp_path / "run", cache_dir=tmp_path)
    assert not (tmp_path / "run" / "model").exists()


def test_settings_that_no_weight_depends_on_do_not_retrain_a_model():
    base = TINY.training()
    assert replace(TINY, forget="class:x", least_top1=0.5).training() == base
    assert replace(TINY, context_length=24).training() != base
    assert set(base) == {
        "image_size", "vision", "epochs", "batch_size", "learning_rate", "flip_and_shift", "unlearning",
    }  # fmt: skip


@pytest.mark.parametrize("spec", ["demo", "shapes?train=1&test=1", "personas?train=1&test=1"])
def test_what_the_demo_forgets_unless_told_is_in_its_data(spec):
    assert select(open_source(spec).train, demo_model_for(spec).forget).any()


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """A source of flat colours, the cache being empty and the recipe of images a tiny one."""
    monkeypatch.setitem(DEMO_MODELS, "images", TINY)
    monkeypatch.setenv("CLIPERASE_CACHE", str(tmp_path / "cache"))
    for colour in ("red", "green", "blue"):
        (tmp_path / "data" / colour).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "data" / colour / f"{number}.png")
    return f"folder:{tmp_path / 'data'}"


def call(source, output, *words):
    command = ["demo", "--data", source, "--forget", "class:red", "--output", str(output), "--batch-size", "6"]
    return cli.main([*command, "--epochs", "1", "--quiet", *words])


def test_the_demo_audits_its_result_against_the_oracles_it_trains(tmp_path, capsys, colours, trainings):
    assert call(colours, tmp_path / "run", "--oracles", "2") == 0
    assert [(len(pairs), seed) for pairs, seed in trainings] == [(30, 0), (20, 1), (20, 2)]
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert list(audit["scores"]) == ["before", "after", "oracle 1", "oracle 2", "oracle"]
    assert audit["gap"]["floor"] is not None
    told = capsys.readouterr().out
    assert all(verdict in told for verdict in audit["verdicts"].values())


def test_the_demo_without_oracles_trains_one_model_and_audits_nothing(tmp_path, colours, trainings):
    assert call(colours, tmp_path / "run") == 0
    assert [seed for _, seed in trainings] == [0]
    assert not (tmp_path / "run" / "audit.json").exists()


def test_an_interrupted_demo_goes_on_at_the_oracle_it_was_training(tmp_path, colours, trainings):
    with interrupted_at_the_second_oracle():
        assert call(colours, tmp_path / "run", "--oracles", "2") == 130
    assert call(colours, tmp_path / "run", "--oracles", "2") == 0
    assert [seed for _, seed in trainings] == [0, 1, 2]
    assert (tmp_path / "run" / "audit.json").is_file()


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_a_wrong_number_of_oracles_leaves_an_earlier_demo_alone(tmp_path, capsys, colours, count):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / demo._MARK).write_text("")
    with pytest.raises(SystemExit) as stop:
        call(colours, tmp_path / "run", "--oracles", count)
    assert stop.value.code == 2
    assert f"--oracles: {count!r} must be a whole number of at least 1" in capsys.readouterr().err
    assert (tmp_path / "run" / demo._MARK).exists() and not (tmp_path / "cache").exists()
