import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch

from cliperase_fast import InputError, UnlearnConfig, config
from cliperase_fast.config import parse_options, read_options


def test_a_recipe_is_the_file_of_its_method(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    (tmp_path / "ssd.yaml").write_text("method: ssd\nmethod_options: {alpha: 30.0}\nselect: divergence\n")
    found = UnlearnConfig.recipe("ssd", seed=3)
    assert (found.method, found.method_options, found.select, found.seed) == ("ssd", {"alpha": 30.0}, "divergence", 3)
    with pytest.raises(InputError, match="the method 'sdd' has no recipe; did you mean 'ssd'"):
        UnlearnConfig.recipe("sdd")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"epochs": 2.5}, "epochs=2.5 must be a whole number"),
        ({"epochs": "many"}, "epochs='many' must be a whole number"),
        ({"epochs": "automatic"}, "epochs='automatic' must be a whole number or 'auto'"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number or 'auto'"),
        ({"lambda_forget": "auto"}, "lambda_forget='auto' must be a number"),
        ({"schedule": "cosine"}, "schedule=cosine ends with the last epoch: give a number of epochs"),
        ({"evaluate_every": 2}, "evaluate_every=2 counts epochs"),
        ({"steps": -1}, "steps=-1 must not be negative"),
        ({"steps": 40, "epochs": 3}, "steps=40 and epochs=3 both say how long to train: give one of them"),
        ({"steps": 40, "evaluate_every": 2}, "evaluate_every=2 counts epochs"),
        ({"warmup_steps": 30, "epochs": 2}, "must be less than the 30 steps for which learning_rate='auto' tries"),
        ({"grad_cache_chunk": 200}, "more than the 128 pairs of a batch"),
        ({"worst_class_floor": -0.1}, "worst_class_floor=-0.1 must not be negative"),
        ({"learning_rate": 0}, "learning_rate=0.0 must be positive"),
        ({"learning_rate": float("nan")}, "must be finite"),
        ({"lambda_retain": -1}, "lambda_retain=-1.0 must not be negative"),
        ({"lambda_retain": 0, "lambda_forget": 0, "lambda_consistency": 0}, "nothing would be trained"),
        ({"forget_loss": "euclid"}, "forget_loss='euclid' is not one of cosine, hinge, contrastive"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 must lie between 0 and 1"),
        ({"batch_size": 1}, "one forget and one retain pair"),
        ({"trainable": "last:0"}, "use all, image, text, last:K or lora"),
        ({"trainable": "head"}, "use all, image, text, last:K or lora"),
        ({"report": "yes"}, "report='yes' must be true or false"),
        ({"audit": 1}, "audit=1 must be true, false, depth or full"),
        ({"audit": "yes"}, "audit='yes' must be true, false, depth or full"),
        ({"margin": 2}, "must lie between -1 and 1"),
        ({"method": 3}, "method=3 must be a string"),
        ({"method_options": ["a"]}, "method_options=['a'] must be a mapping"),
    ],
)
def test_a_wrong_setting_is_an_error_with_the_remedy(settings, says):
    with pytest.raises(InputError, match=None) as error:
        UnlearnConfig.from_dict(settings)
    assert says in str(error.value)


@pytest.mark.parametrize(("dataset", "rate"), [("cifar100", 1e-6), ("cc12m", 1e-6), ("flickr30k", 1e-8)])
def test_paper_presets_hold_the_published_settings(dataset, rate):
    config = UnlearnConfig.paper(dataset)
    weights = (config.lambda_retain, config.lambda_forget, config.lambda_consistency)
    assert weights == (1.0, 3.0, 3.0)
    assert (config.optimizer, config.batch_size, config.epochs, config.learning_rate) == ("adam", 16, 20, rate)


@pytest.mark.parametrize("dataset", ["cifar100", "cc12m", "flickr30k"])
def test_paper_presets_pin_every_field_against_changed_defaults(monkeypatch, dataset):
    before = UnlearnConfig.paper(dataset)
    changed = object()  # no field takes it
    names = [spec.name for spec in dataclasses.fields(UnlearnConfig)]
    assert names == list(inspect.signature(UnlearnConfig).parameters)
    monkeypatch.setattr(UnlearnConfig.__init__, "__defaults__", (changed,) * len(names))
    with pytest.raises(InputError):
        UnlearnConfig()
    assert UnlearnConfig.paper(dataset) == before


def test_paper_presets_follow_cliperase_and_take_overrides():
    config = UnlearnConfig.paper("cifar100", method="gradient_ascent", epochs=1)
    assert (config.method, config.epochs, config.learning_rate) == ("gradient_ascent", 1, 1e-6)
    assert UnlearnConfig.paper("cifar100").method == "cliperase"


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(InputError, match="cifar100, cc12m, flickr30k"):
        UnlearnConfig.paper("imagenet")


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_file_gives_the_same_settings_as_keywords(tmp_path, name):
    path = tmp_path / name
    written = {"epochs": 3, "learning_rate": "1e-5" if name.endswith("yaml") else 1e-5, "teacher_cache": "memory"}
    path.write_text(
        json.dumps(written) if name.endswith("json") else "epochs: 3\nlearning_rate: 1e-5\nteacher_cache: memory"
    )
    assert UnlearnConfig.from_file(path) == UnlearnConfig(epochs=3, learning_rate=1e-5, teacher_cache="memory")


