"""Gradient caching: a batch encoded in chunks has the gradients of the batch encoded at once."""

from __future__ import annotations

import pytest
import torch
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs
from torch import nn

import cliperase_fast as cf
from cliperase_fast import CLIPEraseLoss, InputError
from cliperase_fast.models import load_model
from cliperase_fast.unlearning.engines.grad_cache import ChunkedFeatures

CPU = torch.device("cpu")


def tiny_adapter(dtype, patch_dropout):
    adapter = load_model(make_tiny_clip(patch_dropout=patch_dropout).to(dtype))
    adapter.module.train()
    return adapter


def gradients(adapter, way, size, dtype):
    """Of every parameter, as one vector; at once, in chunks kept with their graphs, or cached. And a random draw."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(10, 3, 8, 8, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 1000, (10, 8), generator=generator)
    teacher = torch.nn.functional.normalize(torch.randn(2, 6, 16, generator=generator, dtype=dtype), dim=-1)
    adapter.module.zero_grad()
    torch.manual_seed(2)
    count = -(-len(pixels) // size)
    if way == "cached":
        cached = [
            ChunkedFeatures(adapter.encode_image, pixels, count, CPU),
            ChunkedFeatures(adapter.encode_text, tokens, count, CPU),
        ]
        image, text = (tower.features for tower in cached)
    else:
        cached = []
        image = torch.cat([adapter.encode_image(part) for part in pixels.tensor_split(count)])
        text = torch.cat([adapter.encode_text(part) for part in tokens.tensor_split(count)])
    loss = CLIPEraseLoss(backend="eager")
    loss(image[:4], text[:4], image[4:], text[4:], *teacher, adapter.logit_scale(), 10.0).total.backward()
    for tower in cached:
        tower.backward()
    return torch.cat([p.grad.flatten() for p in adapter.module.parameters() if p.grad is not None]), torch.rand(3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("size", [1, 3, 5, 10, 16])
def test_chunked_gradients_equal_those_of_the_whole_batch(size, dtype, tolerance):
    adapter = tiny_adapter(dtype, patch_dropout=0.0)
    whole, _ = gradients(adapter, "at once", 10, dtype)
    chunked, _ = gradients(adapter, "cached", size, dtype)
    assert (chunked - whole).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("size", [3, 10])
def test_dropout_draws_the_same_for_features_and_gradients(size, dtype, tolerance):
    adapter = tiny_adapter(dtype, patch_dropout=0.5)
    kept, random_after = gradients(adapter, "kept", size, dtype)
    cached, random_after_cached = gradients(adapter, "cached", size, dtype)
    assert (cached - kept).norm() <= tolerance * kept.norm()
    assert torch.equal(random_after, random_after_cached)


def test_a_frozen_tower_advances_the_random_state_once():
    inputs = torch.randn(6, 4)
    torch.manual_seed(0)
    frozen = ChunkedFeatures(torch.nn.functional.dropout, inputs, 3, CPU)
    after = torch.get_rng_state()
    frozen.features.sum().backward()
    frozen.backward()
    assert torch.equal(torch.get_rng_state(), after)


def run(model=None, **changes):
    forget, retain = split_pairs(make_pairs(), "red")
    return cf.unlearn(make_tiny_clip() if model is None else model, forget, retain, **{**QUICK, **changes})


def steps(result):
    return [line for line in result.history if "total" in line]


def assert_same_history(first, second, rel):
    assert len(steps(first)) == len(steps(second)) >= 4
    for a, b in zip(steps(first), steps(second), strict=True):
        for name in ("total", "retain", "forget", "consistency", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=rel, abs=rel)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "epochs": 4},
        {"trainable": "image", "grad_clip": 0.1},
        {"trainable": "lora"},
        {"teacher_cache": "off", "eval_batch_size": 2},
    ],
    ids=lambda changes: ", ".join(changes) or "default",
)
def test_a_chunked_run_follows_the_unchunked_one(changes):
    assert_same_history(run(**changes), run(grad_cache_chunk=2, **changes), rel=1e-4)


def test_mixed_precision_in_chunks_matches_the_whole_batch():
    # At a small rate: the weights' own rounding differs between chunks, and large steps would let that grow.
    single, plain, chunked = (
        run(learning_rate=1e-5, **changes)
        for changes in ({}, {"precision": "bf16"}, {"precision": "bf16", "grad_cache_chunk": 2})
    )
    first, alike, other = (steps(result)[0]["total"] for result in (plain, chunked, single))
    assert alike == pytest.approx(first, rel=1e-6)
    assert other != pytest.approx(first, rel=1e-5)
    assert_same_history(plain, chunked, rel=2e-2)


def test_random_layers_advance_as_if_each_chunk_were_encoded_once():
    changes = {"false_negatives": "none", "lambda_consistency": 0}
    plain = run(make_tiny_clip(patch_dropout=0.5), **changes)
    chunked = run(make_tiny_clip(patch_dropout=0.5), grad_cache_chunk=QUICK["batch_size"], **changes)
    assert_same_history(plain, chunked, rel=1e-4)


class Watched(nn.Module):
    """Two linear towers that note how many rows are encoded at a time while training."""

    rows: dict[str, set[int]]

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(3 * 8 * 8, 8), nn.Embedding(128, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        self._note("image", pixels)
        return self.visual(pixels.flatten(1))

    def encode_text(self, tokens):
        self._note("text", tokens)
        return self.text(tokens).mean(1)

    def _note(self, name, inputs):
        if self.training:
            Watched.rows[name].add(len(inputs))


def test_at_most_one_chunk_is_encoded_at_a_time():
    Watched.rows = {"image": set(), "text": set()}
    pairs = [(image, torch.tensor([i, i + 1])) for i, (image, _) in enumerate(make_pairs())]
    forget, retain = pairs[:12], pairs[12:]
    cf.unlearn(Watched(), forget, retain, grad_cache_chunk=4, test=(forget, retain), **{**QUICK, "batch_size": 10})
    assert Watched.rows == {"image": {4, 3, 1}, "text": {4, 3, 1}}  # 1: whether a gradient goes through


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (-1, "grad_cache_chunk=-1 must not be negative"),
        (7, "grad_cache_chunk=7 is more than the 6 pairs of a batch"),
        (2.5, "grad_cache_chunk=2.5 must be a whole number"),
        ("all", "grad_cache_chunk='all' must be a whole number"),
    ],
)
def test_an_invalid_chunk_size_is_an_error_with_the_remedy(chunk, says):
    with pytest.raises(InputError) as error:
        run(grad_cache_chunk=chunk)
    assert says in str(error.value)
