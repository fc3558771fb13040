"""Numbers of things in messages."""

from __future__ import annotations


def counted(number: int, noun: str, form: str = "") -> str:
    """Return "1 pair" or "3 pairs". form: of the number, such as "," for thousands separators."""
    return f"{number:{form}} {noun}" + ("" if number == 1 else "s")


def more_classes(number: int) -> str:
    """Return "1 more class" or "3 more classes"."""
    return f"{number:,} more {'class' if number == 1 else 'classes'}"
