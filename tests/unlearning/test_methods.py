"""The seam that every method runs through, with the examples of docs/methods.md."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearnConfig, cli
from cliperase_fast.evaluation import encode_pairs
from cliperase_fast.models import load_model
from cliperase_fast.report import verdict
from cliperase_fast.unlearning.methods import ClosedFormMethod, TrainingMethod, registry
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures
from cliperase_fast.unlearning.selection import Candidate, Selection

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
EXAMPLES = [source for source in BLOCKS if "@cf.register_method" in source]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.fixture
def examples():
    """The methods that the page defines, registered."""
    for source in EXAMPLES:
        exec(source, {"__name__": "example"})


def run(**changes):
    trains = changes.get("method") not in ("drop_direction", "shrink")
    settings = QUICK if trains else {"progress": False, "report": False}
    if "config" in changes:  # which names the method
        settings = {name: value for name, value in settings.items() if name != "method"}
    return cf.unlearn(make_tiny_clip(), *split_pairs(make_pairs(), "red"), **{**settings, **changes})


def steps(result):
    return [line for line in result.history if "total" in line]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


def test_the_examples_of_the_page_have_at_most_40_lines():
    assert len(EXAMPLES) == 2
    assert max(len(source.splitlines()) for source in EXAMPLES) <= 40


def test_every_method_has_a_line_in_the_table_and_on_the_page(capsys):
    assert {"cliperase", "gradient_ascent"} <= set(cf.methods())
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name, summary in cf.methods().items():
        assert re.search(rf"^{name} .*{re.escape(summary)}", printed, re.MULTILINE)
        assert f"| `{name}` |" in PAGE.read_text()


def test_cliperase_is_the_default_and_named_in_the_record(tmp_path):
    default, named = run(), run(method="cliperase", output_dir=tmp_path / "run")
    assert equal(default.model.state_dict(), named.model.state_dict())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["method_options"]) == ("cliperase", {})


@pytest.mark.parametrize("teacher_cache", ["memory", "disk", "off"])
@pytest.mark.parametrize("joint", [True, False])
def test_teacher_features_are_those_of_the_pairs_that_the_method_asks_for(teacher_cache, joint):
    """At the first step the student is the teacher, so that its features tell which pairs the teacher's belong to."""
    seen, runs = [], []

    class Watching(TrainingMethod):
        name, summary, source = "watching", "keeps the first batch", "a test"
        needs, joint_teacher = ("forget", "retain", "teacher"), joint

        def objective(self, run):
            def terms(features):
                seen.append(features)
                runs.append(run)
                return _Total(features.image.sum())

            return terms

    cf.register_method(Watching)
    run(method="watching", teacher_cache=teacher_cache)
    first = seen[0]
    asked = slice(0 if joint else first.n_forget, None)
    assert torch.allclose(first.teacher_image, first.image[asked], atol=1e-6)
    assert torch.allclose(first.teacher_text, first.text[asked], atol=1e-6)
    if not joint:
        assert first.background_image is None and first.background_text is None
        return
    train = runs[0].data.train
    encoded = encode_pairs(load_model(make_tiny_clip()), train.pairs, batch_size=64, device="cpu")
    image = encoded.image_features[train.n_forget :]
    text = encoded.caption_features[np.concatenate(encoded.caption_index[train.n_forget :])]
    assert torch.allclose(first.background_image, (first.teacher_image @ text.T).mean(1), atol=1e-6)
    assert torch.allclose(first.background_text, (first.teacher_text @ image.T).mean(1), atol=1e-6)


class _Total(NamedTuple):
    total: torch.Tensor


def features(forget=3, retain=4, groups=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(forget + retain, 8, generator=generator), dim=1) for _ in range(2))
    ids = None if groups is None else torch.tensor(groups)
    return BatchFeatures(image, text, torch.tensor(7.0), forget, ids)


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 2, 1, 3], [0, 1, 0, 0, 2, 2, 2]])
def test_the_ascent_loss_has_denominators_over_the_whole_batch(groups):
    batch = features(groups=groups)
    expected = 0.0
    for rows, columns in ((batch.image, batch.text), (batch.text, batch.image)):
        for m in range(batch.n_forget):
            others = [j for j in range(7) if j == m or groups is None or groups[j] != groups[m]]
            logits = 7.0 * rows[m].double() @ columns[others].double().T
            expected += float(logits.logsumexp(0) - logits[others.index(m)]) / (2 * batch.n_forget)
    assert float(forget_clip_loss(batch)) == pytest.approx(expected, rel=1e-5)