def test_yaml_off_is_read_as_a_string(tmp_path):
    (tmp_path / "c.yaml").write_text("teacher_cache: off")
    assert UnlearnConfig.from_file(tmp_path / "c.yaml").teacher_cache == "off"


@pytest.mark.parametrize(("text", "says"), [("epochs: [", "neither valid YAML"), ("- 1", "must hold `name: value`")])
def test_a_broken_config_file_is_an_error_with_its_path(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as error:
        UnlearnConfig.from_file(path)
    assert str(path) in str(error.value)


def test_a_missing_config_file_is_an_error_with_its_path(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml"):
        UnlearnConfig.from_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a=1", "b=0.5", "c=true", "d=word", "e=[1, 2]"], {"a": 1, "b": 0.5, "c": True, "d": "word", "e": [1, 2]}),
        (['{"a": 1, "b": "x=y"}', "a=2"], {"a": 2, "b": "x=y"}),
        (["a=x=y", "b="], {"a": "x=y", "b": ""}),
        ([], {}),
    ],
)
def test_method_options_are_read_from_words(words, expected):
    assert parse_options(words) == expected


@pytest.mark.parametrize("word", ["a", "=1", "{", "{1}", "a b=1", '["a"]'])
def test_an_invalid_method_option_is_an_error(word):
    with pytest.raises(InputError, match="is neither KEY=VALUE nor a JSON object"):
        parse_options([word])


@pytest.mark.parametrize("annotation", ["float", float])
def test_options_of_a_dataclass_are_coerced_and_checked(annotation):
    options = dataclasses.make_dataclass("Options", [("rate", annotation, 1.0), ("names", list, None)])
    assert read_options(options, {"rate": "1e-3", "names": ["a"]}, "x") == options(1e-3, ["a"])
    with pytest.raises(InputError, match="rate='fast' must be a number"):
        read_options(options, {"rate": "fast"}, "x")
    with pytest.raises(InputError, match="x has no option 'rat'; did you mean 'rate'"):
        read_options(options, {"rat": 1}, "x")
    required = dataclasses.make_dataclass("Required", [("rate", annotation)])
    with pytest.raises(InputError, match=r"the options of x: .*'rate'"):
        read_options(required, {}, "x")


def test_settings_survive_a_round_trip_through_json():
    config = UnlearnConfig(epochs=3, margin=0.2, forget_loss="hinge")
    assert UnlearnConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("fraction", "forget"), [(0.5, 8), (0.25, 4), (0.01, 1), (0.99, 15)])
def test_the_ratio_keeps_at_least_one_pair_of_each_kind(fraction, forget):
    config = UnlearnConfig(batch_size=16, forget_fraction=fraction)
    assert (config.forget_pairs, config.retain_pairs) == (forget, 16 - forget)


def test_every_setting_has_a_help_text():
    assert all(spec.metadata["help"] for spec in dataclasses.fields(UnlearnConfig))


NUMBERS = {"learning_rate": 1e-5, "epochs": 3}


@pytest.mark.parametrize(
    ("given", "batch", "select"),
    [
        ({}, (32, 96), "divergence"),
        ({"learning_rate": 1e-5}, (32, 96), "divergence"),
        ({"epochs": 3}, (32, 96), "divergence"),
        (NUMBERS, (8, 8), "floor"),
        ({"steps": 40}, (32, 96), "divergence"),
        ({"steps": 40, "learning_rate": 1e-5, "schedule": "cosine"}, (8, 8), "floor"),
        ({"batch_size": 64}, (16, 48), "divergence"),
        ({"forget_fraction": 0.5, "select": "floor"}, (64, 64), "floor"),
        ({**NUMBERS, "batch_size": 12, "select": "divergence"}, (6, 6), "divergence"),
    ],
)
def test_batches_and_selection_follow_from_what_is_automatic(given, batch, select):
    config = UnlearnConfig(**given)
    resolved = config.resolved()
    for one in (config, resolved):
        assert (one.forget_pairs, one.retain_pairs) == batch
    assert (resolved.batch_size, resolved.select) == (sum(batch), select)
    assert resolved.resolved() == resolved
    assert (resolved.learning_rate, resolved.epochs) == (config.learning_rate, config.epochs)


def test_settings_that_a_method_does_not_use_stay_as_they_are():
    resolved = UnlearnConfig().resolved({"learning_rate", "batch_size", "forget_fraction"})
    assert (resolved.batch_size, resolved.forget_fraction, resolved.select) == ("auto", "auto", "floor")


@pytest.mark.parametrize("given", [3, ["epochs"]])
def test_settings_that_are_not_a_mapping_are_refused(given):
    with pytest.raises(InputError, match=f"config is a {type(given).__name__}; pass a mapping, an UnlearnConfig or"):
        UnlearnConfig.from_dict(given)


def test_numbers_of_numpy_and_devices_of_torch_are_taken():
    given = {"epochs": np.int64(3), "batch_size": np.uint8(8), "learning_rate": np.float32(0.25), "report": np.True_}
    found = UnlearnConfig(**given, device=torch.device("cpu"))
    assert (found.epochs, found.batch_size, found.learning_rate, found.report) == (3, 8, 0.25, True)
    assert found.device == "cpu"
    json.dumps(found.to_dict())
