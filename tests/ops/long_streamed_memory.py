"""The memory of the sweep in pure PyTorch at 16,384 pairs; part of `make long-check`."""

from processes import apart
from test_streamed_memory import ALLOWED, N, extra_memory


def test_pure_pytorch_stays_under_a_twentieth_of_one_similarity_matrix():
    extra = apart(extra_memory, "torch", "nothing", N)
    assert 0 < extra < ALLOWED, f"{extra / 2**20:.1f} MiB"
