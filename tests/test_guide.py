"""docs/guide.md shows the signatures and members that there are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import cliperase_fast as cf

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")


def test_the_signature_of_evaluate_is_the_real_one():
    (shown,) = re.findall(r"cliperase_fast\.evaluate\((.*?)\) ->", GUIDE, re.DOTALL)
    namespace: dict = {}
    exec(f"def evaluate({shown}): ...", namespace)
    real = inspect.signature(cf.evaluate)
    found = inspect.signature(namespace["evaluate"])
    assert [(p.name, p.kind, p.default) for p in found.parameters.values()] == [
        (p.name, p.kind, p.default) for p in real.parameters.values()
    ]


@pytest.mark.parametrize(
    "name", re.findall(r"`(\w+)(?:\(\w*\))?`", GUIDE.split("## `UnlearnResult`")[1].split("##")[0])
)
def test_every_name_in_the_section_on_the_result_exists(name):
    known = {*dir(cf.UnlearnResult), *cf.UnlearnResult.__dataclass_fields__, "UnlearnConfig", "unlearn"}
    assert name in known or name in ("epoch", "step", "reason", "validation", "per_class")
