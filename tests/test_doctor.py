"""`cliperase-fast doctor`."""

import importlib.metadata
import json

import pytest
import torch

from cliperase_fast import cli
from cliperase_fast.cli import doctor
from cliperase_fast.ops import registry


def found(capsys, *words):
    code = cli.main(["doctor", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def installed(monkeypatch):
    """Replace the requirements in the package's metadata."""

    def set_to(*requirements):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))

    set_to("torch>=2")
    return set_to


def test_every_backend_that_is_here_passes_its_self_test(capsys, installed):
    code, told = found(capsys)
    assert code == 0 and told["problems"] == []
    for name, status in registry.backends().items():
        states = [test["state"] for test in told["backends"] if test["name"] == name]
        assert states == (["ok"] if status.available else ["not available"])
    assert all(0 < test["error"] <= doctor.TOLERANCE for test in told["backends"] if test["state"] == "ok")


def test_the_text_names_libraries_compilers_devices_and_backends(capsys, installed):
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    for part in ("libraries", torch.__version__.partition("+")[0], "compilers", "cmake", "devices", "cpu", "eager"):
        assert part in told
    assert told.endswith("Everything that is installed works.\n")


@pytest.mark.parametrize("fault", ["wrong", "not finite", "raises"])
def test_a_backend_that_fails_is_a_problem_and_exit_code_1(fault, capsys, installed, monkeypatch):
    backend = registry.REGISTRY["torch"]
    real = backend.load("cpu")

    def sweep(inputs):
        if fault == "raises":
            raise RuntimeError("the compiler failed\nin line 3")
        retention, consistency = real.sweep(inputs)
        return retention * (1 + 1e-3 if fault == "wrong" else torch.nan), consistency

    monkeypatch.setitem(backend.loaded, "cpu", real._replace(sweep=sweep))
    code, told = found(capsys)
    assert code == 1
    (problem,) = told["problems"]
    said = {"wrong": "differ from float64", "not finite": "are not finite", "raises": "the compiler failed in line 3"}
    assert problem.startswith("the backend torch fails on cpu: ") and said[fault] in problem


def test_libraries_that_are_missing_or_too_old_are_problems_unless_optional(capsys, installed):
    installed(
        "torch>=999", "no-such-library>=1", 'other-library>=2; extra == "lora"',
        'torchvision>=999; extra == "transformers"', "numpy>=1; python_version < '3'",
    )  # fmt: skip
    code, told = found(capsys)
    assert code == 1
    states = {one["name"]: (one["state"], one["extra"]) for one in told["libraries"]}
    assert states == {
        "torch": ("wrong", None),
        "no-such-library": ("missing", None),
        "other-library": ("missing", "lora"),
        "torchvision": ("wrong", "transformers"),
    }
    assert [problem.split()[0] for problem in told["problems"]] == ["torch", "no-such-library", "torchvision"]


def test_a_library_that_cannot_be_imported_is_a_problem_unless_optional(capsys, installed, monkeypatch):
    real = doctor.importlib.import_module

    def imported(name, *more):
        if name in ("torchvision", "PIL", "peft"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *more)

    monkeypatch.setattr(doctor.importlib, "import_module", imported)
    installed("torch>=2", "torchvision", "pillow", 'peft; extra == "lora"')
    code, told = found(capsys)
    assert code == 1
    assert {one["name"]: one["state"] for one in told["libraries"]} == {
        "torch": "ok", "torchvision": "broken", "pillow": "broken", "peft": "ok"
    }  # fmt: skip
    assert [problem.split()[0] for problem in told["problems"]] == ["torchvision", "pillow"]
    assert told["problems"][0].endswith("cannot be imported: RuntimeError: operator torchvision::nms does not exist")
    assert cli.main(["doctor"]) == 1
    assert 'cannot be imported: pip install --force-reinstall "torchvision"' in capsys.readouterr().out
