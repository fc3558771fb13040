"""Train only those rows of a token embedding that occur in the captions.

The other rows have zero gradients in every step, and Adam without weight decay does not move a weight whose gradients
were always zero. So leaving them out changes no weight, and saves the cost of a table of 49,408 rows: a dense gradient,
two moments and a pass over all of them in every step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.models.adapters.base import ClipAdapter

ROWS = "rows"


class RowsOfEmbedding(nn.Module):
    """An nn.Embedding whose rows `used` (sorted ids) are a separate parameter, `rows`; the other rows are frozen."""

    used: Tensor

    def __init__(self, whole: nn.Embedding, used: Tensor) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("used", used.to(whole.weight.device), persistent=False)  # int64 [U]
        self.rows = nn.Parameter(whole.weight.detach()[self.used].clone())  # [U, W]
        whole.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The table, for code that needs its dtype or device; its `used` rows are not up to date."""
        return self.whole.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, L, W]
        place = torch.searchsorted(self.used, tokens.contiguous()).clamp_(max=len(self.used) - 1)
        known = (self.used[place] == tokens)[..., None]
        return torch.where(known, F.embedding(place, self.rows), self.whole(tokens))

    def merged(self) -> nn.Embedding:
        """Return the whole table with the trained rows written into it."""
        with torch.no_grad():
            self.whole.weight[self.used] = self.rows
        return self.whole


def train_rows(
    adapter: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], tokens: Tensor
) -> list[tuple[str, nn.Parameter]]:
    """Replace a trained token embedding with `RowsOfEmbedding`; return the new list of trained parameters.

    tokens: the ids of all training captions, any shape. `merge_rows` restores the plain embedding.
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
    adapter.module.set_submodule(name, module)
    return [(f"{name}.{ROWS}", module.rows) if parameter is old else (n, parameter) for n, parameter in parameters]


def merge_rows(adapter: ClipAdapter) -> None:
    """Undo `train_rows`: write the trained rows into the token embedding and restore it."""
    for name, module in list(adapter.module.named_modules()):
        if isinstance(module, RowsOfEmbedding):
            adapter.module.set_submodule(name, module.merged())


def _table(adapter: ClipAdapter, trained: set[int]) -> tuple[str, nn.Embedding] | None:
    """Return the text tower's token embedding if only the lookup uses its weight, else None."""
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
