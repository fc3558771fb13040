"""Tests of `make demo` and `make test`: in either order, any number of times, with other files in the folder.

The Python of these tests only records its arguments, because installing takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RECORDER = """#!/bin/sh
echo "threads=$OMP_NUM_THREADS backend=$CLIPERASE_BACKEND path=$PYTHONPATH safe=$PYTHONSAFEPATH python $*" >> "$RECORD"
case "$*" in *"-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;; esac
for failing in $FAILING; do case "$*" in *"-m $failing"*) exit 1;; esac; done
exit 0
"""


class Clone:
    def __init__(self, folder: Path) -> None:
        self.folder, self.record, self.python = folder / "a clone", folder / "record", folder / "a python"
        (self.folder / "csrc").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt"):
            shutil.copy(ROOT / name, self.folder)
        self.python.write_text(RECORDER)
        self.python.chmod(0o755)

    def make(self, target: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        """Run make; return its outcome and the recorded calls of Python."""
        self.record.write_text("")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MAKE", "MFLAGS", "CLIPERASE_", "OMP_")) and name != "PYTHONPATH"
        }
        kept |= {"RECORD": str(self.record), **environment}
        command = ["make", target, f"PYTHON={self.python}"]
        done = subprocess.run(command, cwd=self.folder, env=kept, capture_output=True, text=True, check=False)
        return done, [line for line in self.record.read_text().splitlines() if not line.endswith(" -I -c ")]


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call.partition("pip install ")[2] for call in calls if "pip install" in call and "--upgrade" not in call]


def test_the_docs_are_built_strictly_checked_and_installed_for_once(clone):
    done, calls = clone.make("docs")
    assert done.returncode == 0, done.stderr
    assert installs(calls) == ["--editable .", "cliperase_fast[docs]"]
    assert any("-m mkdocs build" in call and "--strict" in call for call in calls)
    assert any("docs/site/check.py build/site" in call for call in calls)
    assert installs(clone.make("docs")[1]) == []


@pytest.mark.parametrize("first", ["demo", "test"])
def test_each_command_installs_what_it_uses_and_nothing_twice(clone, first):
    wanted = {"demo": ["--editable ."], "test": ["--editable .", "cliperase_fast[dev]"]}
    done, calls = clone.make(first)
    assert done.returncode == 0, done.stderr
    assert installs(calls) == wanted[first]
    second = "test" if first == "demo" else "demo"
    assert installs(clone.make(second)[1]) == [one for one in wanted[second] if one not in wanted[first]]
    for again in ("test", "demo", "test"):
        done, calls = clone.make(again)
        assert done.returncode == 0 and installs(calls) == []


@pytest.mark.parametrize(
    ("failing", "verdict"),
    [
        ("", "lint passed, tests passed"),
        ("ruff", "lint FAILED, tests passed"),
        ("mypy", "lint FAILED, tests passed"),
        ("pytest", "lint passed, tests FAILED"),
        ("mypy pytest", "lint FAILED, tests FAILED"),
    ],
)
def test_lint_and_tests_both_run_and_are_reported(clone, failing, verdict):
    clone.make("test")
    done, calls = clone.make("test", FAILING=failing)
    assert f"make test: {verdict}" in done.stdout
    assert (done.returncode == 0) == (not failing)
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert any(f"-m {tool}" in call for call in calls), tool


def test_only_the_number_of_threads_is_passed_from_the_caller_to_the_tests(clone):
    given = {"CLIPERASE_BACKEND": "eager", "PYTHONPATH": "/elsewhere"}
    (call,) = (call for call in clone.make("test", **given)[1] if "-m pytest" in call)
    assert call.startswith("threads=1 backend= path= safe=1 python -I -m pytest")
    (call,) = (call for call in clone.make("test", OMP_NUM_THREADS="8")[1] if "-m pytest" in call)
    assert call.startswith("threads=8 ")


def test_a_clone_that_was_moved_is_installed_again(clone):
    clone.make("test")
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    assert installs(clone.make("test")[1]) == ["--editable .", "cliperase_fast[dev]"]
    assert installs(clone.make("demo")[1]) == []


def test_a_failed_install_is_repeated(clone):
    done, _ = clone.make("demo", FAILING="pip")
    assert done.returncode != 0
    done, calls = clone.make("demo")
    assert done.returncode == 0 and installs(calls) == ["--editable ."]


def test_other_files_in_the_folder_do_not_change_the_verdict_of_ruff(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests" / "distributed", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))

    def judged() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ruff", "check", "--no-cache", "tests"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert judged().returncode == 0, judged().stdout
    for helper in (tmp_path / "tests").glob("*.py"):
        (tmp_path / helper.stem).mkdir()
    (tmp_path / "tiny.py").write_text("def (")
    assert judged().returncode == 0, judged().stdout
