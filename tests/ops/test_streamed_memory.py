"""The promise of the streamed sweep: forward and backward in 5 % of the memory of one N x N matrix."""

from __future__ import annotations

import json
import subprocess
import sys

N, WIDTH = 16_384, 64

# A fresh process, so that nothing else is resident. The first, small run loads what is loaded on first use.
MEASURE = f"""
import json, torch
import torch.nn.functional as F
from cliperase_fast.functional import cliperase_loss

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

def batch(n):
    features = [F.normalize(torch.randn(n, {WIDTH}), dim=1) for _ in range(4)]
    return features[0].requires_grad_(), features[1].requires_grad_(), features[2], features[3]

def step(image, text, teacher_image, teacher_text, ids, backend):
    cliperase_loss(
        image[:8], text[:8], image, text, teacher_image, teacher_text, 50.0, 50.0,
        group_ids=ids, backend=backend,
    ).total.backward()

torch.manual_seed(0)
torch.set_num_threads(1)
step(*batch(300), torch.arange(300) // 2, "torch")
inputs, ids = batch({N}), torch.arange({N}) // 2
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the peak starts again from what is resident now
before = kib("VmRSS")
step(*inputs, ids, "auto")
gradients = sum(tensor.grad.nbytes for tensor in inputs[:2])
print(json.dumps({{"extra": (kib("VmHWM") - before) * 1024 - gradients}}))
"""


def test_forward_and_backward_stay_under_a_twentieth_of_one_similarity_matrix():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extra = json.loads(done.stdout)["extra"]
    assert 0 < extra < 0.05 * 4 * N * N, f"{extra / 2**20:.1f} MiB"
