"""Completion scripts for shells, generated from the parser.

The scripts hold all words themselves: starting Python for each press of the tab key would take seconds, because the
package imports torch.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "cliperase-fast"
_FUNCTION = "_cliperase_fast"


@dataclass(frozen=True)
class _Flag:
    """names: with their dashes. takes_value: whether a value follows. values: those to offer; empty for any."""

    names: tuple[str, ...]
    takes_value: bool
    values: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class _Command:
    name: str
    help: str
    flags: tuple[_Flag, ...]
    words: tuple[str, ...]  # to offer for its positional argument


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script for one of `SHELLS`."""
    commands = list(_commands(parser))
    if shell == "fish":
        return "".join(f"{line}\n" for line in _fish(commands))
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + "".join(f"{line}\n" for line in _bash(commands))


def _commands(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    yield _Command("", "", tuple(_flags(parser)), ())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                words = [
                    str(choice) for one in inner._actions if not one.option_strings for choice in one.choices or ()
                ]
                yield _Command(name, helps[name], tuple(_flags(inner)), tuple(words))


def _flags(parser: argparse.ArgumentParser) -> Iterator[_Flag]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            values = tuple(map(str, action.choices or _known_values(action.dest)))
            text = (action.help or "").partition("; ")[0].partition(" (default")[0].replace("%%", "%")
            yield _Flag(tuple(action.option_strings), action.nargs != 0, values, text)


def _known_values(name: str) -> tuple[str, ...]:
    """Return what to offer for a flag whose values are open: data sources and methods."""
    if name in ("data", "test_data", "validation_data"):
        from cliperase_fast.data.sources import SOURCES

        return tuple(source.kind + ":" * source.needs_path for source in SOURCES)
    if name == "method":
        from cliperase_fast.unlearning.methods import methods

        return tuple(methods())
    return ()


def _bash(commands: list[_Command]) -> Iterator[str]:
    names = [command.name for command in commands if command.name]
    yield f"{_FUNCTION}() {{"
    yield '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" words="" i'
    yield "    for ((i = 1; i < COMP_CWORD; i++)); do"
    yield '        case "${COMP_WORDS[i]}" in'
    yield f'            {"|".join(names)}) command="${{COMP_WORDS[i]}}"; break ;;'
    yield "        esac"
    yield "    done"
    yield '    case "$command $before" in'
    for command in commands:
        for flag in command.flags:
            if flag.takes_value:
                patterns = "|".join(shlex.quote(f"{command.name} {name}") for name in flag.names)
                yield f"        {patterns}) words={shlex.quote(' '.join(flag.values))} ;;"
    yield "        *)"
    yield '            case "$command" in'
    for command in commands:
        words = [*command.words, *(name for flag in command.flags for name in flag.names)]
        if not command.name:
            words = [*names, *words]
        yield f"                {command.name or shlex.quote('')}) words={shlex.quote(' '.join(words))} ;;"
    yield "            esac ;;"
    yield "    esac"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "}"
    yield f"complete -o default -F {_FUNCTION} {_PROGRAM}"


def _fish(commands: list[_Command]) -> Iterator[str]:
    for command in commands:
        if not command.name:
            when = "__fish_use_subcommand"
        else:
            yield f"complete -c {_PROGRAM} -n __fish_use_subcommand -f -a {command.name} -d {_quoted(command.help)}"
            when = f"__fish_seen_subcommand_from {command.name}"
        start = f"complete -c {_PROGRAM} -n {_quoted(when)}"
        if command.words:
            yield f"{start} -f -a {_quoted(' '.join(command.words))}"
        for flag in command.flags:
            for name in flag.names:
                kind = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                value = f" -x -a {_quoted(' '.join(flag.values))}" if flag.values else " -r" if flag.takes_value else ""
                yield f"{start} {kind}{value} -d {_quoted(flag.help)}"


def _quoted(text: str) -> str:
    """Quote for fish, where a backslash escapes a quote inside quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
