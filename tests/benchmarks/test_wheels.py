"""`make wheels`, with recorded commands in place of builds and installs."""

from __future__ import annotations

import json
import zipfile

import pytest

from cliperase_fast.benchmarks import wheels, write_docs

NATIVE = {"name": "native", "state": "ok", "error": 2e-7, "reason": ""}


def wheel_with(folder, *names):
    path = folder / "cliperase_fast-0.2.0-cp311-cp311-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return (wheel, torch) of every environment; python3.9 cannot build a wheel, and torch 9 fails."""
    tried = []

    def build(tools, sdist, python):
        if python == "python3.9":
            raise wheels.Failure("requires Python 3.10")
        return tmp_path / f"p-1-{python}-x.whl"

    def attempt(python, wheel, torch):
        if torch == "torch==9":
            raise wheels.Failure("an operator is missing")
        tried.append((python, torch))
        versions = dict.fromkeys(wheels._VERSIONS, "1") | {"torch": torch.partition("==")[2] or "2.14.1"}
        return {"python": python.removeprefix("python"), **versions, "wheel": wheel.name, "error": 2e-7, "steps": 4}

    monkeypatch.setattr(wheels, "RECORD", tmp_path / "wheels.json")
    monkeypatch.setattr(wheels, "tools_in", lambda folder: folder)
    monkeypatch.setattr(wheels, "build_sdist", lambda tools: tmp_path / "p.tar.gz")
    monkeypatch.setattr(wheels, "build_wheel", build)
    monkeypatch.setattr(wheels, "try_wheel", attempt)
    return tried


def test_each_python_builds_one_wheel_for_all_versions_of_torch_and_the_table_shows_them(bench):
    assert wheels.main(["python3.10", "python3.11:2.11.0,2.14.1"]) == 0
    assert bench == [("python3.10", "torch"), ("python3.11", "torch==2.11.0"), ("python3.11", "torch==2.14.1")]
    table = wheels.figures(wheels.RECORD, write_docs.table)
    assert "| 3.10 | 2.14.1 | 1 | 1 | 1 | python3.10-x | 2.0e-07 | 4 |" in table


def test_a_run_replaces_only_that_of_the_same_versions(bench):
    for words in (["python3.11:2.14.1", "python3.9"], ["python3.10", "python3.11"], ["python3.11:2.11.0"]):
        wheels.main(words)
    runs = json.loads(wheels.RECORD.read_text())["runs"]
    assert [(run["python"], run["torch"]) for run in runs] == [
        ("3.10", "2.14.1"),
        ("3.11", "2.11.0"),
        ("3.11", "2.14.1"),
    ]


def test_a_failure_is_printed_and_the_other_environments_still_run(bench, capsys):
    assert wheels.main(["python3.9", "python3.11:9,2.14.1"]) == 1
    assert bench == [("python3.11", "torch==2.14.1")]
    assert len(json.loads(wheels.RECORD.read_text())["runs"]) == 1
    assert capsys.readouterr().err == "requires Python 3.10\nan operator is missing\n"


def test_a_wheel_with_a_library_beside_the_extension_or_without_the_extension_fails(tmp_path):
    module = "cliperase_fast/_C.cpython-311-x86_64-linux-gnu.so"
    wheels.require_own_libraries(wheel_with(tmp_path, "cliperase_fast/__init__.py", module))
    for names in (["cliperase_fast/__init__.py"], [module, "cliperase_fast.libs/libgomp-f9a9ad78.so.1.0.0"]):
        with pytest.raises(wheels.Failure, match="must hold the extension alone"):
            wheels.require_own_libraries(wheel_with(tmp_path, *names))


def test_a_native_backend_that_is_missing_or_wrong_fails():
    assert wheels.native_error({"backends": [NATIVE]}) == 2e-7
    for state in ("failed", "not available"):
        with pytest.raises(wheels.Failure, match=f"native is {state}: it was not built"):
            wheels.native_error({"backends": [{**NATIVE, "state": state, "reason": "it was not built"}]})


@pytest.mark.parametrize("losses", [[1.0, 2.0], [1.0, 2.0, 3.0, float("nan")]])
def test_an_unlearning_that_stopped_early_or_diverged_fails(tmp_path, losses):
    path = tmp_path / "metrics.jsonl"
    lines = [{"total": 1.0}] * wheels.STEPS + [{"validation": {}}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert wheels.steps_in(path) == wheels.STEPS
    path.write_text("\n".join(json.dumps({"total": loss}) for loss in losses))
    with pytest.raises(wheels.Failure, match="finite"):
        wheels.steps_in(path)


def test_the_caller_s_settings_do_not_reach_the_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPERASE_BACKEND", "eager")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    told = wheels.call("env", cwd=tmp_path, CLIPERASE_CUDA="OFF")
    assert "CLIPERASE_CUDA=OFF" in told and "CLIPERASE_BACKEND" not in told and "PYTHONPATH" not in told
    with pytest.raises(wheels.Failure, match=r"ls /nowhere\nended with 2"):
        wheels.call("ls", "/nowhere")
