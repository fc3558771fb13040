"""What all streamed backends share: the memory budgets from the environment."""

from __future__ import annotations

import pytest
import torch

from cliperase_fast.errors import InputError
from cliperase_fast.ops import engine


def test_the_memory_budgets_come_from_the_environment(monkeypatch):
    for variable in (engine.STRIP_VARIABLE, engine.KEEP_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    assert engine.strip_bytes() == 128 << 20
    assert engine.keep_bytes(torch.device("cpu")) < engine.keep_bytes(torch.device("cuda"))
    monkeypatch.setenv(engine.STRIP_VARIABLE, "7")
    monkeypatch.setenv(engine.KEEP_VARIABLE, "3")
    assert engine.strip_bytes() == 7 << 20
    assert engine.keep_bytes(torch.device("cpu")) == engine.keep_bytes(torch.device("cuda")) == 3 << 20


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "lots"])
def test_a_budget_that_is_no_size_is_named(monkeypatch, value):
    monkeypatch.setenv(engine.KEEP_VARIABLE, value)
    with pytest.raises(InputError, match=f"CLIPERASE_KEEP_MIB={value} must be a whole number"):
        engine.keep_bytes(torch.device("cpu"))
