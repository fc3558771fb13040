"""ZeRO-3 on two ranks: no rank holds the student from the first step to the last, and it is whole and clean after."""

from __future__ import annotations

import pytest
from runs import run, told

from cliperase_fast.unlearning.engines.zero3 import Zero3Engine


def _watched(rank: int, changes: dict) -> tuple[dict, list[tuple[int, int, int]], list[str]]:
    """Run; also return the numbers in the student, in this rank's parts and in all at each step, and what is left."""
    seen = []

    class Watched(Zero3Engine):
        def step(self, rate):
            found = super().step(rate)
            parts = [parameter.ds_tensor.numel() for parameter in self.training.module.parameters()]
            whole = [parameter.ds_numel for parameter in self.training.module.parameters()]
            seen.append((sum(p.numel() for p in self.student.module.parameters()), sum(parts), sum(whole)))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cliperase_fast.unlearning.trainer.Zero3Engine", Watched)
        result = run(**changes)
    left = [
        name for name, part in result.model.named_modules() if part._forward_hooks or part._forward_pre_hooks
        or any(hasattr(parameter, "ds_id") for parameter in part.parameters(recurse=False))
    ]  # fmt: skip
    return told(result), seen, left


def test_the_student_is_in_parts_while_it_trains_and_whole_after(two, tmp_path):
    changes = {"deepspeed": "zero3", "epochs": 2, "trainable": "text", "output_dir": tmp_path / "run"}
    for found, seen, left in two.run(_watched, changes):
        assert seen and left == []
        for student, own, whole in seen:
            assert student == 0
            assert own < 0.6 * whole
        assert found["losses"][-1][0] < found["losses"][0][0]
