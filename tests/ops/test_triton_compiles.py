"""The kernels, compiled ahead of time without a GPU, use tensor cores, do not spill and fit the shared memory.

Compiling all forms in all configurations takes minutes and is done by `python -m benchmarks.kernel_report`. A test
checks that its committed results are for the shipped configurations. Here, only the forms with the most registers are
compiled.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from cliperase_fast.benchmarks.kernel_report import SHARED_MEMORY_KIB, Case, cases, compile_case, compile_small
from cliperase_fast.benchmarks.machine import RESULTS

LARGEST = [
    case
    for case in cases()
    if (case.dtype == "bf16" and case.form == "consistency, or both" and not case.narrow)
    or (case.dtype in ("bf16", "fp16") and case.form == "both, groups" and case.narrow == (case.dtype == "fp16"))
    or (case.dtype == "fp32" and case.form == "both, groups" and not case.narrow)
    or (case.dtype != "bf16" and case.form == "sigmoid loss and gradients" and not case.narrow)
]
VARIANTS = [
    case for case in LARGEST if case.config.shared and case.target == 90 and case.form == "consistency, or both"
]
LARGEST = [case for case in LARGEST if not case.config.shared]


def name(case: Case) -> str:
    return f"sm_{case.target}-{case.kernel}{'-shared' * case.config.shared}-{case.dtype}-{case.form}"


@pytest.mark.parametrize("case", LARGEST, ids=name)
def test_the_largest_forms_use_tensor_cores_and_fit_registers_and_shared_memory(case):
    resources = compile_case(case)
    assert resources.tensor_cores == (case.tensor_cores is not None)
    assert resources.spilled_bytes == 0
    assert resources.registers <= 255
    assert resources.shared_bytes <= SHARED_MEMORY_KIB[case.target] * 1024


@pytest.mark.parametrize("case", [case for case in VARIANTS if case.kernel != "repair"], ids=name)
def test_the_variants_for_hopper_multiply_128_columns_at_a_time_without_spills(case):
    resources = compile_case(case)
    assert resources.shape == "m64n128k16" or (case.kernel == "backward" and "m64n128k16" in resources.shape)
    assert resources.spilled_bytes == 0 and resources.shared_bytes <= SHARED_MEMORY_KIB[90] * 1024


@pytest.mark.parametrize("target", SHARED_MEMORY_KIB)
def test_the_small_kernels_fit_registers_and_shared_memory(target):
    for resources in compile_small(target).values():
        assert resources.spilled_bytes == 0
        assert resources.shared_bytes <= SHARED_MEMORY_KIB[target] * 1024


def spills(case: Case) -> bool:
    """Whether the assembler prefers 8 bytes of stack to one register more, in two forms that are known."""
    if case.config.shared:
        return case.target == 80 and case.form == "both, groups, compact"
    return case.dtype == "fp32" and case.form == "retention, groups"


def test_the_committed_report_covers_the_shipped_configurations_with_two_registers_spilled_at_most():
    runs = json.loads((RESULTS / "kernels.json").read_text(encoding="utf-8"))["runs"]
    described = [{key: run[key] for key in asdict(next(cases()))} for run in runs]
    assert described == [asdict(case) for case in cases()]
    for run, case in zip(runs, cases(), strict=True):
        assert run["spilled_bytes"] <= (8 if spills(case) else 0), case
        assert run["shared_bytes"] <= SHARED_MEMORY_KIB[case.target] * 1024
        assert run["tensor_cores"] == (case.tensor_cores is not None)
