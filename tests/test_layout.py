"""The layout of the package: which way imports flow, how long files are, and what an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "cliperase_fast"
LONGEST = 500  # lines of a file

# A part of the package is a subpackage or a module at its top. It imports only parts of the lines below its own.
LAYERS = [
    {PACKAGE},  # its __init__.py
    {"cli"},
    {"comparing", "demo", "ledger", "inspecting", "querying"},
    {"export"},
    {"integrations"},
    {"unlearning"},
    {"auditing"},
    {"report"},
    {"evaluation", "planning"},
    {"models", "data"},
    {"losses"},
    {"contrastive"},
    {"functional"},
    {"validation"},
    {"distributed"},
    {"ops"},
    {"config", "demo_models", "tensor_files"},
    {"terms", "storage", "progress", "defaults", "allocation", "extras"},
    {"coercion", "reading"},
    {"errors", "_version", "plurals"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


class Import(NamedTuple):
    target: str
    only_for_types: bool  # under `if TYPE_CHECKING`


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def part_of(module: str) -> str:
    """The subpackage or top module that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(module: str) -> Iterator[Import]:
    """Every module of the package that `module` imports, inside functions and for type checkers too."""

    def walk(node: ast.AST, only_for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, only_for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (origin(module, node.level), node.module)))
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield Import(below if below in MODULES else base, only_for_types)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, only_for_types or is_type_checking(node))

    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return (found for found in walk(tree, False) if found.target in MODULES)


def origin(module: str, level: int) -> str:
    """The package that a relative import starts from; empty for an absolute one."""
    if level == 0:
        return ""
    parts = module.split(".") + (["__init__"] if MODULES[module].name == "__init__.py" else [])
    return ".".join(parts[:-level])


IMPORTS = {module: list(imported(module)) for module in MODULES}


def test_every_part_of_the_package_has_a_layer():
    assert {part_of(module) for module in MODULES} <= LEVEL.keys()


def test_modules_do_not_import_each_other_in_a_cycle():
    graph = {
        module: {found.target for found in imports if not found.only_for_types} for module, imports in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_nothing_imports_upwards():
    upwards = [
        f"{module} imports {found.target}"
        for module, imports in IMPORTS.items()
        for found in imports
        if (here := part_of(module)) != (there := part_of(found.target)) and LEVEL[there] <= LEVEL[here]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_file_is_longer_than_500_lines():
    sources = [
        path
        for folder in (PACKAGE, "benchmarks", "csrc", "tests", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".c", ".sh"}
    ]
    assert len(sources) > len(MODULES)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    too_long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > LONGEST}
    assert not too_long


def test_importing_the_package_loads_only_what_the_losses_need():
    heavy = ("open_clip", "transformers", "matplotlib", "sklearn", "torchvision", "triton", "PIL")
    code = f"import sys, cliperase_fast; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_two_test_files_share_a_name():
    """pytest imports test files by their bare names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
