"""No allocation in the package depends on torch's defaults, which users may change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cliperase_fast

PACKAGE = Path(cliperase_fast.__file__).parent
# What makes a tensor out of nothing, or of Python numbers, and takes a dtype and a device.
CONSTRUCTORS = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided",
    "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
LAYERS = {"Linear", "Embedding", "LayerNorm", "Conv2d", "MultiheadAttention"}
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor"}
# These check the dtype of the user's own tokens, which must be integers.
DTYPE_LOOKED_AT = {
    ("data/pairs.py", "as_tensor"),
    ("models/adapters/base.py", "as_tensor"),
    ("models/preprocessing.py", "as_tensor"),
}


def unnamed(source: str, file: str = "") -> Iterator[str]:
    """file:line of each call that leaves a dtype or a device to torch's defaults."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in CONSTRUCTORS | {"Generator"}:
                    yield f"{file}:{node.lineno} imports {alias.name} by its name, where this test does not see it"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = {keyword.arg for keyword in node.keywords}
        needed: set[str] = set()
        if (owner == "torch" and name in CONSTRUCTORS) or (owner in ("nn", "torch.nn") and name in LAYERS):
            needed = {"dtype", "device"}
        if (file, name) in DTYPE_LOOKED_AT:
            needed = {"device"}
        if needed - given:
            yield f"{file}:{node.lineno} {owner}.{name} without {' and '.join(sorted(needed - given))}"
        if owner == "torch" and name == "Generator" and not node.args and "device" not in given:
            yield f"{file}:{node.lineno} torch.Generator without device"
        if owner == "torch" and name in LEGACY and node.args:
            yield f"{file}:{node.lineno} torch.{name} takes the default dtype"


def test_every_allocation_names_its_dtype_and_device():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = [
        line
        for path in files
        for line in unnamed(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
    ]
    assert found == []


def test_the_check_sees_what_is_left_out():
    for source in (
        "torch.empty(2)", "torch.zeros(2, dtype=d)", "torch.tensor(0.5, device=x)", "torch.arange(n, **options)",
        "torch.Generator()", "nn.Linear(2, 2)", "from torch import zeros", "torch.Tensor([1])",
    ):  # fmt: skip
        assert len(list(unnamed(source))) == 1, source
    for source in ("torch.empty(2, dtype=d, device=x)", "a.new_empty(2)", "torch.zeros_like(a)", "np.zeros(2)"):
        assert list(unnamed(source)) == [], source
