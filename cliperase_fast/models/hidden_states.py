"""The hidden states of a causal text tower: what text-to-image pipelines read in place of a caption's feature."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.base import ClipAdapter, normalise
from cliperase_fast.models.fast_paths.padding import end_position


@dataclass(frozen=True)
class HiddenStates:
    """Rows that hold the hidden states of captions after their features.

    Of each caption they hold the states of its tokens up to the end token, then zeros, then that of the end token of
    the empty caption, which pipelines encode for classifier-free guidance.

    features: D, the number of features. tokens: T, those of the longest caption and one more. width: W. end: the id of
    the end token; None if it is the highest of a caption. skip: how many layers before the last one; the final norm
    belongs to the last one.
    """

    features: int
    tokens: int
    width: int
    end: int | None
    skip: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: ClipAdapter, tokens: Tensor, skip: int = 0) -> HiddenStates:
        """Return the layout for captions int64 [U, L], the longest among them.

        Raises InputError for a text tower whose hidden states are not known, or that has no such layer.
        """
        unknown = (
            f"the hidden states of the text tower of this {type(adapter.module).__name__} are not known: they can be "
            "held in CLIP's causal towers of open_clip and transformers"
        )
        tower = adapter.causal_text()
        if tower is None:
            raise InputError(unknown)
        norm: Any = tower[0]
        layers = len(adapter.blocks()[1])
        if skip >= layers:
            raise InputError(f"hidden_skip={skip} leaves no layer of the text tower, which has {layers}")
        end = end_position(tokens, tower[1])
        sizes = adapter.encode_text(tokens[:1]).shape[1], int(end.max()) + 2, norm.weight.numel()
        last = cls(*sizes, tower[1])
        features, states = last.split(last.adapter(adapter).encode_text(tokens[:1]))
        own, projection = states[:, int(end[0])], adapter.projection("text")
        again = normalise(own if projection is None else projection(own))
        if not torch.allclose(again, features.to(again.dtype), rtol=1e-4, atol=1e-5):
            raise InputError(f"{unknown} (the projection of its last state is not the caption's feature)")
        return cls(*sizes, tower[1], skip)

    @property
    def row(self) -> int:
        """How many numbers a row has, D + T W."""
        return self.features + self.tokens * self.width

    def adapter(self, adapter: ClipAdapter) -> ClipAdapter:
        """Return an adapter of the same module whose `encode_text` returns rows [B, D + T W]."""
        twin: Any = copy.copy(adapter)
        twin.encode_text = torch_defaults()(lambda tokens: self._rows(adapter, tokens))
        return twin

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, D] and the states [B, T, W] of rows."""
        return rows[:, : self.features], self.unflatten(rows[:, self.features :])

    def unflatten(self, states: Tensor) -> Tensor:  # [B, T W] -> [B, T, W]
        return states.unflatten(1, (self.tokens, self.width))

    def _rows(self, adapter: ClipAdapter, tokens: Tensor) -> Tensor:  # [B, L] -> [B, D + T W]
        count, end = len(tokens), end_position(tokens, self.end)
        empty = torch.zeros_like(tokens[:1])
        empty[:, 0], empty[:, 1] = tokens[0, 0], tokens[0, end[0]]
        features, states = self._encoded(adapter, torch.cat([tokens, empty]))
        own = states[:count, : self.tokens - 1]
        places = torch.arange(own.shape[1], dtype=torch.int64, device=own.device)
        own = own * (places <= end.to(own.device)[:, None])[..., None]
        own = F.pad(own, (0, 0, 0, self.tokens - 1 - len(places)))
        whole = torch.cat([own, states[count:, 1:2].expand(count, -1, -1)], dim=1)  # [B, T, W]
        return torch.cat([features[:count], whole.flatten(1).to(features.dtype)], dim=1)

    def _encoded(self, adapter: ClipAdapter, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, D], and the states [B, l, W] of the positions that the tower reads."""
        seen: list[Any] = []
        # Which module is the block can change, so it is looked up each time.
        handle = adapter.blocks()[1][-1 - self.skip].register_forward_hook(lambda *call: seen.append(call[2]))
        try:
            features = adapter.encode_text(tokens)
        finally:
            handle.remove()
        (output,) = seen
        states = output[0] if isinstance(output, tuple) else output
        tower = adapter.causal_text()
        assert tower is not None
        return features, states if self.skip else tower[0](states)


def with_edited_states(
    layout: HiddenStates, adapter: ClipAdapter, forget: Tensor, retain: Tensor, batch_size: int = 256
) -> ClipAdapter:
    """Return an adapter of the original whose rows hold the states that the student should have.

    Those of retained captions are the original's. Of a forget caption, those of the tokens up to which no retained
    caption agrees with it are the mean of the retained captions' states at the same place, scaled to their root mean
    square length. Its other tokens are zero, as the retained captions hold them: in a causal tower their states are the
    same. forget, retain: token ids int64 [U, L] of the captions. Call it without gradients.
    """
    wide = layout.adapter(adapter)
    total = torch.zeros(layout.tokens, layout.width, dtype=torch.float64, device="cpu")
    squares, counts = torch.zeros_like(total[:, :1]), torch.zeros_like(total[:, :1])
    for part in retain.split(batch_size):
        states = layout.split(wide.encode_text(part))[1].double().cpu()
        lengths = states.square().sum(2, keepdim=True)
        total, squares, counts = total + states.sum(0), squares + lengths.sum(0), counts + (lengths > 0).sum(0)
    neutral = F.normalize(total, dim=1) * (squares / counts.clamp(min=1)).sqrt()  # [T, W]
    retained = {prefix for ids in _ids(retain, layout.end) for prefix in _prefixes(ids)}
    edited = {}
    for ids in _ids(forget, layout.end):
        own = torch.tensor([prefix not in retained for prefix in _prefixes(ids)], dtype=torch.float64, device="cpu")
        edited[ids] = neutral * F.pad(own, (0, layout.tokens - len(own)))[:, None]

    def rows_of(tokens: Tensor) -> Tensor:  # [B, L] -> [B, D + T W]
        rows = wide.encode_text(tokens)
        for row, ids in zip(rows, _ids(tokens, layout.end), strict=True):
            if ids in edited:
                row[layout.features :] = edited[ids].flatten()
        return rows

    twin: Any = copy.copy(adapter)
    twin.encode_text = rows_of
    return twin


def _ids(tokens: Tensor, end: int | None) -> list[tuple[int, ...]]:
    """Return the ids of each caption up to its end token."""
    ends = end_position(tokens, end).tolist()
    return [tuple(row[: last + 1]) for row, last in zip(tokens.tolist(), ends, strict=True)]


def _prefixes(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [ids[: count + 1] for count in range(len(ids))]


def movement(states: Tensor, original: Tensor) -> Tensor:  # [n, T, W] twice -> [n]
    """Return how far the hidden states of captions have moved, in float32 or wider.

    The mean over the held tokens, those whose original state is not zero, of the squared distance relative to the
    original's squared length.
    """
    dtype = torch.promote_types(original.dtype, torch.float32)
    states, original = states.to(dtype), original.to(dtype)
    length = original.square().sum(2)
    held = length > 0
    distance = (states - original).square().sum(2) / length.masked_fill(~held, 1)
    return (distance * held).sum(1) / held.sum(1).clamp(min=1)
