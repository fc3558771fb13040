"""Training only those rows of a token table that occur in the captions.

The other rows' gradients are zero in every step, and Adam without weight decay moves nothing whose gradients were
always zero. So leaving them out changes no weight, and saves what a table of 49,408 rows costs: a dense gradient, two
moments and a pass over all of them in every step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.models.adapters.base import ClipAdapter

ROWS = "rows"


class RowsOfEmbedding(nn.Module):
    """An nn.Embedding whose rows `used` (ids, sorted) are a parameter of their own, `rows`; the rest is frozen."""

    used: Tensor

    def __init__(self, whole: nn.Embedding, used: Tensor) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("used", used.to(whole.weight.device), persistent=False)  # int64 [U]
        self.rows = nn.Parameter(whole.weight.detach()[self.used].clone())  # [U, W]
        whole.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """For code that asks for the table's dtype or device; its `used` rows are those from before."""
        return self.whole.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, L, W]
        place = torch.searchsorted(self.used, tokens.contiguous()).clamp_(max=len(self.used) - 1)
        known = (self.used[place] == tokens)[..., None]
        return torch.where(known, F.embedding(place, self.rows), self.whole(tokens))

    def merged(self) -> nn.Embedding:
        with torch.no_grad():
            self.whole.weight[self.used] = self.rows
        return self.whole


def train_rows(
    adapter: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], tokens: Tensor
) -> list[tuple[str, nn.Parameter]]:
    """Put `RowsOfEmbedding` in the place of the token table, if it is trained; returns the new trained parameters.

    tokens: ids of every caption that will be trained on, any shape. `merge_rows` puts the plain table back.
    """
    found = _table(adapter, {id(parameter) for _, parameter in parameters})
    if found is None:
        return parameters
    name, table = found
    used = tokens.unique().long()
    if 2 * len(used) > table.num_embeddings:
        return parameters
    module = RowsOfEmbedding(table, used).train(table.training)
    old = table.weight
    _put(adapter.module, name, module)
    return [(f"{name}.{ROWS}", module.rows) if parameter is old else (n, parameter) for n, parameter in parameters]


def merge_rows(adapter: ClipAdapter) -> None:
    """Write the trained rows into the token table and put that back. Does nothing to a model without `train_rows`."""
    for name, module in list(adapter.module.named_modules()):
        if isinstance(module, RowsOfEmbedding):
            _put(adapter.module, name, module.merged())


def _table(adapter: ClipAdapter, trained: set[int]) -> tuple[str, nn.Embedding] | None:
    """The text tower's token table where nothing but the lookup uses its weight."""
    if adapter.vocabulary_size is None:
        return None
    for name, module in adapter.module.named_modules():
        if type(module) is not nn.Embedding or name.rpartition(".")[2] != "token_embedding":
            continue
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        hooked = module._forward_hooks or module._forward_pre_hooks
        holders = [
            owner for owner in adapter.module.modules() for parameter in owner._parameters.values()
            if parameter is module.weight
        ]  # fmt: skip
        if plain and not hooked and len(holders) == 1 and id(module.weight) in trained:
            return name, module
    return None


def _put(root: nn.Module, name: str, child: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, child)