def test_gradient_ascent_raises_the_forget_loss_and_logs_its_own_terms():
    result = run(method="gradient_ascent", epochs=4)
    lines = steps(result)
    assert lines[-1]["forget"] > lines[0]["forget"] + 1
    assert all(line["total"] == -line["forget"] for line in lines)
    assert not {"retain", "consistency"} & lines[0].keys()
    assert result.after["forget"]["association"] < result.before["forget"]["association"]


@pytest.mark.parametrize("method", ["calibrated", "gradient_ascent", "retain_finetune", "push_apart", "drop_direction"])
def test_every_method_evaluates_reports_saves_and_resumes(tmp_path, monkeypatch, examples, method):
    output = tmp_path / "run"
    settings = {"method": method, "output_dir": output, "report": True}
    result = run(**settings)
    assert result.report_failure is None
    assert (output / "report.html").is_file()
    record = json.loads((output / "result.json").read_text())
    assert record["config"]["method"] == method
    assert record["selection"]["step"] in [line["step"] for line in result.history if "validation" in line]
    saved = load_file(output / "model" / "open_clip_model.safetensors")
    assert not equal(result.model.state_dict(), make_tiny_clip().state_dict())
    assert equal({name: result.model.state_dict()[name] for name in saved}, saved)

    chosen = registry._METHODS[method]
    if issubclass(chosen, ClosedFormMethod):  # a finished edit is not repeated
        monkeypatch.setattr(chosen, "edit", None)
    again = run(**{**settings, "report": False}, resume=True)
    assert equal(again.model.state_dict(), result.model.state_dict())
    assert (again.after, again.selection, again.history) == (result.after, result.selection, result.history)


def test_a_closed_form_method_keeps_the_best_student_it_evaluated(examples):
    result = run(method="drop_direction")
    evaluations = [line["validation"] for line in result.history]
    assert len(evaluations) == 3 and steps(result) == []
    assert result.selection["reason"].startswith(f"Edit {result.selection['step']} ")
    changed = {name for name, tensor in result.model.state_dict().items()
               if not torch.equal(tensor, make_tiny_clip().state_dict()[name])}  # fmt: skip
    assert changed == {"text_projection"}
    assert result.record["pairs_per_second"] is None


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("gradient_ascent", {"learning_rate": 1e-6}, "Raise learning_rate (now 1e-06) or epochs (now 2)."),
        ("drop_direction", {}, "Change method_options, or allow more with retain_floor (now 0.02)."),
        ("cliperase", {"learning_rate": 1e-6}, "Raise learning_rate (now 1e-06) or epochs (now 2), or lambda_forget"),
    ],
)
def test_advice_names_no_setting_that_the_method_does_not_use(examples, method, changes, says):
    result = run(method=method, **changes)
    record = {**result.record, "after": {**result.after, "forget": result.before["forget"]}}
    assert says in verdict(record).advice


@pytest.mark.parametrize(
    ("method", "says"),
    [("cliperase", "a larger lambda_retain"), ("gradient_ascent", "a lower learning_rate or fewer epochs"),
     ("drop_direction", "change method_options")],
)  # fmt: skip
def test_the_reason_of_a_choice_below_the_floor_names_settings_of_the_method(examples, method, says):
    chosen = Candidate(step=3, epoch=1, forget=0.0, retain=0.1, forget_similarity=0.0)
    unused = registry._METHODS[method].unused_settings
    assert says in Selection(0.9, 0.02).reason(chosen, [chosen, chosen], "Edit 3", unused)
    assert "edit 3 lost the least" in Selection(0.9, 0.02).reason(chosen, [chosen, chosen], "Edit 3", unused)


def test_a_closed_form_method_that_never_evaluates_is_evaluated_once(examples):
    @cf.register_method
    class Shrink(ClosedFormMethod):
        name, summary, source = "shrink", "halve a bias", "test"

        def edit(self, run, evaluate):
            run.student.module.ln_final.bias.add_(1)

    result = run(method="shrink")
    assert [line["step"] for line in result.history] == [1]
    assert torch.equal(result.model.ln_final.bias, make_tiny_clip().ln_final.bias + 1)


