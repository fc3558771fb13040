"""Methods that edit the weights without training: two ranks end with the weights of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from runs import make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf


def edited(rank: int, method: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights after an edit. 5 forget and 6 retain pairs a batch: two ranks divide neither."""
    settings = {"batch_size": 11, "forget_fraction": 0.45} if method != "text_projection" else {}
    forget, retain = split_pairs(make_pairs(per_colour=18), "red")
    result = cf.unlearn(
        make_tiny_clip(),
        forget,
        retain,
        method=method,
        method_options=options,
        progress=False,
        report=False,
        **settings,
    )
    return {name: tensor.numpy() for name, tensor in result.model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("text_projection", {}),
        ("ssd", {"alpha": 2.0}),
        ("slug", {"evaluations": 2}),
        ("task_vector", {"learning_rate": 1e-3, "steps": 4}),
    ],
)
def test_two_ranks_edit_the_weights_as_one_process_does(two, method, options):
    first, second = two.run(edited, method, options)
    expected, original = edited(0, method, options), make_tiny_clip().state_dict()
    assert all(np.array_equal(first[name], second[name]) for name in expected), "equal to the last bit"
    assert any(not np.array_equal(expected[name], tensor.numpy()) for name, tensor in original.items())
    # A rounding decides here and there whether ssd shrinks a weight, and the sign of a step of Adam.
    changes = {name: expected[name] - tensor.numpy() for name, tensor in original.items()}
    differences = {name: first[name] - expected[name] for name in expected}
    assert size_of(differences) < 0.05 * size_of(changes)


def size_of(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in tensors.values())))
