"""Compile every kernel of the Triton backend for every architecture it is configured for, and report what it takes.

python -m benchmarks.kernel_report              write benchmarks/results/kernels.json; no GPU needed
python -m benchmarks.kernel_report --missing    after a new configuration or form: compile only cases not in the record
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cliperase_fast.ops.triton.backward import backward_kernel
from cliperase_fast.ops.triton.calibrated import calibrated_backward_kernel, calibrated_forward_kernel
from cliperase_fast.ops.triton.configs import SHARED, TABLE, Config
from cliperase_fast.ops.triton.features_kl import WIDEST, features_kl_kernel, features_kl_launch, features_kl_warps
from cliperase_fast.ops.triton.forward import forward_kernel, merge_kernel, pair_dot_kernel
from cliperase_fast.ops.triton.kept import COMPACT
from cliperase_fast.ops.triton.shared import (
    CHECKED_COLUMNS,
    anchors_kernel,
    check_kernel,
    repair_kernel,
    shared_backward_kernel,
    shared_forward_kernel,
)
from cliperase_fast.ops.triton.sigmoid import sigmoid_kernel
from cliperase_fast.ops.triton.tiles import GROUP_ROWS, OPTIONS

from .machine import RESULTS, describe

PATH = RESULTS / "kernels.json"
COMPUTE_CAPABILITY = {8: 80, 9: 90, 10: 100}
SHARED_MEMORY_KIB = {80: 163, 90: 227, 100: 227}  # CUDA programming guide, most a block can have
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # what the products of half precision compile to
# (plain, masked, teacher, cached): the statistics that a loss needs, and how similarities are cached, see `kept.py`
FORMS = {
    "retention": (1, 0, 0, 0),
    "retention, groups": (0, 1, 0, 0),
    "consistency, or both": (1, 0, 1, 0),
    "both, groups": (1, 1, 1, 0),
    "both, groups, cached": (1, 1, 1, 1),
}
# Of the variants also this one, whose tiles are larger than those with groups.
SHARED_FORMS = {**FORMS, "consistency, or both, cached": (1, 0, 1, 1)}
_FEW = ("consistency, or both", "both, groups, cached")  # of the variants in float16
# 16 bits for each similarity, of half precision
COMPACT_FORMS = {"consistency, or both, compact": (1, 0, 1, 2), "both, groups, compact": (1, 1, 1, 2)}
_ALL_FORMS = {**SHARED_FORMS, **COMPACT_FORMS}
# (masked, edited, cached), and the kernels in which they take the most registers
CALIBRATED_FORMS = {
    "calibrated, edited": (0, 1, 0),
    "calibrated, groups": (1, 0, 0),
    "calibrated, groups, cached": (1, 0, 1),
}
_CALIBRATED = (
    ("calibrated forward", "calibrated, edited"), ("calibrated forward", "calibrated, groups, cached"),
    ("calibrated backward", "calibrated, edited"), ("calibrated backward", "calibrated, groups"),
)  # fmt: skip
SIGMOID_FORMS = ("sigmoid loss", "sigmoid loss and gradients")
_FLOATS = (
    "p_sums",
    "p_scalars",
    "p_row_stats",
    "p_column_stats",
    "p_parts",
    "p_stats",
    "p_softmax",
    "p_diagonal",
    "p_out",
    "p_cache",
    "p_teacher_cache",
    "p_row_moved",
    "p_row_range",
    "p_column_moved",
    "p_column_range",
    "p_moved",
    "p_ranges",
    "p_row_levels",
    "p_column_levels",
)
# The launchers do not specialise the kernels for these.
_NOT_ALIGNED = (
    "strip_start", "strip_stop", "row_stop", "column_stop", "pair_offset", "tiles_per_chunk",
    "start", "first", "positions", "parts", "count",
)  # fmt: skip
_POINTERS = {
    "p_missing": "*i32",
    **dict.fromkeys(("p_row_group", "p_column_group", "p_row_ids", "p_column_ids"), "*i64"),
    **dict.fromkeys(_FLOATS, "*fp32"),
}


@dataclass(frozen=True)
class Case:
    """One compilation. dtype: Triton's name for the features'."""

    kernel: str
    form: str
    dtype: str
    narrow: bool
    target: int
    config: Config

    @property
    def tensor_cores(self) -> str | None:
        """The instruction its products must use; None for IEEE float32, which has none, and where none are left."""
        reads_cache = self.kernel.endswith("backward") and self.form.endswith(("cached", "compact"))
        return None if self.dtype == "fp32" or reads_cache else TENSOR_CORES[self.target]


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: bool
    shape: str  # of the tensor cores' instructions, as far as PTX says it


def cases() -> Iterator[Case]:
    """Every form of the large kernels, in every shipped configuration, then the variants."""
    for major, by_kind in TABLE.items():
        for (half, narrow), configs in by_kind.items():
            for dtype in ("bf16", "fp16") if half else ("fp32",):
                for form, (_, masked, _, cached) in FORMS.items():
                    backward = configs.backward_groups if masked else configs.backward
                    forward = configs.forward_groups if masked or cached else configs.forward
                    for kernel, config in (("forward", forward), ("backward", backward)):
                        yield Case(kernel, form, dtype, narrow, COMPUTE_CAPABILITY[major], config)
                for form in SIGMOID_FORMS:
                    yield Case("sigmoid", form, dtype, narrow, COMPUTE_CAPABILITY[major], configs.backward)
                if dtype == "fp16":  # the same code but for the last rounding
                    continue
                for form, (_, masked, _, _) in COMPACT_FORMS.items() if half else ():
                    for kernel in ("forward", "backward"):
                        yield Case(kernel, form, dtype, narrow, COMPUTE_CAPABILITY[major], configs.compact(masked == 1))
                for kernel, form in () if narrow and not half else _CALIBRATED:
                    forward = configs.calibrated_forward(torch.bfloat16 if half else torch.float32)
                    config = forward if kernel.endswith("forward") else configs.backward
                    yield Case(kernel, form, dtype, narrow, COMPUTE_CAPABILITY[major], config)
    for major, configs in SHARED.items():
        for dtype in ("bf16", "fp16"):
            for form, (_, masked, _, cached) in SHARED_FORMS.items():
                forward = configs.forward_groups if masked or cached else configs.forward
                backward = configs.backward_groups if masked else configs.backward
                for kernel, config in (("forward", forward), ("repair", forward), ("backward", backward)):
                    if dtype == "bf16" or form in _FEW:
                        yield Case(kernel, form, dtype, False, COMPUTE_CAPABILITY[major], config)
            for form, (_, masked, _, _) in COMPACT_FORMS.items() if dtype == "bf16" else ():
                for kernel in ("forward", "backward"):
                    yield Case(kernel, form, dtype, False, COMPUTE_CAPABILITY[major], configs.compact(masked == 1))


def compile_case(case: Case) -> Resources:
    return resources(compiled_case(case), case.target)


def compiled_case(case: Case) -> Any:
    """Return what `triton.compile` returns."""
    if case.form in SIGMOID_FORMS:
        return _compile_sigmoid(case)
    if case.form in CALIBRATED_FORMS:
        return _compile_calibrated(case)
    plain, masked, teacher, cached = _ALL_FORMS[case.form]
    constants: dict[str, Any] = {
        "PLAIN": plain, "MASKED": masked, "TEACHER": teacher, "EVEN_K": True, "EVEN_K_TEACHER": True,
        "BLOCK_M": case.config.block_m, "BLOCK_N": case.config.block_n, "BLOCK_K": case.config.block_k,
        "PRECISION": "ieee",
    }  # fmt: skip
    shared = case.config.shared
    if case.kernel == "backward":
        kernel = shared_backward_kernel if shared else backward_kernel
        constants.update({"GROUP_ROWS": GROUP_ROWS, "READ_CACHE": cached})
    else:
        kernel = shared_forward_kernel if shared else forward_kernel
        constants.update({"NUM_STATS": 2 * (plain + masked) + 3 * teacher, "WRITE_CACHE": cached})
    if case.kernel == "repair":
        kernel = repair_kernel
        constants["CHUNK"] = 64
    elif shared:
        constants["SAME_WIDTH"] = True
    absent = [] if masked else ["p_row_group", "p_column_group"]
    absent += [] if teacher else ["p_teacher_image", "p_teacher_text"]
    absent += [] if cached else ["p_cache", "p_teacher_cache"]
    constants.update(dict.fromkeys(absent))
    types = dict.fromkeys(("p_cache", "p_teacher_cache"), "*i16" if cached == COMPACT else "*fp32")
    return _compile(kernel, constants, case.dtype, case.target, case.config.warps, case.config.stages, types)


def _compile_calibrated(case: Case) -> Any:
    masked, edited, cached = CALIBRATED_FORMS[case.form]
    constants: dict[str, Any] = {
        "PLAIN": 1, "MASKED": masked, "TEACHER": 1, "EDIT": edited, "EVEN_K": True, "EVEN_K_TEACHER": True,
        "BLOCK_M": case.config.block_m, "BLOCK_N": case.config.block_n, "BLOCK_K": case.config.block_k,
        "PRECISION": "ieee",
    }  # fmt: skip
    if case.kernel == "calibrated backward":
        kernel = calibrated_backward_kernel
        constants.update({"GROUP_ROWS": GROUP_ROWS, "READ_CACHE": cached})
    else:
        kernel = calibrated_forward_kernel
        constants.update({"NUM_STATS": 2 * (1 + masked) + 3, "WRITE_CACHE": cached})
    absent = [] if masked else ["p_row_group", "p_column_group"]
    absent += [] if edited else ["p_row_ids", "p_column_ids", "p_row_levels", "p_column_levels"]
    absent += [] if cached else ["p_cache", "p_teacher_cache"]
    constants.update(dict.fromkeys(absent))
    return _compile(kernel, constants, case.dtype, case.target, case.config.warps, case.config.stages)


def _compile_sigmoid(case: Case) -> Any:
    constants = {
        "GRADIENT": case.form == SIGMOID_FORMS[1], "GROUP_ROWS": GROUP_ROWS, "BLOCK_M": case.config.block_m,
        "BLOCK_N": case.config.block_n, "BLOCK_K": case.config.block_k, "EVEN_K": True, "PRECISION": "ieee",
    }  # fmt: skip
    return _compile(sigmoid_kernel, constants, case.dtype, case.target, case.config.warps, case.config.stages)


def compile_small(target: int) -> dict[str, Resources]:
    """The kernels that only load and add."""
    check = {"NUM_STATS": 7, "BLOCK_N": 128, "TILES": CHECKED_COLUMNS // 128}
    merge = {"FRESH": False, "STUDENTS": 2, "TEACHER": 1, "NUM_STATS": 7, "BLOCK": 256}
    kernels = {
        "merge": _compile(merge_kernel, merge, "fp32", target, 4, 3),
        "check": _compile(check_kernel, check, "fp32", target, 4, 3),
        "anchors": _compile(anchors_kernel, {"BLOCK": 128}, "fp32", target, 4, 3),
        "pair_dot": _compile(pair_dot_kernel, {"BLOCK_M": 16, "BLOCK_K": 256}, "bf16", target, 4, 3),
        **{
            f"features_kl, {'backward' if backward else 'forward'}, width {block}": _compile(
                features_kl_kernel,
                {"BACKWARD": backward, **features_kl_launch(block), **absent},
                "bf16",
                target,
                features_kl_warps(block),
                3,
            )
            for block in (1024, WIDEST)
            for backward, absent in ((False, {"p_gradient": None, "p_weight": None}), (True, {"p_kl": None}))
        },
    }
    return {name: resources(compiled, target) for name, compiled in kernels.items()}


def _compile(
    kernel: Any,
    constants: dict[str, Any],
    dtype: str,
    target: int,
    warps: int,
    stages: int,
    types: Mapping[str, str] = _POINTERS,
) -> Any:
    """types: of pointers; those that are not in it, nor in `_POINTERS`, point to features."""
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = types.get(name) or _POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "i32"
        if name not in constants and name not in _NOT_ALIGNED:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, **OPTIONS}  # as the launchers set them
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled: Any, target: int) -> Resources:
    registers, spilled = _registers(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    shape = " ".join(sorted(set(re.findall(r"mma\S*\.(m\d+n\d+k\d+)", ptx))))
    return Resources(registers, spilled, compiled.metadata.shared, TENSOR_CORES[target] in ptx, shape)


def _registers(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack: what did not fit the registers) as the assembler noted them."""
    output = dump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", output)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {output}")
    return int(found[1]), int(found[2]) + int(found[3])


def dump(cubin: bytes, *options: str) -> str:
    """Return what cuobjdump, which comes with Triton, prints."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def main(words: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernel_report", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--missing", action="store_true", help="compile only what the committed record lacks")
    parser.add_argument("--model", action="store_true", help="predict times on an H200, see kernel_model.py")
    arguments = parser.parse_args(words)
    if arguments.model:
        from .kernel_model import predict

        return predict()
    known = json.loads(PATH.read_text(encoding="utf-8"))["runs"] if arguments.missing else []
    runs, description = [], describe()
    for case in cases():
        described = asdict(case)
        row = next((row for row in known if described.items() <= row.items()), None)
        if row is None:
            row = {**described, **asdict(compile_case(case)), "commit": description["commit"]}
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        runs.append(row)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in runs))  # those that compiled the rows
    record = {"command": "python -m benchmarks.kernel_report", **description, "commit": commits, "runs": runs}
    PATH.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
