"""Tests of the benchmarks in an installed package, where they are cliperase_fast.benchmarks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cliperase_fast.config import RECIPES
from cliperase_fast.report.rendering import TEMPLATES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel holds, extension included if there is one; the folder is one to put on the path."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for extension in (ROOT / "cliperase_fast").glob("_C*.so"):
        shutil.copy(extension, folder / "cliperase_fast")
    return folder


def test_benchmarks_are_in_a_wheel_without_a_package_of_that_name(installed):
    assert [entry.name for entry in installed.iterdir()] == ["cliperase_fast"]
    assert (installed / "cliperase_fast" / "benchmarks" / "loss.py").is_file()
    assert not [path for path in installed.rglob("results") if path.is_dir()]  # committed records stay in the checkout
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import benchmarks" not in text and "from benchmarks" not in text, f"{path.name}: import it as `.`"


def test_a_wheel_has_the_files_that_the_package_reads(installed):
    folders = [path for folder in (TEMPLATES, RECIPES) for path in folder.iterdir()]
    for name in ("ops/measured.json", *(path.relative_to(ROOT / "cliperase_fast").as_posix() for path in folders)):
        assert (installed / "cliperase_fast" / name).read_bytes() == (ROOT / "cliperase_fast" / name).read_bytes()


def test_bench_from_an_installed_package_leaves_its_record_in_the_current_folder(installed, tmp_path):
    command = [sys.executable, "-m", "cliperase_fast.cli", "bench", "loss", "--", "--sizes", "32", "--widths", "8"]
    command += ["--dtypes", "float32", "--providers", "ours-torch", "--rounds", "1", "--no-plots", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ours-torch" in done.stdout
    record = json.loads((tmp_path / "loss-cpu.json").read_text())
    assert record["command"].startswith("cliperase-fast bench loss --sizes 32") and record["commit"] == "unknown"
