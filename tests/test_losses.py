"""Test that CLIPEraseLoss equals cliperase_loss with fixed options."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

from cliperase_fast import losses
from cliperase_fast.errors import InputError
from cliperase_fast.functional import LossTerms, cliperase_loss
from cliperase_fast.losses import CalibratedLoss, CLIPEraseLoss


def batch() -> tuple:
    torch.manual_seed(0)
    rows = [F.normalize(torch.randn(n, 6), dim=1) for n in (4, 4, 5, 5, 5, 5)]
    return (*rows, torch.tensor(7.0), 5.0)


OPTIONS = [
    {},
    {"lambda_retain": 0.5, "lambda_forget": 2.0, "lambda_consistency": 0.25},
    {"forget": "hinge", "margin": -0.2, "consistency": "intra", "backend": "torch"},
    {"forget": "contrastive", "consistency": "features"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("group_ids", [None, torch.tensor([0, 0, 1, 2, 2])], ids=["no groups", "groups"])
def test_the_module_gives_what_the_function_gives(options, group_ids):
    terms = CLIPEraseLoss(**options)(*batch(), group_ids=group_ids)
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close(terms, cliperase_loss(*batch(), **options, group_ids=group_ids))


@pytest.mark.parametrize(
    ("kind", "function", "inputs"), [(CLIPEraseLoss, "cliperase_loss", 8), (CalibratedLoss, "calibrated_loss", 6)]
)
def test_every_option_of_the_module_reaches_the_function(kind, function, inputs, monkeypatch):
    said = {}
    monkeypatch.setattr(losses, function, lambda *features, **options: said.update(options))
    options = {"lambda_retain": 0.5, "lambda_forget": 2.0, "lambda_consistency": 0.25, "process_group": "world",
               "gather": "ring", "backend": "torch", "keep": "nothing"}  # fmt: skip
    if kind is CLIPEraseLoss:
        options |= {"forget": "hinge", "margin": 0.1, "consistency": "intra"}
        batch_options = {"group_ids": object()}
    else:
        options |= {"lambda_anchor": 7.0}
        names = ("forget_mask", "group_ids", "background_image", "background_text")
        batch_options = {name: object() for name in names}
    kind(**options)(*range(inputs), **batch_options)
    assert said == options | batch_options


def test_the_weights_are_the_first_three_arguments():
    loss = CLIPEraseLoss(1.5, 0.0, 2.0)
    assert (loss.lambda_retain, loss.lambda_forget, loss.lambda_consistency) == (1.5, 0.0, 2.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"forget": "cosines"}, "did you mean 'cosine'"),
        ({"consistency": "logit"}, "did you mean 'logits'"),
        ({"lambda_retain": -1.0}, "lambda_retain=-1.0 must be"),
        ({"margin": 2.0}, "margin=2.0"),
        ({"margin": None}, "margin=None is a cosine"),
        ({"lambda_forget": "1e-3"}, "lambda_forget='1e-3' must be a finite number"),
        ({"lambda_consistency": None}, "lambda_consistency=None must be"),
        ({"lambda_retain": 1j}, "lambda_retain=1j must be"),
        ({"backend": "nativ"}, "backend='nativ' is not a backend; use auto, eager"),
        ({"backend": ["torch"]}, "is not a backend"),
        ({"keep": "some"}, "keep='some' is not known"),
        ({"lambda_retain": 0, "lambda_forget": 0, "lambda_consistency": 0}, "nothing would be trained"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, match):
    with pytest.raises(InputError, match=match):
        CLIPEraseLoss(**options)


def test_it_has_no_state_and_survives_pickling():
    loss = CLIPEraseLoss(forget="hinge", margin=0.1)
    assert not loss.state_dict() and not list(loss.parameters())
    assert pickle.loads(pickle.dumps(loss))(*batch()) == loss(*batch())


def test_its_repr_shows_the_options():
    text = repr(CLIPEraseLoss(2.0, forget="hinge", margin=0.1, consistency="intra"))
    for part in (
        "lambda_retain=2.0",
        "forget='hinge', margin=0.1",
        "consistency='intra'",
        "backend='auto'",
        "keep='auto'",
    ):
        assert part in text
    assert "margin" not in repr(CLIPEraseLoss())
