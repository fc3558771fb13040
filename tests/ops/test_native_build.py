"""The extension is optional, reports why it is missing, and does not use torch's C++ interface."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest

from cliperase_fast.ops.native import extension

ROOT = Path(__file__).parents[2]


STALE = f"_C{EXTENSION_SUFFIXES[0]}"  # what an earlier build left


def setup(*words: object, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with only Python's own folder on the path."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "CLIPERASE_EXTENSION")}
    kept["PATH"] = str(Path(sys.executable).parent)
    command = [sys.executable, "setup.py", *map(str, words)]
    return subprocess.run(command, cwd=source, env=kept | environment, capture_output=True, text=True, check=False)


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return setup("build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp", **environment)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the source without build outputs, in a folder whose name has a space."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("cliperase_fast", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C*", "__pycache__", "results"))
    return folder


def failing_compiler(folder: Path) -> str:
    compiler = folder / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: not a compiler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_an_install_without_a_compiler_succeeds_and_records_the_reason(tmp_path, monkeypatch):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    reason = tmp_path / "lib" / "cliperase_fast" / "_C_missing.txt"
    assert "there is no C++ compiler: apt install g++" in reason.read_text()
    assert "without its compiled extension: there is no C++ compiler" in done.stdout + done.stderr
    monkeypatch.setattr(extension, "_REASON_FILE", reason)
    words = extension._reason(ModuleNotFoundError())
    assert "not built: there is no C++ compiler" in words and "install cliperase_fast again" in words


def test_a_failing_compiler_is_recorded_with_its_first_error(tmp_path):
    done = build(tmp_path, CXX=failing_compiler(tmp_path))
    assert done.returncode == 0, done.stderr
    reason = (tmp_path / "lib" / "cliperase_fast" / "_C_missing.txt").read_text()
    assert "could not set the build up" in reason and "rror" in reason


def test_a_required_extension_that_cannot_be_built_is_an_error(tmp_path):
    done = build(tmp_path, CLIPERASE_EXTENSION="1")
    assert done.returncode != 0 and "CLIPERASE_EXTENSION=1, but there is no C++ compiler" in done.stderr


def test_a_disabled_extension_is_recorded_as_disabled(tmp_path):
    done = build(tmp_path, CLIPERASE_EXTENSION="0")
    assert done.returncode == 0
    assert "CLIPERASE_EXTENSION=0 at install" in (tmp_path / "lib" / "cliperase_fast" / "_C_missing.txt").read_text()


def test_an_invalid_setting_is_refused_before_anything_is_built(tmp_path):
    done = build(tmp_path, CLIPERASE_EXTENSION="off")
    assert done.returncode != 0 and "CLIPERASE_EXTENSION=off must be 0" in done.stderr
    assert not (tmp_path / "lib").exists()


def names_in(wheels: Path) -> set[str]:
    (wheel,) = wheels.glob("*.whl")
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cliperase_fast/")}


@pytest.mark.parametrize("why", ["disabled", "no compiler", "a failing compiler"])
def test_a_wheel_without_the_extension_contains_no_files_of_an_earlier_build(checkout, why):
    library = checkout / "build" / "lib"
    package = library / "cliperase_fast"
    package.mkdir(parents=True)
    for name in (STALE, "_C.so", "removed_since.py"):
        (package / name).write_text("of an earlier build")
    environments = {
        "disabled": {"CLIPERASE_EXTENSION": "0"},
        "no compiler": {},
        "a failing compiler": {"CXX": failing_compiler(checkout)},
    }
    done = setup(
        "build", "--build-lib", library, "--build-temp", checkout / "temp", "bdist_wheel", "--dist-dir", "wheels",
        source=checkout, **environments[why],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = names_in(checkout / "wheels")
    assert "functional.py" in names and "_C_missing.txt" in names
    assert not names & {STALE, "_C.so", "removed_since.py"}


def test_a_checkout_without_the_extension_contains_none_of_an_earlier_build(checkout):
    """An editable install builds in the source folder, and leaves the extension of another Python there."""
    package = checkout / "cliperase_fast"
    for name in (STALE, "_C.cpython-39-another.so"):
        (package / name).write_text("of an earlier build")
    done = setup("build_ext", "--inplace", source=checkout, CXX=failing_compiler(checkout))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in package.glob("_C*")} == {"_C.cpython-39-another.so", "_C_missing.txt"}
    assert "could not set the build up" in (package / "_C_missing.txt").read_text()


def test_an_editable_install_without_a_compiler_succeeds(checkout):
    done = setup("-q", "editable_wheel", "--dist-dir", "wheels", source=checkout)
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler" in (checkout / "cliperase_fast" / "_C_missing.txt").read_text()


def test_a_folder_with_the_name_of_the_package_as_prefix_is_not_packaged(checkout):
    shutil.copytree(checkout / "cliperase_fast", checkout / "cliperase_fast_old")
    done = setup("-q", "build_py", "--build-lib", checkout / "lib", source=checkout)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (checkout / "lib").iterdir()] == ["cliperase_fast"]


WITHOUT = """
import sys
sys.modules["cliperase_fast._C"] = None
import torch, cliperase_fast as cf
from cliperase_fast.errors import InputError
from cliperase_fast.validation import choose
status = cf.backends()["native"]
assert not status.available and "extension" in status.reason, status
features = torch.nn.functional.normalize(torch.randn(300, 8), dim=1)
assert choose("auto", features, features).name == "torch"
assert cf.functional.clip_loss(features, features, 10.0).isfinite()
try:
    cf.functional.clip_loss(features, features, 10.0, backend="native")
except InputError as error:
    assert "backend='native' is not available here: the extension" in str(error), error
else:
    raise AssertionError("it ran")
"""


def test_the_other_backends_work_without_the_extension():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_extension_with_another_interface_number_is_not_used(monkeypatch):
    assert extension.why_missing() is None
    monkeypatch.setattr(extension, "_INTERFACE", extension._INTERFACE + 1)
    assert "another version of the source; install cliperase_fast again" in extension.why_missing()


def test_cuda_kernels_with_another_interface_number_are_not_used(monkeypatch):
    cuda = SimpleNamespace(INTERFACE=extension._CUDA_INTERFACE)
    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(cuda=cuda))
    assert extension.why_no_cuda() is None
    cuda.INTERFACE += 1
    assert "the CUDA kernels were built from another version" in extension.why_no_cuda()


def test_the_extension_uses_no_symbol_of_torch():
    names = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", extension.load().__file__],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert any("PyModule" in name for name in names)
    foreign = [name for name in names if any(part in name for part in ("at::", "c10::", "torch::", "cublas"))]
    assert not foreign


@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_an_unknown_instruction_set_is_refused_and_the_known_ones_are_listed(monkeypatch, name):
    cpu = extension.load().cpu
    known = "use amx, avx512_bf16, avx512, avx2 or portable"
    with pytest.raises(ValueError, match=f"instruction set {name}x is not available here; {known}"):
        cpu.instruction_set(name + "x")
    monkeypatch.setenv("CLIPERASE_CPU", name + "x")
    assert f"CLIPERASE_CPU={name}x: instruction set {name}x is not available" in extension.why_missing()
