"""The tables of terms, and everything that reads them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cliperase_fast import functional, terms
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError
from cliperase_fast.functional import LossTerms, cliperase_loss
from cliperase_fast.report.wording import term_label
from cliperase_fast.terms import CONSISTENCY_MODES, FORGET_LOSSES, TERMS, ForgetLoss


def pairs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.nn.functional.normalize(torch.randn(count, 4), dim=1) for _ in range(2))


def test_every_term_has_a_field_a_weight_and_a_label() -> None:
    assert LossTerms._fields == ("total", *TERMS)
    settings = {spec.name: spec for spec in dataclasses.fields(UnlearnConfig)}
    for name, term in TERMS.items():
        assert settings[term.weight].metadata["help"] == term.help
        assert term_label(name) == term.label


def test_config_takes_the_names_of_the_tables_and_explains_them() -> None:
    settings = {spec.name: spec.metadata for spec in dataclasses.fields(UnlearnConfig)}
    assert settings["forget_loss"]["choices"] == tuple(FORGET_LOSSES)
    assert settings["consistency"]["choices"] == tuple(CONSISTENCY_MODES)
    for variants, setting in ((FORGET_LOSSES, "forget_loss"), (CONSISTENCY_MODES, "consistency")):
        assert all(variant.help in settings[setting]["help"] for variant in variants.values())


def test_every_consistency_mode_is_computed() -> None:
    others = {name for name, mode in CONSISTENCY_MODES.items() if not mode.fused}
    assert others == set(functional.WITHIN_A_MODALITY)


def test_a_forget_loss_in_the_table_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    squared = ForgetLoss("squared", "the squared cosine", lambda products, margin: products.sum(1).square().sum())
    monkeypatch.setitem(FORGET_LOSSES, "squared", squared)
    image, text = pairs()
    found = cliperase_loss(image, text, *pairs(), None, None, 10.0, None, lambda_consistency=0, forget="squared")
    torch.testing.assert_close(found.forget, (image * text).sum(1).square().mean())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"forget": "cosin"}, "forget='cosin' is not known; did you mean 'cosine'"),
        ({"forget": "x"}, "forget='x' is not known; use one of cosine, hinge, contrastive"),
        ({"consistency": "logit"}, "consistency='logit' is not known; did you mean 'logits'"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(changes: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        cliperase_loss(*pairs(), *pairs(), *pairs(), 10.0, 10.0, **changes)


def test_names_are_checked_by_one_function() -> None:
    terms.check_name("color", "red", ["red", "blue"])
    with pytest.raises(InputError, match="color='rde' is not known; did you mean 'red'"):
        terms.check_name("color", "rde", ["red", "blue"])
