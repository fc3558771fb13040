import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from small import make_model, training_and_test
from tiny_models import MODELS, pixels_for

from cliperase_fast.auditing import audit, relearning
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.probing import fit_probe, mean_pooled, pooled_features
from cliperase_fast.data import as_pairs
from cliperase_fast.models import load_model


def test_the_probe_equals_a_logistic_regression_on_raw_features():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (90, 5)), rng.normal(3, 2, (60, 5))
    is_forget, truth = train[:, 0] + rng.normal(size=90) > 4.5, test[:, 0] > 4.5
    mean, deviation = train.mean(0), train.std(0)
    expected = LogisticRegression(class_weight="balanced", max_iter=1000)
    expected.fit((train - mean) / deviation, is_forget)
    answers = fit_probe(train, is_forget, test)
    assert (answers == expected.predict((test - mean) / deviation)).all()
    assert balanced_accuracy_score(truth, answers) > 0.7


def test_the_probe_is_the_balanced_accuracy_at_the_best_block(monkeypatch):
    monkeypatch.setattr(relearning, "STEPS", (0, 1))
    model, (forget, retain, test) = make_model(), training_and_test()
    found = audit(model, model, forget, retain, test=test, depth=True, progress=False)
    probe = found.scores["after"]["depth"]["probe"]
    adapter, how = load_model(model), Encoding(64, torch.device("cpu"))
    feature = {
        name: pooled_features(adapter, as_pairs(pairs, name), how)
        for name, pairs in {"forget": forget, "retain": retain, "one": test[0], "rest": test[1]}.items()
    }
    truth = np.r_[np.ones(len(test[0])), np.zeros(len(test[1]))].astype(bool)
    expected = {}
    for block in feature["forget"]:
        train = np.concatenate([feature["forget"][block], feature["retain"][block]])
        answers = fit_probe(
            train,
            np.arange(len(train)) < len(forget),
            np.concatenate([feature["one"][block], feature["rest"][block]]),
        )
        expected[block] = balanced_accuracy_score(truth, answers)
    assert probe["blocks"] == pytest.approx(expected)
    assert probe["value"] == max(expected.values())
    assert expected[probe["block"]] == probe["value"]


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_image_tower_gives_features_after_each_block(kind):
    adapter = load_model(MODELS[kind]())
    pixels = pixels_for(adapter.module)
    pairs = as_pairs([(image, torch.ones(4, dtype=torch.int64)) for image in pixels], "images")
    found = pooled_features(adapter, pairs, Encoding(2, torch.device("cpu")))
    blocks = len(adapter.blocks()[0])
    assert blocks >= 2
    assert list(found) == [*(f"block {number + 1}" for number in range(blocks)), "features"]
    assert all(rows.ndim == 2 and len(rows) == 3 and np.isfinite(rows).all() for rows in found.values())
    assert len({rows.tobytes() for rows in found.values()}) == blocks + 1


def test_tokens_and_maps_are_averaged_over_positions():
    tokens = torch.randn(2, 5, 7)
    assert torch.equal(mean_pooled(tokens, 2), tokens.mean(1))
    assert torch.equal(mean_pooled(tokens.transpose(0, 1), 2), tokens.mean(1))
    maps = torch.randn(2, 7, 4, 4)
    assert torch.equal(mean_pooled(maps, 2), maps.mean((2, 3)))
    assert torch.allclose(mean_pooled(maps.permute(0, 2, 3, 1), 2), maps.mean((2, 3)))
