"""`unlearn()` without a learning rate on a small model that has learned four colours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "auditing"))
from small import make_model, training_and_test

import cliperase_fast as cf


def run_automatic(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return what was tried and chosen, in types that can be sent between processes."""
    forget, retain, test = training_and_test()
    settings = {"progress": False, "report": False, "val_fraction": 0.25, "epochs": 36, **changes}
    result = cf.unlearn(make_model(), forget, retain, test=test, **settings)
    recipe = result.record["recipe"]
    for probe in recipe["probes"]:
        del probe["seconds"]
    return {
        "recipe": recipe,
        "selection": result.selection,
        "after": result.after,
        "losses": [line["total"] for line in result.history if "total" in line],
    }
