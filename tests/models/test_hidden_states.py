"""Hidden states beside a caption's features: those that a text-to-image pipeline reads, and what they should become."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TwoTowers, tiny_clip, tiny_hugging_face, tiny_open_clip

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.models import load_model
from cliperase_fast.models.fast_paths.padding import end_position
from cliperase_fast.models.hidden_states import HiddenStates, movement, with_edited_states

MODELS = {
    "open_clip": tiny_open_clip,
    "own text tower": lambda: tiny_open_clip(custom_text=True),
    "transformers": tiny_clip,
}
START, END = 8, 9  # of `captions`, the highest ids


def captions(adapter, *rows):
    """Token ids [U, L] of captions without start and end token."""
    length = adapter.context_length
    return torch.tensor([[START, *row, END] + [0] * (length - len(row) - 2) for row in rows])


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_hold_what_a_pipeline_reads_up_to_the_end_token(name, skip):
    adapter = load_model(MODELS[name]())
    tokens = captions(adapter, [1, 2, 3], [4], [5, 6])
    layout = HiddenStates.of(adapter, tokens, skip)
    features, states = layout.split(layout.adapter(adapter).encode_text(tokens[:2]))
    assert torch.allclose(features, adapter.encode_text(tokens[:2]), atol=1e-6)
    encoder = cf.export.to_diffusers_text_encoder(adapter.module)

    def read(ids):
        found = encoder(ids, output_hidden_states=True)
        return found.hidden_states[-1 - skip] if skip else found.last_hidden_state

    expected = read(tokens[:2])
    assert states.shape == (2, 6, expected.shape[2])  # five tokens of the longest caption, one of the empty one
    assert torch.allclose(states[0, :5], expected[0, :5], atol=1e-5)
    assert torch.allclose(states[1, :3], expected[1, :3], atol=1e-5) and not states[1, 3:5].any()
    empty = read(captions(adapter, []))[0, 1]
    assert torch.allclose(states[:, 5], empty.expand(2, -1), atol=1e-5)


def test_gradients_reach_the_tower_through_the_states():
    adapter = load_model(tiny_open_clip())
    tokens = captions(adapter, [1, 2], [3])
    layout = HiddenStates.of(adapter, tokens)
    layout.split(layout.adapter(adapter).encode_text(tokens))[1].sum().backward()
    assert adapter.module.transformer.resblocks[0].attn.in_proj_weight.grad.abs().sum() > 0
    assert not adapter.blocks()[1][-1]._forward_hooks


@pytest.mark.parametrize("make", [TwoTowers, tiny_hugging_face])
def test_towers_whose_states_are_unknown_are_refused(make):
    with pytest.raises(InputError, match="the hidden states of the text tower"):
        HiddenStates.of(load_model(make()), torch.tensor([[START, 1, END, 0]]))


def test_a_layer_that_is_not_there_is_refused():
    adapter = load_model(tiny_clip())
    with pytest.raises(InputError, match="hidden_skip=2 leaves no layer of the text tower, which has 2"):
        HiddenStates.of(adapter, captions(adapter, [1]), skip=2)


def test_a_state_that_is_not_the_captions_feature_is_refused(monkeypatch):
    adapter = load_model(tiny_clip())
    monkeypatch.setattr(adapter, "causal_text", lambda: (torch.nn.LayerNorm(32), END))
    with pytest.raises(InputError, match="the projection of its last state is not the caption's feature"):
        HiddenStates.of(adapter, captions(adapter, [1]))


def test_movement_is_the_mean_relative_distance_of_the_tokens_of_the_original():
    generator = torch.Generator().manual_seed(0)
    states, original = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    original[1, 2:], original[2] = 0, 0  # a shorter caption, and one that is not held
    expected = []
    for count, (own, old) in zip((4, 2, 0), zip(states, original, strict=True), strict=True):
        parts = [float(((own[t] - old[t]) ** 2).sum() / (old[t] ** 2).sum()) for t in range(count)]
        expected.append(sum(parts) / max(len(parts), 1))
    assert movement(states, original).tolist() == pytest.approx(expected, rel=1e-12)
    states[1, 2:] += 7.0  # after the end token
    assert movement(states, original).tolist() == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_tokens_that_only_a_forget_caption_reads_become_the_mean_of_retained_ones():
    adapter = load_model(tiny_clip()).clone()
    forget, retain = captions(adapter, [1, 2], [5]), captions(adapter, [1, 3], [4, 2, 2], [5])
    layout = HiddenStates.of(adapter, torch.cat([forget, retain]))
    wide = layout.adapter(adapter)
    edited = with_edited_states(layout, adapter, forget, retain, batch_size=2)
    assert torch.equal(edited.encode_text(retain[:2]), wide.encode_text(retain[:2]))
    features, states = layout.split(edited.encode_text(torch.cat([retain[:1], forget])))
    assert torch.allclose(features[1:], adapter.encode_text(forget), atol=1e-6)
    own = layout.split(wide.encode_text(retain))[1]  # [3, T, W]
    assert not states[1, :2].any()  # the start and "1", which a retained caption reads too
    for place in (2, 3):
        held = [row[place] for row, end in zip(own, end_position(retain, END), strict=True) if place <= end]
        mean = torch.stack(held).mean(0)
        length = torch.stack(held).square().sum(1).mean().sqrt()
        assert torch.allclose(states[1, place], mean / mean.norm() * length, atol=1e-5)
    assert not states[1, 4:].any() and not states[2].any()  # the second caption is retained as well
