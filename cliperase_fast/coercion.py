"""Conversion of given values to the types of settings."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cliperase_fast.errors import InputError

AUDIT_DEPTHS = ("depth", "full")  # values of `audit` beside False and True
AUTO = "auto"
Auto = Literal["auto"]  # the value of a setting that the run determines itself


def is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def coerce(spec: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as the field's type, so that `1e-6` from YAML (a string there) and `1` for 1.0 both work.

    A field of another type than bool, int, float or str takes any value.
    """
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, torch.device):
        value = str(value)
    wanted = str(getattr(spec.type, "__name__", spec.type))
    wanted, takes_auto, _ = wanted.partition(" | Auto")
    if takes_auto and is_auto(value):
        return value
    otherwise = " or 'auto'" if takes_auto else ""
    if spec.name == "method_options":
        if isinstance(value, Mapping):
            return dict(value)
        raise InputError(f"{spec.name}={shortly(value)} must be a mapping")
    if spec.name == "audit":
        if isinstance(value, bool) or (isinstance(value, str) and value in AUDIT_DEPTHS):
            return value
        raise InputError(f"audit={shortly(value)} must be true, false, {' or '.join(AUDIT_DEPTHS)}")
    if spec.name == "deepspeed":
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, (str, Path)):
            return str(value)
        raise InputError(f"{spec.name}={shortly(value)} must be a string or a mapping")
    if wanted == "bool":
        if isinstance(value, bool):
            return value
        raise InputError(f"{spec.name}={shortly(value)} must be true or false")
    if wanted == "str":
        if isinstance(value, str):
            return value
        if value is False and "off" in (spec.metadata.get("choices") or ()):  # YAML reads a bare `off` as false
            return "off"
        raise InputError(f"{spec.name}={shortly(value)} must be a string")
    if wanted not in ("int", "float"):
        return value
    number: type = int if wanted == "int" else float
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError(f"{spec.name}={shortly(value)} must be a number{otherwise}")
    try:
        converted = number(value)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{spec.name}={shortly(value)} must be {'a whole number' if number is int else 'a number'}{otherwise}"
        ) from error
    if not math.isfinite(converted):
        raise InputError(f"{spec.name}={value!r} must be finite")
    if number is int and isinstance(value, float) and value != converted:
        raise InputError(f"{spec.name}={value!r} must be a whole number")
    return converted


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number, one of numpy too, as an int. Raises InputError for other values and smaller numbers."""
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise InputError(f"{name}={shortly(value)} must be a whole number of at least {least}")
    return number


def shortly(value: Any) -> str:
    """Return a short repr of a few levels, as lists can contain each other or be deeply nested."""
    brief = reprlib.Repr()
    brief.maxlevel = 3
    brief.maxstring = brief.maxother = brief.maxlong = 100
    try:
        return brief.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"
