"""Bring the fields of state.json from one format of checkpoints to the next."""

from __future__ import annotations

from typing import Any


def _from_format_3(state: dict[str, Any]) -> dict[str, Any]:
    """Rename the fields of format 3, and name the method, which was always CLIPErase."""
    renamed = {"looks": "evaluations", "looks_without_better": "evaluations_without_improvement"}
    state = {renamed.get(name, name): value for name, value in state.items()}
    return _with_settings(state, {"method": "cliperase", "method_options": {}})


def _from_format_4(state: dict[str, Any]) -> dict[str, Any]:
    """Add what came with automatic learning rates. Until then all numbers were given."""
    state = _with_measured({**state, "probes": [], "rate": 0.0, "stop": ""}, {"divergence": None})
    return _with_settings(state, {"worst_class_floor": 0.3})


def _from_format_5(state: dict[str, Any]) -> dict[str, Any]:
    """Add the standard error of the association, which did not count before, and the number of steps."""
    return _with_settings(_with_measured(state, {"association_error": 0.0}), {"steps": 0, "forget_level": "unrelated"})


def _from_format_6(state: dict[str, Any]) -> dict[str, Any]:
    """Move `levels`, an option of calibrated, to the settings. Other methods knew only the level of unrelated pairs."""
    identity = state.get("identity")
    config = identity.get("config") if isinstance(identity, dict) else None
    if not isinstance(identity, dict) or not isinstance(config, dict):
        return state
    options = config.get("method_options")
    if config.get("method") != "calibrated" or not isinstance(options, dict):
        return _with_settings(state, {"forget_level": "unrelated"})
    others = {name: value for name, value in options.items() if name != "levels"}
    config = {"forget_level": options.get("levels", "auto"), **config, "method_options": others}
    return {**state, "identity": {**identity, "config": config}}


def _with_measured(state: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """Add scores to every evaluation."""

    def measured(candidate: Any) -> Any:
        return {**candidate, **scores} if isinstance(candidate, dict) else candidate

    if isinstance(evaluations := state.get("evaluations"), list):
        state = {**state, "evaluations": [measured(candidate) for candidate in evaluations]}
    if isinstance(best := state.get("best"), dict):
        state = {**state, "best": {**best, "candidate": measured(best.get("candidate"))}}
    return state


def _with_settings(state: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Add settings to the run's identity, unless it has them."""
    identity = state.get("identity")
    config = identity.get("config") if isinstance(identity, dict) else None
    if isinstance(identity, dict) and isinstance(config, dict):
        state = {**state, "identity": {**identity, "config": {**settings, **config}}}
    return state


UPGRADES = {3: _from_format_3, 4: _from_format_4, 5: _from_format_5, 6: _from_format_6}  # 2 names other files
