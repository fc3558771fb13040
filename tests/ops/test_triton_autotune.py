"""Tests of the search for launch configurations, with made-up times instead of a GPU's."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from triton.runtime.errors import OutOfResources

from cliperase_fast.errors import InputError
from cliperase_fast.ops.triton import autotune
from cliperase_fast.ops.triton.configs import SHARED, TABLE, Config, Configs

SHIPPED = TABLE[9][True, False]
LIMIT = 227 << 10
DEVICE = torch.device("cuda", 0)


def wanted(configs: Configs, way: str) -> float:
    """Return a time that is shortest for 128 x 128 and two stages forward, and for 256 x 64 backward."""
    config = getattr(configs, way)
    shape = (128, 128) if way.startswith("forward") else (256, 64)
    return 1.0 + abs(config.block_m - shape[0]) + abs(config.block_n - shape[1]) + config.stages + config.block_k


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretend that there is a GPU with a name and a size of memory; files are saved in tmp_path."""
    monkeypatch.setenv("CLIPERASE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU / 80GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    properties = type("Properties", (), {"shared_memory_per_block_optin": LIMIT})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    autotune.load.cache_clear()
    return tmp_path


def fields_of(configs: Configs) -> list[Config]:
    return [getattr(configs, field.name) for field in fields(Configs)]


def ask(timer=wanted, width: int = 768) -> Configs:
    return autotune.configs(DEVICE, torch.bfloat16, width, SHIPPED, timer)


def must_not_run(configs: Configs, way: str) -> float:
    raise AssertionError("unexpected search")


def test_there_is_no_search_without_the_variable(gpu, monkeypatch):
    monkeypatch.delenv(autotune.VARIABLE, raising=False)
    assert ask(must_not_run) == SHIPPED
    assert not list(gpu.iterdir())


def test_the_fastest_configuration_of_each_kernel_is_found_saved_and_reused(gpu, monkeypatch, capsys):
    monkeypatch.setenv(autotune.VARIABLE, "1")
    found = ask()
    assert (found.forward.block_m, found.forward.block_n, found.forward.stages) == (128, 128, 2)
    for config in (found.backward, found.backward_groups):
        assert (config.block_m, config.block_n, config.stages) == (256, 64, 2)
    assert "tuning bfloat16, width 1024, forward" in capsys.readouterr().err
    (path,) = (gpu / "triton").iterdir()
    assert path.name.startswith("some-gpu---80gb-torch") and path.suffix == ".json"
    autotune.load.cache_clear()
    assert ask(must_not_run) == found
    monkeypatch.delenv(autotune.VARIABLE)
    assert ask(must_not_run) == found
    assert ask(must_not_run, width=64) == SHIPPED  # another width has not been searched
    monkeypatch.setenv(autotune.VARIABLE, "0")
    assert ask(must_not_run) == SHIPPED


def test_there_is_no_search_during_graph_capture(gpu, monkeypatch):
    monkeypatch.setenv(autotune.VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(must_not_run) == SHIPPED


def test_configurations_that_run_out_of_shared_memory_are_skipped(gpu, monkeypatch):
    def picky(configs: Configs, way: str) -> float:
        if getattr(configs, way) != getattr(SHIPPED, way):
            raise OutOfResources(300 << 10, LIMIT, "shared memory")
        return 1.0

    monkeypatch.setenv(autotune.VARIABLE, "1")
    assert ask(picky) == SHIPPED


def test_other_failures_of_a_configuration_are_raised(gpu, monkeypatch):
    def broken(configs: Configs, way: str) -> float:
        raise RuntimeError("illegal memory access")

    monkeypatch.setenv(autotune.VARIABLE, "1")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ask(broken)
    assert not (gpu / "triton").exists()


def test_candidates_fit_the_shared_memory_and_divide_the_cached_rows():
    for itemsize in (2, 4):
        found = list(autotune.candidates(itemsize, LIMIT))
        assert len(found) == len(set(found)) > 20
        for config in found:
            tiles = (config.block_m + config.block_n) * config.block_k * itemsize * config.stages
            assert tiles * (1 + config.shared) <= LIMIT
            assert 256 % config.block_m == 0
    assert len(list(autotune.candidates(2, 100 << 10))) < len(list(autotune.candidates(2, LIMIT)))
    for config in (Config(64, 128, 64, 4, 3), Config(64, 64, 64, 4, 3), *(c for c in fields_of(SHARED[9]))):
        assert config in autotune.candidates(2, LIMIT)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"forward": {"block_m": 1}}}'])
def test_the_error_names_a_damaged_file(gpu, content):
    path = autotune.saved_path(DEVICE)
    autotune.save(path, {"bfloat16, width 1024": SHIPPED})
    path.write_text(content, encoding="utf-8")
    autotune.load.cache_clear()
    with pytest.raises(InputError, match=r"some-gpu---80gb.*delete it"):
        ask(must_not_run)


def test_an_invalid_value_of_the_variable_is_an_error(gpu, monkeypatch):
    monkeypatch.setenv(autotune.VARIABLE, "yes")
    with pytest.raises(InputError, match="CLIPERASE_AUTOTUNE=yes must be 1"):
        ask(must_not_run)
