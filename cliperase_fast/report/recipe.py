"""How a run found its learning rate and where it ended, for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cliperase_fast.report.rendering import Row, Table
from cliperase_fast.report.wording import decimals, number, percent

_COLUMNS = ("Learning rate", "Steps", "Forget score", "Association", "Divergence", "Outcome")


def recipe_section(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the target, the rates that were tried and why training ended; None if all numbers were given."""
    recipe = result.get("recipe")
    if not recipe:
        return None
    target = recipe.get("target") or {}
    probes = recipe.get("probes") or []
    rate = number(recipe.get("learning_rate"))
    facts = [
        (
            "Target",
            f"association at most {_cosine(target.get('association'))}, {_above(target)} above their background level; "
            f"forget score at most {percent(number(target.get('forget')))}",
        ),
        ("Learning rate", f"{_rate(rate)}: {recipe.get('why')}{_lowered(recipe.get('lowered'))}"),
        ("Weight of forgetting", _pressed(recipe.get("pressed"))),
        ("End of training", f"step {recipe.get('steps')}: {recipe.get('stop')}"),
    ]
    facts = [(name, text) for name, text in facts if text]
    table = Table(_COLUMNS, [_row(probe, rate) for probe in probes], text_columns=1, minor=(1,)) if probes else None
    return {"facts": facts, "table": table}


def _row(probe: Mapping[str, Any], chosen: float | None) -> Row:
    rate, divergence = number(probe.get("rate")), number(probe.get("divergence"))
    outcome = probe.get("stopped") or ("at the target" if probe.get("reached") else "not at the target")
    if rate is not None and rate == chosen:
        outcome += ", chosen"
    return Row(
        (
            _rate(rate),
            str(probe.get("steps", "–")),
            percent(number(probe.get("forget"))),
            _cosine(probe.get("association")),
            "–" if divergence is None else f"{divergence:.3f}",
            outcome,
        ),
        "sum" if rate is not None and rate == chosen else "",
    )


def _lowered(steps: Any) -> str:
    """Say from which steps the rate was lower."""
    return f"; lowered after step {' and '.join(map(str, steps))}" if isinstance(steps, list) and steps else ""


def _pressed(steps: Any) -> str:
    """Say from which steps the forget terms had more weight."""
    pressed = isinstance(steps, list) and steps
    return f"three times as much after step {' and '.join(map(str, steps))}" if pressed else ""


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.2g}"


def _above(target: Mapping[str, Any]) -> str:
    """Say how far the target's association is above the background level."""
    association, background = (number(target.get(name)) for name in ("association", "background"))
    return "–" if association is None or background is None else f"{association - background:.2g}"


def _cosine(value: Any) -> str:
    found = number(value)
    return "–" if found is None else decimals(found, 3)