def test_prepare_comes_before_training_and_sees_the_parameters(monkeypatch, examples):
    seen = []
    chosen = registry._METHODS["push_apart"]
    monkeypatch.setattr(chosen, "prepare", lambda method, run: seen.append([name for name, _ in run.parameters]))
    run(method="push_apart")
    assert len(seen) == 1 and "text_projection" in seen[0]


def test_options_reach_the_method_and_the_record(examples):
    one, two = run(method="push_apart"), run(method="push_apart", method_options={"weight": "2.0"})
    assert one.config.method_options == {"weight": 1.0}
    assert two.config.method_options == {"weight": 2.0}
    line = steps(two)[0]
    assert line["total"] == pytest.approx(2 * line["forget"] - line["retain"], rel=1e-5)
    assert steps(one)[0]["total"] == pytest.approx(line["forget"] - line["retain"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "gradient_asent"}, "method='gradient_asent' is not one of .*; did you mean 'gradient_ascent'"),
        ({"method": "push_apart", "method_options": {"weigth": 1}},
         "method 'push_apart' has no option 'weigth'; did you mean 'weight'"),
        ({"method": "push_apart", "method_options": {"weight": "much"}}, "weight='much' must be a number"),
        ({"method": "push_apart", "method_options": {"weight": 0}}, "weight=0.0 must be positive"),
        ({"method": "cliperase", "method_options": {"weight": 1}},
         "method 'cliperase' has no option 'weight'; it has no options"),
        ({"method_options": "weight=1"}, "method_options='weight=1' must be a mapping"),
        ({"method": "gradient_ascent", "lambda_retain": 2},
         r"method='gradient_ascent' does not use lambda_retain \(now 2.0\); leave it at its default 1.0"),
        ({"method": "gradient_ascent", "backend": "torch"}, "does not use backend"),
        ({"method": "gradient_ascent", "teacher": "local-dir:absent"}, "does not use a teacher: leave out teacher="),
        ({"method": "drop_direction", "epochs": 3}, "does not use epochs"),
    ],
)  # fmt: skip
def test_unsupported_settings_and_options_are_errors_before_any_work(tmp_path, examples, changes, says):
    with pytest.raises(InputError, match=says):
        cf.unlearn(object(), None, None, output_dir=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_keyword_wins_over_the_config_and_drops_options_of_another_method(examples):
    config = UnlearnConfig(method="push_apart", method_options={"weight": 2.0})
    assert run(config=config).config.method_options == {"weight": 2.0}
    other = run(config=config, method="gradient_ascent").config
    assert (other.method, other.method_options) == ("gradient_ascent", {})


@pytest.mark.parametrize("changes", [{"method": "gradient_ascent"}, {"method_options": {"weight": 2.0}}])
def test_a_run_does_not_resume_with_another_method_or_option(tmp_path, examples, changes):
    settings = {"method": "push_apart", "epochs": 1, "output_dir": tmp_path / "run"}
    run(**settings)
    with pytest.raises(InputError, match=r"the settings differ .*method.* -> "):
        run(**{**settings, **changes}, resume=True)


class Terms(NamedTuple):
    total: torch.Tensor


class Complete(TrainingMethod):
    name, summary, source = "complete", "nothing", "test"

    def objective(self, run):
        return lambda features: Terms(features.image.sum())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (object, "object is not a subclass"),
        (type("A", (Complete,), {"summary": ""}), "A.summary is ''; give a string of one line"),
        (type("B", (Complete,), {"name": "Not This"}), "B.name is 'Not This'; use lower-case"),
        (type("C", (Complete,), {"name": "cliperase"}), "the method name 'cliperase' is taken by CLIPErase"),
        (type("D", (Complete,), {"Options": dict}), "D.Options is <class 'dict'>; give a dataclass"),
        (type("E", (Complete,), {"needs": ("teachers",)}), "E.needs has 'teachers'.*did you mean 'teacher'"),
        (type("G", (Complete,), {"unused_settings": {"epoch"}}), "G.unused_settings has 'epoch'.*'epochs'"),
        (type("H", (TrainingMethod,), {"name": "h", "summary": "s", "source": "t"}), "H lacks objective"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_an_incomplete_method_cannot_be_registered(method, says):
    with pytest.raises(InputError, match=says):
        cf.register_method(method)
