"""Which backend runs: by name, by environment, by size; and the words for a wrong or missing one."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cliperase_fast import functional, validation
from cliperase_fast.errors import InputError
from cliperase_fast.ops import eager, measured, registry, streaming
from cliperase_fast.ops.registry import Backend, Implementation, backends
from cliperase_fast.ops.sigmoid import Sigmoid
from cliperase_fast.validation import choose, implementation


def pairs(n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(n, 3, dtype=dtype), torch.ones(n, 3, dtype=dtype)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("CLIPERASE_BACKEND", raising=False)


def with_sweep(sweep=eager.sweep):
    return lambda device: Implementation(sweep, Sigmoid(eager.sigmoid), eager.features_kl)


@pytest.fixture
def broken(monkeypatch):
    """A registry with a backend that is missing here, and one that takes only float32 on a GPU."""
    more = {
        "absent": Backend("absent", with_sweep(), "fast", why_missing=lambda: "it needs a moon rock"),
        "picky": Backend("picky", with_sweep(), "fast", devices=("cuda",)),
        "narrow": Backend("narrow", with_sweep(), "fast", dtypes=(torch.float32,)),
    }
    for name, backend in more.items():
        monkeypatch.setitem(registry.REGISTRY, name, backend)


def loaded(name):
    return implementation(choose(name, *pairs()), torch.device("cpu"))


def test_each_name_loads_its_own_sweep():
    assert loaded("eager").sweep is eager.sweep
    assert loaded("torch").sweep is streaming.sweep


def test_auto_is_native_for_what_it_takes():
    for n in (16, 4096):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert choose("auto", *pairs(n, dtype)).name == "native"


def test_auto_without_native_is_eager_for_few_pairs_and_streams_many(monkeypatch):
    assert choose("auto", *pairs(16, torch.float64)).name == "eager"
    assert choose("auto", *pairs(4096, torch.float64)).name == "torch"
    missing = replace(registry.REGISTRY["native"], why_missing=lambda: "no compiler")
    monkeypatch.setitem(registry.REGISTRY, "native", missing)
    assert choose("auto", *pairs(16)).name == "eager"
    assert choose("auto", *pairs(4096)).name == "torch"


def on_a_gpu(n: int, width: int = 768, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(n, width))


@pytest.fixture
def measured_gpu(monkeypatch):
    """A GPU of capability 9.0, on which some sizes were measured; all backends are there."""
    sizes = {2048: "eager", 8192: "torch", 32768: "native", 65536: "triton"}
    monkeypatch.setattr(measured, "TABLE", {"9.0": {"bfloat16": {768: sizes, 1024: {32768: "triton"}}}})
    monkeypatch.setattr(validation, "_ON_GPU", frozenset(registry.REGISTRY))
    native = replace(registry.REGISTRY["native"], devices=("cpu", "cuda"))
    monkeypatch.setitem(registry.REGISTRY, "native", native)
    found = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return found


@pytest.mark.parametrize(
    ("n", "width", "name"),
    [
        (512, 768, "eager"),
        (2048, 768, "eager"),
        (2049, 768, "torch"),
        (30_000, 512, "native"),
        (65_536, 768, "triton"),
        (1_000_000, 768, "triton"),
        (2048, 769, "triton"),
        (2048, 4096, "triton"),
    ],
)
def test_auto_on_a_gpu_is_what_was_fastest_at_the_measured_size_next_above(measured_gpu, n, width, name):
    features = on_a_gpu(n, width)
    assert choose("auto", features, features).name == name


def test_auto_on_a_gpu_that_was_not_measured_streams(measured_gpu):
    half, single = on_a_gpu(32_768), on_a_gpu(32_768, dtype=torch.float32)
    assert choose("auto", single, single).name == "torch"
    assert choose("auto", half, half, single).name == "torch"  # computed in float32
    measured_gpu.major = 8
    assert choose("auto", half, half).name == "torch"


def test_auto_on_a_gpu_passes_over_what_cannot_do_it(measured_gpu, monkeypatch):
    for_native, for_eager = on_a_gpu(32_768), on_a_gpu(2048)
    assert choose("auto", for_native, for_native, loss="sigmoid").name == "torch"
    assert choose("auto", for_eager, for_eager, sharded=True).name == "torch"
    monkeypatch.setattr(validation, "_ON_GPU", frozenset({"eager", "torch", "triton"}))
    assert choose("auto", for_native, for_native).name == "torch"


def test_auto_goes_by_what_was_measured_also_where_that_is_nothing(monkeypatch):
    monkeypatch.setattr(measured, "TABLE", {})
    features = on_a_gpu(32_768)
    assert choose("auto", features, features).name == "torch"


@pytest.mark.parametrize(
    ("value", "name"), [("torch", "torch"), ("eager", "eager"), ("auto", "native"), ("", "native")]
)
def test_the_environment_overrides_auto(monkeypatch, value, name):
    monkeypatch.setenv("CLIPERASE_BACKEND", value)
    assert choose("auto", *pairs()).name == name


def test_a_name_given_in_code_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("CLIPERASE_BACKEND", "eager")
    assert choose("torch", *pairs()).name == "torch"


def test_an_unknown_backend_is_an_error_with_the_known_ones():
    with pytest.raises(InputError, match=r"backend='cuda' is not a backend; use auto, eager, torch"):
        choose("cuda", *pairs())


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("CLIPERASE_BACKEND", "tritn")
    with pytest.raises(InputError, match="CLIPERASE_BACKEND=tritn is not a backend; use auto, eager"):
        functional.clip_loss(*pairs(), 1.0)


def test_a_missing_backend_is_an_error_with_the_reason(broken):
    with pytest.raises(
        InputError, match=r"'absent' is not available here: it needs a moon rock\. Available are auto, eager"
    ):
        choose("absent", *pairs())


def test_a_backend_that_cannot_take_the_device_or_dtype_says_so(broken):
    with pytest.raises(InputError, match="'picky' runs on cuda, not on cpu"):
        choose("picky", *pairs())
    with pytest.raises(InputError, match=r"'narrow' does not support torch\.float64"):
        choose("narrow", *pairs(dtype=torch.float64))
    with pytest.raises(InputError, match=r"'narrow' does not support torch\.float16"):
        choose("narrow", pairs()[0], pairs(dtype=torch.float16)[1])


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch):
    calls = []

    def sweep(inputs):
        calls.append((inputs.want_retention, inputs.want_consistency, inputs.keep))
        return eager.sweep(inputs)

    monkeypatch.setitem(registry.REGISTRY, "spy", Backend("spy", with_sweep(sweep), ""))
    functional.clip_loss(*pairs(), 1.0, backend="spy", keep="nothing")
    monkeypatch.setenv("CLIPERASE_BACKEND", "spy")
    functional.similarity_kl(*pairs(), 1.0, *pairs(), 1.0)
    assert calls == [(True, False, "nothing"), (False, True, "auto")]


def test_backends_maps_names_to_what_is_known_of_them(broken):
    table = backends()
    assert list(table)[:4] == ["eager", "torch", "native", "triton"]
    assert len(table) == 7
    assert table["eager"].available and table["eager"].devices == "any" and not table["eager"].reason
    assert not table["absent"].available and table["absent"].reason == "it needs a moon rock"
    assert table["picky"].devices == ("cuda" if torch.cuda.is_available() else "needs cuda")


@pytest.mark.parametrize(("gpu", "devices"), [(True, "cpu, cuda"), (False, "cpu")])
def test_backends_lists_only_devices_that_are_here(monkeypatch, gpu, devices):
    both = Backend("both", with_sweep(), "fast", devices=("cpu", "cuda"))
    monkeypatch.setitem(registry.REGISTRY, "both", both)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    table = backends()
    assert table["both"].devices == devices
    assert gpu or "cuda" not in table["native"].devices


def test_no_note_calls_a_backend_fastest():
    """`auto` decides that from measurements; a note would outlive them."""
    assert not [status.name for status in backends().values() if "fast" in status.note]


def test_backends_prints_as_a_table(broken):
    lines = repr(backends()).splitlines()
    assert lines[0].split() == ["backend", "available", "devices", "note"]
    assert lines[1].split()[:3] == ["eager", "yes", "any"]
    assert lines[5].split(maxsplit=3) == ["absent", "no", "any", "it needs a moon rock"]
    assert len({line.index(word) for line, word in zip(lines[1:3], ("any", "any"), strict=True)}) == 1


def test_triton_is_named_with_what_is_missing(monkeypatch):
    def says(version, gpu=True, capability=(9, 0)):
        def installed(name):
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", installed)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        return backends()["triton"].reason

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "not installed" in says(None)
    assert "triton 3.5.1 is installed, at least 3.6 is needed" in says("3.5.1")
    assert "no GPU" in says("3.6.0", gpu=False)
    assert "compute capability 7.5, at least 8.0" in says("3.6.0", capability=(7, 5))
    assert says("3.10.0+git1") == ""


def test_triton_is_taken_by_name_and_refuses_what_it_cannot(monkeypatch):
    available = replace(registry.REGISTRY["triton"], why_missing=None, devices=("cpu",))
    monkeypatch.setitem(registry.REGISTRY, "triton", available)
    half, double = pairs(dtype=torch.bfloat16), pairs(dtype=torch.float64)
    assert choose("triton", *half).name == "triton"
    assert choose("auto", *half).name != "triton"
    for features in (double, [*half, *double]):
        with pytest.raises(InputError, match="float64"):
            choose("triton", *features)


def test_triton_is_not_imported_before_it_is_used():
    code = "import sys, cliperase_fast as cf; cf.backends(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
