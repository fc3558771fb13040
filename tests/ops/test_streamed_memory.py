"""The promise of the streamed sweeps: forward and backward in 5 % of one N x N matrix, plus what `keep` may keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

N, WIDTH = 16_384, 64

# A fresh process, so that nothing else is resident. The first, small run loads what is loaded on first use.
MEASURE = f"""
import json, sys, torch
import torch.nn.functional as F
from cliperase_fast.functional import cliperase_loss

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

def batch(n):
    features = [F.normalize(torch.randn(n, {WIDTH}), dim=1) for _ in range(4)]
    return features[0].requires_grad_(), features[1].requires_grad_(), features[2], features[3]

def step(image, text, teacher_image, teacher_text, ids):
    cliperase_loss(
        image[:8], text[:8], image, text, teacher_image, teacher_text, 50.0, 50.0,
        group_ids=ids, backend=sys.argv[1], keep=sys.argv[2],
    ).total.backward()

torch.manual_seed(0)
torch.set_num_threads(1)
step(*batch(300), torch.arange(300) // 2)
inputs, ids = batch({N}), torch.arange({N}) // 2
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the peak starts again from what is resident now
before = kib("VmRSS")
step(*inputs, ids)
gradients = sum(tensor.grad.nbytes for tensor in inputs[:2])
print(json.dumps({{"extra": (kib("VmHWM") - before) * 1024 - gradients}}))
"""


def extra_memory(backend: str, keep: str, kept_mib: int) -> int:
    """Bytes at the peak beyond inputs and gradients."""
    environment = {**os.environ, "CLIPERASE_KEEP_MIB": str(kept_mib)}
    command = [sys.executable, "-c", MEASURE, backend, keep]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["extra"]


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_forward_and_backward_stay_under_a_twentieth_of_one_similarity_matrix(backend):
    extra = extra_memory(backend, "nothing", 1)
    assert 0 < extra < 0.05 * 4 * N * N, f"{extra / 2**20:.1f} MiB"


def test_what_is_kept_stays_within_its_budget():
    extra = extra_memory("native", "auto", 128)
    assert 100 << 20 < extra < (128 << 20) + 0.05 * 4 * N * N, f"{extra / 2**20:.1f} MiB"
