"""What methods of the caller's own do wrong is said, and a ruined model is not called forgotten."""

from typing import Any, NamedTuple

import pytest
import torch
from test_methods import own_registry  # noqa: F401 - a fixture
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs
from torch import Tensor

import cliperase_fast as cf
from cliperase_fast.unlearning.methods import TERM_SETTINGS, ClosedFormMethod, TrainingMethod


class Terms(NamedTuple):
    total: Any
    forget: Any


class Other(NamedTuple):
    loss: Tensor


def run(method, **changes):
    cf.register_method(method)
    sets = split_pairs(make_pairs(), "red")
    return cf.unlearn(make_tiny_clip(), *sets, **{"progress": False, "report": False, **changes}, method=method.name)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        (lambda loss: None, "returned a NoneType; it must return a named tuple of loss terms, one of them `total`"),
        (lambda loss: (loss, loss), "returned a tuple; it must"),
        (lambda loss: Other(loss), "returned a Other; it must"),
        (lambda loss: Terms(3.0, loss), "the term 'total' of the method's objective is a float"),
        (lambda loss: Terms(loss, 3), "the term 'forget' of the method's objective is a int"),
        (lambda loss: Terms(loss[None], loss), r"the term 'total' of the method's objective is a tensor \[1\]"),
        (lambda loss: Terms(loss.detach(), loss), "'total' of the method's objective carries no gradient"),
    ],
)
def test_an_objective_that_returns_something_else_is_an_error_that_says_what(terms, says):
    class Faulty(TrainingMethod):
        name, summary, source = "faulty", "for this test", "none"
        unused_settings = TERM_SETTINGS

        def objective(self, run):
            return lambda features: terms((features.forget_image * features.forget_text).sum(1).mean())

    with pytest.raises(cf.InputError, match=says):
        run(Faulty, **{name: value for name, value in QUICK.items() if name != "method"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_an_edit_ruined_is_an_error_and_not_forgotten(tmp_path, value):
    class Ruin(ClosedFormMethod):
        name, summary, source = "ruin", "for this test", "none"

        def edit(self, run, evaluate):
            dict(run.student.module.named_parameters())["text_projection"].fill_(value)

    with pytest.raises(cf.UnlearningError, match=r"features of the unlearned model are not finite .*: try other"):
        run(Ruin, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_rate_at_which_the_features_overflow_is_an_error_that_names_it():
    sets = split_pairs(make_pairs(), "red")
    with pytest.raises(cf.UnlearningError, match=r"not finite .*: give a lower learning_rate \(now 1e\+25\)"):
        cf.unlearn(make_tiny_clip(), *sets, **{**QUICK, "epochs": 1, "batch_size": 64, "learning_rate": 1e25})
