"""Autocast and inference mode of the caller change no result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def test_a_run_ends_with_the_same_weights_and_scores_and_leaves_the_mode_on(mode):
    model, sets = make_tiny_clip(), split_pairs(make_pairs(), "red")
    expected = cf.unlearn(model, *sets, **QUICK)
    with mode():
        found = cf.unlearn(model, *sets, **QUICK)
        left_on = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
    assert left_on == (mode is MODES["autocast"], mode is MODES["inference mode"])
    assert (found.before, found.after) == (expected.before, expected.after)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_an_evaluation_has_the_same_scores(mode):
    noise = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = [(image, f"picture {number}") for number, image in enumerate(noise)]
    model = make_tiny_clip()
    expected = cf.evaluate(model, pairs, progress=False)
    with mode():
        assert cf.evaluate(model, pairs, progress=False) == expected


def test_an_audit_attacks_as_without_the_mode(mode):
    model, sets = make_tiny_clip(), split_pairs(make_pairs(), "red")
    expected = cf.audit(model, make_tiny_clip(1), *sets, depth=True, progress=False)
    with mode():
        found = cf.audit(model, make_tiny_clip(1), *sets, depth=True, progress=False)
    assert found.scores == expected.scores


def test_a_conversion_is_exact_and_can_be_trained(mode):
    with mode():
        converted = cf.export.to_transformers(make_tiny_clip())
    assert not any(tensor.is_inference() for tensor in converted.parameters())
