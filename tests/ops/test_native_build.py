"""The extension is optional, says why it is missing, and knows nothing of torch's C++ interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliperase_fast.ops.native import extension

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """setup.py build_ext where only python and what is installed beside it are on the path."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "CLIPERASE_EXTENSION")}
    kept["PATH"] = str(Path(sys.executable).parent)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_install_goes_on_and_leaves_the_reason(tmp_path, monkeypatch):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    reason = tmp_path / "lib" / "cliperase_fast" / "_C_missing.txt"
    assert "there is no C++ compiler: apt install g++" in reason.read_text()
    assert "without its compiled extension: there is no C++ compiler" in done.stdout + done.stderr
    monkeypatch.setattr(extension, "_REASON_FILE", reason)
    words = extension._reason(ModuleNotFoundError())
    assert "not built: there is no C++ compiler" in words and "install cliperase_fast again" in words


def test_a_compiler_that_fails_is_named_with_its_first_error(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: this is no compiler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    reason = (tmp_path / "lib" / "cliperase_fast" / "_C_missing.txt").read_text()
    assert "could not set the build up" in reason and "rror" in reason


def test_who_insists_on_the_extension_gets_an_error(tmp_path):
    done = build(tmp_path, CLIPERASE_EXTENSION="1")
    assert done.returncode != 0 and "CLIPERASE_EXTENSION=1, but there is no C++ compiler" in done.stderr


def test_who_does_without_is_told_so_later(tmp_path):
    done = build(tmp_path, CLIPERASE_EXTENSION="0")
    assert done.returncode == 0
    assert "CLIPERASE_EXTENSION=0 at install" in (tmp_path / "lib" / "cliperase_fast" / "_C_missing.txt").read_text()


WITHOUT = """
import sys
sys.modules["cliperase_fast._C"] = None
import torch, cliperase_fast as cf
from cliperase_fast.errors import InputError
from cliperase_fast.ops import choose
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


def test_everything_else_works_without_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_extension_of_other_source_is_not_used(monkeypatch):
    assert extension.why_missing() is None
    monkeypatch.setattr(extension, "_INTERFACE", extension._INTERFACE + 1)
    assert "another version of the source; install cliperase_fast again" in extension.why_missing()


def test_it_needs_no_symbol_of_torch():
    names = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", extension.load().__file__],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert any("PyModule" in name for name in names)
    foreign = [name for name in names if any(part in name for part in ("at::", "c10::", "torch::", "cublas"))]
    assert not foreign


@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_a_choice_of_instruction_set_that_is_wrong_is_refused_with_the_known_ones(monkeypatch, name):
    cpu = extension.load().cpu
    with pytest.raises(ValueError, match=f"no instruction set {name}x here; known are avx512, avx2 and portable"):
        cpu.instruction_set(name + "x")
    monkeypatch.setenv("CLIPERASE_CPU", name + "x")
    assert f"CLIPERASE_CPU={name}x: no instruction set" in extension.why_missing()
