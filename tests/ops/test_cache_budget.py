"""What all streamed backends share: the memory budgets from the environment."""

from __future__ import annotations

import pytest
import torch

from cliperase_fast.errors import InputError
from cliperase_fast.ops import autograd


def test_the_memory_budgets_come_from_the_environment(monkeypatch):
    for variable in (autograd.STRIP_VARIABLE, autograd.KEEP_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    assert autograd.strip_bytes() == 128 << 20
    assert autograd.cache_budget(torch.device("cpu")) < autograd.cache_budget(torch.device("cuda"))
    monkeypatch.setenv(autograd.STRIP_VARIABLE, "7")
    monkeypatch.setenv(autograd.KEEP_VARIABLE, "3")
    assert autograd.strip_bytes() == 7 << 20
    assert autograd.cache_budget(torch.device("cpu")) == autograd.cache_budget(torch.device("cuda")) == 3 << 20


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "lots"])
def test_an_invalid_budget_is_named_in_the_error(monkeypatch, value):
    monkeypatch.setenv(autograd.KEEP_VARIABLE, value)
    with pytest.raises(InputError, match=f"CLIPERASE_KEEP_MIB={value} must be a whole number"):
        autograd.cache_budget(torch.device("cpu"))
