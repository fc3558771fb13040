"""Test the committed report of the CUDA kernels' resources."""

from __future__ import annotations

import json

from cliperase_fast.benchmarks.machine import RESULTS
from cliperase_fast.benchmarks.native_kernel_report import SPILLS, allowed_spill, kernels

FORMS = {
    "retention", "retention, groups", "consistency, or both", "both, groups", "calibrated", "calibrated, groups",
    "calibrated, edited",
}  # fmt: skip


def test_the_report_covers_every_kernel_and_architecture_with_the_stated_spill_alone():
    assert {architecture for architecture, *_ in SPILLS} == {"sm_120"}
    runs = json.loads((RESULTS / "native_kernels.json").read_text(encoding="utf-8"))["runs"]
    assert sorted(kernels()) == ["backward_kernel", "forward_kernel", "merge_kernel"]
    expected = {
        ("merge_kernel", "any"),
        *((kernel, form) for kernel in ("forward_kernel", "backward_kernel") for form in FORMS),
    }
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"):
        of = [run for run in runs if run["architecture"] == architecture]
        assert {(run["kernel"], run["form"]) for run in of} == expected and len(of) == len(expected)
        for run in of:
            assert run["spilled_bytes"] <= allowed_spill(run), run
            assert run["registers"] <= 255
            assert run["shared_bytes"] <= 48 << 10
