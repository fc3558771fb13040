"""docs/guide.md shows the members that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cliperase_fast as cf

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", re.findall(r"`(\w+)(?:\(\w*\))?`", GUIDE.split("## `UnlearnResult`")[1].split("##")[0])
)
def test_every_name_in_the_section_on_the_result_exists(name):
    known = {*dir(cf.UnlearnResult), *cf.UnlearnResult.__dataclass_fields__, "UnlearnConfig", "unlearn"}
    assert name in known or name in ("epoch", "step", "reason", "validation", "per_class")
