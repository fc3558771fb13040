"""The methods by name.

To add one to the package: a file in this folder, and its class in `_BUILT_IN`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from cliperase_fast.config import UnlearnConfig, read_options
from cliperase_fast.errors import InputError
from cliperase_fast.terms import nearest_name
from cliperase_fast.unlearning.methods.balanced import Balanced
from cliperase_fast.unlearning.methods.base import DATA, Method
from cliperase_fast.unlearning.methods.calibrated import Calibrated
from cliperase_fast.unlearning.methods.cliperase import CLIPErase
from cliperase_fast.unlearning.methods.gradient_ascent import GradientAscent
from cliperase_fast.unlearning.methods.gradient_difference import GradientDifference
from cliperase_fast.unlearning.methods.kl_minimization import KlMinimization
from cliperase_fast.unlearning.methods.masked_distillation import MaskedDistillation
from cliperase_fast.unlearning.methods.multidelete import MultiDelete
from cliperase_fast.unlearning.methods.relabel import Relabel
from cliperase_fast.unlearning.methods.retain_finetune import RetainFinetune
from cliperase_fast.unlearning.methods.salun import SalUn
from cliperase_fast.unlearning.methods.slug import SingleLayerUnlearningGradient
from cliperase_fast.unlearning.methods.ssd import SelectiveSynapticDampening
from cliperase_fast.unlearning.methods.task_vector import NegMerge, TaskVector
from cliperase_fast.unlearning.methods.text_projection import TextProjection

M = TypeVar("M", bound=type[Method])

_BUILT_IN: tuple[type[Method], ...] = (
    CLIPErase,
    Calibrated,
    Balanced,
    GradientAscent,
    GradientDifference,
    KlMinimization,
    MaskedDistillation,
    MultiDelete,
    Relabel,
    RetainFinetune,
    SalUn,
    TextProjection,
    SelectiveSynapticDampening,
    SingleLayerUnlearningGradient,
    TaskVector,
    NegMerge,
)
_METHODS: dict[str, type[Method]] = {}


class MethodTable(Mapping[str, str]):
    """name -> summary; printed as a table."""

    def __init__(self, found: Mapping[str, type[Method]]) -> None:
        self._found = dict(found)

    def __getitem__(self, name: str) -> str:
        return self._found[name].summary

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        rows = [("method", "options", "needs", "summary", "source")]
        for name, method in self._found.items():
            options = ", ".join(spec.name for spec in dataclasses.fields(method.Options)) or "-"
            rows.append((name, options, ", ".join(method.needs), method.summary, method.source))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def methods() -> MethodTable:
    """Return every method with its summary in one line. Prints as a table."""
    return MethodTable(_METHODS)


def register_method(method: M) -> M:
    """Make a subclass of `Method` known by its name; also a class decorator. Returns the class.

    Raises InputError if the class does not describe itself as `Method` says, or the name is taken.
    """
    where = getattr(method, "__qualname__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise InputError(f"{where} is not a subclass of cliperase_fast.unlearning.methods.Method")
    for attribute in ("name", "summary", "source"):
        text = getattr(method, attribute, None)
        if not isinstance(text, str) or not text or "\n" in text:
            raise InputError(f"{where}.{attribute} is {text!r}; give a string of one line")
    missing = sorted(getattr(method, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}: define it")
    if not re.fullmatch("[a-z][a-z0-9_]*", method.name):
        raise InputError(f"{where}.name is {method.name!r}; use lower-case letters, digits and underscores")
    if not (inspect.isclass(method.Options) and dataclasses.is_dataclass(method.Options)):
        raise InputError(f"{where}.Options is {method.Options!r}; give a dataclass")
    known = {spec.name for spec in dataclasses.fields(UnlearnConfig)}
    for attribute, values, allowed in (
        ("needs", method.needs, DATA),
        ("unused_settings", method.unused_settings, known),
    ):
        for value in values:
            if value not in allowed:
                raise InputError(f"{where}.{attribute} has {value!r}, which is unknown{nearest_name(value, allowed)}")
    taken = _METHODS.get(method.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (method.__module__, method.__qualname__):
        raise InputError(f"the method name {method.name!r} is taken by {taken.__qualname__}: choose another name")
    _METHODS[method.name] = method
    return method


def make_method(settings: UnlearnConfig) -> tuple[Method, UnlearnConfig]:
    """Return the settings' method, and the settings with its options filled in and with numbers where they are known.

    Raises InputError for an unknown method or option, or a value that is not of the option's type.
    """
    method = _METHODS.get(settings.method)
    if method is None:
        hint = nearest_name(settings.method, _METHODS)
        raise InputError(f"method={settings.method!r} is not one of {', '.join(_METHODS)}{hint}")
    options = read_options(method.Options, settings.method_options, f"method {method.name!r}")
    settings = dataclasses.replace(settings, method_options=dataclasses.asdict(options))
    settings = settings.resolved(method.unused_settings)
    return method(settings, options), settings


for _method in _BUILT_IN:
    register_method(_method)
